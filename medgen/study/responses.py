"""Readers' answers from CSV files, trusted only after they have been checked against the pack they claim to come from.

Whatever is wrong is refused with its file and row, all problems at once. What is harmless is put right and said: an exported file that
repeats rows of another one. Text from readers stays text: it is escaped where it is shown, and cannot become a formula in a spreadsheet.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

COLUMNS = (
    "study_id", "pack_sha256", "reader", "session", "position", "item", "task", "question",
    "answer", "confidence", "ms", "viewer_version", "timestamp",
)  # fmt: skip
LARGEST_BYTES = 256 * 1024**2
LONGEST_ANSWER = 20_000
SUREST = 100  # no confidence scale is longer; what lies above was not asked
SHOWN_PROBLEMS = 20
STUDY = re.compile(r'<script[^>]*\bid="study"[^>]*>(?P<json>.*?)</script>', re.DOTALL)  # the study's data in a pack's page


class ResponseError(ValueError):
    """Answers, a key or a pack that cannot be analysed; one line per problem, each with its file and row."""


@dataclass(frozen=True)
class Pack:
    """What the pack's page holds: items and their questions, and each reader's order of items."""

    folder: Path
    study_id: str
    title: str
    sha256: str
    items: Mapping[str, Mapping[str, Any]]
    orders: Mapping[str, tuple[str, ...]]
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """One answered question. `value` is a number (scale, number), an option or text, or a list (order, points)."""

    reader: str
    session: str
    position: int
    item: str
    task: str
    question: str
    value: Any
    confidence: float | None
    ms: int
    timestamp: str
    file: str
    row: int


def read_pack(folder: Path) -> Pack:
    """The pack's study data, after its files have been checked against SHA256SUMS.

    Raises `ResponseError` if a file was changed, is missing, or the page holds no study.
    """
    folder = Path(folder)
    page = folder / "index.html"
    if not page.is_file():
        raise ResponseError(f"{folder} is not a pack: it has no index.html; give the folder that `medgen study build` wrote")
    _check_sums(folder)
    found = STUDY.search(page.read_text("utf-8"))
    if found is None:
        raise ResponseError(f'{page}: no <script id="study"> in it; build the pack again')
    study = json.loads(found["json"])
    protocol = json.loads((folder / "protocol.json").read_text("utf-8")) if (folder / "protocol.json").is_file() else {}
    orders = {reader: tuple(entry["order"]) for reader, entry in study["readers"].items()}
    return Pack(folder, study["study_id"], study["title"], study["pack_sha256"], study["items"], orders, protocol)


def _check_sums(folder: Path) -> None:
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        raise ResponseError(f"{folder} has no SHA256SUMS: it cannot be shown to be the pack that was read; build it again")
    for line in sums.read_text("utf-8").splitlines():
        expected, _, name = line.partition("  ")
        path = (folder / name.strip()).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ResponseError(f"{sums}: {name!r} leaves the pack")
        if not path.is_file():
            raise ResponseError(f"{path} is listed in SHA256SUMS but missing: use the whole pack as it was built")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ResponseError(f"{path} was changed after the pack was built (its SHA-256 is not that in SHA256SUMS)")


def commitment(key: Mapping[str, Any]) -> str:
    """The salted SHA-256 that the pack holds of its key: of the salt, then of the items as sorted JSON."""
    text = json.dumps(key["items"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(f"{key['salt']}\n{text}".encode()).hexdigest()


def read_key(path: Path, pack: Pack) -> dict[str, dict[str, Any]]:
    """What every item truly is. Raises `ResponseError` unless it is this pack's key, unchanged since the pack was built."""
    try:
        key = json.loads(Path(path).read_text("utf-8"))
        study_id, of_pack, items = key["study_id"], key["pack_sha256"], key["items"]
        found = commitment(key)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ResponseError(f"{path} is not an answer key ({error!r}); give the .key.json written beside the pack") from None
    if study_id != pack.study_id or of_pack != pack.sha256:
        raise ResponseError(
            f"{path} is the key of another pack: study {study_id!r}, pack {str(of_pack)[:12]}…; "
            f"{pack.folder} is study {pack.study_id!r}, pack {pack.sha256[:12]}…"
        )
    promised = json.loads((pack.folder / "key_commitment.json").read_text("utf-8"))["salted_sha256"]
    if found != promised:
        raise ResponseError(f"{path} is not the key that this pack was built with: its salted SHA-256 differs from the pack's")
    if missing := [item for item in pack.items if item not in items]:
        raise ResponseError(f"{path} lacks {len(missing)} items of the pack, for example {missing[0]}")
    return dict(items)


