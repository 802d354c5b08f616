"""Opening a series' images once to learn whether they can be trained on: readable, placed, evenly spaced, and in a known unit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medgen.data.images import ImageError
from medgen.data.inspection import inspect_image
from medgen.data.visit_records import VisitSeries
from medgen.data.volumes import is_volume, read_header, read_volume

_SAME_SPACING = 0.05  # relative; scanners round their spacing, protocols change it by more
_AXIS = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}


@dataclass(frozen=True)
class VisitInspection:
    """One image: its file's hash, its ends (pictures: [0, 1]; volumes: as stored), and for a volume spacing along the patient's
    left-right, front-back and head-foot axes (as stored if `axes` is "")."""

    content: str = ""
    low: float = 0.0
    high: float = 1.0
    spacing: tuple[float, ...] = ()
    axes: str = ""
    problem: str = ""


def inspect_visit(path: Path, modality: str, dim: int) -> VisitInspection:
    """Open an image; never raises for an image, its `problem` says what was wrong."""
    if is_volume(path) != (dim == 3):
        return VisitInspection(problem=f"{path} is {'no ' if dim == 3 else 'a '}volume, but its series has dim {dim}")
    if dim == 2:
        seen = inspect_image(path, perceptual=False)
        return VisitInspection(seen.content, high=seen.top, problem=seen.problem)
    try:
        header = read_header(path)
        values, _ = read_volume(path, need_orientation=False)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except (ImageError, OSError) as error:
        return VisitInspection(problem=str(error))
    low, high = float(values.min()), float(values.max())
    spacing = header.spacing
    if header.axes:
        spacing = tuple(mm for _, mm in sorted(zip((_AXIS[letter] for letter in header.axes), spacing, strict=True)))
    problem = ""
    if high <= low:
        problem = f"{path} shows nothing: every voxel is {low:g}"
    elif modality == "ct" and (low > -200 or low < -9000 or high > 32000):
        problem = f"{path} is not in Hounsfield units: its values run from {low:g} to {high:g}, a CT's from about -1000 (air)"
    return VisitInspection(content, low, high, spacing, header.axes, problem)


def spacing_problem(record: VisitSeries, seen: Sequence[VisitInspection]) -> str:
    """What differs between the grids of one series' volumes (in the order of `record.imaged`), if anything."""
    usable = [(visit.visit_id, item.spacing) for visit, item in zip(record.imaged, seen, strict=True) if not item.problem]
    for name, spacing in usable[1:]:
        if spacing and not np.allclose(spacing, usable[0][1], rtol=_SAME_SPACING):
            first, second = (" x ".join(f"{mm:.4g}" for mm in values) for values in (usable[0][1], spacing))
            return f"spacing changes within the series: {usable[0][0]} has {first} mm, {name} {second} mm"
    return ""


def notes(records: Sequence[VisitSeries], seen: Sequence[Sequence[VisitInspection]]) -> list[str]:
    """What training should be told of volumes that are usable but not alike."""
    volumes = [item for record, items in zip(records, seen, strict=True) if record.dim == 3 for item in items if not item.problem]
    if not volumes:
        return []
    found = []
    if unplaced := sum(not item.axes for item in volumes):
        found.append(f"{unplaced} of {len(volumes)} volumes say no orientation: volume.orientation=null")
    ratio = max(max(item.spacing) / min(item.spacing) for item in volumes)
    if ratio > 3:
        found.append(f"spacing differs up to {ratio:.3g} to 1 between axes: volume.max_anisotropy={np.ceil(ratio):g}")
    ranges = {record.modality for record in records if record.dim == 3}
    if "ct" not in ranges:
        low, high = min(item.low for item in volumes), max(item.high for item in volumes)
        found.append(f"values from {low:g} to {high:g} in no fixed unit: volume.intensity=percentile (or minmax)")
    changed = sum(bool(spacing_problem(record, items)) for record, items in zip(records, seen, strict=True) if record.dim == 3)
    if changed:
        found.append(f"{changed} series change their spacing: volume.fit=crop with volume.spacing_mm")
    return found
