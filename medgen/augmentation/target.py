"""What a set of synthetic films shall show: shares of findings, sides, groups of patients and views, and what the real films show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from medgen.augmentation.balancing import Floats
from medgen.augmentation.captions import Caption, kind_of, present_sides
from medgen.config import Config, load_config
from medgen.data.records import FINDINGS, CXRRecord, Finding, FindingLabel
from medgen.evaluation.subgroups import AGES
from medgen.models.classifier import SIDED_FINDINGS

BASES = ("balance", "fill", "real")
Share = float


class Target(Config):
    """The target distribution."""

    base: Literal["balance", "fill", "real"] = Field(
        "balance",
        description="balance: every finding equally often among the synthetic films; fill: among real and synthetic films together; "
        "real: as often as in the real films",
    )
    prevalence: dict[Finding, float] = Field({}, description="share of films with this finding, whatever the base says")
    counts: dict[Finding, int] = Field({}, description="films with this finding, whatever the base says")
    normal: float | None = Field(
        None, ge=0, le=1, description="share of films without any finding; as in the real films if not given"
    )
    sides: Literal["equal", "real"] = Field("equal", description="equal: every sided finding as often left as right")
    groups: Literal["equal", "real"] = Field(
        "equal", description="equal: every sex and age band equally often, and every finding equally often in each of them"
    )
    views: dict[Literal["PA", "AP"], float] = Field({}, description="shares of the views; as in the real films if not given")
    person: bool = Field(False, description="say sex and age in the prompt; for pipelines that have learned such words")
    at_most: float = Field(20.0, gt=0, description="synthetic films with a finding for every real film that has it, at most")
    most_repeats: int = Field(10, ge=1, description="prompts that one report may become, at most")

    @model_validator(mode="after")
    def _shares(self) -> Target:
        if both := sorted(self.prevalence.keys() & self.counts.keys()):
            raise ValueError(f"{', '.join(both)}: give a prevalence or a count, not both")
        for name, share in [*self.prevalence.items(), *self.views.items()]:
            if not 0 <= share <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {share:g}")
        if self.views and abs(sum(self.views.values()) - 1) > 1e-6:
            raise ValueError(f"the shares of the views must sum to 1, not {sum(self.views.values()):g}")
        return self


def load_target(name: str | Path) -> Target:
    """A target by the name of its base ("balance", "fill", "real": also in sides and groups) or from a YAML file."""
    if str(name) == "real":
        return Target(base="real", sides="real", groups="real")
    return Target(base=str(name)) if str(name) in BASES else load_config(Target, name)


@dataclass(frozen=True)
class Counts:
    """What a set of films shows: films by finding, by finding and side, by sex and age band, by view.

    `normal` films have no finding, `in_doubt` none that is sure.
    """

    films: int
    findings: dict[str, int]
    sides: dict[str, int]
    groups: dict[str, int]
    views: dict[str, int]
    normal: int
    in_doubt: int

    def share(self, name: str) -> Share:
        """Part of the films with this finding."""
        return self.findings.get(name, 0) / self.films


def group_name(sex: str | None, age: float | None) -> str | None:
    """Sex and age band, as in "F, under 50"; None where either is unknown."""
    band = next((name for low, high, name in AGES if age is not None and low <= age < high), None)
    return f"{sex}, {band}" if sex and band else None


def count(films: Sequence[tuple[Sequence[FindingLabel], str | None, float | None, str]]) -> Counts:
    """Count films given as (labels, sex, age, view)."""
    shown = [present_sides(labels) for labels, *_ in films]
    findings: Counter[str] = Counter(name for present in shown for name in present)
    sides = Counter(f"{name}, {side}" for present in shown for name, side in present.items() if side)
    groups = Counter(name for _, sex, age, _ in films if (name := group_name(sex, age)))
    kinds = Counter(kind_of(labels) for labels, *_ in films)
    ordered = {name: findings[name] for name in FINDINGS if findings[name]}
    views = Counter(view for *_, view in films)
    parts = [dict(sorted(counted.items())) for counted in (sides, groups, views)]
    return Counts(len(films), ordered, parts[0], parts[1], parts[2], kinds["normal"], kinds["in doubt"])


def count_records(records: Sequence[CXRRecord]) -> Counts:
    """Count real films by their labels."""
    return count([(record.labels, record.sex, record.age, record.view) for record in records])


@dataclass(frozen=True)
class Aim:
    """A share that the weighted captions shall have: `values` [N] of every caption, their mean asked for, and its name."""

    name: str
    values: Floats
    share: float


def finding_shares(target: Target, real: Counts, n: int) -> tuple[dict[str, Share], list[str]]:
    """The share of every finding among `n` synthetic films, and what was held back and why."""
    shares = {name: real.share(name) for name in FINDINGS}
    if target.base == "balance":
        shares = dict.fromkeys(FINDINGS, sum(shares.values()) / len(FINDINGS))
    elif target.base == "fill":
        shares = _filling(real, n)
    shares |= {str(name): share for name, share in target.prevalence.items()}
    shares |= {str(name): min(asked / n, 1.0) for name, asked in target.counts.items()}
    notes = []
    for name, share in shares.items():
        most = target.at_most * real.findings.get(name, 0)
        if share > 0 and not most:
            notes.append(f"{name}: no real film shows it, so nothing here says that the generator can draw it")
        elif share * n > most:
            shares[name] = most / n
            notes.append(
                f"{name}: {share * n:.0f} films asked, held at {most:.0f}: {target.at_most:g} for each of the "
                f"{real.findings[name]} real ones (at_most)"
            )
    return shares, notes


def _filling(real: Counts, n: int) -> dict[str, Share]:
    """Shares that bring real and synthetic counts to one level, with as many findings a film as the real films have."""
    have = np.array([real.findings.get(name, 0) for name in FINDINGS], dtype=float)
    budget, rising = n * have.sum() / real.films, np.sort(have)
    levels = (budget + np.cumsum(rising)) / np.arange(
        1, len(have) + 1
    )  # where the k rarest findings end if the others get nothing
    reached = next((level for level, above in zip(levels, rising[1:]) if level <= above), levels[-1])
    return {name: float(max(reached - held, 0) / n) for name, held in zip(FINDINGS, have, strict=True)}


def aims(captions: Sequence[Caption], shares: dict[str, Share], target: Target, real: Counts) -> list[Aim]:
    """Everything that the drawn captions shall meet, as means over them."""
    shown = [caption.present for caption in captions]
    has = {name: np.array([name in present for present in shown], dtype=float) for name in FINDINGS}
    found = [Aim(name, has[name], shares[name]) for name in FINDINGS]
    normal = real.normal / real.films if target.normal is None else target.normal
    for kind, share in (("normal", normal), ("in doubt", real.in_doubt / real.films)):
        found.append(Aim(kind, np.array([kind_of(caption.labels) == kind for caption in captions], dtype=float), share))
    for name in SIDED_FINDINGS:
        left, right = (np.array([present.get(name) == side for present in shown], dtype=float) for side in ("left", "right"))
        counts = [real.sides.get(f"{name}, {side}", 0) for side in ("left", "right")]
        part = counts[0] / sum(counts) if target.sides == "real" and max(counts) else 0.5
        found.append(Aim(f"{name}, left among one-sided", (1 - part) * left - part * right, 0.0))
    return found + _group_aims(captions, has, target, real)


def _group_aims(captions: Sequence[Caption], has: dict[str, Floats], target: Target, real: Counts) -> list[Aim]:
    of = np.array([group_name(caption.sex, caption.age) or "" for caption in captions])
    names = [name for name in sorted(set(of.tolist())) if name]
    known = (of != "").astype(float)
    found = []
    for name in names[:-1]:  # the last one follows from the others
        part = 1 / len(names) if target.groups == "equal" else real.groups.get(name, 0) / max(sum(real.groups.values()), 1)
        found.append(Aim(name, known * ((of == name) - part), 0.0))
        if target.groups == "equal":
            found += [Aim(f"{finding} in {name}", known * has[finding] * ((of == name) - part), 0.0) for finding in FINDINGS]
    return found
