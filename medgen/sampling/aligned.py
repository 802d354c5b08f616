"""How alike two films are once one is laid over the other: a correlation that zoom, shift and contrast cannot hide."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 32
"""Films are compared at so many pixels: noise is averaged out, anatomy is not."""
STORED = 64
"""Candidates are kept at so many: an enlarged part of one still has what the comparison sees."""
_STARTS = (1.0, 0.87)  # parts of the candidate's side that are tried first
_LOG_SMALLEST, _LOG_LARGEST = math.log(0.7), math.log(1.1)  # and of those that are searched
_FARTHEST = 0.35  # shift, in half sides
_EDGE = 1  # pixels of the border that do not count
_DEGREE = 3  # of the grey curve


def reduced(films: Tensor, side: int) -> Tensor:
    """Films [B,1,H,W] as [B,side,side] float32, each pixel a mean."""
    return functional.adaptive_avg_pool2d(films.float(), side)[:, 0]


def aligned_correlation(films: Tensor, candidates: Tensor, iterations: int = 8) -> Tensor:
    """Correlation [Q,K] of `films` [Q,SIDE,SIDE] with the part of each of `candidates` [Q,K,STORED,STORED] that fits best.

    The candidate's grey values are first put through the cubic curve that fits best, so a change of contrast does not matter.
    """
    each = candidates.shape[1]
    where = _placed(films, functional.avg_pool2d(candidates, STORED // SIDE), iterations)
    whole = _coordinates(STORED, films.device)
    grid = whole * where[:, 0].exp()[:, None, None, None] + where[:, None, None, 1:]
    parts = functional.grid_sample(candidates.flatten(0, 1)[:, None], grid, padding_mode="border", align_corners=False)
    inner = slice(_EDGE, SIDE - _EDGE)
    parts = functional.avg_pool2d(parts, STORED // SIDE)[:, 0, inner, inner]
    wanted = films[:, None, inner, inner].expand(-1, each, -1, -1).flatten(0, 1)
    curved = _curved(parts, wanted)
    return (_standard(curved) * _standard(wanted)).mean((1, 2)).view(-1, each)


def _placed(films: Tensor, candidates: Tensor, iterations: int) -> Tensor:
    """(log zoom, shift across, shift down) [Q*K,3] of the part of each of `candidates` [Q,K,S,S] that is most like `films` [Q,S,S].

    Gauss-Newton steps on standardised grey values (Evangelidis & Psarakis 2008) from each of `_STARTS`; the best place met counts.
    """
    queries, each, side = *candidates.shape[:2], candidates.shape[-1]
    starts, count = len(_STARTS), queries * each * len(_STARTS)
    source = candidates[:, :, None].expand(-1, -1, starts, -1, -1).reshape(count, 1, side, side)
    target = _standard(films)[:, None, None].expand(-1, each, starts, -1, -1).reshape(count, side, side)
    across = functional.pad(source[..., 2:] - source[..., :-2], (1, 1)) * (side / 4)
    down = functional.pad(source[..., 2:, :] - source[..., :-2, :], (0, 0, 1, 1)) * (side / 4)
    layers, whole = torch.cat([source, across, down], 1), _coordinates(side, films.device)
    where = torch.zeros(count, 3, device=films.device)
    where[:, 0] = torch.tensor(_STARTS, device=films.device).log().repeat(queries * each)
    best, found = torch.full((count,), -1.0, device=films.device), where
    for _ in range(iterations):
        zoom = where[:, 0].exp()[:, None, None, None]
        seen = functional.grid_sample(layers, whole * zoom + where[:, None, None, 1:], padding_mode="border", align_corners=False)
        standard = _standard(seen[:, 0])
        alike = (standard * target).mean((1, 2))
        found, best = torch.where((alike > best)[:, None], where, found), torch.maximum(alike, best)
        slopes = torch.stack([(seen[:, 1:] * whole.permute(2, 0, 1)).sum(1) * zoom[..., 0], seen[:, 1], seen[:, 2]], 1)
        where = where + _step((slopes / _spread(seen[:, 0])[:, None]).flatten(2), (target - standard).flatten(1))
        where = torch.cat([where[:, :1].clamp(_LOG_SMALLEST, _LOG_LARGEST), where[:, 1:].clamp(-_FARTHEST, _FARTHEST)], 1)
    chosen = best.view(-1, starts).argmax(1)
    return found.view(-1, starts, 3)[torch.arange(queries * each, device=films.device), chosen]


def _step(slopes: Tensor, rest: Tensor) -> Tensor:
    """Damped least-squares step [N,3] from derivatives [N,3,P] and what is left to explain [N,P]."""
    slopes = slopes - slopes.mean(2, keepdim=True)
    normal = slopes @ slopes.transpose(1, 2)
    damping = normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-6) * 0.02
    normal = normal + torch.eye(3, device=slopes.device) * damping[:, None, None]
    return torch.linalg.solve(normal, slopes @ rest[..., None])[..., 0].clamp(-0.1, 0.1)


def _curved(values: Tensor, wanted: Tensor) -> Tensor:
    """`values` [N,h,w] through the polynomial, of each its own, that brings them nearest to `wanted`."""
    flat = _standard(values).flatten(1)
    powers = torch.stack([flat**degree for degree in range(_DEGREE + 1)], 2)
    normal = powers.transpose(1, 2) @ powers + torch.eye(_DEGREE + 1, device=flat.device) * (1e-4 * flat.shape[1])
    weights = torch.linalg.solve(normal, powers.transpose(1, 2) @ wanted.flatten(1)[..., None])
    return (powers @ weights)[..., 0].view_as(values)


def _coordinates(side: int, device: torch.device) -> Tensor:
    """The grid [side,side,2] of a whole picture."""
    return functional.affine_grid(torch.eye(2, 3, device=device)[None], [1, 1, side, side], align_corners=False)[0]


def _spread(values: Tensor) -> Tensor:
    return values.std((-2, -1), keepdim=True, correction=0).clamp(min=1e-4)


def _standard(values: Tensor) -> Tensor:
    return (values - values.mean((-2, -1), keepdim=True)) / _spread(values)
