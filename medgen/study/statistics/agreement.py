"""Do readers agree with each other, and with themselves? Kappas, Krippendorff's α, Gwet's AC1 and AC2, ICC.

Libraries do what they do (statsmodels, krippendorff, pingouin). Gwet's coefficients are here because irrCAC cannot be installed
beside a current pandas; they follow Gwet, Handbook of Inter-Rater Reliability (4th ed., 2014), chapters 4-5.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import stats

from medgen.evaluation.statistics import Estimate, Floats

Weights = Literal["identity", "linear", "quadratic"]
NOTHING = float("nan")


def agreement_weights(count: int, kind: Weights) -> Floats:
    """[count,count] of agreement between ordered categories: 1 on the diagonal, falling with distance unless "identity"."""
    distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count))) / max(count - 1, 1)
    if kind == "identity":
        return (distance == 0).astype(np.float64)
    return 1 - distance if kind == "linear" else 1 - distance**2


def cohen(first: Floats, second: Floats, categories: Floats, weights: Weights = "identity") -> Estimate:
    """Cohen's kappa (1960; weighted 1968) of two ratings [N] of the same cases, 95 % interval of Fleiss, Cohen & Everitt 1969."""
    both = np.isfinite(first) & np.isfinite(second)
    a, b = (np.searchsorted(categories, values[both]) for values in (first, second))
    table = np.zeros((len(categories),) * 2)
    np.add.at(table, (a, b), 1)
    return cohen_table(table, weights)


def cohen_table(table: Floats, weights: Weights | Floats = "identity") -> Estimate:
    """Cohen's kappa of a table [K,K] of counts; `weights` [K,K] are disagreements (0 on the diagonal)."""
    from statsmodels.stats.inter_rater import cohens_kappa

    n = int(table.sum())
    expected = table.sum(0) @ np.asarray(table.sum(1)) / max(n, 1)
    if n < 2 or expected >= n:  # both said one and the same thing throughout: chance agreement is complete
        return Estimate(NOTHING, NOTHING, NOTHING, n)
    disagreement = 1 - agreement_weights(len(table), weights) if isinstance(weights, str) else weights
    plain = isinstance(weights, str) and weights == "identity"
    result = cohens_kappa(table) if plain else cohens_kappa(table, weights=disagreement)
    return Estimate(float(result.kappa), float(result.kappa_low), float(result.kappa_upp), n)


def kappa(first: Floats, second: Floats, categories: Floats, weights: Weights = "identity") -> float:
    """Cohen's kappa alone, without its interval: 1 − observed / expected disagreement; NaN where chance agreement is complete."""
    both = np.isfinite(first) & np.isfinite(second)
    a, b = (np.searchsorted(categories, values[both]) for values in (first, second))
    disagreement = 1 - agreement_weights(len(categories), weights)
    shares = [np.bincount(values, minlength=len(categories)) / max(len(values), 1) for values in (a, b)]
    expected = float(shares[0] @ disagreement @ shares[1])
    return 1 - float(disagreement[a, b].mean()) / expected if expected > 0 else NOTHING


def mean_kappa(ratings: Floats, categories: Floats, weights: Weights = "identity") -> Estimate:
    """Cohen's kappa averaged over all pairs of readers of ratings [N,R], interval by jackknife over cases."""

    def mean_of(kept: np.ndarray) -> float:
        pairs = combinations(range(ratings.shape[1]), 2)
        known = [value for a, b in pairs if np.isfinite(value := kappa(ratings[kept, a], ratings[kept, b], categories, weights))]
        return float(np.mean(known)) if known else NOTHING

    return over_cases(mean_of, len(ratings)) if len(ratings) > 2 else Estimate(NOTHING, NOTHING, NOTHING, len(ratings))


def fleiss(ratings: Floats) -> Estimate:
    """Fleiss's kappa (1971) of ratings [N,R]; cases that a reader left out are left out. Interval: jackknife over cases."""
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

    ratings = ratings[np.isfinite(ratings).all(1)]
    if len(ratings) < 3 or len(np.unique(ratings)) < 2:
        return Estimate(NOTHING, NOTHING, NOTHING, len(ratings))
    table = aggregate_raters(ratings)[0]
    return over_cases(lambda kept: float(fleiss_kappa(table[kept])), len(ratings))


def krippendorff_alpha(ratings: Floats, level: Literal["nominal", "ordinal", "interval"] = "nominal") -> Estimate:
    """Krippendorff's α (2011) of ratings [N,R], NaN where not rated. Interval: jackknife over cases."""
    import krippendorff

    ratings = ratings[np.isfinite(ratings).sum(1) > 1]
    if len(ratings) < 3 or len(np.unique(ratings[np.isfinite(ratings)])) < 2:
        return Estimate(NOTHING, NOTHING, NOTHING, len(ratings))

    def alpha(kept: np.ndarray) -> float:
        part = ratings[kept]
        if len(np.unique(part[np.isfinite(part)])) < 2:
            return NOTHING
        return float(krippendorff.alpha(reliability_data=part.T, level_of_measurement=level))

    return over_cases(alpha, len(ratings))


