"""What one chest X-ray with its report is on disk, and the manifest (Parquet or JSONL) that lists records of one kind.

A manifest is the only thing the rest of medgen reads: every data set, real or digital, becomes one. It is validated on read
and on write; an error names file, row, column and what was expected. Other kinds of record:
`medgen.data.echo_records`, `medgen.data.visit_records`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Generic, Literal, Self, cast, get_args, get_type_hints, overload

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypeVar

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


class Record:
    """What every kind of record has. A kind is a frozen dataclass of text, numbers, JSON values (dict) and tuples of dataclasses.

    `kind` is its name in a manifest's header; `files` are the columns that hold POSIX paths relative to the manifest's folder.
    """

    kind: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    record_id: str
    patient_id: str
    study_id: str
    split: Split

    def below(self, prefix: str) -> Self:
        """The same record with its files named from another folder: `prefix` leads from there to the old one."""
        files = {name: f"{prefix}{value}" for name in self.files if (value := getattr(self, name)) is not None}
        return replace(cast(Any, self), **files)

    def problems(self) -> Iterable[tuple[str, str]]:
        """(column, what was expected) of everything that types alone do not catch; a kind adds its own."""
        if not is_name(self.record_id):
            yield "record_id", "letters, digits and . _ - (it becomes a file name)"
        for column in ("patient_id", "study_id"):
            if not getattr(self, column):
                yield column, "a name that is not empty"
        for column in self.files:
            if (value := getattr(self, column)) is not None and not is_below(value):
                yield column, "a POSIX path below the manifest's folder"
        age = getattr(self, "age", None)
        if age is not None and not 0 <= age <= 130:
            yield "age", "years from 0 to 130"


@dataclass(frozen=True)
class CXRRecord(Record):
    """One image of one study. `image` is a POSIX path relative to the manifest's folder; `age` is in years; `study_date` is ISO.

    `truth` holds numeric truth (digital patients only) and `extra` whatever else the data set says; both must be JSON values.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind = "cxr"
    files = ("image",)
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

    def problems(self) -> Iterable[tuple[str, str]]:
        """Those of every record, and a date that is no ISO date."""
        yield from super().problems()
        if self.study_date is not None:
            try:
                iso = date.fromisoformat(self.study_date).isoformat() == self.study_date
            except ValueError:
                iso = False
            if not iso:
                yield "study_date", "an ISO date such as 2180-05-06"


R = TypeVar("R", bound=Record, default=CXRRecord)


@dataclass(frozen=True)
class Manifest(Generic[R]):
    """Records of one data set, with the folder their files lie below. `sha256` is that of the manifest file."""

    records: tuple[R, ...]
    root: Path
    name: str
    source: str
    schema_version: int
    sha256: str

    def __len__(self) -> int:
        return len(self.records)

    def path(self, relative: str) -> Path:
        """Where a file that a record names lies; `read_manifest` has checked that it is below `root`."""
        return self.root / relative

    def image_path(self: Manifest[CXRRecord], record: CXRRecord) -> Path:
        """Where the image of `record` lies."""
        return self.path(record.image)


@dataclass(frozen=True)
class _Shape:
    """How a kind of record is stored: its columns, those of JSON text, the Parquet schema, and its validator."""

    columns: tuple[str, ...]
    json: tuple[str, ...]
    arrow: Any
    adapter: TypeAdapter[Any]


def _shape(record: type[Record]) -> _Shape:
    hints = get_type_hints(record)
    columns = tuple(column.name for column in dataclasses.fields(record))  # type: ignore[arg-type]
    packed = tuple(name for name in columns if _is_json(hints[name]))
    return _Shape(columns, packed, pa.schema([(c, _arrow(hints[c])) for c in columns]), TypeAdapter(record))


def _is_json(hint: Any) -> bool:
    """Dicts, and tuples of dataclasses that hold more than text."""
    if getattr(hint, "__origin__", None) is dict:
        return True
    inner = (get_args(hint) or (None,))[0]
    if not dataclasses.is_dataclass(inner):
        return False
    kinds = get_type_hints(inner)
    return any(_arrow(kinds[column.name]) != pa.string() or _is_json(kinds[column.name]) for column in dataclasses.fields(inner))


def _arrow(hint: Any) -> Any:
    """The Parquet type of a field: numbers, lists of dataclasses of text, and text (also for JSON)."""
    options = [option for option in (get_args(hint) or (hint,)) if option is not type(None)]
    if options[0] in (float, int):
        return pa.float64() if options[0] is float else pa.int64()
    if isinstance(options[0], int):  # Literal[2, 3]
        return pa.int64()
    if dataclasses.is_dataclass(options[0]) and not _is_json(hint):
        return pa.list_(pa.struct([(column.name, pa.string()) for column in dataclasses.fields(options[0])]))
    return pa.string()


def write_manifest(records: Iterable[Record], path: str | Path, *, name: str, source: str) -> Path:
    """Write `records` (all of one kind) to `path` (.parquet or .jsonl) in one atomic step and return the path.

    `name` is what the data set is called, `source` how it was made (a builder's or generator's name and options).
    Raises `ManifestError` if a record is invalid, a record id repeats, or a patient is in two splits.
    """
    path, records = Path(path), list(records)
    kinds = list(dict.fromkeys(type(record) for record in records))
    if len(kinds) != 1:
        raise ManifestError(f"{path}: " + (f"records of {len(kinds)} kinds in one manifest" if kinds else "no records"))
    rows = [dataclasses.asdict(record) for record in records]  # type: ignore[call-overload]
    _records(rows, path, kinds[0])
    header = {"medgen_manifest": SCHEMA_VERSION, "kind": kinds[0].kind, "name": name, "source": source}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".parquet":
            shape = _shape(kinds[0])
            packed = [{**row, **{column: json.dumps(row[column]) for column in shape.json}} for row in rows]
            metadata = {key: str(value) for key, value in header.items()}
            pq.write_table(pa.Table.from_pylist(packed, schema=shape.arrow.with_metadata(metadata)), temporary)
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


