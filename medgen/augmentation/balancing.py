"""Weights over reports that meet target shares and change as little else as possible (entropy balancing).

Among all weights with the asked shares these are the ones nearest to the reports as they come (least Kullback-Leibler divergence),
so what is not asked for, above all which findings go together, stays as the reports have it. Deming & Stephan 1940 (raking);
Hainmueller, Political Analysis 2012.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

Floats = NDArray[np.float64]
RIDGE = 1e-4  # bounds the tilt where a target cannot be met: then the nearest shares come out, and the caller sees the miss


def balancing_weights(features: Floats, targets: Floats, largest: float = 1.0) -> Floats:
    """Weights [N], summing to one, under which the mean of `features` [N,K] is `targets` [K], none above `largest`.

    Raises `ValueError` if `largest` is below 1/N: then no weights sum to one.
    """
    if largest * len(features) < 1:
        raise ValueError(f"{len(features)} reports of at most {largest:.3g} each do not make one whole")

    weights, full = np.full(len(features), largest, dtype=float), np.zeros(len(features), dtype=bool)
    while (left := 1 - largest * full.sum()) > 0 and not full.all():
        # what is full stays so, and the others make up for what it leaves
        rest = (targets - largest * features[full].sum(0)) / left
        weights[~full] = left * _tilted(features[~full], rest)
        over = ~full & (weights > largest * (1 + 1e-9))
        if not over.any():
            break
        full |= over
        weights[over] = largest
    return weights / weights.sum()


def _tilted(features: Floats, targets: Floats) -> Floats:
    """The weights without a limit: exponential in the features (the dual of the least divergence)."""

    def dual(tilt: Floats) -> tuple[float, Floats]:
        score = features @ tilt
        gradient = softmax(score) @ features - targets + RIDGE * tilt
        return float(logsumexp(score) - tilt @ targets + RIDGE / 2 * tilt @ tilt), gradient

    found = minimize(dual, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "maxcor": 30})
    weights: Floats = softmax(features @ found.x)
    return weights


def draw(weights: Floats, n: int, order: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.intp]:
    """`n` indices, each about `n * weights` times: never further than one away (systematic sampling).

    Neighbours in `order` stand in for each other, so sorting by stratum keeps every stratum's count within one, too.
    """
    ends = np.cumsum(weights[order])
    ticks = (np.arange(n) + rng.random()) / n * ends[-1]
    return order[np.minimum(np.searchsorted(ends, ticks, side="right"), len(order) - 1)]
