"""How often each reader was right, and what that says of readers at large.

Readers, not answers, are the sample: intervals of one reader's share are binomial, the interval of the mean over readers is a t
interval of the readers' own shares. Pooling all answers into one binomial pretends that a reader's answers are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from medgen.evaluation.statistics import Estimate, Floats


@dataclass(frozen=True)
class Share:
    """`successes` of `n`, with both 95 % intervals: Wilson (1927) and Clopper & Pearson (1934, never below 95 % coverage)."""

    successes: int
    n: int
    wilson: tuple[float, float]
    clopper_pearson: tuple[float, float]

    @property
    def value(self) -> float:
        return self.successes / self.n if self.n else float("nan")

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.value, *self.wilson, self.n)


def share(successes: int, n: int) -> Share:
    """One reader's share of right answers; NaN ends where nothing was answered."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} right answers of {n} cannot be: expected 0 ≤ right ≤ answered")
    ends = [
        tuple(float(e) for e in proportion_confint(successes, n, 0.05, method)) if n else (float("nan"),) * 2
        for method in ("wilson", "beta")
    ]
    return Share(successes, n, *ends)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error and degrees of freedom, from which intervals and tests follow."""

    value: float
    standard_error: float
    df: float
    n: int

    def interval(self, level: float = 0.95) -> Estimate:
        """t interval; NaN ends from fewer than two readers."""
        half = stats.t.ppf((1 + level) / 2, self.df) * self.standard_error if self.df > 0 else float("nan")
        return Estimate(self.value, float(self.value - half), float(self.value + half), self.n)

    def p_value(self, reference: float) -> float:
        """Two-sided t test of mean = `reference`."""
        if not self.df > 0 or not np.isfinite(self.standard_error):
            return float("nan")
        if self.standard_error == 0:
            return 1.0 if self.value == reference else 0.0
        return float(2 * stats.t.sf(abs(self.value - reference) / self.standard_error, self.df))


def reader_mean(values: Sequence[float] | Floats) -> Mean:
    """Mean over readers of one number each (NaN: that reader gave none); readers are a sample, the cases are these cases."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if len(known) == 0:
        return Mean(float("nan"), float("nan"), 0.0, 0)
    error = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")
    return Mean(float(known.mean()), error, float(len(known) - 1), len(known))
