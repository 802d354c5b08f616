"""A toy world to evaluate in: dark films whose bright disc is a nodule (right or left) and whose broad one is a large heart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medgen.data.records import CXRRecord, FindingLabel, write_manifest

SIZE = 32
KINDS = (("left", False), ("right", False), (None, True), (None, False), ("left", True), ("right", True))


def film(side: str | None, large_heart: bool, seed: int) -> np.ndarray:
    """[32,32] uint8; the patient's left is on the viewer's right."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    image = 45 + rng.normal(0, 6, (SIZE, SIZE)) + 15 * rng.random()
    if side is not None:
        column = {"left": 25, "right": 6}[side] + rng.integers(-1, 2)
        image += 150 * (np.hypot(rows - rng.integers(6, 16), columns - column) < 4)
    if large_heart:
        image += 120 * (np.hypot((rows - 24) * 1.3, columns - 16) < 8)
    return np.clip(image, 0, 255).astype(np.uint8)


def labels(side: str | None, large_heart: bool) -> tuple[FindingLabel, ...]:
    nodule = FindingLabel("nodule", "present", side) if side else FindingLabel("nodule", "absent")  # type: ignore[arg-type]
    return nodule, FindingLabel("cardiomegaly", "present" if large_heart else "absent")


def report(side: str | None, large_heart: bool) -> str:
    nodule = f"There is a nodule in the {side} lung." if side else "No pulmonary nodule."
    return f"{nodule} {'Moderate cardiomegaly.' if large_heart else 'No cardiomegaly.'}"


def write_reference(folder: Path, count: int, split: str, first_seed: int) -> Path:
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(count):
        kind, name = KINDS[i % len(KINDS)], f"{split}-{i}"
        Image.fromarray(film(*kind, first_seed + i)).save(folder / f"images/{name}.png")
        words = report(*kind)
        records.append(
            CXRRecord(name, f"{split}-p{i // 2}", name, f"images/{name}.png", "PA", words, words, split, labels(*kind))  # type: ignore[arg-type]
        )
    return write_manifest(records, folder / "manifest.parquet", name=f"toy {split}", source="test")


def write_generated(folder: Path, entries: Sequence[dict], images: Sequence[np.ndarray]) -> Path:
    """A folder as the sampler writes it."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as lines:
        for number, (entry, image) in enumerate(zip(entries, images, strict=True)):
            name = f"{entry['case_id']}_{entry.get('trajectory', 0):03d}.png"
            Image.fromarray(image).save(folder / name)
            line = {"file_name": name, "trajectory": 0, "seed": number, "model": "toy", "synthetic": True, **entry}
            lines.write(json.dumps(line) + "\n")
    return folder
