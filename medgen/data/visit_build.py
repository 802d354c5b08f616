"""The part of `medgen data build` and `check` that is particular to visit series: an unusable image costs its visit, not its patient."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import track

from medgen.data.images import ImageError
from medgen.data.sources.base import Quarantined, Unwritten
from medgen.data.visit_inspection import VisitInspection, inspect_visit, notes, spacing_problem
from medgen.data.visit_records import VisitSeries

R = TypeVar("R")


@dataclass
class Sorted(Generic[R]):
    """Records to keep, and what to leave out by name: unusable (`held`), there twice (`copies`: name → name that stays), a series
    with too few images (`short`); how many files were `opened`, and what training should know (`notes`)."""

    kept: list[R] = field(default_factory=list)
    held: list[Quarantined] = field(default_factory=list)
    copies: dict[str, str] = field(default_factory=dict)
    short: dict[str, str] = field(default_factory=dict)
    opened: int = 0
    notes: list[str] = field(default_factory=list)


def write_images(pending: Sequence[Unwritten], home: Path, threads: int | None) -> tuple[list[VisitSeries], list[Quarantined]]:
    """Let every series write its images below `home`; a visit whose image failed stays without it."""
    records, held = [], []
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        done = pool.map(lambda item: item.make(home), pending)
        for item, failed in zip(pending, track(done, "writing images", len(pending), console=Console(stderr=True)), strict=True):
            records.append(without(item.record, failed))
            held += [Quarantined(f"{item.record.record_id}/{name}", reason) for name, reason in failed.items()]
    return records, held


def without(record: VisitSeries, names: object) -> VisitSeries:
    """The same series without the images of the visits `names`; the visits stay."""
    return replace(record, visits=tuple(replace(v, image=None) if v.visit_id in names else v for v in record.visits))  # type: ignore[operator]


def inspect_series(records: Sequence[VisitSeries], home: Path, threads: int | None) -> list[list[VisitInspection]]:
    """What the images of each series are, in the order of `imaged`."""
    wanted = [(home / str(visit.image), record.modality, record.dim) for record in records for visit in record.imaged]
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        done = pool.map(lambda item: inspect_visit(*item), wanted)
        seen = iter(list(track(done, "opening files", len(wanted), console=Console(stderr=True))))
    return [[next(seen) for _ in record.imaged] for record in records]


def sort_series(
    records: Sequence[VisitSeries], home: Path, *, min_images: int, same_spacing: bool, copies: bool, threads: int | None
) -> Sorted[VisitSeries]:
    """Open every image and sort the series. Raises `ImageError` if they share no clock or dimension.

    An image that cannot be used leaves its visit without one, and so does a file that another visit has already shown (`copies`
    keeps it). A series of volumes whose spacing changes is held unless `same_spacing` is False.
    """
    for name, values in (("time_unit", {r.time_unit for r in records}), ("dim", {r.dim for r in records})):
        if len(values) > 1:
            raise ImageError(f"the series have {name} {', '.join(map(str, sorted(values)))}: make a manifest of each")
    out: Sorted[VisitSeries] = Sorted()
    stays: dict[str, str] = {}
    inspected = inspect_series(records, home, threads)
    good: list[list[VisitInspection]] = []
    for record, seen in zip(records, inspected, strict=True):
        out.opened += len(seen)
        lost = set()
        for visit, item in zip(record.imaged, seen, strict=True):
            name = f"{record.record_id}/{visit.visit_id}"
            if item.problem:
                out.held.append(Quarantined(name, item.problem))
                lost.add(visit.visit_id)
            elif not copies and (first := stays.setdefault(item.content, name)) != name:
                out.copies[name] = first
                lost.add(visit.visit_id)
        left = without(record, lost)
        rest = [item for visit, item in zip(record.imaged, seen, strict=True) if visit.visit_id not in lost]
        if same_spacing and (problem := spacing_problem(left, rest)):
            how = "resample first (command), or build with --no-same-spacing and train with volume.fit=crop, volume.spacing_mm"
            out.held.append(Quarantined(record.record_id, f"{problem}; {how}"))
        elif len(left.imaged) < min_images:
            out.short[record.record_id] = f"{len(left.imaged)} usable images, fewer than min_images={min_images}"
        else:
            out.kept.append(left)
            good.append(rest)
    out.notes = notes(out.kept, good)
    return out


def facts(record: VisitSeries) -> list[str]:
    """What the table counts of a series."""
    each = [f"view {visit.view}" for visit in record.imaged if visit.view]
    missing = len(record.visits) - len(record.imaged)
    return [*["visits"] * len(record.visits), *["visits without an image"] * missing, *each, *["events"] * len(record.events)]
