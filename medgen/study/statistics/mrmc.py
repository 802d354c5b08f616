"""Multi-reader multi-case analysis: what a study says of other readers AND other cases (Obuchowski & Rockette 1995, Hillis 2007).

θ_ij of modality i and reader j, estimated on the same cases, carries errors with covariances Cov1 (same reader, other modality),
Cov2 (other reader, same modality) and Cov3 (both other). Any figure of merit whose covariances can be had will do: the AUC (here by
jackknife or DeLong), or a share of right answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medgen.evaluation.statistics import Floats
from medgen.study.statistics.proportions import Mean

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Merit:
    """A figure of merit per modality and reader: `values` [I,J], `covariance` [I·J,I·J] of its error over cases.

    `by_kind`: that covariance as a sum over the kinds of cases that it contrasts, each with its number of cases.
    """

    values: Floats
    covariance: Floats
    by_kind: tuple[tuple[Floats, int], ...] = ()


@dataclass(frozen=True)
class Components:
    """Averages of the error covariance (Hillis 2007): variance, Cov1 (NaN for one modality), Cov2, Cov3."""

    error: float
    cov1: float
    cov2: float
    cov3: float


def components(merit: Merit) -> Components:
    """The four averages over modalities and readers."""
    modalities, readers = merit.values.shape
    full = merit.covariance.reshape(modalities, readers, modalities, readers)
    same_modality = np.eye(modalities, dtype=bool)[:, None, :, None]
    same_reader = np.eye(readers, dtype=bool)[None, :, None, :]

    def average(where: NDArray[np.bool_]) -> float:
        where = np.broadcast_to(where, full.shape)
        return float(full[where].mean()) if where.any() else float("nan")

    return Components(
        average(same_modality & same_reader),
        average(~same_modality & same_reader),
        average(same_modality & ~same_reader),
        average(~same_modality & ~same_reader),
    )


def single(merit: Merit, modality: int = 0) -> Mean:
    """Mean over readers of one modality, readers and cases random (Hillis 2007, ddf_H single)."""
    values = merit.values[modality]
    readers = len(values)
    rows = slice(modality * readers, (modality + 1) * readers)
    own = components(Merit(values[None], merit.covariance[rows, rows]))
    if readers < 2:
        return Mean(float(values.mean()), float("nan"), 0.0, readers)
    return _mean(float(values.mean()), float(values.var(ddof=1)), readers * max(own.cov2, 0.0), readers, readers - 1)


def these_cases(merit: Merit, modality: int = 0) -> Mean:
    """Mean over readers of one modality: other readers, the same cases.

    The spread between readers is expected to be σ²(readers) + Var − Cov2 (Obuchowski & Rockette 1995), and σ² is not negative: a few
    readers who happen to be alike (all nearly always right) are not taken for more alike than their own answers allow.
    """
    values = merit.values[modality]
    readers = len(values)
    if readers < 2:
        return Mean(float(values.mean()), float("nan"), 0.0, readers)
    rows = slice(modality * readers, (modality + 1) * readers)
    own = components(Merit(values[None], merit.covariance[rows, rows]))
    square = max(float(values.var(ddof=1)), own.error - max(own.cov2, 0.0))
    return Mean(float(values.mean()), float(np.sqrt(square / readers)), readers - 1.0, readers)


def contrast(merit: Merit) -> Mean:
    """Mean over readers of a contrast between kinds of cases (synthetic minus real, rated above), readers and cases random.

    The error is that of `single`. Its degrees of freedom are not: Hillis takes the covariance over cases as known, and with some 20 cases
    of a kind it is not (6-7 % false differences). This is Clark's quasi-F (1973, Journal of Verbal Learning 12:335) with Satterthwaite's
    degrees of freedom as in Dorfman, Berbaum & Metz (1992): every mean square brings its own, those over cases one set a kind (Welch).
    """
    mean, values = single(merit), merit.values[0]
    readers = len(values)
    if readers < 2:
        return mean
    square, shared, over_cases = float(values.var(ddof=1)), 0.0, 0.0
    for covariance, cases in merit.by_kind:
        own = components(Merit(values[None], covariance))
        shared += own.cov2
        over_cases += ((own.error + (readers - 1) * own.cov2) ** 2 + (own.error - own.cov2) ** 2 / (readers - 1)) / (cases - 1)
    spread = square**2 / (readers - 1) + (over_cases if shared > 0 else 0.0)
    total = square + readers * max(shared, 0.0)
    return replace(mean, df=float(total**2 / spread) if spread > 0 else mean.df)


def difference(merit: Merit) -> Mean:
    """Modality 0 minus modality 1, readers and cases random, with Hillis's denominator degrees of freedom."""
    if merit.values.shape[0] != 2:
        raise ValueError(f"a difference needs two modalities, not {merit.values.shape[0]}")
    readers = merit.values.shape[1]
    apart = merit.values[0] - merit.values[1]
    if readers < 2:
        return Mean(float(apart.mean()), float("nan"), 0.0, readers)
    parts = components(merit)
    interaction = float(apart.var(ddof=1) / 2)  # MS(T·R) of two modalities
    mean = _mean(float(apart.mean()), interaction, readers * max(parts.cov2 - parts.cov3, 0.0), readers, readers - 1)
    return Mean(mean.value, mean.standard_error * np.sqrt(2), mean.df, readers)


def _mean(value: float, square: float, correction: float, readers: int, df: int) -> Mean:
    """SE = √((MS + r·Cov)/r); ddf_H = (MS + r·Cov)² / (MS²/df)."""
    total = square + correction
    freedom = total**2 / (square**2 / df) if square > 0 else float(df)
    # one error free of between-reader spread would have endless degrees of freedom; a finite cap keeps t defined
    return Mean(value, float(np.sqrt(total / readers)), float(min(freedom, 1e6)), readers)