def read_responses(files: Sequence[Path], pack: Pack) -> tuple[list[Answer], list[str]]:
    """All answers of all files with notes on what was put right; `ResponseError` names every row that cannot be used.

    Refused: wrong columns, another study or pack, readers, items or questions the pack does not have, a place in the order that is
    not the reader's, answers a question does not allow, two answers to one question, mixed viewer versions.
    """
    if not files:
        raise ResponseError("no response files given; name the CSV files that the readers saved")
    problems: list[str] = []
    notes: list[str] = []
    answers: dict[tuple[str, str, str], Answer] = {}
    versions: dict[str, str] = {}
    for file in files:
        repeated = 0
        for number, row in _rows(Path(file), problems):
            where = f"{file}, row {number}"
            try:
                answer = read_answer(row, pack, str(file), number)
            except ResponseError as error:
                problems.append(f"{where}: {error}")
                continue
            versions.setdefault(row["viewer_version"], where)
            place = (answer.reader, answer.item, answer.question)
            if place not in answers:
                answers[place] = answer
            elif _same(answers[place], answer):
                repeated += 1
            else:
                first = answers[place]
                problems.append(
                    f"{where}: reader {answer.reader!r} already answered {answer.question!r} of item {answer.item} in "
                    f"{first.file}, row {first.row}, differently; keep one file per reader"
                )
        if repeated:
            notes.append(f"{file}: {repeated} rows repeat answers already read, word for word; counted once")
    if len(versions) > 1:
        listed = ", ".join(f"{version!r} (first in {where})" for version, where in versions.items())
        problems.append(f"answers from different viewer versions: {listed}; all readers must read with the same page")
    if problems:
        rest = len(problems) - SHOWN_PROBLEMS
        lines = problems[:SHOWN_PROBLEMS] + ([f"and {rest} more"] if rest > 0 else [])
        raise ResponseError("\n".join(lines))
    if not answers:
        raise ResponseError(f"no answers in {', '.join(map(str, files))}")
    return list(answers.values()), notes


def _rows(file: Path, problems: list[str]) -> Iterable[tuple[int, dict[str, str]]]:
    if not file.is_file():
        raise ResponseError(f"no response file at {file}")
    if file.stat().st_size > LARGEST_BYTES:
        raise ResponseError(f"{file} has {file.stat().st_size} bytes; a response file has a few MB")
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ResponseError(
            f"{file} is not UTF-8 text: use the CSV as the reader saved it, not one saved by a spreadsheet"
        ) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if sorted(header) != sorted(COLUMNS):
            lacking = ", ".join(sorted(set(COLUMNS) - set(header))) or "none"
            extra = ", ".join(sorted(set(header) - set(COLUMNS))) or "none"
            problems.append(f"{file}, row 1: not the columns of a response file (lacking: {lacking}; unknown: {extra})")
            return
        for number, cells in enumerate(reader, 2):
            if not cells:
                continue
            if len(cells) != len(header):
                problems.append(f"{file}, row {number}: {len(cells)} cells instead of {len(header)}")
                continue
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        problems.append(f"{file}, row {reader.line_num}: not readable as CSV ({error})")


