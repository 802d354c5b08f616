"""Is the forecast still the same person? Its features among the baselines of other patients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medgen.evaluation.statistics import Floats
from medgen.seeds import stable_seed


@dataclass(frozen=True)
class Retrieval:
    """Of every query [N]: rank1, whether its own baseline is the nearest (1 or 0), and the cosine to it; `gallery`: baselines each had."""

    rank1: Floats
    cosine: Floats
    gallery: int


def retrieval(
    queries: ArrayLike,
    query_patients: Sequence[str],
    baselines: ArrayLike,
    baseline_patients: Sequence[str],
    most: int = 100,
    seed: int = 0,
) -> Retrieval:
    """Every query [N,F] among its own patient's baseline and up to `most` − 1 of other patients', drawn by lot, of baselines [P,F].

    Features are standardised by the baselines' mean and deviation, dimension by dimension, so that the cosine is not that of what all
    films share. A patient with several baselines is found by any of them. Score real pairs in the same way: they are the ceiling.
    """
    asked, known = (np.asarray(values, dtype=np.float64) for values in (queries, baselines))
    patients, owners = np.array(query_patients), np.array(baseline_patients)
    if asked.ndim != 2 or known.ndim != 2 or asked.shape[1] != known.shape[1]:
        raise ValueError(f"features must be [N,F] and [P,F], got {list(asked.shape)} and {list(known.shape)}")
    if lost := sorted(set(query_patients) - set(baseline_patients)):
        raise ValueError(f"{len(lost)} of the patients asked for have no baseline, {lost[0]!r} first")
    mean, deviation = known.mean(0), known.std(0)
    rows = [(values - mean) / np.where(deviation > 1e-9, deviation, 1.0) for values in (asked, known)]
    asked, known = (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12) for values in rows)
    cosines = asked @ known.T
    most = min(most, len(set(owners)))
    first, own = np.zeros(len(asked)), np.zeros(len(asked))
    for i, (patient, row) in enumerate(zip(patients, cosines, strict=True)):
        others = np.flatnonzero(owners != patient)
        drawn = np.random.default_rng(stable_seed("gallery", seed, patient)).permutation(others)
        chosen = _one_each(drawn, owners, most - 1)
        own[i] = row[owners == patient].max()
        first[i] = float(own[i] > row[chosen].max(initial=-np.inf))
    return Retrieval(first, own, most)


def _one_each(rows: np.ndarray, owners: np.ndarray, most: int) -> np.ndarray:
    """The first of `rows` of every owner, `most` at most."""
    _, first = np.unique(owners[rows], return_index=True)
    return np.asarray(rows[np.sort(first)[:most]])