def auc_merit(ratings: Floats, signal: Bools, method: Literal["jackknife", "delong"] = "jackknife") -> Merit:
    """AUC per modality and reader from ratings [I,J,N] of N shared cases (NaN: not read), with covariances over cases.

    jackknife: leave one case out, so missing readings are allowed. delong: DeLong, DeLong & Clarke-Pearson 1988, all cases read.
    """
    modalities, readers, _ = ratings.shape
    flat = ratings.reshape(modalities * readers, -1)
    known = np.isfinite(flat)
    if method == "delong" and not known.all():
        raise ValueError(
            "DeLong's covariance needs every reader to have read every case; use the jackknife with missing readings"
        )
    if (known[:, signal].sum(1) < 2).any() or (known[:, ~signal].sum(1) < 2).any():
        raise ValueError("an AUC needs at least two answered cases of each kind from every reader")
    values, of_signal, of_noise = _placements(flat, signal)
    if method == "delong":
        parts = [np.atleast_2d(np.cov(one)) / one.shape[1] for one in (of_signal, of_noise)]
    else:  # about the AUC itself, which is the mean of what is left without a case of either kind
        scatter = (_leave_one_out(values, of_signal, of_noise, known, signal) - values[:, None]) * np.sqrt(1 - 1 / len(signal))
        parts = [scatter[:, kind] @ scatter[:, kind].T for kind in (signal, ~signal)]
    counts = (int(signal.sum()), int((~signal).sum()))
    return Merit(values.reshape(modalities, readers), parts[0] + parts[1], tuple(zip(parts, counts, strict=True)))


def _placements(flat: Floats, signal: Bools) -> tuple[Floats, Floats, Floats]:
    """AUCs [F] and each case's share of opposite cases it is rated on the right side of: [F,n signal], [F,n noise]; NaN unread.

    By ranks: a case's rank among all less its rank among its own kind counts the opposite cases rated lower, ties half.
    """
    everywhere = stats.rankdata(flat, axis=1, nan_policy="omit")
    shares = []
    for kind in (signal, ~signal):
        opposite = np.isfinite(flat[:, ~kind]).sum(1, keepdims=True)
        own = stats.rankdata(flat[:, kind], axis=1, nan_policy="omit")
        shares.append((everywhere[:, kind] - own) / opposite)
    of_signal, of_noise = shares[0], 1 - shares[1]
    return np.nanmean(of_signal, axis=1), of_signal, of_noise


def _leave_one_out(values: Floats, of_signal: Floats, of_noise: Floats, known: Bools, signal: Bools) -> Floats:
    """AUC [F,N] without each case: a case that a reader did not read changes nothing for that reader."""
    left = np.repeat(values[:, None], known.shape[1], axis=1)
    for placements, kind in ((of_signal, signal), (of_noise, ~signal)):
        n = known[:, kind].sum(1, keepdims=True)
        without = (n * values[:, None] - placements) / (n - 1)
        left[:, kind] = np.where(np.isfinite(placements), without, values[:, None])
    return left


def jackknife_covariance(leave_one_out: Floats, kinds: NDArray[np.generic] | None = None) -> Floats:
    """[F,F] from F statistics without each of N cases, [F,N]: (N − 1)/N times their scatter.

    `kinds` [N]: the study fixes how many cases of each kind there are; exact for means over all cases.
    """
    kinds = np.zeros(leave_one_out.shape[1]) if kinds is None else kinds
    cases, parts = len(kinds), []
    for kind in np.unique(kinds):
        own = leave_one_out[:, kinds == kind]
        n = own.shape[1]
        parts.append(np.sqrt(n / max(n - 1, 1)) * (cases - 1) / cases * (own - own.mean(1, keepdims=True)))
    scaled = np.concatenate(parts, axis=1)
    return scaled @ scaled.T


def share_merit(right: Floats, kinds: NDArray[np.generic] | None = None) -> Merit:
    """Share of right answers per modality and reader from right [I,J,N] (1, 0 or NaN: not answered), covariances by jackknife.

    The share is over the study's mix of cases. With `kinds` [N] that mix is fixed, as it is when a study has so many real and so many
    synthetic cases: readers who call most of them real are then no proof that another set of cases would change their score.
    """
    modalities, readers, _ = right.shape
    flat = right.reshape(modalities * readers, -1)
    known = np.isfinite(flat)
    n = known.sum(1, keepdims=True)
    if (n < 2).any():
        raise ValueError("a share needs at least two answered cases from every reader")
    values = np.where(known, flat, 0).sum(1) / n[:, 0]
    without = np.where(known, (n * values[:, None] - np.where(known, flat, 0)) / (n - 1), values[:, None])
    return Merit(values.reshape(modalities, readers), jackknife_covariance(without, kinds))


def contrast_merit(values: Floats, signal: Bools) -> Merit:
    """Mean over signal cases minus mean over the others, per reader, from values [J,N] (NaN: not answered), jackknife over both kinds."""
    apart, parts = np.zeros(len(values)), []
    for sign, kind in ((1, signal), (-1, ~signal)):
        own = values[:, kind]
        n = np.isfinite(own).sum(1, keepdims=True)
        if (n < 2).any():
            raise ValueError("a difference of kinds needs at least two answered cases of each kind from every reader")
        mean = np.nanmean(own, axis=1, keepdims=True)
        apart = apart + sign * mean[:, 0]
        parts.append((jackknife_covariance(np.where(np.isfinite(own), (n * mean - own) / (n - 1), mean)), int(kind.sum())))
    return Merit(apart[None], parts[0][0] + parts[1][0], tuple(parts))
