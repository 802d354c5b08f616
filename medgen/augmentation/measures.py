"""AUROC, average precision, Brier score, calibration error and recall (of a number: `agreement`) of one run, on resampled patients.

A resample of patients is a weight per film (how often its patient was drawn), so every measure here takes weights [B,N] and gives
[B]; the first row is all ones: the films as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medgen.augmentation import agreement
from medgen.augmentation.predictions import Bools, Experiment, Films, Run, Scores
from medgen.seeds import stable_seed

Floats = NDArray[np.float64]
BINS = 10
LEVEL = 0.95


def resampled(films: Films, count: int, seed: int = 0) -> Floats:
    """Weights [count+1,N]: first every film once, then patients drawn with replacement, all films of a patient together."""
    unique, member = np.unique(films.patients, return_inverse=True)
    rng = np.random.default_rng(stable_seed("augmentation report", seed))
    drawn = rng.multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=count)
    return np.concatenate([np.ones((1, len(member))), drawn[:, member]]).astype(np.float64)


def auroc(truth: Bools, scores: Scores, weights: Floats) -> Floats:
    """Area under the ROC curve [B] (ties count half) of scores [N]; NaN where a class is missing."""
    order = np.argsort(scores, kind="stable")
    truth, scores, weights = truth[order], scores[order], weights[:, order]
    first, last = _ties(scores)
    positive, negative = weights * truth, weights * ~truth
    below = np.concatenate([np.zeros((len(weights), 1)), np.cumsum(negative, axis=1)], axis=1)
    wins = (positive * (below[:, first] + below[:, last + 1]) / 2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return wins / (positive.sum(1) * negative.sum(1))


def auprc(truth: Bools, scores: Scores, weights: Floats) -> Floats:
    """Average precision [B] (no interpolation, as scikit-learn's); NaN where nothing is positive."""
    order = np.argsort(-scores, kind="stable")
    truth, scores, weights = truth[order], scores[order], weights[:, order]
    _, last = _ties(scores)
    positive = weights * truth
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = (np.cumsum(positive, axis=1) / np.cumsum(weights, axis=1))[:, last]
        return (positive * np.nan_to_num(precision)).sum(1) / positive.sum(1)


def _ties(ordered: Scores) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First and last place of the run of equal scores that each place is in."""
    new = np.flatnonzero(np.diff(ordered)) + 1
    starts = np.concatenate([[0], new])
    group = np.searchsorted(starts, np.arange(len(ordered)), side="right") - 1
    return starts[group], np.concatenate([new, [len(ordered)]])[group] - 1


def brier(truth: Bools, scores: Scores, weights: Floats) -> Floats:
    """Mean squared error of the probabilities [B]."""
    return np.asarray(weights @ (scores - truth) ** 2 / weights.sum(1))


def calibration(truth: Bools, scores: Scores, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Weight, mean probability and observed share in `BINS` equally wide bins, each [B,BINS] (NaN: empty)."""
    inside = np.eye(BINS)[np.minimum((scores * BINS).astype(int), BINS - 1)]
    total = weights @ inside
    with np.errstate(invalid="ignore", divide="ignore"):
        return total, weights @ (inside * scores[:, None]) / total, weights @ (inside * truth[:, None]) / total


def ece(truth: Bools, scores: Scores, weights: Floats) -> Floats:
    """Expected calibration error [B] (Naeini et al. 2015). With few films in a bin it is too large, alike for all arms."""
    total, predicted, observed = calibration(truth, scores, weights)
    return np.asarray(np.nansum(total * np.abs(predicted - observed), axis=1) / total.sum(1))


def recall(truth: Bools, scores: Scores, weights: Floats, threshold: float) -> tuple[Floats, Floats]:
    """Sensitivity and specificity [B] at `threshold`."""
    positive, negative = weights * truth, weights * ~truth
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * (scores >= threshold)).sum(1) / positive.sum(1), (negative * (scores < threshold)).sum(
            1
        ) / negative.sum(1)


def threshold(truth: Bools, scores: Scores) -> float:
    """Where sensitivity + specificity is largest (Youden), half-way to the next score; 0.5 where a class is missing."""
    if truth.all() or not truth.any():
        return 0.5
    levels = np.unique(scores)
    cuts = np.concatenate([(levels[1:] + levels[:-1]) / 2, [levels[-1] + 1e-9]])
    sensitivity = 1 - np.searchsorted(np.sort(scores[truth]), cuts) / truth.sum()
    specificity = np.searchsorted(np.sort(scores[~truth]), cuts) / (~truth).sum()
    return float(cuts[np.argmax(sensitivity + specificity)])


def thresholds(run: Run) -> Floats:
    """Of every finding, on the run's own validation films, [F]."""
    p, truth, known = run.scores["val"], run.scores["val_truth"] > 0, run.scores["val_known"] > 0
    return np.array([threshold(truth[known[:, f], f], p[known[:, f], f]) for f in range(p.shape[1])])


CLASSES = {"auroc": auroc, "auprc": auprc, "brier": brier, "ece": ece}
NUMBERS = {"mae": agreement.mae, "r2": agreement.r2, "bias": agreement.bias, "lower": agreement.lower, "upper": agreement.upper}


