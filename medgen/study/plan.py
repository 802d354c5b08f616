"""How many readers and cases a study needs before it can support its claim: whole studies simulated and analysed as they will be.

Readers are the sample. More cases sharpen each reader's share, but never the spread between readers; that is why a plan with few readers
cannot support a claim of equivalence, however many cases it has.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from medgen.evaluation.statistics import Floats
from medgen.seeds import stable_seed

Design = Literal["crossed", "split_plot"]
Claim = Literal["equivalence", "difference"]
MOST_READERS = 400


@dataclass(frozen=True)
class Study:
    """One design: `cases` in all; in a split plot every group of readers reads its own cases / groups of them."""

    readers: int
    cases: int
    between_reader_sd: float
    margin: float
    design: Design
    groups: int
    claim: Claim
    accuracy: float
    chance: float
    case_sd: float


@dataclass(frozen=True)
class Plan:
    """What simulation says of a study: its power, the half-widths of its 95 % intervals, and whether it can support its claim."""

    study: Study
    power: float
    power_wanted: float
    power_error: float
    half_width_readers: float
    half_width_readers_and_cases: float
    supports: bool
    readers_needed: int | None
    simulations: int

    @property
    def verdict(self) -> str:
        """One sentence for the protocol."""
        what = (
            f"that readers stay within {100 * self.study.chance:.0f} ± {100 * self.study.margin:.0f} %"
            if self.study.claim == "equivalence"
            else f"that readers differ from {100 * self.study.chance:.0f} %"
        )
        power = f"power {100 * self.power:.0f} % (wanted {100 * self.power_wanted:.0f} %)"
        if self.supports:
            return f"This plan can support its claim {what}: {power}."
        needed = (
            f"about {self.readers_needed} readers could, all else equal"
            if self.readers_needed
            else f"no number of readers up to {MOST_READERS} could: take more cases, or a wider margin that can be defended"
        )
        return f"This plan CANNOT support its claim {what}: {power}; {needed}."

    def __str__(self) -> str:
        s = self.study
        design = "every reader reads every case" if s.design == "crossed" else f"split plot, {s.groups} groups"
        rows = [
            ("readers", f"{s.readers}"),
            ("cases", f"{s.cases} ({design})"),
            ("spread between readers (SD)", f"{100 * s.between_reader_sd:.1f} points"),
            ("true share of right answers", f"{100 * s.accuracy:.0f} %"),
            ("margin", f"{100 * s.margin:.0f} points around {100 * s.chance:.0f} %"),
            ("power", f"{100 * self.power:.1f} % ± {100 * self.power_error:.1f} ({self.simulations} simulated studies)"),
            ("95 % interval, these cases", f"± {100 * self.half_width_readers:.1f} points"),
            ("95 % interval, other cases too", f"± {100 * self.half_width_readers_and_cases:.1f} points"),
        ]
        width = max(len(name) for name, _ in rows) + 2
        return "\n".join([*(f"{name:<{width}}{value}" for name, value in rows), "", self.verdict])

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "verdict": self.verdict}


def plan(
    readers: int = 10,
    cases: int = 60,
    between_reader_sd: float = 0.156,
    margin: float = 0.1,
    design: Design = "crossed",
    groups: int = 2,
    claim: Claim = "equivalence",
    accuracy: float = 0.5,
    chance: float = 0.5,
    case_sd: float = 0.5,
    power: float = 0.8,
    simulations: int = 2000,
    seed: int = 0,
    out: Path | None = None,
) -> Plan:
    """Power, expected interval and verdict of a reader study, by simulation.

    Args:
        readers: how many readers.
        cases: how many cases in all, both arms together.
        between_reader_sd: spread of readers' true shares of right answers (.156: 17 radiologists on chest films, Radiology 2026).
        margin: distance from chance that still counts as no different, fixed before reading; a share (0.1 is 10 points).
        design: crossed (every reader reads every case) or split_plot (each group of readers reads its own cases).
        groups: groups of a split plot.
        claim: equivalence (readers are within the margin of chance) or difference (readers are not at chance).
        accuracy: the true mean share of right answers; at chance for a generator that is as good as hoped.
        chance: what guessing gives.
        case_sd: spread of case difficulty (probit units): what makes another set of cases give another answer.
        power: the share of such studies that should succeed.
        simulations: simulated studies; 2000 give the power to about ± 2 points.
        seed: seed of the simulation.
        out: also write the plan as JSON here.
    """
    study = Study(readers, cases, between_reader_sd, margin, design, groups, claim, accuracy, chance, case_sd)
    _check(study, power, simulations)
    found, within, beyond = simulate(study, simulations, seed)
    error = 1.96 * float(np.sqrt(max(found * (1 - found), 1e-12) / simulations))
    needed = None if found >= power else readers_needed(study, power, min(simulations, 1000), seed)
    result = Plan(study, found, power, error, within, beyond, found >= power, needed, simulations)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(result.as_dict(), indent=2) + "\n", "utf-8")
    return result


def _check(study: Study, power: float, simulations: int) -> None:
    groups = study.groups if study.design == "split_plot" else 1
    for wrong, message in (
        (study.readers < 2, f"--readers {study.readers}: readers are the sample, at least 2 are needed"),
        (study.cases // groups < 4, f"--cases {study.cases}: at least 4 cases for every reader are needed"),
        (
            study.design == "split_plot" and not 2 <= groups <= study.readers,
            f"--groups {groups}: between 2 and the number of readers",
        ),
        (
            not 0 <= study.between_reader_sd < 0.5,
            f"--between-reader-sd {study.between_reader_sd}: a share from 0 to .5 (0.156 = 15.6 points)",
        ),
        (not 0 < study.margin < 0.5, f"--margin {study.margin}: a share between 0 and .5 (0.1 = 10 points)"),
        (not 0 < study.accuracy < 1 or not 0 < study.chance < 1, "--accuracy and --chance are shares between 0 and 1"),
        (
            study.claim == "equivalence" and abs(study.accuracy - study.chance) >= study.margin,
            f"--accuracy {study.accuracy} lies outside the margin: equivalence would then be false, and no study should show it",
        ),
        (
            study.claim == "difference" and study.accuracy == study.chance,
            "--claim difference needs --accuracy other than --chance",
        ),
        (not 0 < power < 1, f"--power {power}: a share between 0 and 1"),
        (simulations < 100, f"--simulations {simulations}: at least 100"),
    ):
        if wrong:
            raise ValueError(message)


def readers_needed(study: Study, power: float, simulations: int, seed: int) -> int | None:
    """The fewest readers with that power, by doubling and bisection; None if even `MOST_READERS` lack it."""

    def enough(readers: int) -> bool:
        return simulate(Study(**{**asdict(study), "readers": readers}), simulations, seed)[0] >= power

    low, high = study.readers, study.readers
    while not enough(high):
        if high >= MOST_READERS:
            return None
        low, high = high, min(2 * high, MOST_READERS)
    while high - low > max(1, high // 40):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def simulate(study: Study, count: int, seed: int) -> tuple[float, float, float]:
    """Power and mean half-widths of both 95 % intervals over `count` studies, in chunks that fit in memory."""
    rng = np.random.default_rng(stable_seed("study plan", seed))  # the same draws for every design: smoother comparison
    successes, within, beyond = 0.0, 0.0, 0.0
    chunk = max(1, 4_000_000 // (study.readers * study.cases))
    for start in range(0, count, chunk):
        part = min(chunk, count - start)
        values, errors, dfs = analyse(*right_answers(study, rng, part))
        success = np.all([_succeeds(study, values, error, df) for error, df in zip(errors, dfs, strict=True)], axis=0)
        halves = [float(np.sum(stats.t.ppf(0.975, df) * error)) for error, df in zip(errors, dfs, strict=True)]
        successes, within, beyond = successes + float(success.sum()), within + halves[0], beyond + halves[1]
    return successes / count, within / count, beyond / count


def right_answers(study: Study, rng: np.random.Generator, count: int) -> tuple[Floats, Floats]:
    """Right answers [S,J,n] of each reader to the n cases of the reader's group, and the group [J] of each reader.

    Probit: a reader of share p is right on case i when z(p)·√(1 + case_sd²) + case_sd·c_i + noise > 0, so the mean share is p.
    """
    groups = study.groups if study.design == "split_plot" else 1
    n = study.cases // groups
    share = np.clip(rng.normal(study.accuracy, study.between_reader_sd, (count, study.readers)), 0.01, 0.99)
    skill = stats.norm.ppf(share) * np.sqrt(1 + study.case_sd**2)
    group = np.arange(study.readers) % groups
    case = rng.standard_normal((count, groups, n), dtype=np.float32)[:, group] * study.case_sd
    noise = rng.standard_normal((count, study.readers, n), dtype=np.float32)
    return (skill[..., None] + case + noise > 0).astype(np.float32), group.astype(np.float64)


def analyse(right: Floats, group: Floats) -> tuple[Floats, tuple[Floats, Floats], tuple[Floats, Floats]]:
    """Mean share [S], standard errors and degrees of freedom: reader-level t, and Obuchowski-Rockette (as `mrmc.single`)."""
    readers, n = right.shape[1:]
    shares = right.mean(2)
    square = np.maximum(shares.var(1, ddof=1), 1e-9)
    centred = right - shares[..., None]
    covariance = np.zeros(len(right))  # sum over pairs of different readers of the same group
    for one in np.unique(group):
        own = centred[:, group == one]
        covariance += ((own.sum(1) ** 2).sum(1) - (own**2).sum((1, 2))) / (n * (n - 1))
    cov2 = np.maximum(covariance / (readers * (readers - 1)), 0)
    total = square + readers * cov2
    return (
        shares.mean(1),
        (np.sqrt(square / readers), np.sqrt(total / readers)),
        (np.full(len(right), readers - 1.0), total**2 / (square**2 / (readers - 1))),
    )


def _succeeds(study: Study, values: Floats, error: Floats, df: Floats) -> Floats:
    """As `proportions.Mean` of shares and `equivalence.tost` decide: the error of a test against b is the one at b."""
    answers = np.clip(values * (1 - values), 1e-9, None) / error**2

    def beyond(bound: float) -> Floats:
        return (values - bound) / np.sqrt(max(bound * (1 - bound), 1e-12) / answers)

    if study.claim == "difference":
        return 2 * stats.t.sf(np.abs(beyond(study.chance)), df) < 0.05
    low, high = study.chance - study.margin, study.chance + study.margin
    return (stats.t.sf(beyond(low), df) < 0.05) & (stats.t.cdf(beyond(high), df) < 0.05)
