"""Who is missed more often: false-negative rates by sex, age band and view, alone and crossed, and whether synthetic films change that.

A false negative is a finding on a film that the classifier puts below its threshold. The rate of a group is pooled over findings, so
groups with more of the hard findings look worse; what an arm changes within a group does not depend on that. Of a number that is
read off a clip the "rate" is the group's mean absolute error, and the number itself makes groups too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medgen.augmentation.measures import Bools, Floats, Measured, Spread, resampled, spread, thresholds
from medgen.augmentation.predictions import Films, Person
from medgen.seeds import stable_seed

SMALLEST = 20  # patients with a finding; smaller groups are counted, not shown
AGES = ((0, 50, "under 50"), (50, 70, "50 to 69"), (70, 200, "70 and over"))


@dataclass(frozen=True)
class Group:
    """One group's false-negative rate by arm, and each arm's minus real's. `asked`: findings that were there, or clips."""

    axis: str
    name: str
    patients: int
    asked: int
    rates: dict[str, Spread]
    changes: dict[str, Spread]


@dataclass(frozen=True)
class Gap:
    """Largest minus smallest rate over the shown groups of an axis; `chance`: its mean when patients change groups at random."""

    axis: str
    by_arm: dict[str, Spread]
    chance: dict[str, float]
    changes: dict[str, Spread]


@dataclass(frozen=True)
class Gaps:
    """Groups of one set at one fraction; `hidden` (axis, how many groups) had fewer than `smallest` patients with a finding."""

    set: str
    fraction: float
    groups: tuple[Group, ...]
    gaps: tuple[Gap, ...]
    hidden: tuple[tuple[str, int], ...]
    smallest: int


def gaps(measured: Measured, fraction: float, name: str, resamples: int, seed: int = 0) -> Gaps | None:
    """Of every arm at `fraction` on the set `name`; None where it is not known who is on the films."""
    experiment = measured.experiment
    people = experiment.people[name]
    arms = [arm for arm in experiment.arms if experiment.of(arm, fraction)]
    if people is None or not arms:
        return None
    films = experiment.films[name]
    asked = _asked(films)
    missed = {arm: _missed(measured, arm, fraction, name) for arm in arms}
    weights = resampled(films, resamples, seed)
    groups, found, hidden = [], [], []
    for axis, member in _axes(films, people).items():
        names = [
            g
            for g in sorted(set(member) - {""}, key=lambda g: g.replace("under", "0").replace("below", "0"))
            if len(_with_finding(films, asked, member == g)) >= SMALLEST
        ]
        if lacking := len(set(member) - {""}) - len(names):
            hidden.append((axis, lacking))
        rates = {arm: _rates(missed[arm], asked, weights, member, names) for arm in arms}
        groups += [_group(axis, g, i, films, asked, member, rates) for i, g in enumerate(names)]
        if len(names) > 1:
            found.append(_gap(axis, names, rates, missed, asked, member, films, seed))
    return Gaps(name, fraction, tuple(groups), tuple(found), tuple(hidden), SMALLEST)


def _asked(films: Films) -> Floats:
    """How many findings each film has, [N]; a clip has one number."""
    there = films.truth if films.truth.dtype == bool else np.ones_like(films.known)
    return np.asarray((there & films.known).sum(1), dtype=float)


def _rate_bounds(films: Films) -> tuple[float, float]:
    return 0.0, (1.0 if films.truth.dtype == bool else math.inf)


def _missed(measured: Measured, arm: str, fraction: float, name: str) -> dict[int, Floats]:
    """How many of the findings of each film were missed, or how far the number read off a clip lies from the true one, [N], by seed."""
    films, found = measured.experiment.films[name], {}
    for seed, run in measured.experiment.of(arm, fraction).items():
        if films.truth.dtype != bool:
            found[seed] = (np.abs(run.scores[name] - films.truth) * films.known).sum(1)
            continue
        found[seed] = ((run.scores[name] < thresholds(run)) & films.truth & films.known).sum(1).astype(float)
    return found


