"""Do several images of one prompt differ as different patients with the same findings do? Structural similarity of pairs.

Too similar within a prompt: the model knows one patient per prompt. Too different: it ignores the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise

import numpy as np
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

from medgen.evaluation.images import ImageSet, load_square
from medgen.evaluation.statistics import Estimate, Floats, Indices, group_bootstrap
from medgen.seeds import stable_seed

_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli & Bovik 2003
_WINDOW = 11


@dataclass(frozen=True)
class Diversity:
    """Mean MS-SSIM of image pairs of one prompt, and of pairs of real patients with the same findings; 1 is identical."""

    generated: Estimate
    real: Estimate
    scales: int
    size: int


def diversity(generated: ImageSet, reference: ImageSet, size: int, seed: int = 0, largest: int = 400) -> Diversity | None:
    """MS-SSIM within prompts beside real pairs of equal findings; None where no case has two images.

    At most `largest` pairs of either kind, drawn at random.
    """
    inside = _within(generated.groups)
    real = _same_findings(reference)
    pairs = [_sample(candidates, largest, seed) for candidates in (inside, real)]
    if min(len(chosen) for chosen in pairs) < 2:
        return None
    scales = sum(size // 2**level > _WINDOW for level in range(len(_BETAS)))
    results = []
    for images, chosen in zip((generated, reference), pairs, strict=True):
        values = np.array([similarity(images, pair, size, scales) for pair in chosen])
        groups = [images.groups[first] for first, _ in chosen]
        results += group_bootstrap(partial(_mean_of, values), groups, seed)
    return Diversity(results[0], results[1], scales, size)


def similarity(images: ImageSet, pair: tuple[int, int], size: int, scales: int) -> float:
    """MS-SSIM of two images at `size` pixels, over as many scales as their size allows (their weights sum to one)."""
    first, second = (load_square(images.paths[index], size, images.native)[None] for index in pair)
    betas = tuple(weight / sum(_BETAS[:scales]) for weight in _BETAS[:scales])
    return float(ms_ssim(first, second, data_range=2.0, betas=betas, normalize="relu"))


def _mean_of(values: Floats, rows: Indices) -> Floats:
    return np.array([values[rows].mean()])


def _within(groups: Sequence[str]) -> list[tuple[int, int]]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    return [pair for indices in members.values() for pair in combinations(indices, 2)]


def _same_findings(reference: ImageSet) -> list[tuple[int, int]]:
    """Neighbouring pairs, patient by patient, among images whose labels state the same findings on the same sides, in one view."""
    strata: dict[object, list[int]] = defaultdict(list)
    for index, entry in enumerate(reference.metadata):
        present = frozenset((label.name, label.side) for label in entry["labels"] if label.state == "present")
        strata[present, entry["record"].view].append(index)
    pairs = [pair for indices in strata.values() for pair in pairwise(indices)]
    return [(a, b) for a, b in pairs if reference.groups[a] != reference.groups[b]]


def _sample(pairs: list[tuple[int, int]], largest: int, seed: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(stable_seed("similar pairs", seed))
    return [pairs[i] for i in rng.permutation(len(pairs))[:largest]]
