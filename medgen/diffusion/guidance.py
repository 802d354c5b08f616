"""Classifier-free guidance as plain functions: strength, the range of noise levels where it acts, and its known excess taken back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """`scale` 1 is no guidance and costs nothing. `levels`: noise levels in [0,1] where it acts (Kynkäänniemi 2024: the middle).

    `rescale` in [0,1] restores the conditional prediction's spread (Lin 2023, eq. 15-16) against burnt contrast.
    """

    scale: float = 1.0
    levels: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def acts_at(self, level: float) -> bool:
        """Whether the unconditional prediction is needed at this noise level."""
        return self.scale != 1.0 and self.levels[0] <= level <= self.levels[1]


def guided(conditional: Tensor, unconditional: Tensor, guidance: Guidance) -> Tensor:
    """Ho & Salimans 2022: unconditional + scale * (conditional - unconditional), for predictions [B,...] of any kind."""
    prediction = unconditional + guidance.scale * (conditional - unconditional)
    if guidance.rescale == 0.0:
        return prediction
    axes = tuple(range(1, prediction.ndim))
    spread = conditional.std(axes, keepdim=True) / prediction.std(axes, keepdim=True).clamp(min=1e-8)
    return guidance.rescale * prediction * spread + (1 - guidance.rescale) * prediction
