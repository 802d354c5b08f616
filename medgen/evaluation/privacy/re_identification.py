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
from medgen.evaluation.privacy.galleries import Distances, compared, distances_to_patients, equal_galleries, share_closer
from medgen.evaluation.statistics import Estimate, Floats, group_bootstrap
from medgen.models.siamese import DIGITAL_CHEST, SiameseNetwork, load_siamese
from medgen.sampling.privacy_gate import embed

FALSE_MATCHES = 0.01  # share of unseen patients' films that match some training patient at the threshold
SHOWN = 6


@dataclass(frozen=True)
class ReIdentification:
    """Matches of generated films with equally many training and held-out patients, at the threshold that unseen patients give.

    to_train, to_heldout: share of generated films that match one of them; `excess` their difference.
    closer_to_train: share whose nearest film is a training patient's; 50 % without memory.
    All four with intervals over random halves of the cases and of both sides' patients.
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
    if not len(generated):
        raise EvaluationError(f"{generated.name} holds no film: there is nothing to look for patients in")
    rows = equal_galleries(train, heldout, seed)
    members, strangers = extract(train, seen, cache)[rows[0]], extract(heldout, seen, cache)[rows[1]]
    ways = [extract(generated, encoder, cache) for encoder in (seen, mirrored)]
    to_train, index = _nearest_way(ways, members, [train.groups[i] for i in rows[0]])
    to_heldout, _ = _nearest_way(ways, strangers, [heldout.groups[i] for i in rows[1]])
    unseen = nearest(strangers, members)[0]
    threshold = float(np.quantile(unseen, FALSE_MATCHES))

    def shares(first: Distances, second: Distances) -> Floats:
        hits, chance = ((side.min(1) < threshold).mean() for side in (first, second))
        return np.array([hits, chance, hits - chance, share_closer(first, second)])

    bounds = [(0.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (0.0, 1.0)]
    matched, matched_unseen, excess, closer = compared(shares, to_train, to_heldout, generated.groups, bounds, seed)
    whose = [heldout.groups[i] for i in rows[1]]
    (chance,) = group_bootstrap(lambda films: np.array([(unseen[films] < threshold).mean()]), whose, seed)
    median = max(float(np.median(unseen)), 1e-12)
    best, patients = to_train.argmin(1), to_train.shape[1]
    order = np.argsort(to_train.min(1))[:SHOWN]
    pairs = tuple(Neighbour(int(i), int(rows[0][index[i, best[i]]]), float(to_train[i, best[i]] / median)) for i in order)
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


def _nearest_way(ways: Sequence[Features], gallery: Features, patients: Sequence[str]) -> tuple[Distances, NDArray[np.intp]]:
    """Distances [N,P] to the patients of `gallery`, of the films or of their mirror images, whichever is nearer, and the films' rows."""
    (straight, first), (mirrored, second) = (distances_to_patients(way, gallery, patients) for way in ways)
    return np.minimum(straight, mirrored), np.where(straight <= mirrored, first, second)


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"
