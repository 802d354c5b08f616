"""`medgen audit gate`: a privacy gate from training films, its threshold from unseen patients, tested with planted copies.

A gate that nobody tested is a feeling. This one is validated only if it finds at least 95 % of changed copies of training films and
stops at most 5 % of the films of patients who set no threshold; otherwise it works all the same and says "not validated" everywhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from medgen import __version__
from medgen.data.records import Manifest, Split
from medgen.evaluation.images import EvaluationError, ImageSet, batches, reference_set
from medgen.evaluation.privacy.planted import CHANGES, planted
from medgen.evaluation.privacy.subjects import read_apart
from medgen.evaluation.statistics import Estimate, group_bootstrap, wilson
from medgen.models.siamese import DIGITAL_CHEST, load_siamese
from medgen.sampling.gates import NOT_VALIDATED
from medgen.sampling.privacy_gate import BATCH, INDEX, Index, PrivacyGate
from medgen.seeds import stable_seed

VALIDATION, CARD, PICTURES = "validation.json", "README.md", "planted_copies.png"
RECALL, FALSE_ALARMS = 0.95, 0.05
AIMED_AT = 0.025  # share of the threshold's own patients' films above it: half of what is allowed, for others' films spread
FEWEST_HELDOUT = 40  # patients; with fewer, 2.5 % of their films is less than one film
COST_FILMS = 10_000
SplitName = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Validation:
    """What the gate did with films it had to stop and films it had to pass. Intervals: Wilson for copies, by patient for false alarms."""

    validated: bool
    threshold: float
    recall: Estimate
    recall_by_change: dict[str, Estimate]
    false_alarms: Estimate
    seconds_per_film: float
    seconds_per_film_at_10000: float

    def __str__(self) -> str:
        verdict = "validated" if self.validated else NOT_VALIDATED.upper()
        each = ", ".join(f"{name} {estimate.value:.1%}" for name, estimate in self.recall_by_change.items())
        return (
            f"{verdict}: planted copies found {_percent(self.recall)} ({each}); "
            f"false alarms on unseen patients {_percent(self.false_alarms)}; "
            f"{self.seconds_per_film_at_10000 * 1e3:.0f} ms a film at 10,000 training films"
        )


@dataclass(frozen=True)
class BuiltGate:
    """A gate folder and how it was tested."""

    folder: Path
    validation: Validation

    def __str__(self) -> str:
        return f"{self.folder}: privacy gate {self.validation}"


def build_gate(
    train: Path,
    heldout: Path,
    out: Path,
    model: str | Path = DIGITAL_CHEST,
    train_split: SplitName = "train",
    heldout_split: SplitName = "test",
    copies: int = 300,
    seed: int = 0,
    device: str | None = None,
) -> BuiltGate:
    """Build a privacy gate for the sampler from the films a pipeline was trained on, and test it.

    The folder holds small pictures of training films: it is patient data, to be kept as the training set is.

    Args:
        train: manifest that the pipeline was trained on.
        heldout: manifest of patients of the same kind whom it never saw; may be the same file, another split.
        out: folder of the gate, for `medgen sample text-to-cxr --gates`.
        model: re-identification network: a shipped one's name or a folder.
        train_split: which split of `train` was learned from.
        heldout_split: which split of `heldout` was not.
        copies: planted copies of training films to test with.
        seed: of which films are copied, and how they are changed.
        device: cpu, cuda, ...; the best there is if not given.

    Raises `EvaluationError` for patients on both sides or too few of them.
    """
    members, strangers = read_apart(Path(train), Path(heldout), _split(train_split), _split(heldout_split))
    network = load_siamese(model, device)
    size = int(network.config["image_size"])
    known, unseen = reference_set(members), reference_set(strangers)
    index = Index.of(batches(known, size, BATCH), [str(line["record_id"]) for line in known.metadata], network)
    gate = PrivacyGate(network, index, threshold=1.0)
    first, second = _two_halves(unseen, strangers, seed)
    scores, seconds = _scores(gate, batches(unseen, size, BATCH))
    gate.threshold = float(np.quantile(scores[first], 1 - AIMED_AT))
    rows = np.sort(np.random.default_rng(stable_seed("copied films", seed)).permutation(len(known))[:copies])
    changes = [CHANGES[i % len(CHANGES)] for i in range(len(rows))]
    originals = torch.cat(list(batches(known.take(rows.tolist()), size, BATCH)))
    fakes = planted(originals, changes, seed)
    found, _ = _scores(gate, fakes.split(BATCH))
    validation = _validation(gate, found, changes, scores[second], [unseen.groups[i] for i in second], seconds, seed)
    gate.validated = validation.validated
    out = Path(out)
    facts = {
        "training_set": members.name,
        "training_set_sha256": members.sha256,
        "patients": len(set(known.groups)),
        "heldout_set": strangers.name,
        "heldout_set_sha256": strangers.sha256,
        "medgen": __version__,
    }
    gate.save(out, facts)
    patients = {"threshold_from_patients": len({unseen.groups[i] for i in first}), "films_copied": len(rows), "seed": seed}
    (out / VALIDATION).write_text(json.dumps({**asdict(validation), **patients, **facts}, indent=1))
    (out / CARD).write_text(_card(validation, facts, len(index)))
    _pictures(originals, fakes, changes, found > gate.threshold).save(out / PICTURES)
    return BuiltGate(out, validation)


def _split(name: SplitName) -> Split | None:
    return None if name == "all" else name


def _two_halves(unseen: ImageSet, manifest: Manifest, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of the patients who set the threshold, and of those who test it."""
    patients = sorted(set(unseen.groups), key=lambda name: (stable_seed("threshold", seed, name), name))
    if len(patients) < FEWEST_HELDOUT:
        raise EvaluationError(
            f"{manifest.name} holds {len(patients)} unseen patients; a gate's threshold and its test need at least {FEWEST_HELDOUT}"
        )
    chosen = np.isin(unseen.groups, patients[: len(patients) // 2])
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def _scores(gate: PrivacyGate, films: Any) -> tuple[NDArray[np.float64], float]:
    """Likeness of every film to its nearest training film, and seconds a film."""
    start, parts = time.perf_counter(), [gate.nearest(batch).score.double().numpy() for batch in films]
    scores = np.concatenate(parts)
    return scores, (time.perf_counter() - start) / len(scores)


def _validation(
    gate: PrivacyGate,
    found: NDArray[np.float64],
    changes: Sequence[str],
    unseen: NDArray[np.float64],
    patients: Sequence[str],
    seconds: float,
    seed: int,
) -> Validation:
    caught, alarmed = found > gate.threshold, unseen > gate.threshold
    by_change: dict[str, Estimate] = {
        name: wilson(int(caught[rows].sum()), len(rows))
        for name in CHANGES
        if len(rows := np.flatnonzero([change == name for change in changes]))
    }
    recall = wilson(int(caught.sum()), len(caught))
    (alarms,) = group_bootstrap(lambda rows: np.array([alarmed[rows].mean()]), patients, seed)
    return Validation(
        bool(recall.value >= RECALL and alarms.value <= FALSE_ALARMS),
        gate.threshold,
        recall,
        by_change,
        alarms,
        seconds,
        gate_cost(gate, COST_FILMS),
    )


def gate_cost(gate: PrivacyGate, films: int, repeats: int = 20) -> float:
    """Seconds of processor time that `gate` takes for one film with `films` training films in its index (its own, repeated); the median."""
    times = -(-films // len(gate.index))
    large = Index(
        gate.index.vectors.repeat(times, 1)[:films],
        gate.index.films.repeat(times, 1, 1)[:films],
        (gate.index.records * times)[:films],
    )
    side = int(gate.network.config["image_size"])
    asked, taken = PrivacyGate(gate.network, large, gate.threshold), []
    film = torch.rand(1, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for _ in range(repeats + 1):
        start = time.process_time()
        asked.nearest(film)
        taken.append(time.process_time() - start)
    return float(np.median(taken[1:]))


def _pictures(originals: Tensor, fakes: Tensor, changes: Sequence[str], caught: NDArray[np.bool_], each: int = 4) -> Image.Image:
    """Original and planted copy side by side, `each` of every change; what was missed is shown first."""
    side, strip = originals.shape[-1], 14
    sheet = Image.new("L", (each * 2 * side, len(CHANGES) * (side + strip)), 255)
    draw = ImageDraw.Draw(sheet)
    for row, change in enumerate(CHANGES):
        rows = sorted((i for i, name in enumerate(changes) if name == change), key=lambda i: (bool(caught[i]), i))[:each]
        for column, i in enumerate(rows):
            left, top = column * 2 * side, row * (side + strip)
            for offset, film in enumerate((originals[i, 0], fakes[i, 0])):
                pixels = ((film.clamp(-1, 1) + 1) * 127.5).byte().numpy()
                sheet.paste(Image.fromarray(pixels), (left + offset * side, top + strip))
            draw.text((left + 2, top + 1), f"{change}: {'found' if caught[i] else 'MISSED'}", fill=0)
    return sheet


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%}, n = {estimate.n})"


def _card(validation: Validation, facts: dict[str, Any], films: int) -> str:
    rows = "\n".join(f"| {name} | {_percent(estimate)} |" for name, estimate in validation.recall_by_change.items())
    status = "**validated**" if validation.validated else f"**{NOT_VALIDATED}**"
    return f"""# Privacy gate: {status}

**This folder is patient data**: {INDEX} holds {films} small pictures of training films
({facts["training_set"]}, {facts["patients"]} patients), {PICTURES} some of their films.
Keep it as you keep them; never publish it with synthetic films.

The sampler rejects a film whose likeness to a training film is above {validation.threshold:.4f}, which {AIMED_AT:.1%} of the films of
unseen patients exceed. Validated means: at least {RECALL:.0%} of planted copies found, and at most
{FALSE_ALARMS:.0%} false alarms on films of other unseen patients than those that set the threshold.

| | 95 % interval in brackets |
|---|---|
| all planted copies | {_percent(validation.recall)} |
{rows}
| false alarms | {_percent(validation.false_alarms)} |

It looks for copies under these changes and nothing else: a film that passes is no proof that it shows nobody, or that no part of it was
copied. Processor time of one film with {COST_FILMS:,} training films: {validation.seconds_per_film_at_10000 * 1e3:.0f} ms.
"""
