"""Does the forecast follow what it is given (dates, treatments, visits removed), and does it still show the same patient?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medgen.evaluation.progression.baselines import copy_last
from medgen.evaluation.progression.collect import Reader, Real, Sampled
from medgen.evaluation.progression.fidelity import fidelity
from medgen.evaluation.progression.identity import retrieval
from medgen.evaluation.progression.patients import primary
from medgen.evaluation.progression.scores import below, means
from medgen.evaluation.statistics import Estimate, Floats, wilson

GALLERY = 100


@dataclass(frozen=True)
class ZeroGap:
    """SSIM to the last real image of what was asked for on its own day, and of its reconstruction; `short`: by how much less."""

    ssim: Estimate
    ceiling: Estimate | None
    short: Estimate | None


@dataclass(frozen=True)
class Directions:
    """Pairs that differ in one thing: share in which the measured biomarker moved the way it must; by biomarker (right, of how many).

    points: (biomarker, movement that is true, movement measured), in spreads; the true one is NaN where only its direction is known.
    """

    right: Estimate
    by_biomarker: dict[str, tuple[int, int]]
    points: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Identity:
    """Share of images whose nearest neighbour among the baselines of `gallery` patients is their own; cosine to the own baseline."""

    generated: Estimate
    real: Estimate
    cosine: Estimate
    real_cosine: Estimate
    gallery: int


@dataclass(frozen=True)
class Missing:
    """Growth of the normalised biomarker error (a share: .1 is ten percent more) when a third of the past visits is removed.

    last_kept: among patients who kept their last visit; copy_last: of copying the last visit that is left.
    """

    growth: Estimate
    last_kept: Estimate | None
    copy_last: Estimate | None
    full: Estimate
    removed: Estimate
    patients: int


def zero_gap(cases: Sequence[Sampled], real: Mapping[str, Real], reader: Reader, seed: int = 0) -> ZeroGap | None:
    """Of cases that ask for the last visit's own day."""
    chosen = [case for case in cases if case.purpose == "zero_gap"]
    if not chosen:
        return None
    rows: dict[str, list[float]] = defaultdict(list)
    for case in chosen:
        one = real[case.record_id]
        last = one.images[one.known - 1 : one.known]
        made = float(fidelity(reader.images(case.files[0]), last)["ssim"][0])
        rows["ssim"].append(made)
        if one.reconstructed is not None:
            ceiling = float(fidelity(one.reconstructed[one.known - 1 : one.known], last)["ssim"][0])
            rows["ceiling"].append(ceiling)
            rows["short"].append(ceiling - made)
    found = means({name: np.array(values) for name, values in rows.items()}, [_patient(case) for case in chosen], seed)
    return ZeroGap(found["ssim"], found.get("ceiling"), found.get("short"))


def directions(
    cases: Sequence[Sampled], purpose: str, variants: tuple[str, str], spread: Mapping[str, float]
) -> Directions | None:
    """Of the pairs of a purpose: the mean over trajectories in the second variant minus the first."""
    pairs: dict[str, dict[str, Sampled]] = defaultdict(dict)
    for case in cases:
        if case.purpose == purpose:
            pairs[str(case.line["pair_id"])][str(case.line["variant"])] = case
    points, right = [], defaultdict(list)
    for pair in pairs.values():
        if set(pair) != set(variants):
            continue
        before, after = (pair[variant] for variant in variants)
        name = str(before.line["biomarker"])
        if name not in before.readings or name not in spread:
            continue
        moved = float(after.readings[name][:, -1].mean() - before.readings[name][:, -1].mean())
        change = before.line.get("truth_change")
        points.append((name, float("nan") if change is None else float(change) / spread[name], moved / spread[name]))
        right[name].append(bool(np.sign(moved) == int(before.line["direction"])))
    if not points:
        return None
    flat = [answer for answers in right.values() for answer in answers]
    counts = {name: (sum(answers), len(answers)) for name, answers in right.items()}
    return Directions(wilson(sum(flat), len(flat)), counts, tuple(points))


def identity(cases: Sequence[Sampled], real: Mapping[str, Real], seed: int = 0) -> Identity | None:
    """Of each patient's first later visit, forecast and true, among the last past visits of at most `GALLERY` patients."""
    chosen = [case for case in cases if case.purpose == "forecast" and case.features.shape[-1]]
    if len({_patient(case) for case in chosen}) < 2:
        return None
    patients = [_patient(case) for case in chosen]
    own = [real[case.record_id] for case in chosen]
    baselines = np.stack([one.features[one.known - 1] for one in own])
    made = retrieval(np.stack([case.features[0, 0] for case in chosen]), patients, baselines, patients, GALLERY, seed)
    came = np.stack([one.features[one.index(case.times[0])] for one, case in zip(own, chosen, strict=True)])
    true = retrieval(came, patients, baselines, patients, GALLERY, seed)
    columns = {"rank1": made.rank1, "cosine": made.cosine, "real": true.rank1, "real_cosine": true.cosine}
    found = means({name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}, patients, seed)
    return Identity(found["rank1"], found["real"], found["cosine"], found["real_cosine"], made.gallery)


def missing(cases: Sequence[Sampled], real: Mapping[str, Real], spread: Mapping[str, float], seed: int = 0) -> Missing | None:
    """Of patients with a forecast from all of their past and one from two thirds of it, with equally many trajectories."""
    full = {case.record_id: case for case in cases if case.purpose == "forecast"}
    pairs = [(full[case.record_id], case) for case in cases if case.purpose == "missing" and case.record_id in full]
    rows: dict[str, list[float]] = defaultdict(list)
    groups, kept = [], []
    for whole, part in pairs:
        one = real[part.record_id]
        name = primary(one.patient, {n: spread[n] for n in part.readings if n in spread})
        if name is None:
            continue
        count = min(len(whole.files), len(part.files))
        wanted = [one.index(time) for time in part.times]
        came = one.readings[name][wanted]
        left = [one.index(float(visit["time"])) for visit in part.line["past"]]
        said = {
            "full": whole.first(count).middle(name),
            "removed": part.first(count).middle(name),
            "copy": copy_last(one.readings[name][: one.known], len(wanted)),
            "copy_removed": copy_last(one.readings[name][left], len(wanted)),
        }
        for method, values in said.items():
            rows[method] += list(np.abs(values - came) / spread[name])
        groups += [_patient(part)] * len(wanted)
        kept += [bool(part.line.get("last_kept"))] * len(wanted)
    if not groups:
        return None
    errors = {method: np.array(values) for method, values in rows.items()}
    chosen = np.flatnonzero(kept)
    found = means(errors, groups, seed)
    growth = _growth(errors["full"], errors["removed"], groups, seed)
    if growth is None:
        return None
    return Missing(
        growth=growth,
        last_kept=_growth(errors["full"][chosen], errors["removed"][chosen], [groups[i] for i in chosen], seed)
        if len(chosen)
        else None,
        copy_last=_growth(errors["copy"], errors["copy_removed"], groups, seed),
        full=found["full"],
        removed=found["removed"],
        patients=len(set(groups)),
    )


def _growth(full: Floats, removed: Floats, groups: Sequence[str], seed: int) -> Estimate | None:
    """mean(removed) / mean(full) − 1."""
    found = below(removed, {"full": full}, groups, seed).get("full")
    return None if found is None else Estimate(-found.value, -found.high, -found.low, found.n)


def _patient(case: Sampled) -> str:
    return str(case.line.get("patient_id") or case.record_id)
