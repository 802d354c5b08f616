"""How alike two ECGs are: error and correlation per lead, R peaks found again, and the linear regressions to be better than."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Signals = NDArray[np.float32]


class LinearRegression:
    """Every target row from the given rows at lags of -`reach` to `reach` samples (0: the same instant), by ridge regression.

    Fitted to recordings [G,S] and [N,S] one after another, so that memory does not grow with their number.
    """

    def __init__(self, reach: int = 0, stride: int = 1, ridge: float = 1e-4) -> None:
        self.lags, self.ridge = tuple(range(-reach, reach + 1, stride)), ridge
        self.weights: NDArray[np.float64] | None = None

    def fit(self, given: Sequence[Signals], targets: Sequence[Signals]) -> LinearRegression:
        """Least squares over all instants of all recordings, with an intercept."""
        scatter: Any = 0.0
        cross: Any = 0.0
        for one, other in zip(given, targets, strict=True):
            rows = self._rows(one)
            scatter = scatter + rows @ rows.T
            cross = cross + rows @ other.T.astype(np.float64)
        size = len(np.asarray(scatter))
        penalty = self.ridge * np.trace(np.asarray(scatter)) / size * np.eye(size)
        self.weights = np.linalg.solve(np.asarray(scatter) + penalty, np.asarray(cross))
        return self

    def predict(self, given: Signals) -> Signals:
        """[N,S] from [G,S]."""
        if self.weights is None:
            raise ValueError("fit the regression before it predicts")
        return np.asarray(self.weights.T @ self._rows(given), np.float32)

    def _rows(self, given: Signals) -> NDArray[np.float64]:
        reach = self.lags[-1]
        padded = np.pad(given.astype(np.float64), ((0, 0), (reach, reach)))
        count = given.shape[1]
        return np.concatenate([np.ones((1, count)), *(padded[:, reach + lag : reach + lag + count] for lag in self.lags)])


def correlation(first: Signals, second: Signals) -> NDArray[np.float64]:
    """Pearson's r of each row of two [N,S]; NaN where one is constant."""
    a, b = (x.astype(np.float64) - x.mean(1, keepdims=True) for x in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)))


@dataclass(frozen=True)
class PeakMatch:
    """R peaks found against true ones: how many of each matched within a tolerance, and the matched ones' errors in seconds."""

    true: int
    found: int
    errors: NDArray[np.float64]

    @property
    def matched(self) -> int:
        """Pairs within the tolerance."""
        return len(self.errors)


def match_peaks(found: NDArray[np.float64], true: NDArray[np.float64], tolerance: float) -> PeakMatch:
    """One-to-one matches of times [K] and [L] (seconds) that differ by at most `tolerance`, as many and as close as possible."""
    if not len(found) or not len(true):
        return PeakMatch(len(true), len(found), np.zeros(0))
    distance = np.abs(found[:, None] - true[None])
    rows, columns = linear_sum_assignment(np.where(distance <= tolerance, distance, 1e3))
    close = distance[rows, columns] <= tolerance
    return PeakMatch(len(true), len(found), (found[rows] - true[columns])[close])


def f1(matches: Sequence[PeakMatch]) -> float:
    """F1 over all recordings together; NaN without any peak."""
    total = sum(m.true + m.found for m in matches)
    return 2 * sum(m.matched for m in matches) / total if total else float("nan")
