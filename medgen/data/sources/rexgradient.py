"""ReXGradient-160K: metadata/{train,valid,test}_metadata.csv or metadata/{train,valid,test}_metadata_view_position.json.

The JSON is a dictionary by study id ("<patient>_<...>") with Findings, Impression, Indication, Comparison, StudyInstanceUid and two
parallel lists, ImagePath (beginning with "../") and ImageViewPosition (words such as "POSTERO_ANTERIOR"; null occurs). The CSV has
the reports by `id`, and patient columns that the JSON lacks; where there is only the CSV, its lists are text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medgen.data.records import CXRRecord, Split
from medgen.data.report_labels import label_text
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_age,
    as_date,
    as_id,
    as_sex,
    as_view,
    read_rows,
)

_SPLITS: Mapping[str, Split] = {"train": "train", "valid": "val", "test": "test"}


def records(root: Path, options: SourceOptions) -> Records:
    """Every film of a wanted view with its study's report; the official split."""
    folder = root / "metadata" if (root / "metadata").is_dir() else root
    found = False
    for name, split in _SPLITS.items():
        for study_id, study in _studies(folder, name):
            found = True
            yield from _films(study_id, study, split, options)
    if not found:
        raise SourceError(f"{folder} holds no train_metadata.csv or train_metadata_view_position.json (nor valid, test)")


def _studies(folder: Path, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    table, views = folder / f"{split}_metadata.csv", sorted(folder.glob(f"{split}_*view_position.json"))
    rows = (
        {row.get("id") or row.get("StudyInstanceUid", ""): row for row in read_rows(table, ["Findings"])}
        if table.is_file()
        else {}
    )
    if not views:
        for study_id, row in rows.items():
            lists = {name: _list(row.get(name, "")) for name in ("ImagePath", "ImageViewPosition")}
            yield study_id, {**row, **lists}
        return
    try:
        studies = json.loads(views[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{views[0]} is not JSON (cut off?): {error}") from None
    if not isinstance(studies, dict):
        raise SourceError(f"{views[0]} must be a dictionary by study id, not a {type(studies).__name__}")
    for study_id, study in studies.items():
        yield study_id, {**rows.get(study_id, {}), **study}


def _list(text: str) -> list[str]:
    """A Python or JSON list written as text; a bare path is a list of one."""
    try:
        value = ast.literal_eval(text) if text.startswith("[") else [text] if text else []
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in value]


def _films(study_id: str, study: Mapping[str, Any], split: Split, options: SourceOptions) -> Records:
    paths, views = study.get("ImagePath"), study.get("ImageViewPosition") or []
    if not isinstance(paths, list) or not paths or (views and len(views) != len(paths)):
        count = len(paths) if isinstance(paths, list) else "no"
        yield Quarantined(as_id(study_id), f"study {study_id!r} has {count} ImagePath entries and {len(views)} views")
        return
    findings, impression = (str(study.get(name) or "") for name in ("Findings", "Impression"))
    labels = label_text(f"{findings}\n\n{impression}")
    patient = str(study.get("PatientID") or study_id.partition("_")[0])
    for path, position in zip(paths, views or [""] * len(paths), strict=True):
        view = as_view(str(position or ""))
        if view not in options.views:
            continue
        image = str(path).replace("\\", "/")
        while image.startswith(("../", "./")):
            image = image.partition("/")[2]
        yield CXRRecord(
            record_id=as_id(image.rpartition(".")[0] or image),
            patient_id=patient,
            study_id=study_id,
            image=image,
            view=view,
            findings=findings,
            impression=impression,
            split=split,
            labels=labels,
            age=as_age(str(study.get("PatientAge") or "")),
            sex=as_sex(str(study.get("PatientSex") or "")),
            study_date=as_date(str(study.get("StudyDate") or "")),
            extra={
                "indication": str(study.get("Indication") or ""),
                "study_instance_uid": str(study.get("StudyInstanceUid") or ""),
            },
        )
