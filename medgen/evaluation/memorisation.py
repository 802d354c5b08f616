"""Are generated images copies of training images? Nearest neighbours in features and in pixels.

Compared with what unseen real images show: they too have nearest training neighbours, and no one copied them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from medgen.evaluation.features import Features
from medgen.evaluation.statistics import Estimate, group_bootstrap, wilson
from medgen.seeds import stable_seed

SUSPICIOUS_QUANTILE = 0.01


@dataclass(frozen=True)
class Neighbour:
    """A generated image with its nearest training image; `distance` is relative to the median of unseen real images."""

    generated: int
    train: int
    distance: float


@dataclass(frozen=True)
class Memorisation:
    """Nearest-neighbour evidence in one space.

    closer_to_train: share of generated images whose nearest neighbour, among equally many training and held-out images, is a
        training image; ½ is what a model without memory of its training images gives.
    distance_ratio: median of (distance to nearest training image) ÷ (distance to nearest held-out image), equally many of both; 1
        without memory, 0 for copies.
    suspicious: share of generated images nearer to a training image than 99 % of unseen real images are; 1 % by chance.
    """

    space: str
    closer_to_train: Estimate
    distance_ratio: Estimate
    suspicious: Estimate
    worst: tuple[Neighbour, ...]


def nearest(queries: Features, targets: Features, chunk: int = 1024) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Euclidean distance [N] to, and index [N] of, the nearest of `targets` [M,D] for each of `queries` [N,D], chunk by chunk."""
    distances, indices = [], []
    for start in range(0, len(queries), chunk):
        rows = torch.from_numpy(np.array(queries[start : start + chunk], dtype=np.float32))
        best, where = torch.full((len(rows),), torch.inf), torch.zeros(len(rows), dtype=torch.long)
        for begin in range(0, len(targets), 8 * chunk):
            part = torch.from_numpy(np.array(targets[begin : begin + 8 * chunk], dtype=np.float32))
            # exact differences: the quick matrix form loses the small distances that matter here
            found, place = torch.cdist(rows, part, compute_mode="donot_use_mm_for_euclid_dist").min(1)
            closer = found < best
            best, where = torch.where(closer, found, best), torch.where(closer, place + begin, where)
        distances.append(best)
        indices.append(where)
    return torch.cat(distances).numpy(), torch.cat(indices).numpy()


def memorisation(
    space: str, generated: Features, groups: list[str], train: Features, heldout: Features, seed: int = 0, worst: int = 6
) -> Memorisation:
    """Compare generated [N,D] with training [M,D] and held-out [K,D] features of one space; `groups` are the generated cases."""
    size = min(len(train), len(heldout))
    rng = np.random.default_rng(stable_seed("neighbours", seed))
    some_train, some_heldout = (np.sort(rng.permutation(len(x))[:size]) for x in (train, heldout))
    to_train, to_heldout = nearest(generated, train[some_train])[0], nearest(generated, heldout[some_heldout])[0]
    share = wilson(int((to_train < to_heldout).sum() + round(0.5 * (to_train == to_heldout).sum())), len(generated))
    ratios = to_train / np.maximum(to_heldout, 1e-12)
    (ratio,) = group_bootstrap(lambda rows: np.array([np.median(ratios[rows])]), groups, seed)
    unseen, (distance, index) = nearest(heldout, train)[0], nearest(generated, train)
    limit, median = np.quantile(unseen, SUSPICIOUS_QUANTILE), max(float(np.median(unseen)), 1e-12)
    order = np.argsort(distance)[:worst]
    pairs = tuple(Neighbour(int(i), int(index[i]), float(distance[i] / median)) for i in order)
    return Memorisation(space, share, ratio, wilson(int((distance < limit).sum()), len(generated)), pairs)
