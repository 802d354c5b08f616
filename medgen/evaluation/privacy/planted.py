"""Planted copies: training films changed as a copy might be, by which a privacy gate is tested before it is believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from medgen.seeds import generator

Change = Literal["flip", "crop", "contrast", "noise", "combined"]
CHANGES: tuple[Change, ...] = get_args(Change)
SMALLEST_CROP = 0.8  # share of the film's side that a crop keeps at least
GAMMA, GAIN = (0.6, 1.6), (0.75, 1.25)
NOISE = (0.02, 0.1)  # standard deviation, as a share of the full range from black to white


def planted(films: Tensor, changes: Sequence[Change], seed: int = 0) -> Tensor:
    """Copies of `films` [N,1,H,W] in [-1,1], each with its own of `changes`; the same for the same film number and seed.

    flip: mirrored. crop: 80 to 98 % of the side, anywhere in the film, enlarged to the whole. contrast: another exponent and gain.
    noise: white, 2 to 10 % of the range. combined: crop, contrast and noise together, every second one mirrored too.
    """
    return torch.cat([_changed(film, change, (seed, i)) for i, (film, change) in enumerate(zip(films, changes, strict=True))])


def _changed(film: Tensor, change: Change, key: tuple[int, int]) -> Tensor:
    draws = generator("planted copy", *key)
    numbers = torch.rand(7, generator=draws).tolist()
    values = (film[None].float() + 1) / 2
    if change == "flip" or (change == "combined" and key[1] % 2):
        values = values.flip(-1)
    if change in ("crop", "combined"):
        values = _cropped(values, _between(numbers[0], SMALLEST_CROP, 0.98), numbers[1], numbers[2])
    if change in ("contrast", "combined"):
        values = ((values.clamp(0, 1) ** _between(numbers[3], *GAMMA)) - 0.5) * _between(numbers[4], *GAIN) + 0.5
    if change in ("noise", "combined"):
        values = values + torch.randn(values.shape, generator=draws) * _between(numbers[5], *NOISE)
    return (values.clamp(0, 1) * 2 - 1).to(film.dtype)


def _cropped(values: Tensor, keep: float, across: float, down: float) -> Tensor:
    """The part of [1,1,H,W] whose sides are `keep` of the whole, at `across` and `down` of the room there is, as large as the whole."""
    room = 1 - keep
    theta = torch.tensor([[[keep, 0.0, room * (2 * across - 1)], [0.0, keep, room * (2 * down - 1)]]])
    grid = functional.affine_grid(theta, list(values.shape), align_corners=False)
    return functional.grid_sample(values, grid, padding_mode="border", align_corners=False)


def _between(share: float, low: float, high: float) -> float:
    return low + share * (high - low)
