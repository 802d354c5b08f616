"""Two one-sided tests (Schuirmann 1987): the only road from a study to "as good as chance" or "no different".

A large p value of an ordinary test says that the study was small, not that two things are alike; no sentence here rests on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scipy.special import stdtr

from medgen.study.statistics.proportions import Mean

Verdict = Literal["equivalent", "equivalent but different", "different", "inconclusive", "unknown"]


@dataclass(frozen=True)
class Equivalence:
    """Is the mean within `reference` ± `margin`? `low`, `high`: the 1 − 2α interval that must lie inside (90 % for α = .05)."""

    value: float
    reference: float
    margin: float
    low: float
    high: float
    p_equivalence: float
    p_difference: float
    df: float
    alpha: float

    @property
    def verdict(self) -> Verdict:
        """Equivalent at level α, shown different at level α, both (a small but certain difference), or neither."""
        if not self.df > 0 or self.p_equivalence != self.p_equivalence:
            return "unknown"
        inside, apart = self.p_equivalence < self.alpha, self.p_difference < self.alpha
        if inside:
            return "equivalent but different" if apart else "equivalent"
        return "different" if apart else "inconclusive"


def tost(mean: Mean, reference: float, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t tests of |mean − reference| < margin; p is the larger of the two.

    Raises `ValueError` unless margin > 0: a margin is stated before reading, in the measure's own unit.
    """
    if not margin > 0:
        raise ValueError(f"an equivalence margin must be above 0, in the unit of what is measured, not {margin}")
    below, above = reference - margin, reference + margin
    if not mean.df > 0 or mean.standard_error != mean.standard_error:
        p = low = high = float("nan")
    else:
        p = max(
            _beyond(mean.value - below, mean.error_at(below), mean.df), _beyond(above - mean.value, mean.error_at(above), mean.df)
        )
        ends = mean.interval(1 - 2 * alpha)
        low, high = ends.low, ends.high
    return Equivalence(mean.value, reference, margin, low, high, p, mean.p_value(reference), mean.df, alpha)


def _beyond(distance: float, error: float, df: float) -> float:
    """p of one one-sided test: `distance` inside the bound; without error (all readers alike, or a bound at 0 or 1) it is plain."""
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stdtr(df, -distance / error))
