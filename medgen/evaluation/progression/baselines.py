"""What a forecast must beat: the last image again, a straight line through the past; and the judge's error, which no forecast can beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medgen.evaluation.statistics import Floats

NEIGHBOURS = 25  # readings of similar films from which an error of the judge is drawn


def copy_last(past: NDArray, wanted: int) -> NDArray:
    """`past` [K,...] → its last entry, `wanted` times: [wanted,...]."""
    return np.repeat(past[-1:], wanted, axis=0)


def extrapolate(
    times: Sequence[float], past: NDArray, wanted: Sequence[float], low: float = 0.0, high: float = np.inf
) -> NDArray:
    """Least-squares line in time through `past` [K,...] at `times` [K], continued to `wanted` [T]: [T,...], kept within [low, high].

    One visit gives no line: it is repeated.
    """
    if len(past) < 2:
        return copy_last(past, len(wanted))
    t = np.asarray(times, dtype=np.float64)
    centred = t - t.mean()
    slope = np.tensordot(centred, past, axes=(0, 0)) / (centred**2).sum()
    ahead = (np.asarray(wanted, dtype=np.float64) - t.mean()).reshape(-1, *(1,) * (past.ndim - 1))
    return np.clip(past.mean(0) + ahead * slope, low, high).astype(past.dtype)


@dataclass(frozen=True)
class JudgeError:
    """How the judge misreads one biomarker: readings minus truth of real images, in the order of the truth."""

    truth: Floats
    residual: Floats

    @classmethod
    def of(cls, truth: Floats, reading: Floats) -> JudgeError | None:
        """From real images [N] whose truth is known; None where too few are."""
        known = np.isfinite(truth) & np.isfinite(reading)
        if known.sum() < NEIGHBOURS:
            return None
        order = np.argsort(truth[known], kind="stable")
        return cls(truth[known][order], (reading - truth)[known][order])

    def seen(self, values: Floats, rng: np.random.Generator) -> Floats:
        """`values` of any shape as the judge would read them: each with the error of a real image of nearly the same value.

        Errors are drawn independently: what the judge always gets wrong about one patient is not in them.
        """
        flat = np.asarray(values, dtype=np.float64).ravel()
        first, last = (np.searchsorted(self.truth, flat, side=side) for side in ("left", "right"))
        missing = np.maximum(NEIGHBOURS - (last - first), 0)
        first = np.maximum(first - (missing + 1) // 2, 0)
        last = np.minimum(np.maximum(last, first) + (missing + 1) // 2, len(self.truth))
        chosen = first + (rng.random(len(flat)) * (last - first)).astype(np.intp)
        return np.maximum(flat + self.residual[chosen], 0.0).reshape(np.shape(values))
