"""Visits' images as training items, pictures and volumes alike: `[1, *S]` float32 in [-1, 1], prepared once, then read from disk."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import Dataset

from medgen.config import Config
from medgen.data import disk_cache
from medgen.data.dataset import PreparedImages
from medgen.data.images import ImageError, ImagePreprocessing, from_grid, preprocess
from medgen.data.records import Manifest
from medgen.data.visit_records import VisitSeries
from medgen.data.volumes import VolumePreprocessing, is_volume, load_volume

_CACHE_VERSION = 1  # raise it when `load_volume` gives other values for the same file and preprocessing

_SIDES = "size must be 8 to 4096 along each side"


class VisitPreprocessing(Config):
    """How a visit's image file becomes a tensor; part of a pipeline's saved configuration."""

    dim: Literal[2, 3] = Field(2, description="pictures or volumes")
    size: int | tuple[int, int, int] = Field(128, description="pixels along each side; volumes: a cube's side, or D, H, W")
    image: ImagePreprocessing = Field(
        ImagePreprocessing(size=128), description="for pictures; its size is the size above, its range is [-1, 1]"
    )
    volume: VolumePreprocessing = Field(VolumePreprocessing(), description="for volumes")

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, values: Any) -> Any:
        """`image.size` follows `size`, so that the two cannot disagree unless both are given."""
        if not isinstance(values, dict) or not isinstance(values.get("size", 128), int):
            return values
        if not 8 <= values.get("size", 128) <= 4096:
            raise ValueError(_SIDES)
        image = values.get("image") or {}
        if isinstance(image, dict):
            values = {**values, "image": {"size": values.get("size", 128), **image}}
        return values

    @model_validator(mode="after")
    def _agree(self) -> VisitPreprocessing:
        sides = (self.size,) if isinstance(self.size, int) else self.size
        if not all(8 <= side <= 4096 for side in sides):
            raise ValueError(_SIDES)
        if self.dim == 2 and not isinstance(self.size, int):
            raise ValueError("pictures are square: size is one number where dim is 2")
        if self.dim == 2 and self.image.size != self.size:
            raise ValueError(f"size is {self.size} but image.size {self.image.size}: give one of them")
        if self.image.range != (-1.0, 1.0):
            raise ValueError("image.range must be [-1, 1], as for every visit")
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) or (D, H, W)."""
        return (self.size,) * self.dim if isinstance(self.size, int) else self.size


def load_visit(path: str | Path, preprocessing: VisitPreprocessing) -> Tensor:
    """`[1, *S]` float32 in [-1, 1] of a PNG, JPEG, TIFF, DICOM or (dim 3) NIfTI file. Raises `ImageError` naming the file."""
    _check_kind(Path(path), preprocessing)
    if preprocessing.dim == 2:
        return preprocess(path, preprocessing.image)
    return from_grid(_volume_grid(Path(path), preprocessing), -1.0, 1.0)


def _check_kind(path: Path, preprocessing: VisitPreprocessing) -> None:
    if is_volume(path) != (preprocessing.dim == 3):
        found, wanted = ("a volume", "pictures") if is_volume(path) else ("no volume (.nii, .nii.gz, .mgz)", "volumes")
        raise ImageError(f"{path} is {found}, but the preprocessing is for {wanted} (dim {preprocessing.dim})")


def _volume_grid(path: Path, preprocessing: VisitPreprocessing) -> NDArray[np.uint16]:
    values = load_volume(path, preprocessing.size, preprocessing.volume).values[0].numpy()
    grid: NDArray[np.uint16] = np.rint((values + 1) * 32767.5).astype(np.uint16)
    return grid


class PreparedVisits:
    """`load_visit` with a cache on disk (uint16 `.npy`, see `PreparedImages`); the values are the same with and without it."""

    def __init__(self, preprocessing: VisitPreprocessing, folder: str | Path | None = None) -> None:
        self.preprocessing = preprocessing
        self.folder = None if folder is None else Path(folder)
        self._pictures = PreparedImages(preprocessing.image, folder)

    def __call__(self, path: Path) -> Tensor:
        """`[1, *S]` float32 in [-1, 1]. Raises `ImageError` naming the file."""
        _check_kind(path, self.preprocessing)
        if self.preprocessing.dim == 2:
            return self._pictures(path)
        if self.folder is None:
            return load_visit(path, self.preprocessing)
        try:
            state = disk_cache.file_state(path)
        except OSError:
            raise ImageError(f"no image at {path}") from None
        settings = self.preprocessing.model_dump_json(include={"size", "volume"})
        entry = disk_cache.entry(self.folder, ".npy", "volume", _CACHE_VERSION, state, settings)
        try:
            grid = np.load(entry, allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):  # absent, or cut off by a full disk
            grid = _volume_grid(path, self.preprocessing)
            disk_cache.write_atomically(entry, partial(np.save, arr=grid, allow_pickle=False))
        return from_grid(grid, -1.0, 1.0)


class VisitImages(Dataset[dict[str, Any]]):
    """Map-style data set of every imaged visit of a manifest: `[i]` gives {"id": "record_id/visit_id", "image": [1, *S] in [-1, 1]}.

    Visits come series by series, in the order of their times; `rows[record_id]` are a series' indices, `ids` all names. `cache` is a
    folder for prepared images, None decodes every time. Fits `LatentCache.build` in 2D and 3D (`fingerprint` for its key). Picklable.
    """

    def __init__(
        self, manifest: Manifest[VisitSeries], preprocessing: VisitPreprocessing, cache: str | Path | None = None
    ) -> None:
        wrong = next((record for record in manifest.records if record.dim != preprocessing.dim), None)
        if wrong is not None:
            raise ImageError(
                f"{manifest.name}: series {wrong.record_id!r} has dim {wrong.dim}, the preprocessing {preprocessing.dim}; "
                f"set preprocessing.dim={wrong.dim}"
            )
        self.manifest, self.preprocessing = manifest, preprocessing
        self.prepare = PreparedVisits(preprocessing, cache)
        self.visits = [(record, visit) for record in manifest.records for visit in record.imaged]
        self.ids = [f"{record.record_id}/{visit.visit_id}" for record, visit in self.visits]
        self.rows: dict[str, list[int]] = {record.record_id: [] for record in manifest.records}
        for row, (record, _) in enumerate(self.visits):
            self.rows[record.record_id].append(row)
        parts = (manifest.sha256, preprocessing.model_dump_json(), *self.ids)
        self.fingerprint = hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:24]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.visits[index][1].image
        assert image is not None  # `imaged` says so
        try:
            values = self.prepare(self.manifest.path(image))
        except ImageError as error:
            raise ImageError(f"visit {self.ids[index]!r} of {self.manifest.name}: {error}") from error
        return {"id": self.ids[index], "image": torch.as_tensor(values)}
