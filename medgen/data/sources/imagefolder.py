"""Hugging Face ImageFolder: metadata.jsonl or metadata.csv with `file_name` and the text, at the root or per split folder.

The text is a column `text` (or caption, prompt, report) or `findings` / `impression`; `patient_id`, `study_id`, `view`, `age`, `sex`
and `split` are taken if they are there. medgen's own samples (metadata.jsonl beside the images) are read the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medgen.data.records import CXRRecord, Split
from medgen.data.report_labels import label_text
from medgen.data.report_text import sections
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_age,
    as_id,
    as_sex,
    as_view,
    hashed_split,
    read_rows,
)

_TEXT = ("text", "caption", "prompt", "report", "additional_feature")
_SPLITS: Mapping[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "validate": "val", "test": "test",
}  # fmt: skip


def records(root: Path, options: SourceOptions) -> Records:
    """Every row; a view that is not named is unknown and never filtered, a split that is not named is hashed by patient."""
    tables = sorted([*root.glob("metadata.*"), *root.glob("*/metadata.*")])
    tables = [path for path in tables if path.suffix in (".jsonl", ".csv")]
    if not tables:
        raise SourceError(f"{root} holds no metadata.jsonl or metadata.csv (at its root or in train/, validation/, test/)")
    for table in tables:
        folder = table.parent.relative_to(root)
        for number, row in enumerate(_rows(table), 1):
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                yield Quarantined(
                    f"{as_id(folder.name or root.name)}-row-{number}", f"{table.name} row {number} has no file_name"
                )
                continue
            record = _record((folder / name).as_posix(), folder.name, row, options)
            if record.view == "UNKNOWN" or record.view in options.views:
                yield record


def _rows(table: Path) -> Iterator[Mapping[str, Any]]:
    if table.suffix == ".csv":
        yield from read_rows(table, ["file_name"])
        return
    with table.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise SourceError(f"{table}, line {number}: not a JSON object: {line[:80]!r}") from None
            if not isinstance(row, dict):
                raise SourceError(f"{table}, line {number}: expected an object with file_name, not a {type(row).__name__}")
            yield row


def _record(image: str, folder: str, row: Mapping[str, Any], options: SourceOptions) -> CXRRecord:
    text = next((str(row[name]) for name in _TEXT if row.get(name)), "")
    found = {"findings": str(row.get("findings") or ""), "impression": str(row.get("impression") or "")}
    if not any(found.values()):
        found = {"findings": "", "impression": ""} | (sections(text) if text.strip() else {})
    identity = as_id(image.rpartition(".")[0] or image)
    patient = str(row.get("patient_id") or row.get("subject_id") or row.get("case_id") or identity)
    named = str(row.get("split") or folder).lower()
    return CXRRecord(
        record_id=identity,
        patient_id=patient,
        study_id=str(row.get("study_id") or identity),
        image=image,
        view=as_view(str(row.get("view") or row.get("view_position") or "")),
        findings=found["findings"],
        impression=found["impression"],
        split=_SPLITS.get(named) or hashed_split(patient, options),
        labels=label_text(f"{found['findings']}\n\n{found['impression']}"),
        age=as_age(str(row.get("age") or "")),
        sex=as_sex(str(row.get("sex") or row.get("gender") or "")),
    )
