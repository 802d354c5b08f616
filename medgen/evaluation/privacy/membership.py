"""Can one tell whose films a model learned from? Denoising losses of members' and of strangers' films, compared patient by patient.

The attack that asks least of the attacker: he has a film with its report and the weights. After Carlini et al. 2022 (report true positives
at few false ones), Duan et al. 2023 (losses of diffusion models), Zhai et al. 2024 (what the caption adds to the loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medgen.evaluation.alignment import auroc
from medgen.evaluation.privacy.predictor import NoisePredictor
from medgen.evaluation.privacy.subjects import Step, Subjects
from medgen.evaluation.statistics import Estimate, Floats, group_bootstrap, wilson
from medgen.seeds import generator

LEVELS = (0.2, 0.4, 0.6)  # below, the film is all but given; above, only its caption is left
FALSE_POSITIVE_RATES = (0.01, 0.001)
CHUNK = 16


@dataclass(frozen=True)
class Losses:
    """Denoising losses of N films, [N,levels], means over draws: with their own caption, and without any."""

    captioned: NDArray[np.float32]
    uncaptioned: NDArray[np.float32]


@dataclass(frozen=True)
class Detection:
    """How many members are found at one rate of false alarms; None where so few strangers cannot show that rate."""

    false_positive_rate: float
    true_positive_rate: Estimate | None


@dataclass(frozen=True)
class Attack:
    """One score by which patients were ranked: `members` and `strangers` are its values, one a patient (higher: rather a member)."""

    score: str
    auc: Estimate
    at: tuple[Detection, ...]
    members: tuple[float, ...]
    strangers: tuple[float, ...]

    @property
    def found(self) -> bool:
        """Whether the score ranks members above strangers beyond chance."""
        return self.auc.low > 0.5


@dataclass(frozen=True)
class Membership:
    """All attacks; `decisive` is the one whose AUC decides, fixed before looking: the calibrated one if there is a reference.

    smallest_rate: the lowest rate of false alarms that so many strangers can show (one of them).
    """

    attacks: tuple[Attack, ...]
    decisive: str
    levels: tuple[float, ...]
    draws: int
    smallest_rate: float

    @property
    def attack(self) -> Attack:
        """The decisive one."""
        return next(attack for attack in self.attacks if attack.score == self.decisive)


def membership(
    predictor: NoisePredictor,
    train: Subjects,
    heldout: Subjects,
    reference: NoisePredictor | None = None,
    levels: Sequence[float] = LEVELS,
    draws: int = 3,
    seed: int = 0,
    step: Step = lambda films: None,
) -> Membership:
    """Score every patient by the mean over his films and `levels` of minus the denoising loss, in three ways.

    "loss": as it is. "caption": loss without caption minus loss with it (what the caption tells the model). "reference": loss under
    `reference` (a model that never saw these patients, best the one that was fine-tuned) minus loss. Every film meets the same
    noise: `draws` draws a level, seeded by (`seed`, level, draw). `step` is told how many films are done.
    """
    sides = (train, heldout)
    target = [losses(predictor, side, levels, draws, seed, step) for side in sides]
    scores = {
        "loss": [-found.captioned for found in target],
        "caption": [found.uncaptioned - found.captioned for found in target],
    }
    if reference is not None:
        outside = [losses(reference, side, levels, draws, seed, step, captioned_only=True) for side in sides]
        scores["reference"] = [far.captioned - near.captioned for near, far in zip(target, outside, strict=True)]
    attacks = tuple(
        _attack(name, _per_patient(found[0], train.patients), _per_patient(found[1], heldout.patients), seed)
        for name, found in scores.items()
    )
    decisive = "reference" if reference is not None else "loss"
    return Membership(attacks, decisive, tuple(levels), draws, 1 / len(set(heldout.patients)))


@torch.no_grad()
def losses(
    predictor: NoisePredictor,
    subjects: Subjects,
    levels: Sequence[float],
    draws: int,
    seed: int = 0,
    step: Step = lambda films: None,
    captioned_only: bool = False,
) -> Losses:
    """Mean squared errors of what the network predicts (its own training target), film by film."""
    found = np.zeros((2, len(subjects), len(levels)), dtype=np.float32)
    for start in range(0, len(subjects), CHUNK):
        rows = list(range(start, min(start + CHUNK, len(subjects))))
        clean = predictor.latents(subjects.images(rows))
        said = predictor.captions([subjects.prompts[row] for row in rows])
        conditions = [said] if captioned_only else [said, predictor.captions([""] * len(rows))]
        for column, level in enumerate(levels):
            for draw in range(draws):
                noise = torch.randn(clean.shape[1:], generator=generator("membership", seed, level, draw)).to(clean.device)[None]
                noisy, target = predictor.noised(clean, noise, level), predictor.target(clean, noise, level)
                for kind, captions in enumerate(conditions):
                    error = (predictor.predict(noisy, level, captions) - target).square().flatten(1).mean(1)
                    found[kind, rows, column] += error.cpu().numpy() / draws
        step(len(rows))
    return Losses(found[0], found[1])


def _per_patient(values: NDArray[np.float32], patients: Sequence[str]) -> Floats:
    """Means over levels and films of each patient, in the order of names."""
    _, member = np.unique(np.array(patients), return_inverse=True)
    means: Floats = np.bincount(member, values.mean(1)) / np.bincount(member)
    return means


def _attack(name: str, members: Floats, strangers: Floats, seed: int) -> Attack:
    scores = np.concatenate([members, strangers])
    positive = np.arange(len(scores)) < len(members)
    smallest = 1 / len(strangers)
    asked = (*((smallest,) if smallest > max(FALSE_POSITIVE_RATES) else ()), *FALSE_POSITIVE_RATES)
    rates = [rate for rate in asked if rate >= smallest]

    def statistic(rows: NDArray[np.intp]) -> Floats:
        drawn, inside = scores[rows], positive[rows]
        return np.array([auroc(drawn, inside), *(true_positives(drawn, inside, rate) for rate in rates)])

    patients = [str(number) for number in range(len(scores))]
    area, *shares = group_bootstrap(statistic, patients, seed)
    found = {rate: _widened(share, len(members)) for rate, share in zip(rates, shares, strict=True)}
    detections = tuple(Detection(rate, found.get(rate)) for rate in asked)
    return Attack(name, area, detections, tuple(map(float, members)), tuple(map(float, strangers)))


def _widened(share: Estimate, members: int) -> Estimate:
    """A share of all or none has no spread under resampling: its interval is at least Wilson's at this threshold."""
    at_threshold = wilson(round(share.value * members), members)
    return Estimate(share.value, min(share.low, at_threshold.low), max(share.high, at_threshold.high), members)


def true_positives(scores: NDArray[np.floating], positive: NDArray[np.bool_], rate: float) -> float:
    """Share of members above a threshold that at most `rate` of the strangers exceed; NaN where a side is empty."""
    strangers = np.sort(scores[~positive])[::-1]
    if not len(strangers) or not positive.any():
        return float("nan")
    allowed = int(rate * len(strangers) + 1e-9)  # strangers who may stand above the threshold
    return float((scores[positive] > strangers[min(allowed, len(strangers) - 1)]).mean())
