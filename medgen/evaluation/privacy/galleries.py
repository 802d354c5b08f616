"""Two galleries of patients, equally many on either side: which of them do generated films lie nearer to?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from medgen.evaluation.features import Features
from medgen.evaluation.images import EvaluationError, ImageSet
from medgen.evaluation.statistics import Estimate, Floats, half_samples, interval
from medgen.seeds import stable_seed

Distances = NDArray[np.float32]
HALVES = 200


def equal_galleries(train: ImageSet, heldout: ImageSet, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the films of equally many patients of both sides; who is drawn depends on id and seed only.

    Raises `EvaluationError` for an empty side.
    """
    count = min(len(set(train.groups)), len(set(heldout.groups)))
    if not count:
        raise EvaluationError(f"{train.name} or {heldout.name} holds no film: patients are needed on both sides")
    drawn = []
    for images in (train, heldout):
        names = sorted(set(images.groups), key=lambda name: (stable_seed("gallery", seed, name), name))[:count]
        drawn.append(np.flatnonzero(np.isin(images.groups, names)))
    return drawn[0], drawn[1]


def distances_to_patients(films: Features, gallery: Features, patients: Sequence[str]) -> tuple[Distances, NDArray[np.intp]]:
    """Distance [N,P] of every film to the nearest film of each patient (patients in sorted order), and that film's row [N,P]."""
    _, whose = np.unique(np.array(patients), return_inverse=True)
    queries, targets = (torch.from_numpy(np.array(values, dtype=np.float32)) for values in (films, gallery))
    # exact differences: the quick matrix form loses the small distances that matter here
    every = torch.cdist(queries, targets, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    members = [np.flatnonzero(whose == patient) for patient in range(whose.max() + 1)]
    rows = np.stack([own[every[:, own].argmin(1)] for own in members], axis=1)
    return np.take_along_axis(every, rows, 1), rows


def compared(
    measures: Callable[[Distances, Distances], Floats],
    to_train: Distances,
    to_heldout: Distances,
    cases: Sequence[str],
    bounds: Sequence[tuple[float, float]],
    seed: int = 0,
) -> list[Estimate]:
    """`measures` of the distances [N,P] to both galleries, with intervals over random halves of cases and of both sides' patients.

    Patients too: who happens to stand in a gallery of a few dozen moves the result as much as which films were generated.
    """
    count = to_train.shape[1]
    names = [str(patient) for patient in range(count)]
    films = half_samples(cases, seed, HALVES)
    train, heldout = (half_samples(names, stable_seed(side, seed), HALVES) for side in ("train", "heldout"))
    replicates = np.stack(
        [measures(to_train[np.ix_(f, t)], to_heldout[np.ix_(f, h)]) for f, t, h in zip(films, train, heldout, strict=True)]
    )
    values = measures(to_train, to_heldout)
    return [
        interval(float(value), column, len(to_train), ends)
        for value, column, ends in zip(values, replicates.T, bounds, strict=True)
    ]


def share_closer(to_train: Distances, to_heldout: Distances) -> float:
    """Share of films that lie nearer to somebody of the first gallery; ½ is what a model without memory gives."""
    first, second = to_train.min(1), to_heldout.min(1)
    return float((first < second).mean() + 0.5 * (first == second).mean())
