"""From an image file (PNG, JPEG, TIFF, DICOM) to the tensor that models see: `[1, H, W]` float32 in [-1, 1].

`ImagePreprocessing` is saved with every pipeline, so that a model always meets the intensities and geometry it was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from medgen.config import Config
from medgen.data.dicom import DICOM_SUFFIXES, DicomError, is_dicom, read_dicom

PILLOW_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


class ImageError(ValueError):
    """An image file that cannot be used; the message says which and why."""


class ImagePreprocessing(Config):
    """How an image file becomes a tensor; part of a pipeline's saved configuration."""

    size: int = Field(512, ge=8, le=4096, description="height and width in pixels")
    pad: bool = Field(True, description="pad to a square with black; otherwise crop the centre square")
    intensity: Literal["stored", "minmax", "percentile"] = Field(
        "stored",
        description="what becomes black and white: the container's full range (DICOM: its VOI window), the image's own extremes, "
        "or its 0.5th and 99.5th percentile (for 16-bit files that hold 12 bits)",
    )
    range: tuple[float, float] = Field((-1.0, 1.0), description="values of black and white in the tensor")


def load_image(path: str | Path, size: int | None = None, channels: int = 1) -> Tensor:
    """`[channels, H, W]` float32 in [-1, 1] of a PNG (8/16 bit), JPEG, TIFF or DICOM file; `size` pads to a square and resizes.

    Raises `ImageError` (or its DICOM reason) for a missing, damaged or non-finite image.
    """
    values = torch.from_numpy(read_grey(path, size))[None]
    if size is not None:
        values = to_square(values, size, pad=True)
    return (values * 2 - 1).expand(channels, -1, -1).contiguous()


def preprocess(path: str | Path, preprocessing: ImagePreprocessing) -> Tensor:
    """`[1, size, size]` float32 in `preprocessing.range`, on a grid of 65,536 grey values (so that caching changes nothing)."""
    low, high = preprocessing.range
    return from_grid(to_grid(path, preprocessing), low, high)


def to_grid(path: str | Path, preprocessing: ImagePreprocessing) -> NDArray[np.uint16]:
    """`[size, size]` uint16: the preprocessed image as it is cached."""
    grey = read_grey(path, preprocessing.size)
    if preprocessing.intensity != "stored":
        ends = (0.0, 100.0) if preprocessing.intensity == "minmax" else (0.5, 99.5)
        low, high = np.percentile(grey, ends)
        grey = np.clip((grey - low) / max(float(high - low), 1e-6), 0.0, 1.0).astype(np.float32)
    values = to_square(torch.from_numpy(grey)[None], preprocessing.size, preprocessing.pad)[0]
    grid: NDArray[np.uint16] = np.rint(values.numpy() * 65535).astype(np.uint16)
    return grid


def from_grid(grid: NDArray[np.uint16], low: float, high: float) -> Tensor:
    """`[1, H, W]` float32 in [low, high] from `to_grid`'s values."""
    values = grid.astype(np.float32)  # NumPy, not torch: its threads cost a loader more than they bring
    values *= np.float32((high - low) / 65535)
    values += np.float32(low)
    return torch.from_numpy(values)[None]


def read_grey(path: str | Path, size_hint: int | None = None) -> NDArray[np.float32]:
    """`[H, W]` float32 in [0, 1]. With `size_hint` a JPEG may be decoded at a fraction that is still twice that size."""
    path = Path(path)
    if not path.is_file():
        raise ImageError(f"no image at {path}")
    if path.suffix.lower() in DICOM_SUFFIXES or (path.suffix.lower() not in PILLOW_SUFFIXES and is_dicom(path)):
        try:
            return read_dicom(path)[0]
        except DicomError as error:
            raise ImageError(str(error)) from error
    try:
        with Image.open(path) as image:
            if size_hint is not None:
                image.draft("L", (2 * size_hint, 2 * size_hint))
            return _grey(ImageOps.exif_transpose(image), path)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{path} cannot be decoded as an image (damaged, cut off or another format): {error}") from error


def _grey(image: Image.Image, path: Path) -> NDArray[np.float32]:
    if image.mode == "F":
        values = np.array(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ImageError(f"{path} holds NaN or infinite pixels")
        if values.min() < 0 or values.max() > 1:
            raise ImageError(
                f"{path} holds floats outside [0, 1] (from {values.min():g} to {values.max():g}); save it as 16-bit PNG"
            )
        return values
    if image.mode.startswith("I"):  # 16-bit greyscale: "I;16" and kin, "I" for some containers
        wide: NDArray[Any] = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise ImageError(f"{path} holds integers outside 16 bits (from {wide.min()} to {wide.max()})")
        return (wide / np.float32(65535)).astype(np.float32)
    return (np.asarray(image.convert("L")) / np.float32(255)).astype(np.float32)


def to_square(values: Tensor, size: int, pad: bool) -> Tensor:
    """`[N, H, W]` in [0, 1] to `[N, size, size]`: square by padding or centre crop, then antialiased."""
    height, width = values.shape[-2:]
    side = max(height, width) if pad else min(height, width)
    top, left = (side - height) // 2, (side - width) // 2  # negative: crop
    values = functional.pad(values, (left, side - width - left, top, side - height - top))
    if side != size:
        values = functional.interpolate(values[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return values.clamp_(0.0, 1.0)