@overload
def read_manifest(path: str | Path, split: Split | None = None) -> Manifest[CXRRecord]: ...


@overload
def read_manifest(path: str | Path, split: Split | None = None, *, record: type[R]) -> Manifest[R]: ...


def read_manifest(path: str | Path, split: Split | None = None, *, record: type[Any] = CXRRecord) -> Manifest[Any]:
    """Read and validate a manifest of `record`s; `split` keeps only that split's (an empty result is an error).

    Raises `ManifestError` naming file, row (counted from 1), column and what was expected.
    """
    path = Path(path)
    if split is not None and split not in SPLITS:
        raise ManifestError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    content = _content(path)
    header, rows = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path, content)
    if (kind := _kind(header)) != record.kind:
        raise ManifestError(f"{path} lists records of kind {kind!r}; expected a manifest of {record.kind!r} records")
    if path.suffix == ".parquet":
        rows = _unpacked(rows, path, _shape(record))
    _check_version(header, path)
    records = _records(rows, path, record)
    if split is not None:
        kept = [item for item in records if item.split == split]
        if not kept:
            raise ManifestError(f"{path}: none of its {len(records)} records is in split {split!r}")
        records = kept
    digest = hashlib.sha256(content).hexdigest()
    return Manifest(tuple(records), path.parent, str(header["name"]), str(header["source"]), SCHEMA_VERSION, digest)


def manifest_kind(path: str | Path) -> str:
    """Which kind of record the manifest at `path` lists, such as "cxr" or "echo". Raises `ManifestError` if it is none."""
    path = Path(path)
    content = _content(path)
    header, _ = _read_parquet(path) if path.suffix == ".parquet" else _read_jsonl(path, content)
    _check_version(header, path)
    return _kind(header)


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise ManifestError(f"no manifest at {path}; `medgen data build` or `medgen digital` writes one")
    if path.suffix not in (".parquet", ".jsonl"):
        raise ManifestError(f"{path}: a manifest ends in .parquet or .jsonl, not {path.suffix!r}")
    return path.read_bytes()


def _kind(header: dict[str, Any]) -> str:
    """The kind of record a header names; the first manifests listed only films and did not say so."""
    return str(header.get("kind", CXRRecord.kind))


def _check_version(header: dict[str, Any], path: Path) -> None:
    version = header.get("medgen_manifest")
    if str(version) != str(SCHEMA_VERSION):
        found = "no schema version" if version is None else f"schema version {version}"
        raise ManifestError(f"{path}: {found}; this medgen reads version {SCHEMA_VERSION}: build the manifest again")


def _read_parquet(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{path} is not a readable Parquet file: {error}") from None
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}, table.to_pylist()


def _unpacked(rows: list[dict[str, Any]], path: Path, shape: _Shape) -> list[dict[str, Any]]:
    """Rows of a Parquet table with their JSON text read."""
    columns, known = list(rows[0]) if rows else shape.columns, shape.columns
    missing, unknown = set(known) - set(columns), set(columns) - set(known)
    if missing or unknown:
        said = [f"missing columns {sorted(missing)}"] * bool(missing) + [f"unknown columns {sorted(unknown)}"] * bool(unknown)
        raise ManifestError(f"{path}: {' and '.join(said)}; expected {', '.join(known)}")
    for number, row in enumerate(rows, 1):
        for column in shape.json:
            try:
                row[column] = json.loads(row[column])
            except (TypeError, ValueError):
                raise ManifestError(f"{path}, row {number}, column {column!r}: expected JSON, got {row[column]!r}") from None
    return rows


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


def _records(rows: list[dict[str, Any]], path: Path, kind: type[Record]) -> list[Record]:
    """Validated records; also that ids are unique and no patient is in two splits."""
    shape = _shape(kind)
    records: list[Record] = []
    seen: dict[str, int] = {}
    split_of: dict[str, Split] = {}
    for number, row in enumerate(rows, 1):
        try:
            record: Record = shape.adapter.validate_python(row)
        except ValidationError as error:
            raise ManifestError(_explain(error, path, number, shape.columns)) from None
        for column, expected in record.problems():
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


def is_name(text: str) -> bool:
    """Whether a name can be a file's on any system: letters, digits and . _ - only."""
    return _ID.fullmatch(text) is not None


def is_below(text: str) -> bool:
    """Whether a POSIX path stays below the folder it is relative to, on any system."""
    path = PurePosixPath(text)
    return bool(text) and not (path.is_absolute() or ".." in path.parts or "\\" in text or ":" in (path.parts or ("",))[0])


def _explain(error: ValidationError, path: Path, number: int, columns: Sequence[str]) -> str:
    problem = error.errors()[0]
    column = ".".join(str(part) for part in problem["loc"]) or "(whole row)"
    if problem["type"] in ("missing", "unexpected_keyword_argument"):
        what = "missing" if problem["type"] == "missing" else "unknown"
        return f"{path}, row {number}: {what} column {column!r}; expected {', '.join(columns)}"
    return f"{path}, row {number}, column {column!r}: {problem['msg'].lower()}, got {problem['input']!r}"
