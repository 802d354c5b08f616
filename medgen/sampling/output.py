"""The folder a sampler writes: every file whole or absent, resumable after a kill, shared by shards, the same whatever their number.

While sampling: finished files, one `.metadata-<i>-of-<n>.jsonl` per shard, and what was asked (`sampling.json`, `cases.jsonl`).
When the last trajectory is there, the shard that sees it merges the parts, in the order of the cases, into `metadata.jsonl`.
Where gates reject attempts, one line of each goes the same way into `rejected.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

METADATA, SETTINGS, CASES, REJECTED = "metadata.jsonl", "sampling.json", "cases.jsonl", "rejected.jsonl"
_FILES = {"file_name", "frames_file"}  # what a line promises to lie beside it, and the list `files`


class OutputError(ValueError):
    """An output folder that cannot be used or written; the message says which file, why, and what to do."""


class OutputFolder:
    """One sampling request's folder, used by one shard: `claim` it, `write` what is not in `finished`, then `merge`."""

    def __init__(self, path: str | Path, part: str = "0-of-1") -> None:
        self.path = Path(path)
        self._part = self.path / f".metadata-{part}.jsonl"
        self._rejected_part = self.path / f".rejected-{part}.jsonl"

    def claim(self, settings: Mapping[str, Any], cases: str) -> None:
        """Make the folder for exactly these settings and cases (JSON lines), or check that it was made for them.

        Raises `OutputError` naming what differs.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {self.path}: {error.strerror}; choose another --out") from None
        if not (self.path / SETTINGS).exists():
            if (self.path / METADATA).exists():
                raise OutputError(f"{self.path} holds a {METADATA} that no sampler of medgen wrote; choose another --out")
            # sampling.json comes last: a folder that has it has both. Shards that race write the same bytes.
            self._write_whole(CASES, cases.encode())
            self._write_whole(SETTINGS, json.dumps(settings, indent=2).encode())
        try:
            before = json.loads((self.path / SETTINGS).read_text())
        except ValueError:
            raise OutputError(f"{self.path / SETTINGS} is damaged; choose another --out") from None
        differing = [
            f"  {key}: {before.get(key)!r} there, {settings.get(key)!r} now"
            for key in {**before, **settings}
            if before.get(key) != settings.get(key)
        ]
        differing += _differing_cases((self.path / CASES).read_text(), cases)
        if differing:
            raise OutputError(
                f"{self.path} holds samples of another request:\n"
                + "\n".join(differing)
                + "\nChoose another --out, or take these values back to continue it"
            )
        self._repair()

    def finished(self) -> dict[str, dict[str, Any]]:
        """Metadata of every trajectory whose files are there, by file name, from all shards."""
        lines: dict[str, dict[str, Any]] = {}
        # Parts before the merged file: if another shard merges meanwhile, what vanishes from the parts is already in it.
        for path in [*sorted(self.path.glob(".metadata-*.jsonl")), self.path / METADATA]:
            lines |= {line["file_name"]: line for line in _read_lines(path)}
        return {name: line for name, line in lines.items() if all((self.path / file).is_file() for file in _promised(line))}

    def write(self, files: Mapping[str, bytes], line: Mapping[str, Any]) -> None:
        """Write one trajectory's files (name -> content), then its metadata line; each is on disk when this returns.

        The line gains `sha256`, by file name: what is exported or shown to readers later can be known to be what was sampled.
        """
        for name, content in files.items():
            self._write_whole(name, content)
        digests = {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}
        self._append(self._part, _json_line({**line, "sha256": digests}))

    def reject(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep a line (`file_name`, `attempt`, why) of every rejected attempt at one trajectory."""
        if lines:
            self._append(self._rejected_part, b"".join(map(_json_line, lines)))

    def rejected(self) -> list[dict[str, Any]]:
        """The line of every rejected attempt, from all shards, each once (a trajectory that a kill cut short is attempted again)."""
        lines: dict[tuple[str, int], dict[str, Any]] = {}
        for path in [*sorted(self.path.glob(".rejected-*.jsonl")), self.path / REJECTED]:
            lines |= {(line["file_name"], line["attempt"]): line for line in _read_lines(path, ("file_name", "attempt"))}
        return list(lines.values())

    def given_up(self, retries: int) -> set[str]:
        """The `file_name` of every trajectory whose last attempt was rejected."""
        return {line["file_name"] for line in self.rejected() if line["attempt"] >= retries}

    def merge(
        self,
        names: Sequence[str],
        summary: Callable[[list[dict[str, Any]]], Mapping[str, bytes]],
        retries: int | None = None,
    ) -> bool:
        """If every file of `names` is there, write `metadata.jsonl` in that order and `summary`'s files; else return False.

        With `retries` (a gated run's) trajectories that were given up may be missing, and `rejected.jsonl` is written, in that order.
        """
        lines = self.finished()
        missing = set() if retries is None else self.given_up(retries) - lines.keys()
        if any(name not in lines and name not in missing for name in names):
            return False
        ordered = [lines[name] for name in names if name in lines]
        content = b"".join(map(_json_line, ordered))
        target = self.path / METADATA
        if retries is not None:
            self._write_rejected(names)
        if not target.exists() or target.read_bytes() != content:
            for name, picture in summary(ordered).items():
                self._write_whole(name, picture)
            self._write_whole(METADATA, content)
        for pattern in (".metadata-*.jsonl", ".rejected-*.jsonl", ".*.tmp"):
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)
        return True

    def _write_rejected(self, names: Sequence[str]) -> None:
        place = {name: number for number, name in enumerate(names)}
        lines = sorted(self.rejected(), key=lambda line: (place[line["file_name"]], line["attempt"]))
        content, target = b"".join(map(_json_line, lines)), self.path / REJECTED
        if not target.exists() or target.read_bytes() != content:
            self._write_whole(REJECTED, content)

    def _repair(self) -> None:
        """Cut a last line that a kill left without its end; its trajectory is sampled again."""
        for part in (self._part, self._rejected_part):
            if part.exists():
                content = part.read_bytes()
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    os.truncate(part, whole)

    def _append(self, part: Path, lines: bytes) -> None:
        try:
            size = part.stat().st_size if part.exists() else 0
            try:
                with part.open("ab") as stream:
                    stream.write(lines)
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError:
                os.truncate(part, size)
                raise
        except OSError as error:
            raise self._unwritable(part, error) from None

    def _write_whole(self, name: str, content: bytes) -> None:
        path = self.path / name
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            try:
                with temporary.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(path, error) from None

    def _unwritable(self, path: Path, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write {path}: {error.strerror}. What was finished is whole; free space or permissions, "
            "then the same command continues"
        )


def _promised(line: Mapping[str, Any]) -> list[str]:
    return [*(line[key] for key in sorted(_FILES & line.keys())), *line.get("files", ())]


def _json_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _read_lines(path: Path, required: Sequence[str] = ("file_name",)) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    # What follows the last line end is a line still being written, or cut by a kill.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            for key in required:
                values[key]
        except (ValueError, KeyError, TypeError):
            raise OutputError(f"{path}, line {number} is damaged; delete that line and run the same command again") from None
        lines.append(values)
    return lines


def _differing_cases(before: str, now: str) -> list[str]:
    """What the first differing case line says, as at most one line of text."""
    if before == now:
        return []
    for number, (there, here) in enumerate(zip_longest(before.splitlines(), now.splitlines()), start=1):
        if there != here:
            old, new = json.loads(there or "{}"), json.loads(here or "{}")
            if not old or not new:
                return [f"  cases: {len(before.splitlines())} there, {len(now.splitlines())} now"]
            key = next((key for key in {**old, **new} if old.get(key) != new.get(key)), "order of fields")
            return [f"  case {number} ({old.get('case_id')!r}), {key}: {old.get(key)!r} there, {new.get(key)!r} now"]
    return []
