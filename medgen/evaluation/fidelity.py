"""How far generated images are from real ones as a population, always beside how far real ones are from each other.

Fréchet and kernel distance, precision, recall, density and coverage, in the features of a named encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics.image.kid import poly_mmd

from medgen.evaluation.features import Features
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.statistics import Estimate, Floats, Gaussian, Indices, half_samples, halves, interval
from medgen.seeds import stable_seed

SMALLEST_SET = 20
NEIGHBOURS = 5
METRICS = ("frechet", "kernel", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Comparison:
    """One metric: of generated against real images, and of other real images against the same real ones (`floor`)."""

    value: Estimate
    floor: Estimate
    ratio: Estimate | None = None  # value ÷ floor, where a ratio has meaning


@dataclass(frozen=True)
class Fidelity:
    """All population metrics of one encoder. `n` images stood on each side of every comparison."""

    encoder: str
    n: int
    dim: int
    metrics: dict[str, Comparison]
    warnings: tuple[str, ...]


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½) (Dowson & Landau 1982), in float64.

    The symmetric form needs only eigenvalues of positive semi-definite matrices, so it neither fails nor turns complex where
    Σ has no full rank.
    """
    shift = first.mean - second.mean
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ second.covariance @ root
    overlap = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    return max(float(shift @ shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * overlap), 0.0)


