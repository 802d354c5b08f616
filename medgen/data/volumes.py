"""From a volume file (NIfTI, FreeSurfer .mgz) to the tensor that models see, `[1, D, H, W]` float32 in [-1, 1], and back.

A NIfTI array is indexed (x, y, z); tensors here are its mirror image (z, y, x), slices first: with the orientation RAS, D counts
from feet to head, H from back to front, W from the patient's left to right. An affine always maps (x, y, z) = (W, H, D) voxels to
millimetres in RAS.
"""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import nibabel
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from medgen.config import Config
from medgen.data import disk_cache
from medgen.data.images import ImageError

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
_SPACING_MM = (0.02, 30.0)  # outside: metres, micrometres or no spacing at all
_SHEAR = 0.05  # cosine between two axes: more is no scanner's grid


class VolumeError(ImageError):
    """A volume file that cannot be used; the message says which, what was found and what to do."""


class VolumePreprocessing(Config):
    """How a volume file becomes a tensor; part of a pipeline's saved configuration."""

    orientation: Literal["RAS"] | None = Field(
        "RAS", description="turn every volume to the patient's axes by its affine; null: as stored (files without an orientation)"
    )
    fit: Literal["zoom", "crop"] = Field(
        "zoom", description="zoom: the whole volume at the wanted size; crop: at spacing_mm, then the middle, padded where short"
    )
    spacing_mm: float | tuple[float, float, float] | None = Field(
        None, description="spacing along D, H, W that fit=crop resamples to; null: the file's own"
    )
    max_anisotropy: float = Field(
        3.0, ge=1, description="largest ratio of a file's coarsest to finest spacing (short-axis cine: 10 mm / 1.25 mm = 8)"
    )
    intensity: Literal["window", "minmax", "percentile"] = Field(
        "window", description="what becomes black and white: the window (CT), the volume's extremes, or two percentiles (MR)"
    )
    window: tuple[float, float] = Field(
        (-1024.0, 600.0), description="stored values (HU) of black and white, for intensity=window"
    )
    percentiles: tuple[float, float] = Field((0.5, 99.5), description="percentiles of black and white, for intensity=percentile")

    @model_validator(mode="after")
    def _ordered(self) -> VolumePreprocessing:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"window must rise, not {self.window[0]:g} to {self.window[1]:g}")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError("percentiles must rise within 0 and 100")
        if self.spacing_mm is not None and self.fit != "crop":
            raise ValueError("spacing_mm is what fit=crop resamples to; fit=zoom knows no spacing: leave one of them out")
        spacing = self.spacing_mm if isinstance(self.spacing_mm, tuple) else (self.spacing_mm or 1.0,)
        if not all(_SPACING_MM[0] <= value <= _SPACING_MM[1] for value in spacing):
            raise ValueError(f"spacing_mm must lie in {_SPACING_MM[0]} to {_SPACING_MM[1]} mm")
        return self

    def restored(self, values: Tensor) -> NDArray[np.float32]:
        """Stored values (HU) of `values` in [-1, 1] for intensity=window; [0, 1] for the others, whose scale each file lost."""
        unit = ((values.detach().float().cpu() + 1) / 2).numpy()
        low, high = self.window if self.intensity == "window" else (0.0, 1.0)
        return np.asarray(low + unit * (high - low), dtype=np.float32)


class Volume(NamedTuple):
    """A prepared volume: `[1, D, H, W]` float32 in [-1, 1], and the affine `[4, 4]` of its (x, y, z) voxels to RAS mm."""

    values: Tensor
    affine: NDArray[np.float64]


class Header(NamedTuple):
    """What a volume file says of itself: shape (x, y, z[, t]), spacing in mm along x, y, z, and its axes such as "LPS" ("" unknown)."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    axes: str


def is_volume(path: str | Path) -> bool:
    """Whether the name says that this is a volume file."""
    return str(path).lower().endswith(VOLUME_SUFFIXES)


def read_header(path: str | Path) -> Header:
    """Shape, spacing and orientation without the voxels. Raises `VolumeError`."""
    return _header(_open(Path(path)), Path(path))


def read_shape(path: str | Path) -> tuple[int, ...]:
    """The array's shape alone, whatever else the header says. Raises `VolumeError`."""
    return tuple(int(n) for n in _open(Path(path)).shape)


