"""Do the drawn futures spread as the real ones do? Scores of samples [N,M] against what came, or against simulated futures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from medgen.evaluation.statistics import Floats
from medgen.seeds import stable_seed


@dataclass(frozen=True)
class SpreadError:
    """Do wider futures go with larger errors? spearman: of the draws' standard deviation and the error of their mean.

    ratio: root mean variance of the draws, times √((M+1)/M) for their number, over the root mean squared error of their mean
    (Fortin et al. 2014): 1 where they are calibrated, below where they are too sure of themselves.
    """

    spearman: float
    ratio: float


def crps(draws: ArrayLike, true: ArrayLike) -> Floats:
    """Continuous ranked probability score [N] of `draws` [N,M] against `true` [N]: E|X − y| − ½ E|X − X′| over the draws.

    The sample formula of Gneiting & Raftery 2007 (eq. 21); for one draw the absolute error. In the quantity's unit, less is better.
    """
    x, y = _checked(draws, true)
    return np.asarray(np.abs(x - y[:, None]).mean(1) - 0.5 * _mean_difference(x))


def crps_of_futures(draws: ArrayLike, futures: Sequence[ArrayLike]) -> Floats:
    """Mean CRPS [N] of `draws` [N,M] over the futures [K] of each row, each of which could have come."""
    rows = np.asarray(draws, dtype=np.float64)
    if len(rows) != len(futures):
        raise ValueError(f"{len(rows)} rows of draws and futures of {len(futures)}")
    scores = [
        float(crps(np.broadcast_to(x, (np.size(f), len(x))), np.ravel(f)).mean()) for x, f in zip(rows, futures, strict=True)
    ]
    return np.array(scores)


def band(draws: ArrayLike, level: float) -> tuple[Floats, Floats]:
    """Ends [N] of the central band of `draws` [N,M] in which one more draw lies with probability `level`.

    Quantiles at the positions p (M + 1) (Weibull 1939), the only ones for which that holds at any M; with fewer than 2 / (1 − level) − 1
    draws the extremes are all there is, and the band is narrower than its name.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    low, high = np.quantile(np.asarray(draws, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2], axis=1, method="weibull")
    return np.asarray(low), np.asarray(high)


def covered(draws: ArrayLike, true: ArrayLike, level: float) -> NDArray[np.bool_]:
    """Whether `true` [N] lies in the `band` of `draws` [N,M]."""
    x, y = _checked(draws, true)
    low, high = band(x, level)
    return np.asarray((low <= y) & (y <= high))


def futures_covered(draws: ArrayLike, futures: Sequence[ArrayLike], level: float) -> Floats:
    """Share [N] of the futures [K] of each row that lie in the `band` of its draws [N,M]."""
    low, high = band(draws, level)
    if len(low) != len(futures):
        raise ValueError(f"{len(low)} rows of draws and futures of {len(futures)}")
    rows = (np.ravel(np.asarray(f, dtype=np.float64)) for f in futures)
    return np.array([float(((a <= f) & (f <= b)).mean()) for a, b, f in zip(low, high, rows, strict=True)])


def rank_histogram(draws: ArrayLike, true: ArrayLike, seed: int = 0) -> NDArray[np.int64]:
    """Counts [M+1] of the rank of `true` [N] among its `draws` [N,M] (Talagrand et al. 1997); ties are broken by lot.

    Flat where they are calibrated, a U where the draws are too narrow, a slope where they are off.
    """
    x, y = _checked(draws, true)
    below, equal = (x < y[:, None]).sum(1), (x == y[:, None]).sum(1)
    ranks = below + np.random.default_rng(stable_seed("rank ties", seed)).integers(0, equal + 1)
    return np.bincount(ranks, minlength=x.shape[1] + 1).astype(np.int64)


def spread_error(draws: ArrayLike, true: ArrayLike) -> SpreadError:
    """The relation of spread and error over rows; NaN with one draw or fewer than three rows."""
    x, y = _checked(draws, true)
    if x.shape[1] < 2 or len(x) < 3:
        return SpreadError(float("nan"), float("nan"))
    spread, error = x.std(1, ddof=1), np.abs(x.mean(1) - y)
    flat = min(np.ptp(spread), np.ptp(error)) < 1e-12
    rmse = float(np.sqrt((error**2).mean()))
    size = float(np.sqrt((spread**2).mean() * (1 + 1 / x.shape[1])))
    return SpreadError(float("nan") if flat else float(spearmanr(spread, error).statistic), size / rmse if rmse else float("nan"))


def _mean_difference(x: Floats) -> Floats:
    """Mean |x_i − x_j| over all pairs of a row, itself included [N], from the sorted row in M log M."""
    count = x.shape[1]
    weight = 2 * np.arange(1, count + 1) - count - 1
    return np.asarray(2 * (np.sort(x, 1) * weight).sum(1) / count**2)


def _checked(draws: ArrayLike, true: ArrayLike) -> tuple[Floats, Floats]:
    x, y = np.asarray(draws, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1] or x.shape[1] < 1:
        raise ValueError(f"draws must be [N,M] and the truth [N], got {list(x.shape)} and {list(y.shape)}")
    return x, y
