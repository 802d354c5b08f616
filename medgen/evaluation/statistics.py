"""Means, covariances and intervals that can be computed in a stream, merged exactly and trusted for related images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from medgen.seeds import stable_seed

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % interval; `n` is how many images (or pairs) it rests on."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass
class Gaussian:
    """Mean [D] and scatter matrix [D,D] of n vectors, in float64. Shards merge to exactly what the whole would give."""

    n: int
    mean: Floats
    scatter: Floats

    @classmethod
    def of(cls, features: NDArray[np.floating], chunk: int = 4096) -> Gaussian:
        """Of `features` [N,D] (a memory map will do: it is read in chunks)."""
        dim = features.shape[1]
        total = cls(0, np.zeros(dim), np.zeros((dim, dim)))
        for start in range(0, len(features), chunk):
            part = np.asarray(features[start : start + chunk], dtype=np.float64)
            mean = part.mean(0)
            total = total.merge(cls(len(part), mean, (part - mean).T @ (part - mean)))
        return total

    def merge(self, other: Gaussian) -> Gaussian:
        """Statistics of both sets together (Chan, Golub & LeVeque 1979)."""
        n = self.n + other.n
        if n == 0:
            return self
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.n * other.n / n)
        return Gaussian(n, self.mean + shift * (other.n / n), scatter)

    @property
    def covariance(self) -> Floats:
        """Unbiased covariance [D,D]; needs n ≥ 2."""
        return self.scatter / (self.n - 1)


def halves(groups: Sequence[str], seed: int, count: int, purpose: str = "halves") -> Iterator[tuple[Indices, Indices]]:
    """`count` random splits of the images into two halves that share no group (patient or case)."""
    names = np.array(groups)
    unique = np.unique(names)
    for number in range(count):
        order = np.random.default_rng(stable_seed(purpose, seed, number)).permutation(unique)
        first = np.isin(names, order[: len(unique) // 2])
        yield np.flatnonzero(first), np.flatnonzero(~first)


def half_samples(groups: Sequence[str], seed: int, count: int) -> Iterator[Indices]:
    """Random halves for `interval`: whole groups, without replacement."""
    for first, _ in halves(groups, seed, count, "half samples"):
        yield first


def interval(value: float, replicates: Sequence[float] | Floats, n: int, bounds: tuple[float, float] | None = None) -> Estimate:
    """95 % interval of `value` from its values on random halves of the data (drawn without replacement).

    The spread of a statistic over random halves estimates its own standard error on the whole (the delete-half jackknife, Shao
    & Wu 1989). Unlike bootstrap resamples, halves hold no image twice, which would distort neighbour distances and rank. The
    replicates are centred on `value`, since a distance between halves is biased upwards. `bounds` clip what cannot be exceeded.
    """
    known = np.asarray([r for r in replicates if np.isfinite(r)], dtype=np.float64)
    if len(known) < 2 or not np.isfinite(value):
        return Estimate(float(value), float("nan"), float("nan"), n)
    low, high = (float(value + np.quantile(known - known.mean(), q)) for q in (0.025, 0.975))
    if bounds is not None:
        low, high = (min(max(end, bounds[0]), bounds[1]) for end in (low, high))
    return Estimate(float(value), low, high, n)


def group_bootstrap(statistic: Callable[[Indices], Floats], groups: Sequence[str], seed: int, count: int = 500) -> list[Estimate]:
    """`statistic` [K] of all images, each with its 95 % percentile interval over resampled groups (with replacement)."""
    unique, member = np.unique(np.array(groups), return_inverse=True)
    members = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    rng = np.random.default_rng(stable_seed("bootstrap", seed))
    draws = (np.concatenate([members[i] for i in rng.integers(0, len(unique), len(unique))]) for _ in range(count))
    replicates = np.stack([statistic(draw) for draw in draws])
    estimates = []
    for value, column in zip(statistic(np.arange(len(groups))), replicates.T, strict=True):
        known = column[np.isfinite(column)]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) > 1 and np.isfinite(value) else (np.nan, np.nan)
        estimates.append(Estimate(float(value), float(low), float(high), len(groups)))
    return estimates


def wilson(successes: int, n: int) -> Estimate:
    """A share with its 95 % Wilson interval."""
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    ends = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    return Estimate(successes / n, float(ends.low), float(ends.high), n)