@dataclass(frozen=True)
class Replicates:
    """One run on one set: values [B+1,F] by measure, the first row on the films as they are; sensitivity and specificity too."""

    values: dict[str, Floats]

    def macro(self, measure: str) -> Floats:
        """Mean over the findings that both classes of are there, [B+1]."""
        table = self.values[measure]
        if table.shape[1] == 1:
            return table[:, 0]
        with np.errstate(invalid="ignore"):
            return np.asarray(np.nanmean(table[:, np.isfinite(table[0])], axis=1))


def replicates(run: Run, films: Films, name: str, weights: Floats) -> Replicates:
    """Every measure of `run` on the set `name`: of classes where the truth is one, of agreement where it is a number."""
    classes = films.truth.dtype == bool
    functions: dict[str, Any] = CLASSES if classes else NUMBERS
    columns: dict[str, list[Floats]] = {key: [] for key in (*functions, *(("recall", "specificity") if classes else ()))}
    cuts = thresholds(run) if classes else None
    for f in range(films.truth.shape[1]):
        rows = films.known[:, f]
        truth, scores, part = films.truth[rows, f], run.scores[name][rows, f], weights[:, rows]
        for key, function in functions.items():
            columns[key].append(function(truth, scores, part))
        if cuts is not None:
            for key, values in zip(("recall", "specificity"), recall(truth, scores, part, cuts[f]), strict=True):
                columns[key].append(values)
    return Replicates({key: np.stack(values, axis=1) for key, values in columns.items()})


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its 95 % interval over other patients and other seeds, and p against 0.

    Patients and seeds are crossed, as cases and readers are in a reader study: variance = that of the mean over seeds among
    resampled patients + that of the seeds' values divided by their number (which counts their interaction twice: on the safe
    side). Three seeds resampled would give too short an interval; Student's t with Satterthwaite's degrees of freedom does not.
    With one seed the interval is over patients only, and nothing is claimed of other trainings. `se_patients` is the part of the
    standard error that patients make: more seeds narrow only the rest.
    """

    value: float
    low: float
    high: float
    se: float
    se_patients: float
    df: float
    seeds: int
    by_seed: tuple[float, ...]

    def p(self, against: float = 0.0) -> float:
        """Two-sided."""
        if not self.se > 0:
            return float("nan")
        return float(2 * stats.t.sf(abs(self.value - against) / self.se, self.df))

    def p_above(self, against: float) -> float:
        """One-sided: that it is not above `against`."""
        return float(stats.t.sf((self.value - against) / self.se, self.df)) if self.se > 0 else float("nan")


def spread(table: Floats, patients: int, bounds: tuple[float, float] | None = None) -> Spread:
    """`Spread` of one number from its values [S,B+1] for seeds and resamples (first column: the films as they are)."""
    by_seed = table[:, 0]
    seeds, value = len(by_seed), float(by_seed.mean())
    among = table[:, 1:].mean(0)
    among = among[np.isfinite(among)]
    if not np.isfinite(value) or len(among) < 20:
        nan = float("nan")
        return Spread(value, nan, nan, nan, nan, nan, seeds, tuple(map(float, by_seed)))
    of_patients = float(among.var(ddof=1))
    of_seeds = float(by_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    variance = of_patients + of_seeds
    pieces = of_patients**2 / max(patients - 1, 1) + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0)
    df = variance**2 / pieces if pieces > 0 else float("inf")
    reach = float(stats.t.ppf((1 + LEVEL) / 2, df)) * variance**0.5
    low, high = value - reach, value + reach
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Spread(value, low, high, variance**0.5, of_patients**0.5, df, seeds, tuple(map(float, by_seed)))


@dataclass(frozen=True)
class Measured:
    """Replicates of every run on every tested set, and the patients of each."""

    experiment: Experiment
    tables: dict[tuple[str, float, int, str], Replicates]
    patients: dict[str, int]

    def values(self, arm: str, fraction: float, name: str, measure: str, finding: int | None = None) -> dict[int, Floats]:
        """[B+1] by seed: the macro mean, or one finding's."""
        found = {}
        for seed in self.experiment.of(arm, fraction):
            one = self.tables[arm, round(fraction, 6), seed, name]
            found[seed] = one.macro(measure) if finding is None else one.values[measure][:, finding]
        return found

    def estimate(self, arm: str, fraction: float, name: str, measure: str, finding: int | None = None) -> Spread:
        """Of one arm."""
        rows = self.values(arm, fraction, name, measure, finding)
        return spread(np.stack(list(rows.values())), self.patients[name], self.experiment.outcome.bounds(measure))

    def difference(
        self, arm: str, reference: str, fraction: float, name: str, measure: str, finding: int | None = None
    ) -> Spread | None:
        """`arm` minus `reference` on the same patients and seeds; None without a seed in common."""
        ours, theirs = (self.values(a, fraction, name, measure, finding) for a in (arm, reference))
        common = sorted(ours.keys() & theirs.keys())
        return spread(np.stack([ours[s] - theirs[s] for s in common]), self.patients[name]) if common else None


def measure(experiment: Experiment, resamples: int, seed: int = 0) -> Measured:
    """Every run on every tested set; all of them on the same resampled patients, so that differences are paired."""
    tables, patients = {}, {}
    for name in experiment.sets:
        films = experiment.films[name]
        weights = resampled(films, resamples, seed)
        patients[name] = len(set(films.patients))
        for run in experiment.runs:
            tables[run.arm, round(run.fraction, 6), run.seed, name] = replicates(run, films, name, weights)
    return Measured(experiment, tables, patients)
