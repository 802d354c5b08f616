"""The judge's eye: biomarkers and features of films that are real, generated, reconstructed or averaged; lung air of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from medgen.data.images import to_square
from medgen.evaluation.statistics import Floats
from medgen.models.film_meter import FilmMeter

AERATED_HU = -500.0
BATCH = 64


@dataclass(frozen=True)
class Readings:
    """What a judge reads: every biomarker [...], and features [...,F], for images with any leading dimensions."""

    biomarkers: Mapping[str, Floats]
    features: NDArray[np.float32]


@torch.inference_mode()
def read_films(judge: FilmMeter, films: ArrayLike) -> Readings:
    """`films` [...,H,W] in [0,1], padded to a square and resized to the judge's size, each read alone."""
    values = torch.as_tensor(np.asarray(films, dtype=np.float32))
    if values.ndim < 2 or not torch.isfinite(values).all():
        raise ValueError(f"films must be finite and [...,H,W], got {list(values.shape)}")
    leading, size = values.shape[:-2], int(judge.config["image_size"])
    device = next(judge.parameters()).device
    biomarkers: list[dict[str, torch.Tensor]] = []
    features: list[torch.Tensor] = []
    for part in values.reshape(-1, *values.shape[-2:]).split(BATCH):
        maps, seen = judge.thickness_and_features((to_square(part, size, pad=True)[:, None] * 2 - 1).to(device))
        biomarkers.append(judge.biomarkers(maps.float()))
        features.append(seen.float().cpu())
    read = {
        name: torch.cat([part[name] for part in biomarkers]).double().cpu().numpy().reshape(leading) for name in biomarkers[0]
    }
    return Readings(read, torch.cat(features).numpy().reshape(*leading, -1))


def read_volumes(hu: ArrayLike, voxel_ml: float) -> dict[str, Floats]:
    """Aerated lung in mL [...] of volumes [...,D,H,W] in HU (D from feet to head), voxels of `voxel_ml`.

    Voxels below -500 HU inside the body; air that reaches a wall of the volume, but its top and bottom, lies around the body.
    """
    values = np.asarray(hu)
    if values.ndim < 3:
        raise ValueError(f"volumes must be [...,D,H,W], got {list(values.shape)}")
    flat = values.reshape(-1, *values.shape[-3:])
    voxels = np.array([_inner_air(volume).sum() for volume in flat], dtype=np.float64)
    return {"aerated_lung_ml": (voxels * voxel_ml).reshape(values.shape[:-3])}


def _inner_air(volume: NDArray[np.floating]) -> NDArray[np.bool_]:
    air = volume < AERATED_HU
    regions, _ = ndimage.label(air)
    walls = np.concatenate([regions[:, edge].ravel() for edge in (0, -1)] + [regions[..., edge].ravel() for edge in (0, -1)])
    return np.asarray(air & ~np.isin(regions, np.unique(walls)))
