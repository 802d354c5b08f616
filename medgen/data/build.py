"""`medgen data build` and `medgen data check`: from a public data set's folder to a manifest that can be trusted, and back.

Every image or clip is opened once: what cannot be read, shows nothing, or (a film) has no words is quarantined by name; what is there
twice is kept once.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from medgen.data import disk_cache
from medgen.data.clip_inspection import inspect_clip, inspect_ecg
from medgen.data.ecg_records import ECGRecord
from medgen.data.echo_records import EchoRecord, EchoView
from medgen.data.inspection import Inspection, inspect_image, near_duplicates
from medgen.data.records import (
    FINDINGS,
    SPLITS,
    CXRRecord,
    Manifest,
    ManifestError,
    View,
    manifest_kind,
    read_manifest,
    write_manifest,
)
from medgen.data.report_labels import label_text
from medgen.data.report_text import clean_report
from medgen.data.sources import SOURCES
from medgen.data.sources.base import Annotated, Quarantined, Records, SourceOptions, Unwritten
from medgen.data.visit_build import Sorted, inspect_series, sort_series, write_images
from medgen.data.visit_build import facts as series_facts
from medgen.data.visit_inspection import notes as series_notes
from medgen.data.visit_records import VisitSeries

Buildable: TypeAlias = CXRRecord | EchoRecord | ECGRecord | VisitSeries
SourceName: TypeAlias = Literal[
    "mimic_cxr_jpg", "rexgradient", "chexpert_csv", "chestmnist", "imagefolder", "dicom_folder",
    "echonet_dynamic", "camus", "ultrasound_dicom", "mimic_iv_echo", "echoxflow", "mimic_iv_ecg", "ptb_xl",
    "mimic_cxr_visits", "nih_followups", "acdc", "bids_sessions", "visit_csv",
]  # fmt: skip
_NOUNS = {CXRRecord.kind: "images", EchoRecord.kind: "clips", ECGRecord.kind: "ECGs", VisitSeries.kind: "series"}


class BuildError(ValueError):
    """A manifest that was not written; the message says why."""


@dataclass(frozen=True)
class BuildReport:
    """What `build` did. `quarantined` counts by reason; the names are in `quarantine.jsonl` beside the manifest.

    Of visit series also how many have too few images (`short`), and what a training configuration should say of them (`notes`).
    """

    manifest: Path
    records: int
    duplicates: int
    quarantined: dict[str, int]
    short: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        held = f", {sum(self.quarantined.values())} quarantined" if self.quarantined else ""
        short = f", {self.short} series with too few images left out" if self.short else ""
        return f"{self.manifest}: {self.records} records, {self.duplicates} near-duplicates left out{held}{short}" + "".join(
            f"\n  {note}" for note in self.notes
        )


def build(
    source: SourceName,
    root: Path,
    out: Path,
    views: Sequence[View | EchoView] | None = None,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    seed: int = 0,
    ecg_hours: float = 24.0,
    frames: int = 12,
    contrast: str = "T1w",
    command: str = "",
    min_images: int = 2,
    same_spacing: bool = True,
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
        views: views to keep; default: PA and AP of films, every view of echo clips.
        val_fraction: patients for validation where there is no official split.
        test_fraction: patients for testing where there is no official split.
        seed: changes who goes where in a split by hash.
        ecg_hours: how far in time an ECG of the same patient may be from an echo (sets that share no clock).
        frames: ACDC: to how many frames a beat is resampled from end-diastole to end-systole; 0: those recorded.
        contrast: BIDS: which image of a session, by its file's ending.
        command: BIDS: run on every image, such as "mri_synthstrip -i {input} -o {output}" (registration, bias field, ...).
        min_images: visit series with fewer usable images are left out; 1 keeps all, as an autoencoder wants.
        same_spacing: hold a series of volumes whose spacing changes (train those with volume.fit=crop, volume.spacing_mm).
        max_quarantined: the largest part of the records that may be unusable before nothing is written.
        duplicates: leave out films that look the same and say the same, only identical files (echo clips: always these), or none.
        threads: how many open images; default: one per core.
    """
    if source not in SOURCES:
        raise BuildError(f"there is no source {source!r}; there are {', '.join(SOURCES)}")
    root, out = Path(root), Path(out)
    if not root.exists():
        raise BuildError(f"no folder at {root}")
    if out.suffix not in (".parquet", ".jsonl"):
        raise BuildError(f"{out}: a manifest ends in .parquet or .jsonl; did you mean {out / 'manifest.parquet'}?")
    entry = SOURCES[source]
    options = _options(
        views=tuple(views or entry.views), val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, ecg_hours=ecg_hours,
        frames=frames, contrast=contrast, command=command,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    if entry.unpack is not None:
        root = entry.unpack(root, out.parent)
    prefix = _prefix(root, out.parent, source)
    records, held = _usable(entry.records(root, options), prefix, source, out.parent, threads)
    if not records and not held:
        raise BuildError(f"{root}: no {source} record of the views {', '.join(options.views)}")
    found = len(held)
    chosen: Sorted[Any]
    if series := [record for record in records if isinstance(record, VisitSeries)]:
        chosen = sort_series(
            series,
            out.parent,
            min_images=min_images,
            same_spacing=same_spacing,
            copies=duplicates == "keep",
            threads=threads,
        )
    else:
        chosen = _sorted(records, out.parent, duplicates, threads)
    held += chosen.held
    _write_quarantine(out.parent / "quarantine.jsonl", held, chosen.copies, chosen.short)
    _refuse_if_too_many(held, found + chosen.opened, max_quarantined, out)
    if not chosen.kept:
        raise BuildError(f"{root}: nothing is left; the reasons are in {out.parent / 'quarantine.jsonl'}")
    how_made = f"medgen data build {source}, {options.model_dump_json()}, duplicates {duplicates}"
    write_manifest(chosen.kept, out, name=source, source=how_made)
    _console().print(_table(chosen.kept, f"{source}: {len(chosen.kept)} records"))
    counts = dict(Counter(_kind(item.reason) for item in held))
    return BuildReport(out, len(chosen.kept), len(chosen.copies), counts, len(chosen.short), tuple(chosen.notes))


def _sorted(records: Sequence[Buildable], home: Path, duplicates: str, threads: int | None) -> Sorted[Buildable]:
    """Open every record's files: those to keep, those that are unusable, and those that are there twice."""
    perceptual = duplicates == "perceptual" and all(isinstance(record, CXRRecord) for record in records)
    inspections = _inspect(records, home, perceptual, threads)
    held = [Quarantined(r.record_id, i.problem) for r, i in zip(records, inspections, strict=True) if i.problem]
    usable = [(r, i) for r, i in zip(records, inspections, strict=True) if not i.problem]
    copies = {} if duplicates == "keep" else near_duplicates(usable, exact=not perceptual)
    kept = [record for record, _ in usable if record.record_id not in copies]
    return Sorted(kept, held, copies, opened=len(records))


def _options(**values: Any) -> SourceOptions:
    try:
        return SourceOptions(**values)
    except ValidationError as error:
        raise BuildError("; ".join(f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors())) from None


def _usable(
    found: Records, prefix: str, source: str, home: Path, threads: int | None
) -> tuple[list[Buildable], list[Quarantined]]:
    """Records with paths below the data set and, for films, words and labels; and the others."""
    records: list[Buildable] = []
    held: list[Quarantined] = []
    pending: list[Unwritten] = []
    for item in track(found, description=f"reading {source}", console=_console()):
        if isinstance(item, Quarantined):
            held.append(item)
            continue
        record = item.record if isinstance(item, Annotated | Unwritten) else item
        if (problem := _problem(record)) is not None:
            held.append(Quarantined(record.record_id, problem))
            continue
        if isinstance(item, Unwritten):
            pending.append(item)
            continue
        record = record.below(prefix)
        if isinstance(item, Annotated) and isinstance(record, EchoRecord):
            record = replace(record, annotations=_write_annotations(home, record.record_id, item.arrays))
        if isinstance(record, CXRRecord):
            record = replace(record, labels=record.labels or label_text(f"{record.findings}\n\n{record.impression}"))
        records.append(record)
    if pending:
        written, failed = write_images(pending, home, threads)
        records, held = [*records, *written], held + failed
    return records, held


def _write_annotations(home: Path, name: str, arrays: dict[str, NDArray[Any]]) -> str:
    below = f"annotations/{name}.npz"
    disk_cache.write_atomically(home / below, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
    return below


def check(manifest: Path, threads: int | None = None) -> str:
    """Open every image or clip a manifest names, count splits, views and labels, and raise `ManifestError` naming what is unusable.

    Args:
        manifest: a record manifest, .parquet or .jsonl.
        threads: how many open images; default: one per core.
    """
    kind = manifest_kind(manifest)
    kinds: dict[str, type[Any]] = {record.kind: record for record in (CXRRecord, EchoRecord, ECGRecord, VisitSeries)}
    if kind not in kinds:
        raise ManifestError(f"{manifest} lists records of kind {kind!r}; this checks {' and '.join(kinds)}")
    read = read_manifest(manifest, record=kinds[kind])
    if kind == VisitSeries.kind:
        return _check_series(manifest, read, threads)
    inspections = _inspect(read.records, read.root, False, threads)
    _console().print(_table(read.records, f"{read.name}: {len(read)} records"))
    what = _NOUNS[kind]
    broken = [f"{r.record_id}: {i.problem}" for r, i in zip(read.records, inspections, strict=True) if i.problem]
    _raise_for(manifest, broken, len(read), what)
    dark = sum(i.top < 0.25 for i in inspections)
    note = f"; {dark} use less than a quarter of their grey values: train with preprocessing.intensity=percentile" if dark else ""
    return f"{manifest}: {len(read)} records, every {what[:-1]} opens, no patient in two splits{note}"


def _check_series(path: Path, read: Manifest[VisitSeries], threads: int | None) -> str:
    seen = inspect_series(read.records, read.root, threads)
    _console().print(_table(read.records, f"{read.name}: {len(read)} records"))
    each = [(f"{r.record_id}/{v.visit_id}", i) for r, items in zip(read.records, seen) for v, i in zip(r.imaged, items)]
    _raise_for(path, [f"{name}: {item.problem}" for name, item in each if item.problem], len(each), "images")
    notes = "".join(f"\n  {note}" for note in series_notes(read.records, seen))
    return f"{path}: {len(read)} series of {len(each)} images, every image opens, no patient in two splits{notes}"


def _raise_for(manifest: Path, broken: Sequence[str], total: int, what: str) -> None:
    if broken:
        more = f"\n  ... and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ManifestError(f"{manifest}: {len(broken)} of {total} {what} are unusable:\n  " + "\n  ".join(broken[:10]) + more)


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


def _problem(record: Buildable) -> str | None:
    for name in record.files:
        path = PurePosixPath(getattr(record, name) or "")
        if path.is_absolute() or ".." in path.parts:
            return f"path outside the data set: {path}"
    if isinstance(record, CXRRecord) and not clean_report(record.impression) and not clean_report(record.findings):
        return "no words about the image in its report"
    wrong = next(iter(record.problems()), None)
    if wrong is None:
        return None
    return f"expected {wrong[1]}" if wrong[0] == "visits" else f"{wrong[0]} is {getattr(record, wrong[0])!r}; expected {wrong[1]}"


def _inspect(records: Sequence[Buildable], home: Path, perceptual: bool, threads: int | None) -> list[Inspection]:
    """What each record's files are, in order. Threads suffice: decoding and resizing hold no interpreter lock."""

    def look(record: Buildable) -> Inspection:
        if isinstance(record, CXRRecord):
            return inspect_image(home / record.image, perceptual)
        return inspect_clip(record, home) if isinstance(record, EchoRecord) else inspect_ecg(cast(ECGRecord, record), home)

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        done = pool.map(look, records)
        return list(track(done, total=len(records), description="opening files", console=_console()))


def _kind(reason: str) -> str:
    """A reason without its names, for counting."""
    missing = {
        "no image at": "missing image",
        "missing below": "missing image",
        "no video at": "missing video",
        "no ECG at": "missing ECG",
    }
    known = (
        "cannot be decoded",
        "no report",
        "no words",
        "path outside",
        "shows nothing",
        "stands still",
        "colour Doppler",
        "undated",
        "same time",
        "spacing changes",
        "is 4D",
        "NaN",
        "affine",
        "Hounsfield",
        "command",
        "cut off",
    )
    for words in (*missing, *known):
        if words in reason:
            return missing.get(words, words)
    return "other"


def _write_quarantine(path: Path, held: Iterable[Quarantined], copies: dict[str, str], short: dict[str, str]) -> None:
    lines = [{"record_id": item.record_id, "reason": item.reason, "kind": "quarantined"} for item in held]
    lines += [{"record_id": name, "reason": f"near-duplicate of {first}", "kind": "duplicate"} for name, first in copies.items()]
    lines += [{"record_id": name, "reason": reason, "kind": "short"} for name, reason in short.items()]
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


def _table(records: Sequence[Buildable], title: str) -> Table:
    table = Table(title=title)
    table.add_column("")
    for split in SPLITS:
        table.add_column(split, justify="right")
    first = _NOUNS[records[0].kind] if records else "records"
    rows: dict[str, Counter[str]] = {first: Counter(), "patients": Counter()}
    people: dict[str, set[str]] = {split: set() for split in SPLITS}
    for record in records:
        people[record.split].add(record.patient_id)
        for name in (first, *_facts(record)):
            rows.setdefault(name, Counter())[record.split] += 1
    rows["patients"].update({split: len(names) for split, names in people.items()})
    order = [first, "patients", *sorted(name for name in rows if name.startswith("view "))]
    order += [name for name in rows if name not in order and not name.startswith(FINDINGS)]
    order += [
        f"{name}, {state}" for name in FINDINGS for state in ("present", "uncertain", "absent") if f"{name}, {state}" in rows
    ]
    for name in order:
        table.add_row(name.replace("_", " "), *(str(rows[name][split]) for split in SPLITS))
    return table


def _facts(record: Buildable) -> list[str]:
    """What the table counts of a record."""
    if isinstance(record, VisitSeries):
        return series_facts(record)
    if isinstance(record, CXRRecord):
        return [f"view {record.view}", *(f"{label.name}, {label.state}" for label in record.labels)]
    if isinstance(record, ECGRecord):
        return ["with a pulse wave"] if record.ppg is not None else []
    facts = {"with ejection fraction": record.ejection_fraction, "with annotations": record.annotations}
    return [f"view {record.view}", *(name for name, value in facts.items() if value is not None), f"ECG {record.pairing}"]


def _console() -> Console:
    return Console(stderr=True)
