"""Follow-ups small enough to learn in a test: discs that grow with the days, on real PNGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from medgen.data.records import write_manifest
from medgen.data.visit_records import Event, Visit, VisitSeries

SIZE = 32


def disc(radius: float, place: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIZE, :SIZE]
    inside = (rows - 16) ** 2 + (columns - 8 - place) ** 2 < radius**2
    return np.where(inside, 200, 50).astype(np.uint8)


def write_follow_ups(root: Path, patients: int = 12, visits: int = 4) -> Path:
    """A manifest of `patients` whose discs grow by a pixel in ten days, less after a drainage; every third weight is unknown."""
    (root / "images").mkdir(parents=True)
    series = []
    for p in range(patients):
        draws = np.random.default_rng(p)
        times = np.cumsum(draws.integers(5, 30, visits)).astype(float)
        seen = []
        for v, time in enumerate(times):
            image = f"images/p{p}-{v}.png"
            Image.fromarray(disc(2 + time / 10, p % 16)).save(root / image)
            seen.append(Visit(f"p{p}-{v}", float(time), image, report="Small left pleural effusion. No pneumothorax." * (v % 2)))
        covariates: dict[str, float | str] = {"sex": "FM"[p % 2], "age": 40.0 + p}
        if p % 3:
            covariates["weight_kg"] = 70.0
        events = (Event("drainage", float(times[0]) + 1),) if p % 2 else ()
        split = "train" if p < patients - 4 else "val" if p < patients - 2 else "test"
        series.append(VisitSeries(f"p{p}", f"p{p}", f"p{p}", tuple(seen), "cxr", 2, "days", split, events, covariates))  # type: ignore[arg-type]
    return write_manifest(series, root / "manifest.parquet", name="discs", source="test")
