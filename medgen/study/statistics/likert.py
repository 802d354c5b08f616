"""Ordered ratings: cumulative-link (proportional-odds) models, plain and with readers as a random effect.

P(Y ≤ k) = logistic(θ_k − x·β − u_j − s_j·x_1) (McCullagh 1980; mixed: Tutz & Hennevogl 1996): exp(β) is the odds ratio of a higher
rating. Readers use a scale differently (intercept u_j) and may differ in how they take the arms (slope s_j): with few readers and no
slope, their spread would be mistaken for precision. Readers' answers are counts per arm, so a fit costs the same for any number of cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats
from scipy.special import expit, logsumexp

from medgen.evaluation.statistics import Estimate, Floats

# Equally spaced nodes with normal weights: the trapezoid rule converges exponentially for such integrands, and unlike Gauss-Hermite
# with few nodes it also sees a likelihood that is much narrower than the readers' spread.
NODES = np.linspace(-5, 5, 81)
SLOPE_NODES = np.linspace(-4, 4, 33)


@dataclass(frozen=True)
class OrdinalFit:
    """Thresholds [K−1], effects [P] (log odds of a higher rating) with 95 % Wald intervals, spread of readers, log-likelihood."""

    thresholds: tuple[float, ...]
    effects: tuple[Estimate, ...]
    p_values: tuple[float, ...]
    reader_sd: float
    slope_sd: float
    log_likelihood: float
    converged: bool


def cumulative_link(ratings: Floats, design: Floats) -> OrdinalFit:
    """Proportional odds without reader effects, by statsmodels' `OrderedModel`: ratings [N], design [N,P]."""
    from statsmodels.miscmodels.ordinal_model import OrderedModel

    result = OrderedModel(ratings, design, distr="logit").fit(method="bfgs", disp=0, gtol=1e-7, maxiter=500)
    count = design.shape[1]
    thresholds = result.model.transform_threshold_params(result.params)[1:-1]
    effects = [
        Estimate(float(value), float(low), float(high), len(ratings))
        for value, (low, high) in zip(result.params[:count], result.conf_int()[:count], strict=True)
    ]
    return OrdinalFit(
        tuple(float(t) for t in thresholds),
        tuple(effects),
        tuple(float(p) for p in result.pvalues[:count]),
        0.0,
        0.0,
        float(result.llf),
        bool(result.mle_retvals["converged"]),
    )


def ordinal_mixed(counts: Floats, design: Floats, slopes: bool = False) -> OrdinalFit:
    """Cumulative-link mixed model of counts [J readers,C conditions,K categories] with design [C,P], by maximum likelihood.

    A random intercept per reader; with `slopes` also a random slope of the design's first column. Empty categories are merged away.
    Intervals use Student's t with J − 1 degrees of freedom when slopes vary by reader (readers are the sample), else the normal.
    """
    counts = counts[:, :, counts.sum((0, 1)) > 0]
    categories, effects = counts.shape[2], design.shape[1]
    if categories < 2:
        raise ValueError("all ratings are the same: there is no odds ratio to estimate")
    start = _start(counts, effects, slopes)
    weights = [stats.norm.logpdf(NODES) + np.log(NODES[1] - NODES[0]), np.zeros(1)]
    nodes = [NODES, np.zeros(1)]
    if slopes:
        nodes = [SLOPE_NODES, SLOPE_NODES]
        weights = [stats.norm.logpdf(SLOPE_NODES) + np.log(SLOPE_NODES[1] - SLOPE_NODES[0])] * 2
    quadrature = (np.repeat(nodes[0], len(nodes[1])), np.tile(nodes[1], len(nodes[0])), np.add.outer(*weights).ravel())

    def loss(parameters: Floats) -> float:
        return -_log_likelihood(parameters, counts, design, slopes, quadrature)

    found = optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-4, "maxiter": 400})
    thresholds, beta, spread, slope = _unpack(found.x, categories, effects, slopes)
    error = np.sqrt(np.clip(np.diag(_inverse_hessian(loss, found.x))[categories - 1 : categories - 1 + effects], 0, None))
    df = len(counts) - 1 if slopes else np.inf
    half, z = stats.t.ppf(0.975, df) * error, np.abs(beta) / np.where(error > 0, error, np.nan)
    n = int(counts.sum())
    return OrdinalFit(
        tuple(float(t) for t in thresholds),
        tuple(Estimate(float(b), float(b - h), float(b + h), n) for b, h in zip(beta, half, strict=True)),
        tuple(float(p) for p in 2 * stats.t.sf(z, df)),
        spread,
        slope,
        -float(found.fun),
        bool(found.success) or bool(np.abs(found.jac).max() < 1e-2),
    )


def _start(counts: Floats, effects: int, slopes: bool) -> Floats:
    """Thresholds at the pooled cumulative logits, no effects, moderate spread (log SD)."""
    share = np.clip(np.cumsum(counts.sum((0, 1)))[:-1] / counts.sum(), 1e-4, 1 - 1e-4)
    logits = np.log(share / (1 - share))
    steps = np.log(np.maximum(np.diff(logits), 1e-2))
    return np.concatenate([logits[:1], steps, np.zeros(effects), [np.log(0.5)] * (2 if slopes else 1)])


def _unpack(parameters: Floats, categories: int, effects: int, slopes: bool) -> tuple[Floats, Floats, float, float]:
    thresholds = np.cumsum(np.concatenate([parameters[:1], np.exp(parameters[1 : categories - 1])]))
    beta = parameters[categories - 1 : categories - 1 + effects]
    spreads = np.exp(np.clip(parameters[categories - 1 + effects :], -8, 4))
    return thresholds, beta, float(spreads[0]), float(spreads[1]) if slopes else 0.0


def _log_likelihood(parameters: Floats, counts: Floats, design: Floats, slopes: bool, quadrature: Sequence[Floats]) -> float:
    categories, effects = counts.shape[2], design.shape[1]
    thresholds, beta, spread, slope = _unpack(parameters, categories, effects, slopes)
    u, s, log_weights = quadrature
    shift = (design @ beta)[None] + spread * u[:, None] + slope * s[:, None] * design[:, 0][None]  # [nodes,C]
    below = expit(thresholds[None, None] - shift[..., None])  # P(Y ≤ k) [nodes,C,K−1]
    edges = np.concatenate([np.zeros((*below.shape[:2], 1)), below, np.ones((*below.shape[:2], 1))], axis=2)
    log_probability = np.log(np.maximum(np.diff(edges, axis=2), 1e-300))
    per_reader = np.tensordot(counts, log_probability, axes=([1, 2], [1, 2]))  # [J,nodes]
    return float(logsumexp(per_reader + log_weights[None], axis=1).sum())


def _inverse_hessian(loss: object, at: Floats) -> Floats:
    from statsmodels.tools.numdiff import approx_hess3

    return np.linalg.pinv(approx_hess3(at, loss))
