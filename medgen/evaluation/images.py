"""The two sides of a comparison: generated images with their metadata, and reference images from a manifest, read in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from medgen.data.images import PILLOW_SUFFIXES, load_image
from medgen.data.records import Manifest


class EvaluationError(ValueError):
    """Something that cannot be evaluated; the message says what, where, and what to do."""


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order. `groups` says which of them belong together (patient, or case): they are never split apart.

    `metadata` holds one dict per image: for generated images their line of metadata.jsonl. `native` is the side in pixels to which
    every image is brought before anything else, so that real and generated images reach an encoder by the same way.
    """

    name: str
    paths: tuple[Path, ...]
    groups: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...] = field(repr=False, default=())
    native: int | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def file_hashes(self) -> tuple[str, ...]:
        """SHA-256 of every file."""
        return tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in self.paths)

    def take(self, indices: Sequence[int]) -> ImageSet:
        """The images at `indices`, in that order."""
        metadata = tuple(self.metadata[i] for i in indices) if self.metadata else ()
        return ImageSet(
            self.name, tuple(self.paths[i] for i in indices), tuple(self.groups[i] for i in indices), metadata, self.native
        )


def read_generated(folder: str | Path) -> ImageSet:
    """Images below `folder` with their metadata.jsonl lines (also of shard folders one level down), ordered by case and trajectory.

    Raises `EvaluationError` for an empty folder, missing or broken metadata, a listed file that is not there, or images of
    different sizes.
    """
    lines = read_metadata(folder, ("file_name", "case_id", "prompt"))
    paths = [line["_path"] for line in lines]
    if len(set(paths)) < len(paths):
        raise EvaluationError(f"{folder}: the same image is listed twice ({next(p for p in paths if paths.count(p) > 1)})")
    native = check_same_size(paths)
    metadata = tuple({key: value for key, value in line.items() if key != "_path"} for line in lines)
    return ImageSet(Path(folder).name, tuple(paths), tuple(line["case_id"] for line in lines), metadata, native)


def read_metadata(folder: str | Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """The metadata lines below `folder`, ordered by case and trajectory; "_path" is where a line's `file_name` lies.

    Raises `EvaluationError` for an empty or unfinished folder, a line that is broken or lacks a field of `required`, a file that is
    not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EvaluationError(f"no folder {folder}; --generated names the folder that `medgen sample` wrote")
    files = sorted([*folder.glob("metadata*.jsonl"), *folder.glob("*/metadata*.jsonl")])
    if not files and any(folder.glob(".metadata*.jsonl")):
        raise EvaluationError(f"sampling into {folder} is not finished; run the same `medgen sample` command again, it continues")
    if not files:
        held = sum(path.is_file() for path in folder.iterdir())
        raise EvaluationError(
            f"{folder} holds {held} files but no metadata.jsonl (what was asked for); `medgen sample` writes it"
        )
    lines = [line for file in files for line in _metadata_lines(file, required)]
    if not lines:
        raise EvaluationError(f"{files[0]} lists nothing: the sampling run wrote nothing")
    lines.sort(key=lambda line: (line["case_id"], line.get("trajectory", 0)))
    return lines


def _metadata_lines(file: Path, required: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            raise EvaluationError(f"{file}, line {number} is not JSON: {text[:80]!r}") from None
        missing = [key for key in required if not isinstance(line, dict) or key not in line]
        if missing:
            raise EvaluationError(f"{file}, line {number} lacks {', '.join(missing)}")
        path = file.parent / str(line["file_name"])
        if not path.resolve().is_relative_to(file.parent.resolve()):
            raise EvaluationError(f"{file}, line {number}: file_name {line['file_name']!r} lies outside {file.parent}")
        if not path.is_file():
            raise EvaluationError(f"{file}, line {number} lists {line['file_name']}, which is not there")
        yield {**line, "case_id": str(line["case_id"]), "_path": path}


def check_same_size(paths: Sequence[Path]) -> int | None:
    """The longer side of the images in pixels (headers only are read; None for DICOM).

    Raises `EvaluationError` naming the first image whose size differs from that of the first one.
    """
    expected: tuple[int, int] | None = None
    for path in paths:
        if path.suffix.lower() not in PILLOW_SUFFIXES:
            continue
        try:
            with Image.open(path) as image:
                size = image.size
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read as an image: {error}") from None
        expected = expected or size
        if size != expected:
            raise EvaluationError(
                f"{path} is {size[0]}x{size[1]} pixels, the others are {expected[0]}x{expected[1]}: mixed sizes"
            )
    return max(expected) if expected else None


def reference_set(manifest: Manifest, native: int | None = None, views: Sequence[str] | None = None) -> ImageSet:
    """The images of a manifest (of `views` only, if given), grouped by patient. Raises `EvaluationError` if none is left."""
    records = [record for record in manifest.records if views is None or record.view in views]
    if not records:
        raise EvaluationError(f"manifest {manifest.name!r} has no image of the views {', '.join(views or ())}")
    metadata = tuple({"record_id": r.record_id, "labels": r.labels, "record": r} for r in records)
    return ImageSet(
        manifest.name, tuple(manifest.image_path(r) for r in records), tuple(r.patient_id for r in records), metadata, native
    )


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: ImageSet, size: int) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return load_square(self.images.paths[index], self.size, self.images.native)


def batches(images: ImageSet, size: int, batch_size: int = 32, workers: int = 0) -> Iterator[Tensor]:
    """Images in order as [b,1,size,size] float32 in [-1,1]; only one batch is in memory at a time."""
    yield from DataLoader(_Pixels(images, size), batch_size, num_workers=workers)


def load_square(path: Path, size: int, native: int | None = None) -> Tensor:
    """One image as [1,size,size] float32 in [-1,1], by way of `native` pixels. Raises `EvaluationError` for NaN or infinity."""
    image = load_image(path, native or size)
    if not torch.isfinite(image).all():
        raise EvaluationError(f"{path} holds NaN or infinite pixels")
    if image.shape[-1] == size:
        return image
    resized: Tensor = functional.interpolate(image[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return resized.clamp(-1, 1)
