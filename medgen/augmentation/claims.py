"""From paired differences to sentences: which comparisons were meant before looking, Holm's correction over them, and no claim beyond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medgen.augmentation.measures import Measured, Spread
from medgen.augmentation.outcomes import FINDINGS, Outcome
from medgen.augmentation.predictions import Experiment

ALPHA = 0.05
Kind = Literal["gain", "equal"]
Verdict = Literal["better", "worse", "none shown", "within the margin", "behind", "not decided", "one seed"]


@dataclass(frozen=True)
class Comparison:
    """One arm minus real at a fraction of the real patients, on one set, of the outcome's primary measure. `p` of the claim, `p_holm`
    over the family.

    kind gain: is there a difference from 0? kind equal: does it lie inside ± the outcome's margin (two one-sided tests)?
    """

    kind: Kind
    arm: str
    fraction: float
    set: str
    difference: Spread
    p: float
    p_holm: float
    outcome: Outcome

    @property
    def verdict(self) -> Verdict:
        d = self.difference
        if d.seeds < 2:
            return "one seed"
        held = np.isfinite(self.p_holm) and self.p_holm < ALPHA
        if self.kind == "equal":
            far = max(self.outcome.better(end) for end in (d.low, d.high)) < -self.outcome.margin
            return "within the margin" if held and self.inside else "behind" if far else "not decided"
        if not (held and (d.low > 0 or d.high < 0)):
            return "none shown"
        return "better" if self.outcome.better(d.value) > 0 else "worse"

    @property
    def inside(self) -> bool:
        """Whether the interval lies inside the margin."""
        return -self.outcome.margin < self.difference.low and self.difference.high < self.outcome.margin

    @property
    def state(self) -> str:
        """Of the sentence: shown, open or warning."""
        return {"better": "shown", "within the margin": "shown", "worse": "warning", "behind": "warning"}.get(
            self.verdict, "open"
        )

    def sentence(self, family: int) -> str:
        """What may be said, and no more."""
        o, d = self.outcome, self.difference
        where = f"{percent(self.fraction)} of the real patients, {self.set} {o.items}: {arm_words(self.arm, o.items)}"
        against = f"minus as many real {o.items}" if self.kind == "equal" else f"minus real {o.items} alone"
        told = f"{where} {against} = {points(d, o)} of {o.what}"
        corrected, margin = f"{p_words(self.p_holm)} after Holm's correction over {family}", f"{o.scale * o.margin:g} points"
        if self.verdict == "one seed":
            return f"{told}. One seed: another training might say the opposite, so nothing is claimed."
        if self.verdict == "within the margin":
            return f"{told}, inside ± {margin}, {corrected}."
        if self.verdict == "behind":
            return f"{told}: more than {margin} behind real {o.items}."
        if self.verdict == "not decided":
            if self.inside:
                return f"{told}, inside ± {margin}, but {corrected} comparisons: not decided."
            return f"{told}. The interval reaches beyond ± {margin}: not decided."
        if self.verdict == "none shown":
            if d.low > 0 or d.high < 0:
                return f"{told}. The interval leaves out 0, but {corrected} comparisons: no difference is shown."
            return f"{told}. No difference is shown, which is not evidence that there is none."
        way = f"Synthetic {o.items} helped" if self.verdict == "better" else f"Synthetic {o.items} did harm"
        return f"{told}. {way} ({corrected} comparisons)."


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p-values; NaN stays, and still counts as a comparison that was meant."""
    order = sorted(range(len(p)), key=lambda i: (not np.isfinite(p[i]), p[i] if np.isfinite(p[i]) else 0.0))
    adjusted, largest = [float("nan")] * len(p), 0.0
    for rank, i in enumerate(order):
        if np.isfinite(p[i]):
            largest = max(largest, min((len(p) - rank) * p[i], 1.0))
            adjusted[i] = largest
    return adjusted


