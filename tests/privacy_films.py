"""Toy patients for the privacy tests: every one has smooth shading of his own, and two films of it that differ in place and exposure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, shift

from medgen.data.records import CXRRecord, write_manifest
from medgen.models.siamese import SiameseNetwork

SIZE = 32


def toy_film(patient: int, number: int) -> np.ndarray:
    """[32,32] uint8."""
    own = gaussian_filter(np.random.default_rng(patient).normal(size=(SIZE, SIZE)), 2.5)
    other = np.random.default_rng([patient, number])
    moved = shift(own / own.std(), other.uniform(-1, 1, 2), mode="nearest")
    return (120 + 55 * moved * other.uniform(0.8, 1.2) + other.normal(0, 2, own.shape)).clip(0, 255).astype(np.uint8)


def write_patients(root: Path, per_split: dict[str, int], first: int = 0) -> Path:
    """The manifest of so many patients of each split, two films each."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    records, start = [], first
    for split, count in per_split.items():
        for patient in range(start, start + count):
            for number in range(2):
                name = f"p{patient}-{number}"
                Image.fromarray(toy_film(patient, number)).save(root / f"images/{name}.png")
                words = f"Film of patient {patient}."
                records.append(
                    CXRRecord(name, f"p{patient}", name, f"images/{name}.png", ("PA", "AP")[number], words, words, split)  # type: ignore[arg-type]
                )
        start += count
    return write_manifest(records, root / "manifest.parquet", name="toy patients", source="test")


def write_network(folder: Path) -> Path:
    """A network that learned nothing: its vectors are random projections, which know a film again and little else."""
    torch.manual_seed(0)
    SiameseNetwork(image_size=SIZE, channels=(8, 16), dim=32, threshold=0.5).save_pretrained(folder)
    return folder