def read_volume(path: str | Path, need_orientation: bool = True) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """`[x, y, z]` float32 as stored, and its affine. Raises `VolumeError` for anything but one finite, placed volume.

    Without `need_orientation` a file that says nothing of its axes passes; its affine is then its spacing alone.
    """
    path = Path(path)
    image = _open(path)
    header = _header(image, path)
    if len(header.shape) == 4 and header.shape[3] > 1:
        raise VolumeError(
            f"{path} is 4D, {_x(header.shape)}: expected one 3D volume; write each frame to its own file (sources.acdc does)"
        )
    if need_orientation and not header.axes:
        raise VolumeError(
            f"{path} says no orientation (its sform and qform codes are 0): repair its header from the DICOM files, or use "
            "volume.orientation=null where all files of the set are stored alike"
        )
    try:
        values = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, TypeError, ImageFileError) as error:
        raise VolumeError(f"{path} cannot be decoded as a volume (damaged, cut off or not of numbers): {error}") from error
    values = values.reshape(header.shape[:3])
    if bad := int((~np.isfinite(values)).sum()):
        raise VolumeError(
            f"{path} holds {bad} NaN or infinite voxels of {values.size}: replace them (0, or air) and write it again"
        )
    affine = np.asarray(image.affine, dtype=np.float64) if header.axes else np.diag([*header.spacing, 1.0])
    return values, affine


def load_volume(path: str | Path, size: int | tuple[int, int, int], preprocessing: VolumePreprocessing) -> Volume:
    """The prepared volume at `path`; `size` is a cube's side or (D, H, W). Raises `VolumeError`."""
    path = Path(path)
    values, affine = read_volume(path, preprocessing.orientation is not None)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if (ratio := spacing.max() / spacing.min()) > preprocessing.max_anisotropy:
        raise VolumeError(
            f"{path} is anisotropic: {_x(spacing)} mm, {ratio:.3g} to 1, more than volume.max_anisotropy="
            f"{preprocessing.max_anisotropy:g}; take thinner slices, or raise it where the whole set is like this"
        )
    scaled = _scaled(torch.from_numpy(np.ascontiguousarray(values))[None], preprocessing, path)
    return _placed(scaled, affine, size, preprocessing)


def _placed(
    values: Tensor, affine: NDArray[np.float64], size: int | tuple[int, int, int], preprocessing: VolumePreprocessing
) -> Volume:
    """`values` [1,x,y,z] in [0,1], oriented, resampled to `size` (D, H, W) and reversed to [1,D,H,W] in [-1,1]."""
    from monai.data import MetaTensor  # slow to import
    from monai.transforms import Orientation, Resize, ResizeWithPadOrCrop

    wanted = ((size,) * 3 if isinstance(size, int) else size)[::-1]
    tensor: Any = MetaTensor(values, affine=torch.from_numpy(affine))
    if preprocessing.orientation is not None:
        labels = (("L", "R"), ("P", "A"), ("I", "S"))
        tensor = Orientation(axcodes=preprocessing.orientation, labels=labels)(tensor)
    shape = tuple(tensor.shape[1:])
    grid: tuple[int, ...] = wanted
    if preprocessing.fit == "crop":
        have = np.linalg.norm(np.asarray(tensor.affine)[:3, :3], axis=0)
        spacing = preprocessing.spacing_mm
        want = have if spacing is None else np.full(3, spacing) if isinstance(spacing, float) else np.array(spacing[::-1])
        grid = tuple(max(1, round(float(n * h / w))) for n, h, w in zip(shape, have, want, strict=True))
    if grid != shape:
        shrinks = any(a < b for a, b in zip(grid, shape, strict=True))
        tensor = Resize(spatial_size=grid, mode="trilinear", align_corners=False, anti_aliasing=shrinks)(tensor)
    if grid != wanted:
        tensor = ResizeWithPadOrCrop(spatial_size=wanted)(tensor)
    out = tensor.as_tensor().permute(0, 3, 2, 1).contiguous().clamp_(0, 1)
    return Volume(out.mul_(2).sub_(1), np.asarray(tensor.affine, dtype=np.float64))