def read_answer(row: Mapping[str, str], pack: Pack, file: str, number: int) -> Answer:
    """One row (all `COLUMNS`, as text), checked against the pack: what the analysis refuses, the server refuses with the same words."""
    if row["study_id"] != pack.study_id:
        raise ResponseError(f"study {row['study_id']!r}, but the pack is of study {pack.study_id!r}")
    if row["pack_sha256"] != pack.sha256:
        raise ResponseError(
            f"answered in pack {row['pack_sha256'][:12]!r}…, not in this one ({pack.sha256[:12]}…), or edited since"
        )
    if row["reader"] not in pack.orders:
        raise ResponseError(f"unknown reader {row['reader']!r}; the pack has {', '.join(pack.orders)}")
    if row["item"] not in pack.items:
        raise ResponseError(f"unknown item {row['item']!r}")
    item = pack.items[row["item"]]
    if row["task"] != item["task"]:
        raise ResponseError(f"item {row['item']} is of task {item['task']!r}, not {row['task']!r}")
    position = _whole(row["position"], "position")
    order = pack.orders[row["reader"]]
    if row["item"] not in order:
        raise ResponseError(f"item {row['item']} is not among those of reader {row['reader']!r}")
    if position != order.index(row["item"]):
        raise ResponseError(
            f"item {row['item']} stands at position {order.index(row['item'])} in the order of reader {row['reader']!r}, not {position}"
        )
    question = next((q for q in item["questions"] if q["id"] == row["question"]), None)
    if question is None:
        raise ResponseError(f"item {row['item']} has no question {row['question']!r}")
    try:
        datetime.fromisoformat(row["timestamp"].replace("Z", "+00:00"))
    except ValueError:
        raise ResponseError(f"timestamp {row['timestamp']!r} is not an ISO date and time") from None
    confidence = None if row["confidence"] == "" else _number(row["confidence"], "confidence")
    if confidence is not None and not 0 <= confidence <= SUREST:
        raise ResponseError(f"confidence {row['confidence']!r} is on no scale (0 to {SUREST})")
    return Answer(
        row["reader"], row["session"], position, row["item"], row["task"], row["question"], _value(row["answer"], question),
        confidence, _whole(row["ms"], "ms"), row["timestamp"], file, number,
    )  # fmt: skip


def _value(text: str, question: Mapping[str, Any]) -> Any:
    """The answer as its kind of question means it."""
    if len(text) > LONGEST_ANSWER:
        raise ResponseError(f"the answer to {question['id']!r} has {len(text)} characters; at most {LONGEST_ANSWER} are read")
    kind = question["kind"]
    if kind in ("scale", "number"):
        number = _number(text, f"answer to {question['id']!r}")
        low, high = question.get("min", -math.inf), question.get("max", math.inf)
        if not low <= number <= high or (kind == "scale" and number != int(number)):
            raise ResponseError(f"answer {text!r} to {question['id']!r} is not on its scale ({low} to {high})")
        return number
    if kind == "choice":
        allowed = option_values(question)
        if text not in allowed:
            raise ResponseError(f"answer {text!r} to {question['id']!r} is none of its options ({', '.join(allowed)})")
        return text
    if kind in ("order", "points"):
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, list):
            raise ResponseError(f"answer {text[:60]!r} to {question['id']!r} is not a list")
        return values
    return text.replace("\x00", "")


def option_values(question: Mapping[str, Any]) -> list[str]:
    """What a choice may answer: options are words, or {"value", "label"}."""
    return [str(option["value"]) if isinstance(option, dict) else str(option) for option in question.get("options") or []]


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ResponseError(f"{name} {text!r} is not a number")
    return number


def _whole(text: str, name: str) -> int:
    if not re.fullmatch(r"\d{1,12}", text):
        raise ResponseError(f"{name} {text!r} is not a whole number of at least 0")
    return int(text)


def _same(first: Answer, second: Answer) -> bool:
    return (first.value, first.confidence, first.timestamp) == (second.value, second.confidence, second.timestamp)


def safe_cell(value: object) -> str:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets an apostrophe (OWASP: CSV injection)."""
    text = "" if value is None else str(value)
    if text[:1] in ("=", "+", "-", "@", "\t", "\r") and not _is_number(text):
        return "'" + text
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV whose every cell is safe to open in a spreadsheet."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([safe_cell(cell) for cell in row] for row in rows)
