"""Left-ventricular volume and ejection fraction from masks, by the area-length method (Lang et al., ASE/EACVI 2015)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from medgen.evaluation.echo.phase import Beats, smooth_volume
from medgen.evaluation.statistics import Floats

SMALLEST_AREA = 40.0  # pixels: less is no ventricle
_LINES = (-1.5, -0.5, 0.5, 1.5)  # pixels beside the long axis over which its length is averaged
_STEP = 0.5


def area_length(cavity: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Area [N] in square pixels and long axis [N] in pixels of LV cavities [N,H,W] (probabilities or 0/1).

    The long axis runs through the apex and the middle of the mitral plane: the line from the middle of the cavity's lowest tenth,
    as seen along its principal axis, to that of its highest. Its length is the integral of the probability along that line, so
    neither is bound to whole pixels. `base` [N,H,W] (the left atrium) says which end is the base; without it, the lower one is.
    """
    n, height, width = cavity.shape
    rows = torch.arange(height, dtype=cavity.dtype, device=cavity.device)[None, :, None]
    columns = torch.arange(width, dtype=cavity.dtype, device=cavity.device)[None, None]
    area = cavity.sum((1, 2))
    weight = cavity / area.clamp(min=1e-6)[:, None, None]
    row, column = ((weight * place).sum((1, 2))[:, None, None] for place in (rows, columns))
    dr, dc = rows - row, columns - column
    second = [(weight * product).sum((1, 2)) for product in (dr * dr, dc * dc, dr * dc)]
    angle = 0.5 * torch.atan2(2 * second[2], second[0] - second[1])  # from straight down, towards larger columns
    down, right = angle.cos()[:, None, None], angle.sin()[:, None, None]
    if base is not None:
        towards = ((base * dr).sum((1, 2))[:, None, None] * down + (base * dc).sum((1, 2))[:, None, None] * right).sign()
        down, right = (torch.where(towards < 0, -value, value) for value in (down, right))
    along = dr * down + dc * right
    ends = [_end(weight, along, dr, dc, share) for share in (0.1, 0.9)]
    axis = ends[1] - ends[0]
    axis = axis / axis.norm(dim=1, keepdim=True).clamp(min=1e-6)
    middle = (ends[0] + ends[1]) / 2 + torch.stack([row, column], -1).view(n, 2)
    return area, _chord(cavity, middle, axis)


def _end(weight: Tensor, along: Tensor, dr: Tensor, dc: Tensor, share: float) -> Tensor:
    """Centre [N,2] (row, column from the centroid) of the tenth of the cavity that lies at one end of its principal axis."""
    order = along.flatten(1).argsort(1)
    passed = weight.flatten(1).gather(1, order).cumsum(1)
    chosen = (passed <= share) if share < 0.5 else (passed >= share)
    mask = torch.zeros_like(passed).scatter(1, order, chosen.to(passed.dtype)) * weight.flatten(1)
    total = mask.sum(1).clamp(min=1e-9)
    places = (dr.expand_as(along), dc.expand_as(along))
    return torch.stack([(mask * place.flatten(1)).sum(1) / total for place in places], 1)


def _chord(cavity: Tensor, middle: Tensor, axis: Tensor) -> Tensor:
    """Length [N] of the cavity along `axis` [N,2] through `middle` [N,2] (row, column), averaged over a few parallel lines."""
    height, width = cavity.shape[1:]
    reach = math.hypot(height, width) / 2
    steps = torch.arange(-reach, reach, _STEP, dtype=cavity.dtype, device=cavity.device)
    beside = torch.tensor(_LINES, dtype=cavity.dtype, device=cavity.device)
    across = torch.stack([-axis[:, 1], axis[:, 0]], 1)
    points = (
        middle[:, None, None]
        + beside[None, :, None, None] * across[:, None, None]
        + steps[None, None, :, None] * axis[:, None, None]
    )
    size = points.new_tensor([height, width])
    grid = ((2 * points + 1) / size - 1).flip(-1)  # grid_sample wants x before y
    values = functional.grid_sample(cavity[:, None], grid, align_corners=False)[:, 0]
    return values.sum(2).mean(1) * _STEP


def volumes(area: Floats, length: Floats, pixel_mm: float | None = None) -> Floats:
    """V = 8 A² / (3 π L) of areas [T] in square pixels and lengths [T] in pixels: mL where `pixel_mm` is known, else cubic pixels.

    NaN where the cavity is smaller than `SMALLEST_AREA`: no ventricle was seen there.
    """
    seen = (area >= SMALLEST_AREA) & (length > 0)
    volume = np.full(len(area), np.nan)
    volume[seen] = 8 * area[seen] ** 2 / (3 * math.pi * length[seen])
    return volume if pixel_mm is None else volume * pixel_mm**3 / 1000


def ejection_fraction(volume: Floats, times: Floats, beats: Beats) -> tuple[float, float, float]:
    """EF in percent, EDV and ESV (unit of `volume` [T]): means over the beats whose ED and ES the clip shows.

    A clip without a whole systole is measured between the largest and the smallest volume of its smoothed curve.
    """
    seen = []
    for edv, start, end in zip(beats.edv, beats.ed, [*beats.ed[1:], np.inf], strict=False):
        inside = (beats.es > start) & (beats.es < end)
        if inside.any():
            seen.append((float(edv), float(beats.esv[inside][0])))
    if not seen:
        curve = smooth_volume(volume, times)
        if not np.isfinite(curve).any():
            return float("nan"), float("nan"), float("nan")
        seen = [(float(curve.max()), float(curve.min()))]
    edv, esv = (np.array(values, dtype=np.float64) for values in zip(*seen, strict=True))
    fraction = 100 * float(np.mean(1 - esv / np.maximum(edv, 1e-9)))
    return fraction, float(edv.mean()), float(esv.mean())
