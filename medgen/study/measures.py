"""From answers and key to numbers, section by section: what each task is asked to show, and with which uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medgen.evaluation.statistics import Estimate, Floats
from medgen.study.statistics import agreement, mrmc
from medgen.study.statistics import signal_detection as sd
from medgen.study.statistics.equivalence import Equivalence, tost
from medgen.study.statistics.likert import OrdinalFit, ordinal_mixed
from medgen.study.statistics.proportions import Mean, Share, reader_mean, share
from medgen.study.tables import Bools, Table, ratings_of

FEWEST_PER_KIND = 2


@dataclass(frozen=True)
class ReaderRow:
    """One reader: answered and missing cases, right answers, d′ and criterion, AUC, median seconds, agreement with own repeats."""

    reader: str
    missing: int
    accuracy: Share
    detection: sd.Detection
    auc: float
    seconds: float
    repeats: Share


@dataclass(frozen=True)
class Agreement:
    """Between readers (each number with its interval over cases) and within: the same case shown again, for other readers and cases."""

    between: Mapping[str, Estimate]
    within: Estimate
    repeats: Estimate


@dataclass(frozen=True)
class Trend:
    """Slope over the reading: change from a reader's first to last case, reader-level; and shares by fifths [5]."""

    change: Estimate
    p_value: float
    fifths: tuple[Estimate, ...]


@dataclass(frozen=True)
class Detecting:
    """A task with one right answer of two (real or synthetic, which is real, same patient)."""

    signal: str
    chance: float
    readers: tuple[ReaderRow, ...]
    accuracy: Mean
    accuracy_mrmc: Mean | None
    auc: Mean
    auc_mrmc: Mean | None
    d_prime: Mean
    criterion: Mean
    equivalence: Mapping[str, Equivalence]
    agreement: Agreement
    trend: Trend
    arms: Mapping[str, Mean]
    comparisons: Mapping[str, Mean]
    curves: Mapping[str, tuple[Floats, Floats]]
    confidences: Mapping[str, tuple[Floats, Floats]]


def detecting(whole: Table, truth: Bools, levels: int, signal: str, margin: float, task: str) -> Detecting:
    """Everything about a two-sided decision. whole.value: 1 said signal, 0 not; truth [N] of all items; `levels` of confidence."""
    first, rows = whole.first, whole.repeat_of < 0
    kind = truth[rows]
    right = np.where(np.isnan(first.value), np.nan, first.value == kind[:, None])
    rating = ratings_of(first)
    readers = tuple(_reader_row(whole, right, rating, kind, j, task) for j in range(len(first.readers)))
    accuracy = reader_mean([r.accuracy.value for r in readers], share=True)
    auc = _mrmc_auc(rating, kind, mrmc.these_cases) or reader_mean([r.auc for r in readers], share=True)
    accuracy_mrmc, auc_mrmc = _mrmc_mean(right, kind), _mrmc_auc(rating, kind)
    tests = {"accuracy": tost(accuracy, 0.5, margin), "auc": tost(auc, 0.5, margin)}
    if accuracy_mrmc is not None:
        tests["accuracy_mrmc"] = tost(accuracy_mrmc, 0.5, margin)
    if auc_mrmc is not None:
        tests["auc_mrmc"] = tost(auc_mrmc, 0.5, margin)
    arms = {arm: reader_mean(_column_means(right[np.array(first.arms) == arm]), share=True) for arm in dict.fromkeys(first.arms)}
    return Detecting(
        signal,
        0.5,
        readers,
        accuracy,
        accuracy_mrmc,
        auc,
        auc_mrmc,
        reader_mean([r.detection.d_prime.value for r in readers]),
        reader_mean([r.detection.criterion.value for r in readers]),
        tests,
        _agreement(whole, rating, np.array([0.0, 1.0]), first.value),
        _trend(right, first.position, share=True),
        arms,
        compare_arms(first, rating, kind) if task == "real_or_synthetic" else {},
        {reader: sd.roc(rating[:, j], kind) for j, reader in enumerate(first.readers) if _both(rating[:, j], kind)},
        {name: np.histogram(rating[who], bins=_rating_bins(levels)) for name, who in (("signal", kind), ("noise", ~kind))},
    )


