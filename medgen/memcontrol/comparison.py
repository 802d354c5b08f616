"""What the confirmation says: chosen masks against baselines, trained anew and scored by patients and noises that chose nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ttest_1samp

from medgen.evaluation.statistics import Estimate
from medgen.memcontrol.front import as_good_as, best_of, chosen, searched
from medgen.memcontrol.trials import Result

NAMES = {
    "start": "no fine-tuning",
    "full": "full",
    "lora": "LoRA",
    "attention": "attention only",
    "bias": "biases",
    "norm": "norms",
    "random_words": "full + random words",
    "deduplicated": "full + duplicates removed",
    "search": "mask",
}
EQUAL = 0.05
"""Quality is equal where the interval of the difference ends below this share of the baseline's own."""


@dataclass(frozen=True)
class Arm:
    """A fine-tuning in the confirmation: its repeats in order."""

    repeats: tuple[Result, ...]

    @property
    def name(self) -> str:
        """What it is called on the page."""
        trial = self.repeats[0].trial
        return f"mask {trial.name}" if trial.kind == "search" else NAMES[trial.kind]

    def values(self, measure: str) -> dict[int, float]:
        """A score by repeat."""
        return {one.repeat: float(getattr(one.scores, measure)) for one in self.repeats}

    def mean(self, measure: str) -> float:
        """Over repeats."""
        return float(np.mean(list(self.values(measure).values())))

    def each(self, measure: str, digits: int = 3) -> str:
        """Its repeats' values in words."""
        return ", ".join(f"{value:.{digits}f}".replace("-", "−") for value in self.values(measure).values())


@dataclass(frozen=True)
class Comparison:
    """The mask that was chosen against a baseline, minus that baseline; negative is better. Paired by repeat, intervals over repeats."""

    baseline: Arm
    mask: Arm
    as_good_in_search: bool
    memorisation: Estimate
    quality: Estimate

    @property
    def state(self) -> str:
        """ "shown": less memorisation at equal or better quality, by both whole intervals. "worse": more memorisation. Else "open"."""
        if not math.isfinite(self.memorisation.low):
            return "open"
        if self.memorisation.low > 0:
            return "warning"
        equal = self.quality.high < EQUAL * self.baseline.mean("quality")
        return "shown" if self.memorisation.high < 0 and equal else "open"

    @property
    def text(self) -> str:
        """In plain words."""
        name, mask = NAMES[self.baseline.repeats[0].trial.kind], self.mask
        memory, theirs = (arm.mean("memorisation") for arm in (mask, self.baseline))
        quality, their_quality = (arm.mean("quality") for arm in (mask, self.baseline))
        figures = (
            f"memorisation {number(memory, 3)} against {number(theirs, 3)} (difference {estimate(self.memorisation)}), quality "
            f"{number(quality, 3)} against {number(their_quality, 3)} (difference {estimate(self.quality)}), over "
            f"{self.memorisation.n} trainings of each, whose repeated patients were drawn anew"
        )
        if self.state == "shown":
            return f"At equal quality {mask.name} memorises less than {name} fine-tuning: {figures}."
        if self.state == "warning":
            return f"{mask.name.capitalize()} memorises more than {name} fine-tuning: {figures}."
        return f"That {mask.name} memorises less than {name} fine-tuning at equal quality is not shown: {figures}."


def arms(repeats: Sequence[Result]) -> list[Arm]:
    """The confirmation by fine-tuning, baselines first."""
    names = dict.fromkeys(one.trial.name for one in sorted(repeats, key=lambda one: one.trial.kind == "search"))
    return [Arm(tuple(sorted((one for one in repeats if one.trial.name == name), key=lambda one: one.repeat))) for name in names]


def comparisons(results: Sequence[Result], repeats: Sequence[Result]) -> list[Comparison]:
    """Every baseline of the confirmation against the mask that was chosen against it, as far as both are trained."""
    by_name = {arm.repeats[0].trial.name: arm for arm in arms(repeats)}
    found = []
    for kind in dict.fromkeys(one.trial.kind for one in repeats if one.trial.kind != "search"):
        other, mask = best_of(results, kind), chosen(results, kind)
        if other is None or mask is None or not {other.trial.name, mask.trial.name} <= by_name.keys():
            continue
        theirs, ours = by_name[other.trial.name], by_name[mask.trial.name]
        gaps = [_paired(ours.values(measure), theirs.values(measure)) for measure in ("memorisation", "quality")]
        found.append(Comparison(theirs, ours, as_good_as(results, mask, kind), *gaps))
    return found


def _paired(ours: dict[int, float], theirs: dict[int, float]) -> Estimate:
    """The mean difference of the repeats that both have, with Student's 95 % interval."""
    gaps = [ours[repeat] - theirs[repeat] for repeat in ours if repeat in theirs]
    if len(gaps) < 2:
        return Estimate(gaps[0] if gaps else math.nan, math.nan, math.nan, len(gaps))
    ends = ttest_1samp(gaps, 0).confidence_interval(0.95)
    return Estimate(float(np.mean(gaps)), float(ends.low), float(ends.high), len(gaps))


def conclusions(results: Sequence[Result], found: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Sentences with their state: "shown", "open" or "warning"."""
    said = [(one.state, one.text) for one in found]
    full = best_of(results, "full")
    if full is not None and full.scores.membership < 0.7:
        text = f"Full fine-tuning memorised hardly anybody (membership AUC {full.scores.membership:.2f}): there was nothing to avoid."
        said.append(("warning", text))
    masks = searched(results)
    others = [one for one in results if one.trial.kind not in ("search", "start")]
    if masks and others:
        left = [one for one in others if not any(all(a < b for a, b in zip(mask.values, one.values)) for mask in masks)]
        text = f"By the search's own scores {len(others) - len(left)} of {len(others)} baseline points lose to a mask in both objectives"
        names = ", ".join(dict.fromkeys(f"{NAMES[one.trial.kind]} at {one.trial.learning_rate:.2g}" for one in left))
        said.append(("open", f"{text}. Not so: {names}." if left else f"{text}."))
    start, choice = best_of(results, "start"), chosen(results)
    if start is not None and choice is not None and choice.scores.quality >= start.scores.quality:
        text = "No fine-tuning at all is at least as good as the chosen mask: nothing was gained that memorising could be the price of."
        said.append(("warning", text))
    for arm in {one.mask.name: one.mask for one in found}.values():
        if arm.mean("membership") > 0.6:
            text = f"{arm.name.capitalize()} still remembers: the losses of repeated patients' films tell them from patients never seen"
            said.append(("warning", f"{text} (membership AUC {arm.each('membership', 2)})."))
    return said


def estimate(value: Estimate, digits: int = 3) -> str:
    """With its sign, and its interval where it has one."""
    ends = f" [{value.low:+.{digits}f}, {value.high:+.{digits}f}]" if math.isfinite(value.low) else ""
    return (f"{value.value:+.{digits}f}" + ends).replace("-", "−")


def number(value: float | None, digits: int = 4) -> str:
    """Or that it was not measured."""
    return "not measured" if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")
