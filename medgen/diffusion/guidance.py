"""Classifier-free guidance as plain functions: strength, the range of noise levels where it acts, and its known excess taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """`scale` 1 is no guidance and costs nothing. `levels`: noise levels in [0,1] where it acts (Kynkäänniemi 2024: the middle).

    Several scales guide several conditions apart, each by its own prediction without that condition (see `guided`). `rescale` in
    [0,1] restores the conditional prediction's spread (Lin 2023, eq. 15-16) against burnt contrast.
    """

    scale: float | tuple[float, ...] = 1.0
    levels: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    @property
    def scales(self) -> tuple[float, ...]:
        """One scale for every prediction that lacks something."""
        return self.scale if isinstance(self.scale, tuple) else (self.scale,)

    def acts_at(self, level: float) -> bool:
        """Whether a prediction without a condition is needed at this noise level."""
        return any(scale != 1.0 for scale in self.scales) and self.levels[0] <= level <= self.levels[1]


def guided(conditional: Tensor, without: Tensor | Sequence[Tensor], guidance: Guidance) -> Tensor:
    """Predictions [B,...] of any kind, guided away from those that lack a condition.

    One: Ho & Salimans 2022, without + scale * (conditional - without). Several, each lacking one condition c: conditional +
    sum of (scale_c - 1) * (conditional - without_c), which samples p(x | all) * prod p(c | x, the others)^(scale_c - 1). This is
    the composition of Liu et al. 2022 (composable diffusion) taken around the joint prediction rather than around the empty one: conditions
    that act together (a contraction's extent at a moment of the beat) keep doing so, and a scale of 1 needs no evaluation.
    """
    parts = [without] if isinstance(without, Tensor) else list(without)
    if len(parts) != len(guidance.scales):
        raise ValueError(f"{len(parts)} predictions to be guided from, {len(guidance.scales)} scales")
    if len(parts) == 1:
        prediction = parts[0] + guidance.scales[0] * (conditional - parts[0])
    else:
        prediction = conditional + sum((scale - 1) * (conditional - part) for scale, part in zip(guidance.scales, parts))
    if guidance.rescale == 0.0:
        return prediction
    axes = tuple(range(1, prediction.ndim))
    spread = conditional.std(axes, keepdim=True) / prediction.std(axes, keepdim=True).clamp(min=1e-8)
    return guidance.rescale * prediction * spread + (1 - guidance.rescale) * prediction