def _rating_bins(levels: int) -> Floats:
    return np.arange(-levels - 0.5, levels + 1)


def _both(ratings: Floats, kind: Bools) -> bool:
    known = np.isfinite(ratings)
    return bool((known & kind).sum() >= FEWEST_PER_KIND and (known & ~kind).sum() >= FEWEST_PER_KIND)


def _column_means(values: Floats) -> list[float]:
    return [float(np.nanmean(column)) if np.isfinite(column).any() else float("nan") for column in values.T]


def _reader_row(whole: Table, right: Floats, rating: Floats, kind: Bools, j: int, task: str) -> ReaderRow:
    first = whole.first
    said, known = first.value[:, j], np.isfinite(first.value[:, j])
    detected = sd.detection(
        int((said[known & kind] == 1).sum()),
        int((known & kind).sum()),
        int((said[known & ~kind] == 1).sum()),
        int((known & ~kind).sum()),
        two_alternatives=task == "two_alternative",
    )
    times = whole.ms[np.isfinite(whole.value[:, j]), j] / 1000
    return ReaderRow(
        first.readers[j],
        int((whole.asked[:, j] & np.isnan(whole.value[:, j])).sum()),
        share(int(np.nansum(right[:, j])), int(known.sum())),
        detected,
        sd.auc(rating[:, j], kind),
        float(np.median(times)) if len(times) else float("nan"),
        share(*_repeated(whole, j)),
    )


def _repeated(whole: Table, j: int) -> tuple[int, int]:
    again = np.flatnonzero(whole.repeat_of >= 0)
    pairs = [(whole.value[i, j], whole.value[whole.repeat_of[i], j]) for i in again]
    pairs = [(a, b) for a, b in pairs if np.isfinite(a) and np.isfinite(b)]
    return sum(a == b for a, b in pairs), len(pairs)


def _mrmc_mean(values: Floats, kinds: NDArray[np.generic] | None = None, share: bool = True) -> Mean | None:
    """Mean of values [N,J], readers and cases random; None where a reader has too few cases or there is one reader."""
    if values.shape[1] < 2 or (np.isfinite(values).sum(0) < FEWEST_PER_KIND).any():
        return None
    return replace(mrmc.single(mrmc.share_merit(values.T[None], kinds)), share=share)


def _mrmc_auc(rating: Floats, kind: Bools, mean: Callable[[mrmc.Merit], Mean] = mrmc.single) -> Mean | None:
    if rating.shape[1] < 2 or not all(_both(column, kind) for column in rating.T):
        return None
    return replace(mean(mrmc.auc_merit(rating.T[None], kind)), share=True)


def compare_arms(first: Table, rating: Floats, kind: Bools) -> dict[str, Mean]:
    """AUC against the same real cases of every pair of synthetic arms, A minus B: two "modalities" of Obuchowski & Rockette."""
    arms = [arm for arm in dict.fromkeys(first.arms) if kind[np.array(first.arms) == arm].all()]
    found = {}
    for a, b in combinations(arms, 2):
        both = np.stack([np.where((np.array(first.arms) == arm) | ~kind, 1, np.nan)[:, None] * rating for arm in (a, b)])
        if rating.shape[1] > 1 and all(_both(column, kind) for side in both for column in side.T):
            found[f"{a} − {b}"] = mrmc.difference(mrmc.auc_merit(both.transpose(0, 2, 1), kind))
    return found


