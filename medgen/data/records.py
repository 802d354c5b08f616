"""What one chest X-ray with its report is on disk, and the manifest (Parquet or JSONL) that lists them.

A manifest is the only thing the rest of medgen reads: every data set, real or digital, becomes one. It is validated on read
and on write; an error names file, row, column and what was expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, TypeAdapter, ValidationError

SCHEMA_VERSION = 1
FINDINGS = (
    "pleural_effusion",
    "pneumothorax",
    "consolidation",
    "nodule",
    "cardiomegaly",
    "edema",
    "atelectasis",
    "hyperinflation",
)
Finding = Literal[
    "pleural_effusion", "pneumothorax", "consolidation", "nodule", "cardiomegaly", "edema", "atelectasis", "hyperinflation"
]
State = Literal["present", "absent", "uncertain"]
Side = Literal["left", "right", "bilateral"]
View = Literal["PA", "AP", "LATERAL", "UNKNOWN"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class ManifestError(ValueError):
    """A manifest or record that cannot be used; the message says which file, row and column, and what was expected."""


@dataclass(frozen=True)
class FindingLabel:
    """One finding as a report states it. `size` is the report's own word ("small", "12 mm")."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: Finding
    state: State
    side: Side | None = None
    size: str | None = None


@dataclass(frozen=True)
class CXRRecord:
    """One image of one study. `image` is a POSIX path relative to the manifest's folder; `age` is in years; `study_date` is ISO.

    `truth` holds numeric truth (digital patients only) and `extra` whatever else the data set says; both must be JSON values.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    record_id: str
    patient_id: str
    study_id: str
    image: str
    view: View
    findings: str
    impression: str
    split: Split
    labels: tuple[FindingLabel, ...] = ()
    age: float | None = None
    sex: Literal["F", "M"] | None = None
    study_date: str | None = None
    truth: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """Records of one data set, with the folder their images lie below. `sha256` is that of the manifest file."""

    records: tuple[CXRRecord, ...]
    root: Path
    name: str
    source: str
    schema_version: int
    sha256: str

    def __len__(self) -> int:
        return len(self.records)

    def image_path(self, record: CXRRecord) -> Path:
        """Where the image of `record` lies; `read_manifest` has checked that it is below `root`."""
        return self.root / record.image


COLUMNS = tuple(column.name for column in dataclasses.fields(CXRRecord))
_LABEL = pa.struct([(column.name, pa.string()) for column in dataclasses.fields(FindingLabel)])
_ARROW = pa.schema(
    [(c, {"labels": pa.list_(_LABEL), "age": pa.float64()}.get(c, pa.string())) for c in COLUMNS]  # truth, extra: JSON text
)
_RECORD = TypeAdapter(CXRRecord)


def write_manifest(records: Iterable[CXRRecord], path: str | Path, *, name: str, source: str) -> Path:
    """Write `records` to `path` (.parquet or .jsonl) in one atomic step and return the path.

    `name` is what the data set is called, `source` how it was made (a builder's or generator's name and options).
    Raises `ManifestError` if a record is invalid, a record id repeats, or a patient is in two splits.
    """
    path = Path(path)
    rows = [dataclasses.asdict(record) for record in records]
    _records(rows, path)
    header = {"medgen_manifest": SCHEMA_VERSION, "name": name, "source": source}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".parquet":
            packed = [{**row, "truth": json.dumps(row["truth"]), "extra": json.dumps(row["extra"])} for row in rows]
            metadata = {key: str(value) for key, value in header.items()}
            pq.write_table(pa.Table.from_pylist(packed, schema=_ARROW.with_metadata(metadata)), temporary)
        elif path.suffix == ".jsonl":
            temporary.write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]), encoding="utf-8")
        else:
            raise ManifestError(f"{path}: a manifest ends in .parquet or .jsonl, not {path.suffix!r}")
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_manifest(path: str | Path, split: Split | None = None) -> Manifest:
    """Read and validate a manifest; `split` keeps only that split's records (an empty result is an error).

    Raises `ManifestError` naming file, row (counted from 1), column and what was expected.
    """
    path = Path(path)
    if split is not None and split not in SPLITS:
        raise ManifestError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if not path.is_file():
        raise ManifestError(f"no manifest at {path}; `medgen data build` or `medgen digital chest` writes one")
    content = path.read_bytes()
    if path.suffix == ".parquet":
        header, rows = _read_parquet(path)
    elif path.suffix == ".jsonl":
        header, rows = _read_jsonl(path, content)
    else:
        raise ManifestError(f"{path}: a manifest ends in .parquet or .jsonl, not {path.suffix!r}")
    version = header.get("medgen_manifest")
    if str(version) != str(SCHEMA_VERSION):
        found = "no schema version" if version is None else f"schema version {version}"
        raise ManifestError(f"{path}: {found}; this medgen reads version {SCHEMA_VERSION}: build the manifest again")
    records = _records(rows, path)
    if split is not None:
        kept = [record for record in records if record.split == split]
        if not kept:
            raise ManifestError(f"{path}: none of its {len(records)} records is in split {split!r}")
        records = kept
    digest = hashlib.sha256(content).hexdigest()
    return Manifest(tuple(records), path.parent, str(header["name"]), str(header["source"]), SCHEMA_VERSION, digest)


def _read_parquet(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{path} is not a readable Parquet file: {error}") from None
    _check_columns(table.column_names, path)
    rows = table.to_pylist()
    for number, row in enumerate(rows, 1):
        for column in ("truth", "extra"):
            try:
                row[column] = json.loads(row[column])
            except (TypeError, ValueError):
                raise ManifestError(f"{path}, row {number}, column {column!r}: expected JSON, got {row[column]!r}") from None
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}, rows


def _read_jsonl(path: Path, content: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 0):
        try:
            lines.append(json.loads(line))
        except ValueError:
            where = f"row {number}" if number else "the header"
            raise ManifestError(f"{path}, {where}: not a JSON object: {line[:80]!r}") from None
    header, rows = (lines[0], lines[1:]) if lines else ({}, [])
    if not isinstance(header, dict) or "medgen_manifest" not in header:
        raise ManifestError(f'{path}: the first line must be a header like {{"medgen_manifest": 1, "name": ..., "source": ...}}')
    return header, rows


def _check_columns(columns: Sequence[str], path: Path) -> None:
    missing, unknown = set(COLUMNS) - set(columns), set(columns) - set(COLUMNS)
    if missing or unknown:
        said = [f"missing columns {sorted(missing)}"] * bool(missing) + [f"unknown columns {sorted(unknown)}"] * bool(unknown)
        raise ManifestError(f"{path}: {' and '.join(said)}; expected {', '.join(COLUMNS)}")


def _records(rows: list[dict[str, Any]], path: Path) -> list[CXRRecord]:
    """Validated records; also that ids are unique and no patient is in two splits."""
    records: list[CXRRecord] = []
    seen: dict[str, int] = {}
    split_of: dict[str, Split] = {}
    for number, row in enumerate(rows, 1):
        try:
            record = _RECORD.validate_python(row)
        except ValidationError as error:
            raise ManifestError(_explain(error, path, number)) from None
        for column, expected in _problems(record):
            raise ManifestError(f"{path}, row {number}, column {column!r}: expected {expected}, got {getattr(record, column)!r}")
        if record.record_id in seen:
            raise ManifestError(
                f"{path}, row {number}, column 'record_id': {record.record_id!r} is also row {seen[record.record_id]}"
            )
        seen[record.record_id] = number
        if split_of.setdefault(record.patient_id, record.split) != record.split:
            raise ManifestError(
                f"{path}, row {number}, column 'split': patient {record.patient_id!r} is in {record.split!r} here and in "
                f"{split_of[record.patient_id]!r} above; split by patient"
            )
        records.append(record)
    if not records:
        raise ManifestError(f"{path}: no records")
    return records


def _problems(record: CXRRecord) -> Iterable[tuple[str, str]]:
    if not _ID.fullmatch(record.record_id):
        yield "record_id", "letters, digits and . _ - (it becomes a file name)"
    for column in ("patient_id", "study_id"):
        if not getattr(record, column):
            yield column, "a name that is not empty"
    image = PurePosixPath(record.image)
    if not record.image or image.is_absolute() or ".." in image.parts or "\\" in record.image or ":" in image.parts[0]:
        yield "image", "a POSIX path below the manifest's folder"
    if record.age is not None and not 0 <= record.age <= 130:
        yield "age", "years from 0 to 130"
    if record.study_date is not None:
        try:
            iso = date.fromisoformat(record.study_date).isoformat() == record.study_date
        except ValueError:
            iso = False
        if not iso:
            yield "study_date", "an ISO date such as 2180-05-06"


def _explain(error: ValidationError, path: Path, number: int) -> str:
    problem = error.errors()[0]
    column = ".".join(str(part) for part in problem["loc"]) or "(whole row)"
    if problem["type"] in ("missing", "unexpected_keyword_argument"):
        what = "missing" if problem["type"] == "missing" else "unknown"
        return f"{path}, row {number}: {what} column {column!r}; expected {', '.join(COLUMNS)}"
    return f"{path}, row {number}, column {column!r}: {problem['msg'].lower()}, got {problem['input']!r}"
