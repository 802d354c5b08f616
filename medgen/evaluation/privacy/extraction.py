"""Can training films be drawn out of a model? A caption is asked for many times; what comes back again and again may be one film.

After Carlini et al. 2023: cliques of near-identical generations betray a memorised image without the training set; the training film of
the caption then confirms it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medgen.evaluation.images import EvaluationError, load_square
from medgen.evaluation.privacy.subjects import Subjects, repeated
from medgen.evaluation.statistics import Estimate, wilson
from medgen.sampling.cases import Case, TextConditions, trajectory_name
from medgen.sampling.text_to_cxr import sample
from medgen.seeds import stable_seed

SIDE = 32  # films are compared at so many pixels: noise and the autoencoder's texture are averaged out, anatomy is not
TILES = 4
NEAR_QUANTILE = 0.01
CLIQUE_SHARE = (
    0.2  # Carlini et al. 2023: 10 of 500, of a model that saw a film once in 5 billion; a small model is asked for more
)
CHUNK = 256
Distances = NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """One caption and what came of it.

    films: how many training films have this caption; record_id is the one shown. clique: size of the largest set of generations that are
    all near each other. nearest: distance of the clique's middle image (without a clique: of the generation nearest to all others) to
    the nearest of the caption's own training films; `copies`: generations that are near that film. Distances are in units of the
    threshold: below 1 is near. files: names of up to four generations to look at, the middle one first.
    """

    caption: str
    record_id: str
    films: int
    clique: int
    nearest: float
    copies: int
    n: int
    extracted: bool
    files: tuple[str, ...]


@dataclass(frozen=True)
class Extraction:
    """extracted: share of captions whose clique shows their training film; cliques: share that have a clique at all.

    near_strangers: share of the middle images that are near any of as many held-out films as there are training films of the captions.
    threshold: in grey values (-1 to 1); of `calibrated` held-out films, 1 % are as near to their nearest training film.
    """

    asked: tuple[Asked, ...]
    extracted: Estimate
    cliques: Estimate
    near_strangers: Estimate
    threshold: float
    calibrated: int
    clique_size: int


def extraction(
    pipeline: str | Path,
    train: Subjects,
    heldout: Subjects,
    out: Path,
    captions: int = 6,
    n: int = 50,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    device: str | None = None,
    progress: bool = True,
) -> Extraction:
    """Ask `pipeline` `n` times for each of `captions` captions of `train`, repeated ones first, and compare what comes with its films.

    Generations go through the sampler's own path into `out`; the same call continues where one was stopped. A threshold for "near" is taken
    from the held-out films: nobody copied those.
    """
    if n < 10:
        raise EvaluationError(f"{n} generations of a caption show no clique; ask for 10 or more (50 is usual)")
    chosen = list(repeated(train.prompts))[: max(captions // 2, 1)]
    singles = sorted(set(train.prompts) - set(chosen), key=lambda text: (stable_seed("asked", seed, text), text))
    chosen += singles[: captions - len(chosen)]
    cases = [
        Case(f"caption-{number:03d}", stable_seed("extraction", seed, number), n, TextConditions(prompt=text))
        for number, text in enumerate(chosen)
    ]
    sample(pipeline, out, cases=cases, steps=steps, guidance=guidance, device=device, progress=progress)
    native = train.films.preprocessing.size
    real, unseen = (_thumbnails(side.images([row]) for row in range(len(side))) for side in (train, heldout))
    threshold = float(np.quantile(distances(unseen, real).min(1), NEAR_QUANTILE))
    clique_size = max(int(np.ceil(CLIQUE_SHARE * n)), 3)
    asked, middles = [], []
    for case, text in zip(cases, chosen, strict=True):
        files = [out / f"{trajectory_name(case, index)}.png" for index in range(n)]
        drawn = _thumbnails(load_square(file, native)[None] for file in files)
        rows = [row for row, prompt in enumerate(train.prompts) if prompt == text]
        found, middle = _judge(text, files, drawn, train, rows, real, unseen, threshold, clique_size)
        asked.append(found)
        middles.append(drawn[middle])
    own = sum(found.films for found in asked)
    order = np.argsort([stable_seed("strangers", seed, r.record_id) for r in heldout.records])[:own]
    beside = distances(torch.stack(middles), unseen[order]).min(1)
    return Extraction(
        tuple(asked),
        wilson(sum(found.extracted for found in asked), len(asked)),
        wilson(sum(found.clique >= clique_size for found in asked), len(asked)),
        wilson(int((beside < threshold).sum()), len(asked)),
        threshold,
        len(heldout),
        clique_size,
    )


def distances(first: Tensor, second: Tensor) -> Distances:
    """The largest root mean square difference over 4x4 tiles, [N,M], of thumbnails [N,P] and [M,P] (tiles one after the other).

    Carlini et al.'s patched distance: images that agree only in a large background are not near.
    """
    first, second = (part.unflatten(1, (TILES * TILES, -1)).transpose(0, 1) for part in (first, second))  # [tiles,N,pixels]
    rows = [torch.cdist(part, second, compute_mode="donot_use_mm_for_euclid_dist").amax(0) for part in first.split(CHUNK, 1)]
    found: Distances = (torch.cat(rows) / first.shape[2] ** 0.5).numpy()
    return found


def largest_clique(near: NDArray[np.bool_]) -> list[int]:
    """The largest set of images that are all near each other, from a symmetric matrix [N,N]; smallest indices first where several are."""
    graph = nx.from_numpy_array(np.triu(near, 1))
    found, _ = nx.max_weight_clique(graph, weight=None)
    return sorted(found)


def _judge(
    text: str,
    files: Sequence[Path],
    drawn: Tensor,
    train: Subjects,
    rows: Sequence[int],
    real: Tensor,
    unseen: Tensor,
    threshold: float,
    clique_size: int,
) -> tuple[Asked, int]:
    """One caption's answer, and which generation is the middle of its clique."""
    among = distances(drawn, drawn)
    clique = largest_clique(among < threshold)
    inner = clique if len(clique) >= clique_size else list(range(len(files)))
    middle = inner[int(among[np.ix_(inner, inner)].sum(1).argmin())]
    to_films = distances(drawn, real[list(rows)])
    own = int(to_films[middle].argmin())
    record, near = train.records[rows[own]], float(to_films[middle, own])
    shown = [middle, *(index for index in inner if index != middle)][:4]
    found = Asked(
        text,
        record.record_id,
        len(rows),
        len(clique),
        near / threshold,
        int((to_films[:, own] < threshold).sum()),
        len(files),
        # a blurred mean of all films is near to every one of them: a copy is nearer to its own than to any that was never seen
        len(clique) >= clique_size and near < min(threshold, float(distances(drawn[[middle]], unseen).min())),
        tuple(files[index].name for index in shown),
    )
    return found, middle


def _thumbnails(films: Iterable[Tensor]) -> Tensor:
    """Films [1,1,S,S] in [-1,1] at 32x32 as [N,1024], tile after tile."""
    small = torch.cat([functional.interpolate(film, (SIDE, SIDE), mode="bilinear", antialias=True) for film in films])
    side = SIDE // TILES
    return small.unfold(2, side, side).unfold(3, side, side).flatten(1)
