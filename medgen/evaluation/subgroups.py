"""What averages hide: how near generated images come to real ones finding by finding, and whether groups of patients are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medgen.data.records import FINDINGS, CXRRecord
from medgen.evaluation.alignment import Bools
from medgen.evaluation.features import Features
from medgen.evaluation.fidelity import NEIGHBOURS, SMALLEST_SET, Comparison, compare, covered
from medgen.evaluation.statistics import Estimate, Floats, Indices, group_bootstrap, halves

AGES = ((0, 50, "under 50"), (50, 65, "50 to 64"), (65, 200, "65 and over"))
ATTRIBUTES = ("sex", "age", "view")


@dataclass(frozen=True)
class FindingDistance:
    """Fréchet distance between generated and real images of one finding, `n` a side; None where there are too few."""

    name: str
    n: int
    frechet: Comparison | None


@dataclass(frozen=True)
class GroupCoverage:
    """Share of the real images of a group near which a generated image lies; `floor`: near which another patient's image lies."""

    attribute: str
    group: str
    images: int
    coverage: Estimate
    floor: Estimate


@dataclass(frozen=True)
class CoverageGap:
    """Largest minus smallest coverage among the groups of an attribute; `floor`: the same among real patients."""

    attribute: str
    gap: Estimate
    floor: Estimate


@dataclass(frozen=True)
class Subgroups:
    """Coverage per group of patients, and its gaps."""

    groups: tuple[GroupCoverage, ...]
    gaps: tuple[CoverageGap, ...]


def frechet_by_finding(
    encoder: str,
    real: Features,
    real_shows: Bools,
    real_groups: Sequence[str],
    fake: Features,
    fake_asks: Bools,
    fake_groups: Sequence[str],
    seed: int = 0,
    replicates: int = 30,
) -> tuple[FindingDistance, ...]:
    """Fréchet distance per finding, beside its real-vs-real floor at equal N.

    real [M,D] and fake [N,D] are features; real_shows [M,F] and fake_asks [N,F] say which of FINDINGS (in order) the reports state
    and the prompts ask for. N is small here: only the ratio to the floor means something.
    """
    results = []
    for column, name in enumerate(FINDINGS):
        shown, asked = np.flatnonzero(real_shows[:, column]), np.flatnonzero(fake_asks[:, column])
        patients = len({real_groups[int(i)] for i in shown})
        smallest = min(len(shown) // 2, len(asked))
        if smallest < SMALLEST_SET or patients < 4:
            results.append(FindingDistance(name, smallest, None))
            continue
        fidelity = compare(
            encoder,
            real[shown],
            [real_groups[int(i)] for i in shown],
            fake[asked],
            [fake_groups[int(i)] for i in asked],
            seed,
            replicates=replicates,
            metrics=("frechet",),
            smallest=SMALLEST_SET // 2,  # halves by patient are not quite halves of the images
        )
        results.append(FindingDistance(name, fidelity.n, fidelity.metrics["frechet"]))
    return tuple(results)


def group_of(record: CXRRecord, attribute: str) -> str | None:
    """The group that a record belongs to by sex, age or view; None where it is not known."""
    if attribute == "age":
        return next((name for low, high, name in AGES if record.age is not None and low <= record.age < high), None)
    value = record.sex if attribute == "sex" else record.view
    return None if value in (None, "", "UNKNOWN") else str(value)


def subgroup_coverage(
    records: Sequence[CXRRecord], real: Features, fake: Features, seed: int = 0, splits: int = 10
) -> Subgroups | None:
    """Coverage (Naeem et al. 2020) of every group of patients, with intervals over patients; None if no attribute has two groups.

    `real` [M,D] belongs to `records` [M]. In each of `splits` random halvings by patient, a real image of the first half counts as
    covered if a generated image, or for the floor an image of the second half, lies within the distance of its k-th neighbour in
    its own half: all three sets are of one size.
    """
    patients = [record.patient_id for record in records]
    sums, times = np.zeros((2, len(records))), np.zeros(len(records))
    for first, second in halves(patients, seed, splits, "coverage"):
        n = min(len(first), len(second), len(fake))
        rng = np.random.default_rng(seed)
        a, b, c = (np.sort(rng.permutation(part)[:n]) for part in (first, second, np.arange(len(fake))))
        for row, others in enumerate((fake[c], real[b])):
            sums[row, a] += covered(real[a], others, NEIGHBOURS)
        times[a] += 1
    shares = np.divide(sums, times, out=np.full_like(sums, np.nan), where=times > 0)  # [2,M]: by generated, by other real images
    groups: list[GroupCoverage] = []
    gaps: list[CoverageGap] = []
    for attribute in ATTRIBUTES:
        of = np.array([group_of(record, attribute) or "" for record in records])
        names = [name for name in dict.fromkeys(of.tolist()) if name and (of == name).sum() >= SMALLEST_SET]
        if len(names) < 2:
            continue
        fakes, floors = (_means(row, of, names, patients, seed) for row in shares)
        groups += [
            GroupCoverage(attribute, name, int((of == name).sum()), fakes[i], floors[i]) for i, name in enumerate(sorted(names))
        ]
        gaps.append(CoverageGap(attribute, fakes[-1], floors[-1]))
    return Subgroups(tuple(groups), tuple(gaps)) if gaps else None


def _means(
    values: Floats, of: np.ndarray[tuple[int, ...], np.dtype[np.str_]], names: Sequence[str], patients: Sequence[str], seed: int
) -> list[Estimate]:
    """Mean of `values` [M] in every group of sorted `names`, then the largest difference of two of them."""

    def statistic(rows: Indices) -> Floats:
        means = [np.nanmean(chosen) if len(chosen := values[rows[of[rows] == name]]) else np.nan for name in sorted(names)]
        return np.array([*means, np.nanmax(means) - np.nanmin(means)])

    return group_bootstrap(statistic, patients, seed)