def _agreement(whole: Table, ordered: Floats, categories: Floats, decisions: Floats) -> Agreement:
    """Kappas of the decisions, weighted ones and ICC of the ordered ratings [N,J]; repeats pooled over readers."""
    between: dict[str, Estimate] = {}
    scale = np.unique(ordered[np.isfinite(ordered)])
    if decisions.shape[1] > 1 and len(scale) > 1:
        between["Fleiss's kappa"] = agreement.fleiss(decisions)
        between["Gwet's AC1"] = agreement.gwet(decisions, categories)
        between["Cohen's kappa, mean of pairs"] = agreement.mean_kappa(decisions, categories)
        between["Krippendorff's alpha, ordinal"] = agreement.krippendorff_alpha(ordered, "ordinal")
        if len(scale) > 2:
            between["weighted kappa, mean of pairs"] = agreement.mean_kappa(ordered, scale, "quadratic")
            between["Gwet's AC2, quadratic"] = agreement.gwet(ordered, scale, "quadratic")
            between |= {f"{n}": e for n, e in agreement.icc(ordered).items() if n in ("ICC2", "ICC2k")}
    again = whole.repeat_of >= 0
    one, two = whole.value[whole.repeat_of[again]], whole.value[again]
    seen = np.unique(whole.value[np.isfinite(whole.value)])
    within = agreement.with_oneself(one, two, seen) if len(seen) > 1 and again.any() else Estimate(np.nan, np.nan, np.nan, 0)
    return Agreement(between, within, _repeats_alike(one, two))


def _repeats_alike(one: Floats, two: Floats) -> Estimate:
    """Share of repeats [C,J] answered as before, its interval for other readers and cases; of one reader Wilson's; `n`: how many."""
    alike = np.where(np.isfinite(one) & np.isfinite(two), one == two, np.nan)
    n = int(np.isfinite(alike).sum())
    asked = np.isfinite(alike).any(1)
    mean = _mrmc_mean(alike[asked][:, np.isfinite(alike).any(0)]) if n else None
    if mean is None:
        return share(int(np.nansum(alike)), n).estimate
    return replace(mean.interval(), n=n)


def _trend(right: Floats, position: Floats, share: bool) -> Trend:
    """Learning or tiring: each reader's least-squares slope of being right over the own order, from first (0) to last case (1)."""
    slopes, fifths = [], np.full((right.shape[1], 5), np.nan)
    for j in range(right.shape[1]):
        known = np.isfinite(right[:, j])
        if known.sum() < 5:
            continue
        order = stats.rankdata(position[known, j]) - 1
        place = order / max(order.max(), 1)
        slopes.append(float(stats.linregress(place, right[known, j]).slope))
        part = np.minimum((place * 5).astype(int), 4)
        fifths[j] = [right[known, j][part == k].mean() if (part == k).any() else np.nan for k in range(5)]
    mean = reader_mean(slopes)
    return Trend(mean.interval(), mean.p_value(0.0), tuple(reader_mean(column, share).interval() for column in fifths.T))


@dataclass(frozen=True)
class Rating:
    """A task of ordered ratings: per reader and arm, synthetic against real, cumulative-link mixed model, agreement."""

    low: float
    high: float
    per_reader: Mapping[str, Mapping[str, float]]
    missing: Mapping[str, int]
    seconds: Mapping[str, float]
    arms: Mapping[str, Mean]
    counts: Mapping[str, tuple[int, ...]]
    superiority: Mean | None
    equivalence: Equivalence | None
    odds: OrdinalFit | None
    agreement: Agreement
    trend: Trend


