"""What a reader can tell (sensitivity) apart from what a reader tends to say (criterion): ROC, AUC, d′ and c."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medgen.evaluation.statistics import Estimate, Floats

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Detection:
    """d′ = z(H) − z(F) and criterion c = −(z(H) + z(F)) / 2 of one reader (Macmillan & Creelman 2005, ch. 1-2).

    `hits` of `signals` and `false_alarms` of `noises`. c > 0: says "signal" too rarely. Of a choice between two pictures side by side, d′
    is (z(H) − z(F)) / √2, on the scale of single pictures (ibid. ch. 7), and c the preference for a side.
    """

    hits: int
    signals: int
    false_alarms: int
    noises: int
    d_prime: Estimate
    criterion: Estimate


def detection(
    hits: int, signals: int, false_alarms: int, noises: int, correct: bool = True, two_alternatives: bool = False
) -> Detection:
    """d′ and criterion with 95 % intervals (variance of Gourevitch & Galanter 1967).

    `two_alternatives`: the signal is "right", say, of a choice between left and right.
    `correct`: the log-linear correction (Hautus 1995: half a hit and half a miss added), which keeps a perfect reader finite.
    """
    if not (0 <= hits <= signals and 0 <= false_alarms <= noises):
        raise ValueError(f"hits {hits} of {signals} and false alarms {false_alarms} of {noises} cannot be")
    if min(signals, noises) == 0:
        nothing = Estimate(float("nan"), float("nan"), float("nan"), signals + noises)
        return Detection(hits, signals, false_alarms, noises, nothing, nothing)
    add = 0.5 if correct else 0.0
    counts = np.array([hits + add, false_alarms + add])
    totals = np.array([signals + 2 * add, noises + 2 * add], dtype=np.float64)
    rates = counts / totals
    z = stats.norm.ppf(rates)
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = float(np.sum(rates * (1 - rates) / (totals * stats.norm.pdf(z) ** 2)))
    n = signals + noises
    half = stats.norm.ppf(0.975) * np.sqrt(variance)
    scale = np.sqrt(2) if two_alternatives else 1.0
    d, c = float(z[0] - z[1]) / scale, float(-z.sum() / 2)
    return Detection(
        hits,
        signals,
        false_alarms,
        noises,
        Estimate(d, float(d - half / scale), float(d + half / scale), n),
        Estimate(c, float(c - half / 2), float(c + half / 2), n),
    )


def d_prime_2afc(share_right: float) -> float:
    """d′ behind a share of right choices between two: √2 z(p) (Hacker & Ratcliff 1979, m = 2)."""
    return float(np.sqrt(2) * stats.norm.ppf(share_right))


def auc(ratings: Floats, signal: Bools) -> float:
    """Area under the empirical ROC (ties count half); NaN without both kinds. ratings [N]: higher means more sure of signal."""
    known = np.isfinite(ratings)
    high, low = ratings[known & signal], ratings[known & ~signal]
    if min(len(high), len(low)) == 0:
        return float("nan")
    ranks = stats.rankdata(np.concatenate([high, low]))[: len(high)]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def roc(ratings: Floats, signal: Bools) -> tuple[Floats, Floats]:
    """False-alarm and hit rates [K] of every threshold, from (0, 0) to (1, 1)."""
    known = np.isfinite(ratings)
    ratings, signal = ratings[known], signal[known]
    cuts = np.concatenate([[np.inf], np.unique(ratings)[::-1]])
    hits = np.array([np.mean(ratings[signal] >= cut) for cut in cuts])
    alarms = np.array([np.mean(ratings[~signal] >= cut) for cut in cuts])
    return alarms, hits
