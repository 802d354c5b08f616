"""How far a number read off a clip lies from the true one: error, R², bias and limits of agreement, on all clips and on resamples at once.

As in `measures`, weights [B,N] say how often each clip counts, and every function gives [B].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def mae(truth: Floats, seen: Floats, weights: Floats) -> Floats:
    """Mean absolute error [B], in the unit of `truth` [N] and `seen` [N]."""
    return np.asarray(weights @ np.abs(seen - truth) / weights.sum(1))


def r2(truth: Floats, seen: Floats, weights: Floats) -> Floats:
    """Share of the variance that is read, 1 - residual/total sum of squares [B]; NaN where the truth does not vary."""
    total = weights.sum(1)
    mean = weights @ truth / total
    spread = weights @ truth**2 - total * mean**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(1 - weights @ (seen - truth) ** 2 / np.where(spread > 1e-9, spread, np.nan))


def bias(truth: Floats, seen: Floats, weights: Floats) -> Floats:
    """Mean of `seen` - `truth` [B]."""
    return np.asarray(weights @ (seen - truth) / weights.sum(1))


def limits(truth: Floats, seen: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Limits of agreement [B]: bias ± 1.96 standard deviations of the differences (Bland & Altman 1986)."""
    middle, total = bias(truth, seen, weights), weights.sum(1)
    squares = weights @ (seen - truth) ** 2 - total * middle**2
    reach = 1.96 * np.sqrt(np.maximum(squares, 0) / np.maximum(total - 1, 1))
    return middle - reach, middle + reach


def lower(truth: Floats, seen: Floats, weights: Floats) -> Floats:
    """The lower limit of agreement [B]."""
    return limits(truth, seen, weights)[0]


def upper(truth: Floats, seen: Floats, weights: Floats) -> Floats:
    """The upper limit of agreement [B]."""
    return limits(truth, seen, weights)[1]