def _scaled(values: Tensor, preprocessing: VolumePreprocessing, path: Path) -> Tensor:
    """`values` in [0, 1]."""
    low, high = float(values.min()), float(values.max())
    if high <= low:
        raise VolumeError(f"{path} shows nothing: every voxel is {low:g}")
    if preprocessing.intensity == "window":
        bottom, top = preprocessing.window
        if high <= bottom or low >= top:
            raise VolumeError(
                f"{path} holds values from {low:g} to {high:g}, all outside volume.window {bottom:g} to {top:g}: not in HU? "
                "Use intensity=percentile, or the window of these values"
            )
        low, high = bottom, top
    elif preprocessing.intensity == "percentile":
        low, high = (float(value) for value in np.percentile(values.numpy(), preprocessing.percentiles))
        if high <= low:
            raise VolumeError(f"{path}: its {preprocessing.percentiles} percentiles are both {low:g}; use intensity=minmax")
    return ((values - low) / (high - low)).clamp_(0, 1)


def write_volume(
    path: str | Path, values: Tensor | NDArray[Any], affine: NDArray[np.float64], dtype: Any = np.int16, description: str = ""
) -> Path:
    """Write `values` [D,H,W] or [1,D,H,W] (rounded if `dtype` is whole) as NIfTI, whole or not at all; the same bytes every time.

    `description` goes to the header, which has room for 79 letters.
    """
    array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    array = array[0] if array.ndim == 4 else array
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        array = np.clip(np.rint(array), limits.min, limits.max)
    image = nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)).astype(dtype), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("ascii", "replace")[:79]
    return save_nifti(path, image)


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def save_nifti(path: str | Path, image: nibabel.Nifti1Image) -> Path:
    """Write `image` whole or not at all; the same bytes every time."""
    path = Path(path)
    content = image.to_bytes()
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=5, mtime=0)
    disk_cache.write_atomically(path, lambda file: _write(file, content))
    return path


def middle_coronal(volume: Tensor) -> Tensor:
    """`[..., D, W]` of `[..., D, H, W]` in RAS order, as a film is hung: head up, the patient's right on the picture's left."""
    return volume[..., volume.shape[-2] // 2, :].flip(-2, -1)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise VolumeError(f"no image at {path}")
    try:
        return nibabel.load(path)
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        raise VolumeError(f"{path} cannot be decoded as a volume (damaged, cut off or another format): {error}") from error


def _header(image: Any, path: Path) -> Header:
    shape = tuple(int(n) for n in image.shape)
    if len(shape) not in (3, 4) or min(shape) < 1 or min(shape[:3]) < 2:
        raise VolumeError(f"{path} has the shape {_x(shape) or 'of nothing'}: expected a volume of at least 2 x 2 x 2 voxels")
    spacing = tuple(float(zoom) for zoom in image.header.get_zooms()[:3])
    low, high = _SPACING_MM
    if not all(math.isfinite(mm) and low <= mm <= high for mm in spacing):
        raise VolumeError(
            f"{path} says a spacing of {_x(spacing)} mm; expected {low:g} to {high:g}: metres or micrometres? Write it again in mm"
        )
    codes = [int(image.header[name]) for name in ("sform_code", "qform_code") if name in image.header]
    if codes and not any(codes):
        return Header(shape, spacing, "")
    matrix = np.asarray(image.affine, dtype=np.float64)[:3, :3]
    lengths = np.linalg.norm(matrix, axis=0)
    cosines = np.abs((matrix / np.maximum(lengths, 1e-9)).T @ (matrix / np.maximum(lengths, 1e-9)) - np.eye(3))
    plausible = np.isfinite(image.affine).all() and np.allclose(lengths, spacing, rtol=0.02) and cosines.max() < _SHEAR
    if not plausible:
        raise VolumeError(
            f"{path} has no plausible affine: its axes are {_x(lengths)} mm long (its header says {_x(spacing)}) and lean by a "
            f"cosine of {cosines.max():.2g}; repair it (nibabel, c3d), or resample it to a straight grid"
        )
    return Header(shape, spacing, "".join(nibabel.aff2axcodes(image.affine)))


def _x(numbers: Any) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)
