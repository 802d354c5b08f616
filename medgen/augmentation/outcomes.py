"""What the arms of an experiment are compared by: findings on films (AUROC and kin), or the ejection fraction of echo clips (error).

Only words and numbers; the functions are in `measures` and `agreement`. experiment.json names its outcome by `task`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One figure of an arm on a set. `bounds`: no interval reaches beyond them."""

    key: str
    name: str
    told: str  # with what a reader must know of it
    bounds: tuple[float, float]


@dataclass(frozen=True)
class Outcome:
    """`measures[0]` is the one that claims are made about: `sign` 1 where more of it is better, -1 where less is.

    Differences of it are told in points: `scale` points make one unit. `margin` is what counts as equal, `gain` what was asked
    for, both in its own unit. `items` is what a network sees, `network` what it is called.
    """

    task: str
    kind: str  # of the records
    items: str
    network: str
    measures: tuple[Measure, ...]
    what: str  # points of it
    sign: int
    scale: float
    digits: int  # of points
    margin: float
    gain: float

    @property
    def primary(self) -> str:
        """The measure that claims are made about."""
        return self.measures[0].key

    def bounds(self, measure: str) -> tuple[float, float] | None:
        """Of a measure; the others (recall, specificity) are shares."""
        return next((one.bounds for one in self.measures if one.key == measure), (0.0, 1.0))

    def better(self, difference: float) -> float:
        """A difference of the primary measure as a gain."""
        return self.sign * difference


_SHARE, _ANY = (0.0, 1.0), (-math.inf, math.inf)
FINDINGS = Outcome(
    task="image-classifier",
    kind="cxr",
    items="films",
    network="classifier",
    measures=(
        Measure("auroc", "macro AUROC", "AUROC", _SHARE),
        Measure(
            "auprc", "macro average precision", "average precision (its floor is the share of films with the finding)", _SHARE
        ),
        Measure("brier", "macro Brier score", "Brier score (smaller is better)", _SHARE),
        Measure("ece", "macro calibration error", "expected calibration error (smaller is better)", _SHARE),
    ),
    what="macro AUROC",
    sign=1,
    scale=100,
    digits=1,
    margin=0.03,
    gain=0.03,
)
EJECTION_FRACTION = Outcome(
    task="ejection-fraction",
    kind="echo",
    items="clips",
    network="network",
    measures=(
        Measure("mae", "mean absolute error, points", "mean absolute error, points (smaller is better)", (0.0, math.inf)),
        Measure("r2", "R²", "R² (1: all of the variance is read; 0: no better than the mean)", (-math.inf, 1.0)),
        Measure("bias", "bias, points", "bias, points (read minus true, mean)", _ANY),
        Measure("lower", "lower limit of agreement, points", "lower limit of agreement, points", _ANY),
        Measure("upper", "upper limit of agreement, points", "upper limit of agreement, points", _ANY),
    ),
    what="mean absolute error of the ejection fraction",
    sign=-1,
    scale=1,
    digits=2,
    margin=1.0,  # a quarter of what published networks err by (4.1 points, Ouyang et al. 2020), far below two readers' difference
    gain=0.0,
)  # fmt: skip
OUTCOMES = {one.task: one for one in (FINDINGS, EJECTION_FRACTION)}


def outcome_of(facts: Mapping[str, Any]) -> Outcome:
    """Of an experiment.json; the first ones were all about findings and did not say so."""
    return OUTCOMES[facts["config"].get("task", FINDINGS.task)]
