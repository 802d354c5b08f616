"""What a biomarker does over time: its rate per year, and whether it goes one way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import kendalltau, spearmanr

from medgen.evaluation.statistics import Floats

DAYS_PER_YEAR = 365.25


@dataclass(frozen=True)
class Trend:
    """kendall, spearman: rank correlation [N] of time and value (NaN where the value never changes); violations: share [N] of steps
    that go against the direction of the whole by more than the noise."""

    kendall: Floats
    spearman: Floats
    violations: Floats


def annualised_rate(days: ArrayLike, values: ArrayLike) -> Floats:
    """Slope per year [N] of the least-squares lines through `values` [N,T] at `days` [T] or [N,T]; NaN values are left out."""
    y = np.asarray(values, dtype=np.float64)
    x = np.broadcast_to(np.asarray(days, dtype=np.float64) / DAYS_PER_YEAR, y.shape)
    known = np.isfinite(y)
    count = known.sum(1, keepdims=True)
    x, y = np.where(known, x, 0), np.where(known, y, 0)
    x = np.where(known, x - x.sum(1, keepdims=True) / np.maximum(count, 1), 0)
    spread = (x**2).sum(1)
    return np.asarray(np.where(spread > 0, (x * y).sum(1) / np.where(spread > 0, spread, 1), np.nan))


def monotonicity(times: ArrayLike, values: ArrayLike, noise: float = 0.0) -> Trend:
    """Of `values` [N,T] at `times` [T] or [N,T]; `noise`: the difference of two measurements of the same (scan and rescan)."""
    y = np.asarray(values, dtype=np.float64)
    x = np.broadcast_to(np.asarray(times, dtype=np.float64), y.shape)
    if y.ndim != 2 or y.shape[1] < 2:
        raise ValueError(f"values must be [N,T] with at least two times, got {list(y.shape)}")
    ranks = [
        (np.nan, np.nan) if np.ptp(v) == 0 else (kendalltau(t, v).statistic, spearmanr(t, v).statistic) for t, v in zip(x, y)
    ]
    kendall, spearman = np.array(ranks, dtype=np.float64).T
    steps = np.diff(y, axis=1) * np.sign(y[:, -1:] - y[:, :1])
    return Trend(kendall, spearman, (steps < -noise).mean(1))