def with_oneself(first: Floats, again: Floats, categories: Floats) -> Estimate:
    """Cohen's kappa of first and second ratings [N,R] by the same readers, all pairs pooled; interval for other readers and other cases.

    Pairs of one reader are alike, and so are pairs of one case: the interval of independent pairs would be too narrow. Its variance is that
    of a jackknife over readers plus that of one over cases less that of one over single pairs, which both of them hold (two-way clusters:
    Cameron, Gelbach & Miller 2011, J Bus Econ Stat 29:238), never less than the larger; degrees of freedom are Satterthwaite's (1946).
    """
    cases, readers = first.shape
    if readers == 1:
        return cohen(first[:, 0], again[:, 0], categories)
    value = kappa(first.ravel(), again.ravel(), categories)
    left = [[kappa(np.delete(first, i, axis).ravel(), np.delete(again, i, axis).ravel(), categories) for i in range(n)]
            for axis, n in enumerate(first.shape)]  # fmt: skip
    parts = [(len(one) - 1) * float(np.var(one)) for one in left]
    parts.append(float(_without_a_pair(first.ravel(), again.ravel(), categories)))
    variance = max(parts[0] + parts[1] - parts[2], parts[0], parts[1])
    free = sum(part**2 / max(df, 1) for part, df in zip(parts, (cases - 1, readers - 1, cases * readers - 1), strict=True))
    half = float(stats.t.ppf(0.975, variance**2 / free) * np.sqrt(variance)) if free > 0 else 0.0
    return Estimate(value, value - half, min(value + half, 1.0), int((np.isfinite(first) & np.isfinite(again)).sum()))


def _without_a_pair(first: Floats, again: Floats, categories: Floats) -> float:
    """Jackknife variance of kappa over single pairs [N]: pairs of the same two answers leave the same kappa."""
    both = np.isfinite(first) & np.isfinite(again)
    pairs, counts = np.unique(np.stack([first[both], again[both]], axis=1), axis=0, return_counts=True)
    left = []
    for n in range(len(pairs)):
        rest = np.repeat(pairs, counts - (np.arange(len(pairs)) == n), axis=0)
        left.append(kappa(rest[:, 0], rest[:, 1], categories))
    mean = np.average(left, weights=counts)
    return float((counts.sum() - 1) * np.average((np.array(left) - mean) ** 2, weights=counts))


def over_cases(statistic: Callable[[np.ndarray], float], n: int) -> Estimate:
    """`statistic` of all n cases with its 95 % jackknife interval (readers as they are, cases a sample; Student's t, n − 1)."""
    everything = np.arange(n)
    value = statistic(everything)
    left = np.array([statistic(np.delete(everything, i)) for i in range(n)])
    error = np.sqrt((n - 1) / n * np.sum((left - left.mean()) ** 2))
    half = float(stats.t.ppf(0.975, n - 1) * error)
    return Estimate(value, value - half, min(value + half, 1.0), n)


def gwet(ratings: Floats, categories: Floats, weights: Weights = "identity") -> Estimate:
    """Gwet's AC1 (identity weights) or AC2 of ratings [N,R], NaN where not rated; interval from his linearised variance."""
    table = np.stack([(ratings == category).sum(1) for category in categories], axis=1).astype(np.float64)  # [N,K]
    rated = table.sum(1)
    pairs = rated >= 2
    n, count = int((rated > 0).sum()), len(categories)
    if pairs.sum() < 2 or count < 2:
        return Estimate(NOTHING, NOTHING, NOTHING, n)
    weight = agreement_weights(count, weights)
    table, rated, pairs = table[rated > 0], rated[rated > 0], pairs[rated > 0]
    agreeing = np.zeros(n)
    agreeing[pairs] = (table * (table @ weight - 1)).sum(1)[pairs] / (rated * (rated - 1))[pairs]
    observed = agreeing[pairs].mean()
    prevalence = (table / rated[:, None]).mean(0)
    scale = weight.sum() / (count * (count - 1))
    chance = scale * np.sum(prevalence * (1 - prevalence))
    value = (observed - chance) / (1 - chance)
    # Each case's own coefficient and its pull on chance agreement (Gwet 2014, eq. 5.3.17): their spread is the variance.
    own = np.where(pairs, n / pairs.sum() * (agreeing - chance), 0) / (1 - chance)
    own_chance = scale * (table @ (1 - prevalence)) / rated
    pull = own - 2 * (1 - value) * (own_chance - chance) / (1 - chance)
    error = np.sqrt(np.sum((pull - value) ** 2) / (n * (n - 1)))
    half = float(stats.t.ppf(0.975, n - 1) * error)
    return Estimate(float(value), float(value - half), float(min(value + half, 1.0)), n)


def icc(ratings: Floats) -> dict[str, Estimate]:
    """The six intraclass correlations of Shrout & Fleiss (1979) of ratings [N,R]: ICC1 … ICC3k; cases with a gap are left out."""
    import pandas as pd
    import pingouin

    ratings = ratings[np.isfinite(ratings).all(1)]
    cases, readers = ratings.shape
    if cases < 5 or readers < 2 or np.ptp(ratings) == 0:
        return {}
    long = pd.DataFrame(
        {"case": np.repeat(np.arange(cases), readers), "reader": np.tile(np.arange(readers), cases), "rating": ratings.ravel()}
    )
    two_decimals = pingouin.options["round.column.CI95"]
    pingouin.options["round.column.CI95"] = None  # it would round the ends of the intervals
    try:
        table = pingouin.intraclass_corr(long, "case", "reader", "rating")
    finally:
        pingouin.options["round.column.CI95"] = two_decimals
    names = ("ICC1", "ICC2", "ICC3", "ICC1k", "ICC2k", "ICC3k")  # pingouin's own order
    ends = next(column for column in table.columns if column.startswith("CI95"))
    return {
        name: Estimate(float(value), float(low), float(high), cases)
        for name, value, (low, high) in zip(names, table["ICC"], table[ends], strict=True)
    }
