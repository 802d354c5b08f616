"""How well a measured quantity agrees with what it should be: correlation, errors, Bland-Altman limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medgen.evaluation.statistics import Estimate, Floats, Indices, group_bootstrap


@dataclass(frozen=True)
class Agreement:
    """`measured` against `wanted`, in their common unit; intervals are bootstrapped over groups (patients or cases).

    r2 is the coefficient of determination 1 − SS_res/SS_tot (an offset costs, unlike in r²). `low_limit` and `high_limit` are the
    95 % limits of agreement, bias ± 1.96 standard deviations (Bland & Altman 1986). `unmeasured`: how many could not be measured.
    """

    mae: Estimate
    rmse: Estimate
    bias: Estimate
    r: Estimate
    r2: Estimate
    low_limit: float
    high_limit: float
    unmeasured: int


def agreement(wanted: Sequence[float], measured: Sequence[float], groups: Sequence[str], seed: int = 0) -> Agreement | None:
    """None where fewer than three pairs are known; NaN in `measured` counts as unmeasured."""
    x, y = np.asarray(wanted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    asked = np.isfinite(x)
    known = asked & np.isfinite(y)
    if known.sum() < 3:
        return None
    chosen = np.flatnonzero(known)
    x, y = x[chosen], y[chosen]

    def statistic(rows: Indices) -> Floats:
        return _statistics(x[rows], y[rows])

    mae, rmse, bias, r, r2 = group_bootstrap(statistic, [groups[int(i)] for i in chosen], seed, 300)
    spread = 1.96 * float((y - x).std(ddof=1))
    return Agreement(mae, rmse, bias, r, r2, bias.value - spread, bias.value + spread, int(asked.sum() - known.sum()))


def _statistics(x: Floats, y: Floats) -> Floats:
    error, spread = y - x, ((x - x.mean()) ** 2).sum()
    r = float(np.corrcoef(x, y)[0, 1]) if x.std() > 1e-9 and y.std() > 1e-9 else float("nan")
    r2 = 1 - float((error**2).sum() / spread) if spread > 1e-9 else float("nan")
    return np.array([np.abs(error).mean(), np.sqrt((error**2).mean()), error.mean(), r, r2])
