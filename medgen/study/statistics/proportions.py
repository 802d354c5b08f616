"""How often each reader was right, and what that says of readers at large.

Readers, not answers, are the sample: intervals of one reader's share are binomial, the interval of the mean over readers is a t
interval of the readers' own shares. Pooling all answers into one binomial pretends that a reader's answers are independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit  # Student's t, the numbers of scipy.stats.t 400 times as fast: simulations call it a lot
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
    """A mean with its standard error and degrees of freedom, from which intervals and tests follow.

    `share`: the mean lies between 0 and 1 (shares, AUCs). Its error then shrinks towards the ends like that of a share: the interval is
    Wilson's with as many answers as would give this standard error (Korn & Graubard 1998, Dean & Pagano 2015), and a test of the mean m
    against b uses the error at b, SE·√(b(1−b) / m(1−m)). An ordinary t interval of shares near 1 holds the truth far too rarely.
    """

    value: float
    standard_error: float
    df: float
    n: int
    share: bool = False

    def interval(self, level: float = 0.95) -> Estimate:
        """t interval, in Wilson's form for shares; NaN ends from fewer than two readers."""
        t = float(stdtrit(self.df, (1 + level) / 2)) if self.df > 0 else float("nan")
        if not self.share:
            return Estimate(self.value, self.value - t * self.standard_error, self.value + t * self.standard_error, self.n)
        answers = self._answers
        middle = (self.value + t**2 / (2 * answers)) / (1 + t**2 / answers)
        half = t / (1 + t**2 / answers) * math.sqrt(self.value * (1 - self.value) / answers + t**2 / (4 * answers**2))
        return Estimate(self.value, max(middle - half, 0.0), min(middle + half, 1.0), self.n)

    def error_at(self, reference: float) -> float:
        """The standard error if the mean were `reference`; of a share, 0 where nothing but 0 or 1 could come out."""
        if not self.share:
            return self.standard_error
        return math.sqrt(max(reference * (1 - reference), 0.0) / self._answers)

    @property
    def _answers(self) -> float:
        """Independent answers that would give this standard error; one a reader where all readers have the same share."""
        spread = self.value * (1 - self.value)
        if not math.isfinite(self.standard_error):
            return float("nan")
        return spread / self.standard_error**2 if spread > 0 and self.standard_error > 0 else float(self.n)

    def p_value(self, reference: float) -> float:
        """Two-sided t test of mean = `reference`."""
        error = self.error_at(reference)
        if not self.df > 0 or not np.isfinite(error):
            return float("nan")
        if error == 0:
            return 1.0 if self.value == reference else 0.0
        return float(2 * stdtr(self.df, -abs(self.value - reference) / error))


def reader_mean(values: Sequence[float] | Floats, share: bool = False) -> Mean:
    """Mean over readers of one number each (NaN: that reader gave none); readers are a sample, the cases are these cases.

    `share`: the numbers lie between 0 and 1.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if len(known) == 0:
        return Mean(float("nan"), float("nan"), 0.0, 0, share)
    error = float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")
    return Mean(float(known.mean()), error, float(len(known) - 1), len(known), share)
