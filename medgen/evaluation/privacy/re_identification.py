"""Does a re-identification network meet training patients in generated films more often than patients whom the model never saw?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from medgen.evaluation.features import FeatureEncoder, Features, extract, fingerprint
from medgen.evaluation.images import EvaluationError, ImageSet
from medgen.evaluation.memorisation import Neighbour, nearest
from medgen.evaluation.statistics import Estimate, group_bootstrap
from medgen.models.siamese import DIGITAL_CHEST, SiameseNetwork, load_siamese
from medgen.sampling.privacy_gate import embed
from medgen.seeds import stable_seed

FALSE_MATCHES = 0.01  # share of unseen patients' films that match some training patient at the threshold
SHOWN = 6


@dataclass(frozen=True)
class ReIdentification:
    """Matches of generated films with equally many training and held-out patients, at the threshold that unseen patients give.

    to_train, to_heldout: share of generated films that match one of them; `excess` their difference, of the same films (by case).
    closer_to_train: share whose nearest film is a training patient's; 50 % without memory.
    unseen: share of held-out patients' films that match a training patient, by patient: what chance does.
    verification: area under the curve of the network itself on the held-out patients, by patient; nan where none has two films.
    """

    patients: int
    threshold: float
    to_train: Estimate
    to_heldout: Estimate
    excess: Estimate
    closer_to_train: Estimate
    unseen: Estimate
    verification: Estimate
    pairs: tuple[Neighbour, ...]
    flagged: bool
    criterion: str
    measured: str
    cannot_show: str


def re_identification(
    generated: ImageSet,
    train: ImageSet,
    heldout: ImageSet,
    cache: Path,
    seed: int = 0,
    model: str | Path | None = None,
    device: torch.device | str | None = None,
) -> ReIdentification:
    """Look for the patients of `train` and of `heldout`, equally many, in `generated`. Vectors are kept below `cache`.

    `model`: a network's folder or shipped name. Raises `EvaluationError` for an empty side.
    """
    network = load_siamese(model or DIGITAL_CHEST, device)
    seen, mirrored = encoders(network)
    groups = [_some_patients(images, min(len(set(train.groups)), len(set(heldout.groups))), seed) for images in (train, heldout)]
    if not len(generated) or not all(len(rows) for rows in groups):
        raise EvaluationError("nothing to look for, or nobody to look for: generated films and patients on both sides are needed")
    members, strangers = extract(train, seen, cache)[groups[0]], extract(heldout, seen, cache)[groups[1]]
    ways = [extract(generated, encoder, cache) for encoder in (seen, mirrored)]
    to_train, index = _nearest_way(ways, members)
    to_heldout, _ = _nearest_way(ways, strangers)
    unseen = nearest(strangers, members)[0]
    threshold = float(np.quantile(unseen, FALSE_MATCHES))

    def shares(rows: NDArray[np.intp]) -> NDArray[np.float64]:
        train_hits, heldout_hits = (to_train[rows] < threshold).mean(), (to_heldout[rows] < threshold).mean()
        closer = (to_train[rows] < to_heldout[rows]).mean() + 0.5 * (to_train[rows] == to_heldout[rows]).mean()
        return np.array([train_hits, heldout_hits, train_hits - heldout_hits, closer])

    matched, matched_unseen, excess, closer = group_bootstrap(shares, generated.groups, seed)
    whose = [heldout.groups[i] for i in groups[1]]
    (chance,) = group_bootstrap(lambda rows: np.array([(unseen[rows] < threshold).mean()]), whose, seed)
    median = max(float(np.median(unseen)), 1e-12)
    order = np.argsort(to_train)[:SHOWN]
    pairs = tuple(Neighbour(int(i), int(groups[0][index[i]]), float(to_train[i] / median)) for i in order)
    patients = len({train.groups[i] for i in groups[0]})
    return ReIdentification(
        patients,
        threshold,
        matched,
        matched_unseen,
        excess,
        closer,
        chance,
        verification(strangers, whose, seed),
        pairs,
        excess.low > 0 or closer.low > 0.5,
        "more generated films match a training patient than a held-out one, or more than half lie nearer to a training patient "
        "(lower end of the 95 % interval above 0, or above 50 %)",
        f"{_percent(matched)} of {len(generated)} generated films match one of {patients} training patients, "
        f"{_percent(matched_unseen)} one of as many held-out patients, at a threshold that {FALSE_MATCHES:.0%} of unseen patients' "
        f"films pass; nearest to a training patient: {_percent(closer)} (50 % without memory)",
        "Patients whom this network would not know again, and any other network would. Captions are training captions: what a caption "
        "says of its patient (findings, sex) makes a film a little more like that patient without any copying.",
    )


def encoders(network: SiameseNetwork) -> tuple[FeatureEncoder, FeatureEncoder]:
    """The network as feature encoders: of films, and of their mirror images."""
    size, dim, mark = int(network.config["image_size"]), network.feature_dim, fingerprint(network)
    return (
        FeatureEncoder("re-identification", mark, size, dim, lambda films: embed(network, films)),
        FeatureEncoder("re-identification-mirrored", mark, size, dim, lambda films: embed(network, films.flip(-1))),
    )


def verification(vectors: Features, patients: Sequence[str], seed: int = 0) -> Estimate:
    """Probability that two films of one patient are nearer to each other than one of them is to a film of somebody else, by patient."""
    _, whose = np.unique(np.array(patients), return_inverse=True)
    distance = np.asarray(torch.cdist(torch.from_numpy(np.array(vectors)), torch.from_numpy(np.array(vectors))))
    names, values = [], []
    for i, row in enumerate(distance):
        own = (whose == whose[i]) & (np.arange(len(whose)) != i)
        others = np.sort(row[whose != whose[i]])
        if own.any() and len(others):
            rank = (np.searchsorted(others, row[own], "left") + np.searchsorted(others, row[own], "right")) / 2
            names.append(patients[i])
            values.append(1 - rank.mean() / len(others))
    if not values:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    areas = np.array(values)
    (area,) = group_bootstrap(lambda rows: np.array([areas[rows].mean()]), names, seed)
    return area


def _some_patients(images: ImageSet, count: int, seed: int) -> NDArray[np.intp]:
    """Rows of the films of `count` patients; who is drawn depends on id and seed only."""
    names = sorted(set(images.groups), key=lambda name: (stable_seed("re-identified", seed, name), name))[:count]
    return np.flatnonzero(np.isin(images.groups, names))


def _nearest_way(ways: Sequence[Features], targets: Features) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Distance to and index of the nearest of `targets`, of the films or of their mirror images, whichever is nearer."""
    (straight, first), (mirrored, second) = (nearest(way, targets) for way in ways)
    return np.minimum(straight, mirrored), np.where(straight <= mirrored, first, second)


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"
