"""`medgen data build` and `medgen data check`: from a public data set's folder to a manifest that can be trusted, and back.

Every image is opened once: what cannot be read, shows nothing, or has no words is quarantined by name; what is there twice is kept once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from medgen.data.inspection import Inspection, inspect_image, near_duplicates
from medgen.data.records import FINDINGS, SPLITS, CXRRecord, Manifest, ManifestError, View, read_manifest, write_manifest
from medgen.data.report_labels import label_text
from medgen.data.report_text import clean_report
from medgen.data.sources import SOURCES
from medgen.data.sources.base import Quarantined, Records, SourceOptions


class BuildError(ValueError):
    """A manifest that was not written; the message says why."""


@dataclass(frozen=True)
class BuildReport:
    """What `build` did. `quarantined` counts by reason; the names are in `quarantine.jsonl` beside the manifest."""

    manifest: Path
    records: int
    duplicates: int
    quarantined: dict[str, int]

    def __str__(self) -> str:
        held = f", {sum(self.quarantined.values())} quarantined" if self.quarantined else ""
        return f"{self.manifest}: {self.records} records, {self.duplicates} near-duplicates left out{held}"


def build(
    source: Literal["mimic_cxr_jpg", "rexgradient", "chexpert_csv", "chestmnist", "imagefolder", "dicom_folder"],
    root: Path,
    out: Path,
    views: Sequence[View] = ("PA", "AP"),
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    seed: int = 0,
    max_quarantined: float = 0.01,
    duplicates: Literal["perceptual", "exact", "keep"] = "perceptual",
    threads: int | None = None,
) -> BuildReport:
    """Write the manifest of a public data set.

    Beside it goes `quarantine.jsonl`, one line for each record left out with its reason. If the images are not below the
    manifest's folder, a link to them is made there. An official split is kept; otherwise patients are split by hash.

    Args:
        source: the data set, in its own layout.
        root: its folder (ChestMNIST: or the .npz file).
        out: the manifest to write, .parquet or .jsonl.
        views: views to keep.
        val_fraction: patients for validation where there is no official split.
        test_fraction: patients for testing where there is no official split.
        seed: changes who goes where in a split by hash.
        max_quarantined: the largest part of the records that may be unusable before nothing is written.
        duplicates: leave out films that look the same and say the same, only identical files, or none.
        threads: how many open images; default: one per core.
    """
    if source not in SOURCES:
        raise BuildError(f"there is no source {source!r}; there are {', '.join(SOURCES)}")
    root, out = Path(root), Path(out)
    if not root.exists():
        raise BuildError(f"no folder at {root}")
    try:
        options = SourceOptions(views=tuple(views), val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    except ValidationError as error:
        raise BuildError("; ".join(f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors())) from None
    entry = SOURCES[source]
    out.parent.mkdir(parents=True, exist_ok=True)
    if entry.unpack is not None:
        root = entry.unpack(root, out.parent)
    prefix = _prefix(root, out.parent, source)
    records, held = _usable(entry.records(root, options), prefix, source)
    if not records and not held:
        raise BuildError(f"{root}: no {source} record of the views {', '.join(views)}")
    inspections = _inspect([out.parent / record.image for record in records], duplicates == "perceptual", threads)
    held += [Quarantined(r.record_id, i.problem) for r, i in zip(records, inspections, strict=True) if i.problem]
    usable = [(r, i) for r, i in zip(records, inspections, strict=True) if not i.problem]
    copies = {} if duplicates == "keep" else near_duplicates(usable, exact=duplicates == "exact")
    kept = [record for record, _ in usable if record.record_id not in copies]
    _write_quarantine(out.parent / "quarantine.jsonl", held, copies)
    _refuse_if_too_many(held, len(records) + len(held) - sum(1 for i in inspections if i.problem), max_quarantined, out)
    write_manifest(
        kept, out, name=source, source=f"medgen data build {source}, {options.model_dump_json()}, duplicates {duplicates}"
    )
    report = BuildReport(out, len(kept), len(copies), dict(Counter(_kind(item.reason) for item in held)))
    _console().print(_table(kept, f"{source}: {len(kept)} records"))
    return report


def _usable(found: Records, prefix: str, source: str) -> tuple[list[CXRRecord], list[Quarantined]]:
    """Records with a path below the data set and words about the image, labelled; and the others."""
    records: list[CXRRecord] = []
    held: list[Quarantined] = []
    for item in track(found, description=f"reading {source}", console=_console()):
        if isinstance(item, Quarantined):
            held.append(item)
        elif (problem := _problem(item)) is not None:
            held.append(Quarantined(item.record_id, problem))
        else:
            labels = item.labels or label_text(f"{item.findings}\n\n{item.impression}")
            records.append(replace(item, image=f"{prefix}{item.image}", labels=labels))
    return records, held


def check(manifest: Path, threads: int | None = None) -> str:
    """Open every image a manifest names, count splits, views and labels, and raise `ManifestError` naming what is unusable.

    Args:
        manifest: a record manifest, .parquet or .jsonl.
        threads: how many open images; default: one per core.
    """
    read: Manifest = read_manifest(manifest)
    inspections = _inspect([read.image_path(record) for record in read.records], False, threads)
    _console().print(_table(read.records, f"{read.name}: {len(read)} records"))
    broken = [f"{r.record_id}: {i.problem}" for r, i in zip(read.records, inspections, strict=True) if i.problem]
    if broken:
        more = f"\n  ... and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ManifestError(
            f"{manifest}: {len(broken)} of {len(read)} images are unusable:\n  " + "\n  ".join(broken[:10]) + more
        )
    dark = sum(i.top < 0.25 for i in inspections)
    note = f"; {dark} use less than a quarter of their grey values: train with preprocessing.intensity=percentile" if dark else ""
    return f"{manifest}: {len(read)} records, every image opens, no patient in two splits{note}"


def _prefix(root: Path, home: Path, source: str) -> str:
    """What leads from the manifest's folder to the data set's, through a link if it lies elsewhere."""
    root, home = root.resolve(), home.resolve()
    if root.is_relative_to(home):
        inside = root.relative_to(home).as_posix()
        return "" if inside == "." else f"{inside}/"
    link = home / source
    if link.is_symlink() and link.resolve() == root:
        return f"{source}/"
    if link.exists() or link.is_symlink():
        raise BuildError(f"{link} is in the way of a link to {root}; move it, or write the manifest elsewhere")
    link.symlink_to(root, target_is_directory=True)
    return f"{source}/"


def _problem(record: CXRRecord) -> str | None:
    path = PurePosixPath(record.image)
    if path.is_absolute() or ".." in path.parts:
        return f"path outside the data set: {record.image}"
    if not clean_report(record.impression) and not clean_report(record.findings):
        return "no words about the image in its report"
    return None


def _inspect(paths: Sequence[Path], perceptual: bool, threads: int | None) -> list[Inspection]:
    """What each image is, in order. Threads suffice: decoding and resizing hold no interpreter lock."""
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        done = pool.map(inspect_image, paths, [perceptual] * len(paths))
        return list(track(done, total=len(paths), description="opening images", console=_console()))


def _kind(reason: str) -> str:
    """A reason without its names, for counting."""
    for words in ("no image at", "cannot be decoded", "no report", "no words", "path outside", "shows nothing", "missing below"):
        if words in reason:
            return {"no image at": "missing image", "missing below": "missing image"}.get(words, words)
    return "other"


def _write_quarantine(path: Path, held: Iterable[Quarantined], copies: dict[str, str]) -> None:
    lines = [{"record_id": item.record_id, "reason": item.reason, "kind": "quarantined"} for item in held]
    lines += [{"record_id": name, "reason": f"near-duplicate of {first}", "kind": "duplicate"} for name, first in copies.items()]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def _refuse_if_too_many(held: Sequence[Quarantined], total: int, ceiling: float, out: Path) -> None:
    if len(held) <= ceiling * total:
        return
    reasons = ", ".join(f"{count} {kind}" for kind, count in Counter(_kind(item.reason) for item in held).most_common())
    raise BuildError(
        f"{len(held)} of {total} records are unusable ({reasons}; first: {held[0].record_id}: {held[0].reason}), more than "
        f"max_quarantined={ceiling:g}; no manifest was written, the list is in {out.parent / 'quarantine.jsonl'}. For a partial "
        "download raise the ceiling."
    )


def _table(records: Sequence[CXRRecord], title: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    for split in SPLITS:
        table.add_column(split, justify="right")
    rows: dict[str, Counter[str]] = {"images": Counter(), "patients": Counter()}
    people: dict[str, set[str]] = {split: set() for split in SPLITS}
    for record in records:
        people[record.split].add(record.patient_id)
        rows["images"][record.split] += 1
        rows.setdefault(f"view {record.view}", Counter())[record.split] += 1
        for label in record.labels:
            rows.setdefault(f"{label.name}, {label.state}", Counter())[record.split] += 1
    rows["patients"].update({split: len(names) for split, names in people.items()})
    order = ["images", "patients", *sorted(name for name in rows if name.startswith("view "))]
    order += [
        f"{name}, {state}" for name in FINDINGS for state in ("present", "uncertain", "absent") if f"{name}, {state}" in rows
    ]
    for name in order:
        table.add_row(name.replace("_", " "), *(str(rows[name][split]) for split in SPLITS))
    return table


def _console() -> Console:
    return Console(stderr=True)