def kernel_distance(real: Features, fake: Features, seed: int, subsets: int = 20, largest: int = 1000) -> float:
    """Unbiased squared MMD with the cubic kernel (KID, Bińkowski et al. 2018), averaged over random proper subsets."""
    size = min(largest, max(min(len(real), len(fake)) // 2, 2))
    rng = np.random.default_rng(stable_seed("kernel subsets", seed))
    values = []
    for _ in range(subsets):
        first, second = (
            torch.from_numpy(np.asarray(x[np.sort(rng.choice(len(x), size, replace=False))], dtype=np.float64))
            for x in (real, fake)
        )
        values.append(float(poly_mmd(first, second)))
    return float(np.mean(values))


def prdc(real: Features, fake: Features, k: int = NEIGHBOURS, chunk: int = 1024) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) from k nearest neighbours.

    Distances are computed chunk by chunk: memory is O(chunk · N).
    """
    if min(len(real), len(fake)) <= k:
        raise EvaluationError(f"{min(len(real), len(fake))} images are too few for {k} nearest neighbours; sample more")
    x, y = (torch.from_numpy(np.array(values, dtype=np.float32)) for values in (real, fake))
    real_radius, fake_radius = _radii(x, k, chunk), _radii(y, k, chunk)
    inside_real, inside_fake, density = [], [], []
    nearest = torch.full((len(x),), torch.inf)
    for rows in y.split(chunk):
        distance = torch.cdist(rows, x)
        within = distance <= real_radius
        inside_real.append(within.any(1))
        density.append(within.sum(1).float())
        nearest = torch.minimum(nearest, distance.min(0).values)
    for rows in x.split(chunk):
        inside_fake.append((torch.cdist(rows, y) <= fake_radius).any(1))
    return {
        "precision": float(torch.cat(inside_real).float().mean()),
        "recall": float(torch.cat(inside_fake).float().mean()),
        "density": float(torch.cat(density).mean() / k),
        "coverage": float((nearest <= real_radius).float().mean()),
    }


def covered(real: Features, others: Features, k: int = NEIGHBOURS, chunk: int = 1024) -> NDArray[np.bool_]:
    """Which of `real` [N,D] have one of `others` [M,D] within the distance of their k-th nearest real neighbour: [N]."""
    x, y = (torch.from_numpy(np.array(values, dtype=np.float32)) for values in (real, others))
    nearest = torch.cat([torch.cdist(rows, y).min(1).values for rows in x.split(chunk)])
    return np.asarray((nearest <= _radii(x, k, chunk)).numpy())


def _radii(values: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Distance of each vector to its k-th nearest other one, [N]."""
    parts = [torch.cdist(rows, values).kthvalue(k + 1, dim=1).values for rows in values.split(chunk)]
    return torch.cat(parts)


def population_metrics(
    real: Features, fake: Features, seed: int, scale: float = 1.0, names: Sequence[str] = METRICS
) -> dict[str, float]:
    """The metrics `names` of `fake` [n,D] against `real` [n,D]; `scale` divides the features before the kernel distance."""
    values: dict[str, float] = {}
    if "frechet" in names:
        values["frechet"] = frechet_distance(Gaussian.of(real), Gaussian.of(fake))
    if "kernel" in names:
        values["kernel"] = kernel_distance(real / scale, fake / scale, seed)
    if set(names) - values.keys():
        values |= prdc(real, fake)
    return {name: values[name] for name in names}


def compare(
    encoder: str,
    real: Features,
    real_groups: Sequence[str],
    fake: Features,
    fake_groups: Sequence[str],
    seed: int = 0,
    splits: int = 10,
    replicates: int = 100,
    metrics: Sequence[str] = METRICS,
    smallest: int = SMALLEST_SET,
) -> Fidelity:
    """Fidelity of `fake` [N,D] against `real` [M,D], beside the real-vs-real floor at equal N.

    The real images are split into two halves that share no patient; generated images are compared with the first half, the second
    half with the first half too. Both sides and both comparisons hold the same number of images. Values are means over `splits`
    such splits; intervals come from `replicates` further splits, each halved at random (see `statistics.interval`).
    Raises `EvaluationError` for fewer than `smallest` images a side.
    """
    triples = list(_equal_triples(real_groups, fake_groups, seed, splits))
    n = min(len(first) for first, _, _ in triples)
    if n < smallest:
        raise EvaluationError(
            f"{len(fake)} generated and {len(real)} reference images leave {n} on each side of a comparison (the reference is "
            f"halved for the floor); at least {smallest} are needed: sample more, or name a larger reference"
        )
    scale = _kernel_scale(encoder, real)
    values, floors = _both(real, fake, triples, seed, scale, metrics)
    halved = [
        tuple(
            _half(part, groups, seed, number)
            for part, groups in zip(triple, (real_groups, real_groups, fake_groups), strict=True)
        )
        for number, triple in enumerate(_equal_triples(real_groups, fake_groups, seed + 1, replicates))
    ]
    replicate_values, replicate_floors = _both(real, fake, halved, seed, scale, metrics)
    compared = {
        name: _comparison(name, values[name], floors[name], replicate_values[name], replicate_floors[name], n) for name in metrics
    }
    return Fidelity(encoder, n, real.shape[1], compared, _warnings(n, real.shape[1]))


def _kernel_scale(encoder: str, real: Features) -> float:
    """The cubic kernel was made for features around 1: others are divided by their root mean square; Inception's stay as published."""
    if encoder == "inception":
        return 1.0
    squares = [float(np.square(real[i : i + 4096], dtype=np.float64).mean()) for i in range(0, len(real), 4096)]
    return max(float(np.sqrt(np.mean(squares))), 1e-12)


def _equal_triples(
    real_groups: Sequence[str], fake_groups: Sequence[str], seed: int, count: int
) -> list[tuple[Indices, Indices, Indices]]:
    """Reference half, floor half and generated images, all of one size and each in random order."""
    triples = []
    for number, (first, second) in enumerate(halves(real_groups, seed, count)):
        rng = np.random.default_rng(stable_seed("equal", seed, number))
        n = min(len(first), len(second), len(fake_groups))
        a, b, c = (np.sort(rng.permutation(part)[:n]) for part in (first, second, np.arange(len(fake_groups))))
        triples.append((a, b, c))
    return triples


def _half(part: Indices, groups: Sequence[str], seed: int, number: int) -> Indices:
    chosen = next(half_samples([groups[i] for i in part], stable_seed(seed, number), 1))
    return part[chosen]


def _both(
    real: Features, fake: Features, triples: Sequence[tuple[Indices, ...]], seed: int, scale: float, names: Sequence[str]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    value_rows, floor_rows = [], []
    for number, (first, second, generated) in enumerate(triples):
        size = min(len(first), len(second), len(generated))
        reference = real[first[:size]]
        value_rows.append(population_metrics(reference, fake[generated[:size]], seed + number, scale, names))
        floor_rows.append(population_metrics(reference, real[second[:size]], seed + number, scale, names))
    values, floors = ({name: np.array([row[name] for row in rows]) for name in names} for rows in (value_rows, floor_rows))
    return values, floors


def _comparison(name: str, values: Floats, floors: Floats, replicates: Floats, floor_replicates: Floats, n: int) -> Comparison:
    bounds = {"frechet": (0.0, np.inf), "density": (0.0, np.inf), "kernel": None}.get(name, (0.0, 1.0))
    value = interval(float(values.mean()), replicates, n, bounds)
    floor = interval(float(floors.mean()), floor_replicates, n, bounds)
    ratio = None
    if name == "frechet" and floors.mean() > 0 and (floor_replicates > 0).all():
        ratio = interval(float(values.mean() / floors.mean()), replicates / floor_replicates, n, bounds)
    return Comparison(value, floor, ratio)


def _warnings(n: int, dim: int) -> tuple[str, ...]:
    warnings = []
    if n <= dim:
        warnings.append(
            f"{n} images per side cannot fill a covariance of {dim} dimensions (it is rank-deficient): the Fréchet distance is biased "
            "upwards on both sides of the comparison. Compare it with the floor only, never with other papers."
        )
    if n < 5000:
        warnings.append(f"N = {n} is below the 5,000 that published Fréchet distances rest on; read the ratio to the floor.")
    return tuple(warnings)
