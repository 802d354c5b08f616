"""Where a frame would be if nothing but time happened: the frames that are known, carried on or blended.

A forecast learns what is left over (TADM, Litrico 2024, diffuses the residual to the last scan). Between two known frames the
anchor moves from one to the other, so that forecasting and in-betweening are the same task; at a known frame's own time it is
that frame, so that a gap of zero asks for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def neighbours(known: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B,T] of the nearest known frame at or before each frame, and at or after it; -1 where there is none. known [B,T] bool."""
    count = known.shape[1]
    index = torch.arange(count, device=known.device).expand_as(known)
    before = index.masked_fill(~known, -1).cummax(1).values
    after = index.masked_fill(~known, count).flip(1).cummin(1).values.flip(1)
    return before, after.masked_fill(after == count, -1)


def anchors(latents: Tensor, times: Tensor, known: Tensor) -> Tensor:
    """[B,T,C,*S]: latents [B,T,C,*S] of the known frames, held before the first and after the last, linear in time between two.

    times [B,T] do not decrease; known [B,T] bool, at least one frame of every sequence (raises `ValueError`).
    """
    if not bool(known.any(1).all()):
        raise ValueError("a sequence without a known frame has no anchor: give at least one visit")
    before, after = neighbours(known)
    before, after = torch.where(before < 0, after, before), torch.where(after < 0, before, after)
    start, end = times.gather(1, before), times.gather(1, after)
    span = end - start
    weight = torch.where(span > 0, (times - start) / span.clamp(min=torch.finfo(times.dtype).tiny), 0.0)
    weight = weight.clamp(0, 1).reshape(weight.shape + (1,) * (latents.ndim - 2)).to(latents.dtype)
    return torch.lerp(_frames_at(latents, before), _frames_at(latents, after), weight)


def _frames_at(latents: Tensor, index: Tensor) -> Tensor:
    """latents [B,T,...] at index [B,T] of frames."""
    return latents[torch.arange(len(latents), device=latents.device)[:, None], index]