def _axes(films: Films, people: Mapping[str, Person]) -> dict[str, np.ndarray]:
    """Each film's group by axis, [N] text; empty where the record does not say."""
    records = [people[film] for film in films.record_ids]
    sex = np.array([{"F": "women", "M": "men"}.get(r.sex or "", "") for r in records])
    age = np.array([next((n for low, high, n in AGES if r.age is not None and low <= r.age < high), "") for r in records])
    view = np.array([r.view if r.view != "UNKNOWN" else "" for r in records])
    number = {} if films.truth.dtype == bool else {"ejection fraction": _bands(films.truth[:, 0])}

    def crossed(*parts: np.ndarray) -> np.ndarray:
        return np.array([", ".join(row) if all(row) else "" for row in zip(*parts, strict=True)])

    return number | {
        "sex": sex, "age": age, "view": view, "sex × age": crossed(sex, age), "sex × age × view": crossed(sex, age, view)
    }  # fmt: skip


def _bands(fractions: Floats) -> np.ndarray:
    """Ejection fractions [N] (percent) as guidelines cut them: at 40 and 50, and low ones at 30."""
    names = np.array(["below 30 %", "30 to 40 %", "40 to 50 %", "50 % and over"])
    return names[np.digitize(fractions, (30, 40, 50))]


def _with_finding(films: Films, asked: Floats, rows: Bools) -> set[str]:
    return set(films.patients[rows & (asked > 0)])


def _rates(missed: dict[int, Floats], asked: Floats, weights: Floats, member: np.ndarray, names: list[str]) -> dict[int, Floats]:
    """Rate of each group, [G,B], by seed."""
    inside = np.stack([member == g for g in names], axis=1).astype(float) if names else np.zeros((len(member), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        there = weights @ (inside * asked[:, None])
        return {seed: ((weights @ (inside * m[:, None])) / there).T for seed, m in missed.items()}


def _group(
    axis: str, g: str, i: int, films: Films, asked: Floats, member: np.ndarray, rates: dict[str, dict[int, Floats]]
) -> Group:
    rows = member == g
    patients = len(_with_finding(films, asked, rows))
    own = {
        arm: spread(np.stack([t[i] for t in by_seed.values()]), patients, _rate_bounds(films)) for arm, by_seed in rates.items()
    }
    return Group(
        axis,
        g,
        patients,
        int(asked[rows].sum()),
        own,
        _changes({a: {s: t[i] for s, t in r.items()} for a, r in rates.items()}, patients),
    )


def _changes(rows: dict[str, dict[int, Floats]], patients: int) -> dict[str, Spread]:
    """Every arm minus real on common seeds."""
    real, found = rows.get("real", {}), {}
    for arm, by_seed in rows.items():
        common = sorted(real.keys() & by_seed.keys())
        if arm != "real" and common:
            found[arm] = spread(np.stack([by_seed[s] - real[s] for s in common]), patients)
    return found


def _gap(
    axis: str, names: list[str], rates: dict[str, dict[int, Floats]], missed: dict[str, dict[int, Floats]], asked: Floats,
    member: np.ndarray, films: Films, seed: int,
) -> Gap:  # fmt: skip
    wide = {arm: {s: t.max(0) - t.min(0) for s, t in by_seed.items()} for arm, by_seed in rates.items()}
    patients = len(set(films.patients))
    own = {arm: spread(np.stack(list(by_seed.values())), patients, _rate_bounds(films)) for arm, by_seed in wide.items()}
    chance = _chance(missed, asked, member, names, films, seed)
    return Gap(axis, own, chance, _changes(wide, patients))


def _chance(
    missed: dict[str, dict[int, Floats]],
    asked: Floats,
    member: np.ndarray,
    names: list[str],
    films: Films,
    seed: int,
    count: int = 200,
) -> dict[str, float]:
    """Mean gap of every arm when groups are dealt anew: the largest of several rates exceeds the smallest in any case."""
    _, first, who = np.unique(films.patients, return_index=True, return_inverse=True)
    place = {g: i for i, g in enumerate(names)}
    codes = np.array([place.get(g, len(names)) for g in member])  # the last: in no shown group
    # a patient's films keep what they share; views differ within a patient and are dealt film by film
    shared = bool((codes[first][who] == codes).all())
    rng = np.random.default_rng(stable_seed("gap by chance", seed))
    total = dict.fromkeys(missed, 0.0)
    for _ in range(count):
        dealt = rng.permutation(codes[first])[who] if shared else rng.permutation(codes)
        there = np.bincount(dealt, asked, len(names) + 1)[:-1]
        for arm, by_seed in missed.items():
            with np.errstate(invalid="ignore", divide="ignore"):
                rates = [np.bincount(dealt, m, len(names) + 1)[:-1] / there for m in by_seed.values()]
            total[arm] += float(np.mean([np.nanmax(r) - np.nanmin(r) for r in rates]))
    return {arm: one / count for arm, one in total.items()}