def primary_arm(experiment: Experiment, fraction: float) -> str | None:
    """The arm that the claim is about where nobody named one: real films with the fewest synthetic ones."""
    there = [arm for arm in experiment.arms if arm.startswith("mixed") and experiment.of(arm, fraction)]
    return min(there, key=lambda arm: (len(arm), arm), default=None)


def primary(measured: Measured, arm: str | None, fraction: float) -> list[Comparison]:
    """The family, small and fixed before looking: at `fraction`, `arm` minus real alone; and synthetic alone minus as many real
    films at the largest fraction that both have; each on every set."""
    experiment = measured.experiment
    meant: list[tuple[Kind, str, float]] = []
    if arm is not None and experiment.of(arm, fraction) and experiment.of("real", fraction):
        meant.append(("gain", arm, fraction))
    both = [f for f in experiment.fractions("synthetic") if experiment.of("real", f)]
    meant += [("equal", "synthetic", both[-1])] if both else []
    found = []
    for kind, arm, share in meant:
        for name in experiment.sets:
            difference = measured.difference(arm, "real", share, name, experiment.outcome.primary)
            if difference is not None:
                p = _p(kind, difference, experiment.outcome.margin)
                found.append((kind, arm, share, name, difference, p))
    adjusted = holm([one[-1] for one in found])
    return [Comparison(*one, p_holm, experiment.outcome) for one, p_holm in zip(found, adjusted, strict=True)]


def secondary(measured: Measured, family: Sequence[Comparison]) -> list[Comparison]:
    """Every other arm minus real at the same fraction, uncorrected: to look at, not to claim."""
    done = {(one.arm, round(one.fraction, 6)) for one in family}
    found, outcome = [], measured.experiment.outcome
    for arm in measured.experiment.arms[1:]:
        for fraction in measured.experiment.fractions(arm):
            if (arm, round(fraction, 6)) in done or not measured.experiment.of("real", fraction):
                continue
            for name in measured.experiment.sets:
                difference = measured.difference(arm, "real", fraction, name, outcome.primary)
                if difference is not None:
                    found.append(Comparison("gain", arm, fraction, name, difference, difference.p(), float("nan"), outcome))
    return found


def _p(kind: Kind, difference: Spread, margin: float) -> float:
    if kind == "gain":
        return difference.p()
    # two one-sided tests (Schuirmann 1987): above -margin, and below +margin
    below = 1 - difference.p_above(margin)
    return max(difference.p_above(-margin), below)


def arm_words(arm: str, items: str = "films") -> str:
    """ "mixed-2x" as a reader says it."""
    kind, _, times = arm.partition("-")
    many = {"": "as many", "1x": "as many", "all": "all"}.get(times, f"{times[:-1]} times as many")
    if kind == "mixed":
        return f"real {items} and {many} synthetic ones"
    if kind == "synthetic":
        return f"synthetic {items} alone" + ("" if many == "as many" else f", {many}" + " of them" * (many == "all"))
    return {"pretrained": f"pretraining on synthetic, then real {items}", "real": f"real {items}"}.get(arm, arm)


def percent(fraction: float) -> str:
    """ "10 %"."""
    return f"{100 * fraction:g} %"


def points(d: Spread, outcome: Outcome = FINDINGS) -> str:
    """ "+2.1 points (95 % interval +0.4 to +3.8, 3 seeds)"."""
    if not np.isfinite(d.value):
        return "not measured"
    seeds = f"{d.seeds} seed{'s' if d.seeds != 1 else ''}"
    if not np.isfinite(d.low):
        return f"{signed(d.value, outcome)} points ({seeds})"
    return f"{signed(d.value, outcome)} points (95 % interval {signed(d.low, outcome)} to {signed(d.high, outcome)}, {seeds})"


def signed(value: float, outcome: Outcome = FINDINGS) -> str:
    """ "+2.1", "−0.4": a difference in points of the outcome, of a share if not given."""
    return f"{round(outcome.scale * value, outcome.digits) + 0.0:+.{outcome.digits}f}".replace("-", "−")


def p_words(p: float) -> str:
    """ "p = .012", "p < .001"."""
    if not np.isfinite(p):
        return "p –"
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)
