"""`medgen bench load`: images per second in the second epoch of the cached loader, against MONAI's transforms without a cache."""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Resized, ScaleIntensityd, SpatialPadd
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from medgen.bench.machine import machine, seconds
from medgen.data.dataset import CXRDataset
from medgen.data.dicom import write_dx
from medgen.data.images import ImagePreprocessing
from medgen.data.records import CXRRecord, read_manifest, write_manifest


@dataclass(frozen=True)
class LoadTimes:
    """What was measured: the machine, the files, and one row per way of loading."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    ratio: float

    def __str__(self) -> str:
        files, size = f"{self.settings['side']}² 16-bit DICOM", self.settings["size"]
        table = Table(title=f"{files} → {size}², {self.settings['workers']} worker(s), on {self.machine['name']}")
        for heading in ("loader", "images/s", "ms per image"):
            table.add_column(heading, justify="left" if heading == "loader" else "right")
        for row in self.rows:
            table.add_row(row["name"], f"{row['images_per_second']:.0f}", f"{1000 / row['images_per_second']:.2f}")
        console = Console(width=110)
        with console.capture() as captured:
            console.print(table)
            console.print(f"second epoch is {self.ratio:.1f} times as fast as uncached MONAI transforms (target: 5)")
        return captured.get()


def bench_load(
    images: int = 96,
    side: int = 512,
    size: int = 512,
    batch_size: int = 8,
    workers: int = 0,
    repeats: int = 3,
    out: Path | None = None,
) -> LoadTimes:
    """Time an epoch of DICOM files, three ways: MONAI's transforms, the loader's first epoch, its second.

    Args:
        images: how many files are written (noise: what they show does not change their time).
        side: pixels along a side of the files.
        size: pixels along a side of the tensors.
        batch_size: images per batch.
        workers: loader processes.
        repeats: epochs timed of those that can be repeated; the median counts.
        out: also write the figures to this JSON file.
    """
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="medgen-bench-") as folder:
        manifest = read_manifest(_write_films(Path(folder), images, side))
        cached = CXRDataset(manifest, ImagePreprocessing(size=size), cache=Path(folder) / "cache")
        plain = _monai(cached, size)

        def epoch(data: Any) -> float:
            loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=_stack)
            return images / seconds(lambda: [batch.shape for batch in loader], device)

        epoch(plain)  # the files are in the system's memory from here on, for everyone
        first = epoch(cached)
        uncached = [epoch(plain) for _ in range(repeats)]
        second = [epoch(cached) for _ in range(repeats)]
    rates = {"MONAI transforms, no cache": statistics.median(uncached), "medgen, first epoch": first}
    rates["medgen, second epoch"] = statistics.median(second)
    rows = [{"name": name, "images_per_second": rate} for name, rate in rates.items()]
    settings = {"images": images, "side": side, "size": size, "batch_size": batch_size, "workers": workers}
    result = LoadTimes(machine(device), settings, rows, rates["medgen, second epoch"] / rates["MONAI transforms, no cache"])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"machine": result.machine, "settings": settings, "rows": rows, "ratio": result.ratio}, indent=2) + "\n"
        )
    return result


def _write_films(folder: Path, count: int, side: int) -> Path:
    noise = np.random.default_rng(0)
    records = []
    for number in range(count):
        name = f"film{number:04d}"
        pixels = noise.integers(0, 65536, (side, side), dtype=np.uint16)
        write_dx(folder / f"{name}.dcm", pixels, patient_id=name, study_id=name, record_id=name, model="bench", seed=0)
        records.append(CXRRecord(name, name, name, f"{name}.dcm", "PA", "The lungs are clear.", "Normal.", "train"))
    return write_manifest(records, folder / "manifest.parquet", name="bench", source="noise")


def _monai(data: CXRDataset, size: int) -> Dataset:
    """The transforms that a MONAI tutorial would use for the same tensors."""
    steps = [
        LoadImaged("image", reader="PydicomReader", image_only=True),
        EnsureChannelFirstd("image"),
        ScaleIntensityd("image", minv=-1.0, maxv=1.0),
        SpatialPadd("image", (size, size)),
        Resized("image", (size, size), mode="bilinear", anti_aliasing=True),
    ]
    return Dataset([{"image": data.manifest.image_path(record)} for record in data.manifest.records], Compose(steps))


def _stack(items: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(item["image"]) for item in items])