def rating(whole: Table, low: float, high: float, margin: float) -> Rating:
    """Ratings by arm. Superiority: P(a synthetic case is rated above a real one), ties half, per reader; .5 is no difference."""
    first = whole.first
    names = tuple(dict.fromkeys(first.arms))
    arms, sources = np.array(first.arms), np.array(first.sources)
    scale = np.arange(low, high + 1)
    per_reader = {
        reader: {
            arm: float(np.nanmean(v)) if np.isfinite(v := first.value[arms == arm, j]).any() else float("nan") for arm in names
        }
        for j, reader in enumerate(first.readers)
    }
    synthetic, real = sources == "synthetic", sources == "real"
    compared = synthetic.any() and real.any()
    superiority = None
    if compared:
        rows = synthetic | real
        # Between cases: difficulty that readers share would pass for a difference between the arms if cases were not a sample, too.
        superiority = _mrmc_auc(first.value[rows], synthetic[rows], mrmc.contrast)
        if superiority is None:
            superiority = reader_mean([sd.auc(column, synthetic[rows]) for column in first.value[rows].T], share=True)
    return Rating(
        low,
        high,
        per_reader,
        {r: int((whole.asked[:, j] & np.isnan(whole.value[:, j])).sum()) for j, r in enumerate(whole.readers)},
        _seconds(whole),
        {arm: reader_mean([per_reader[reader][arm] for reader in first.readers]) for arm in names},
        {arm: tuple(int((first.value[arms == arm] == step).sum()) for step in scale) for arm in names},
        superiority,
        tost(superiority, 0.5, margin) if superiority is not None else None,
        _odds(first, synthetic, real, scale) if compared else None,
        _agreement(whole, first.value, scale, first.value),
        _trend((first.value - low) / max(high - low, 1), first.position, share=True),
    )


def _seconds(whole: Table) -> dict[str, float]:
    return {
        reader: float(np.nanmedian(whole.ms[:, j]) / 1000) if np.isfinite(whole.ms[:, j]).any() else float("nan")
        for j, reader in enumerate(whole.readers)
    }


def _odds(first: Table, synthetic: Bools, real: Bools, scale: Floats) -> OrdinalFit | None:
    counts = np.stack(
        [
            [[(first.value[kind, j] == step).sum() for step in scale] for kind in (real, synthetic)]
            for j in range(len(first.readers))
        ]
    ).astype(np.float64)
    if len(first.readers) < 2 or (counts.sum((0, 1)) > 0).sum() < 2:
        return None
    return ordinal_mixed(counts, np.array([[0.0], [1.0]]), slopes=len(first.readers) > 2)


@dataclass(frozen=True)
class Scoring:
    """A task whose answers are scored against the key or counted: a number per answer, averaged per reader and arm."""

    unit: str
    per_reader: Mapping[str, Estimate]
    missing: Mapping[str, int]
    seconds: Mapping[str, float]
    arms: Mapping[str, Mean]
    mean: Mean
    mean_mrmc: Mean | None
    difference: Mean | None
    agreement: Mapping[str, Estimate]
    trend: Trend


def scoring(whole: Table, unit: str, continuous: bool = False) -> Scoring:
    """Means of scores by reader and arm, and synthetic minus real over readers. `continuous`: also the ICC between readers."""
    first = whole.first
    arms, sources = np.array(first.arms), np.array(first.sources)
    synthetic, real = sources == "synthetic", sources == "real"
    apart = None
    if synthetic.any() and real.any():
        rows = synthetic | real
        if first.value.shape[1] > 1 and all(_both(column, synthetic[rows]) for column in first.value[rows].T):
            apart = mrmc.contrast(mrmc.contrast_merit(first.value[rows].T, synthetic[rows]))
        else:
            apart = reader_mean(np.subtract(_column_means(first.value[synthetic]), _column_means(first.value[real])))
    bounded = unit == "share"
    return Scoring(
        unit,
        {
            reader: reader_mean(first.value[:, j], bounded).interval() for j, reader in enumerate(first.readers)
        },  # its cases, not readers
        {r: int((whole.asked[:, j] & np.isnan(whole.value[:, j])).sum()) for j, r in enumerate(whole.readers)},
        _seconds(whole),
        {arm: reader_mean(_column_means(first.value[arms == arm]), bounded) for arm in dict.fromkeys(first.arms)},
        reader_mean(_column_means(first.value), bounded),
        _mrmc_mean(first.value, arms, bounded),
        apart,
        agreement.icc(first.value) if continuous and len(first.readers) > 1 else {},
        _trend(first.value, first.position, bounded),
    )
