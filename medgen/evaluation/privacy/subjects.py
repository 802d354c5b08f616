"""Whose films an audit looks at: as many patients of the training set as of the held-out one, their films, and the captions of these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from medgen.data.dataset import CXRDataset
from medgen.data.records import CXRRecord, Manifest, Split, read_manifest
from medgen.data.report_text import PromptConfig
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.privacy.predictor import NoisePredictor
from medgen.seeds import stable_seed

FEWEST_PATIENTS = 10
Step = Callable[[int], None]  # told how much more is done, for a progress line


@dataclass(frozen=True)
class Subjects:
    """Some patients' films with the captions that a pipeline would be trained on. Everything is in the order of `records`."""

    films: CXRDataset

    def __len__(self) -> int:
        return len(self.records)

    @property
    def records(self) -> tuple[CXRRecord, ...]:
        return self.films.manifest.records

    @property
    def patients(self) -> list[str]:
        """Whose each film is."""
        return [record.patient_id for record in self.records]

    @cached_property
    def prompts(self) -> list[str]:
        """The caption of each film."""
        return [self.films.prompt(index) for index in range(len(self))]

    def by_caption(self) -> dict[str, int]:
        """Every distinct caption with the first of its films."""
        return {text: row for row, text in reversed(list(enumerate(self.prompts)))}

    def images(self, rows: Sequence[int]) -> Tensor:
        """Films [B,1,H,W] in [-1,1]."""
        return torch.stack([self.films[row]["image"] for row in rows])

    def path(self, row: int) -> Path:
        """Where film `row` lies."""
        return self.films.manifest.image_path(self.records[row])


def read_apart(
    train: Path, heldout: Path, train_split: Split | None = "train", heldout_split: Split | None = "test"
) -> tuple[Manifest, Manifest]:
    """Both manifests. Raises `ManifestError` for one that is not of films, `EvaluationError` where a patient is in both."""
    members, strangers = read_manifest(train, train_split), read_manifest(heldout, heldout_split)
    shared = {r.patient_id for r in members.records} & {r.patient_id for r in strangers.records}
    if shared:
        raise EvaluationError(
            f"{len(shared)} patients (first: {min(shared)!r}) are both in {train} ({train_split or 'all'}) and in {heldout} "
            f"({heldout_split or 'all'}): nobody can say what the model knew of them; hold out patients, not films"
        )
    for manifest, path, split in ((members, train, train_split), (strangers, heldout, heldout_split)):
        count = len({record.patient_id for record in manifest.records})
        if count < FEWEST_PATIENTS:
            raise EvaluationError(
                f"{path} ({split or 'all'}) holds {count} patients; an audit needs at least {FEWEST_PATIENTS} on either side"
            )
    return members, strangers


def draw_subjects(manifest: Manifest, predictor: NoisePredictor, prompts: PromptConfig, patients: int, seed: int = 0) -> Subjects:
    """`patients` patients of `manifest` (all, if it has fewer) with every film of theirs; who is drawn depends on id and seed only."""
    names = sorted({r.patient_id for r in manifest.records}, key=lambda name: (stable_seed("audited", seed, name), name))
    chosen = set(names[:patients])
    records = tuple(record for record in manifest.records if record.patient_id in chosen)
    prompts = prompts.model_copy(update={"max_tokens": predictor.limit})
    return Subjects(
        CXRDataset(
            replace(manifest, records=records), predictor.preprocessing, prompts=prompts, count_tokens=predictor.count_tokens
        )
    )


def repeated(prompts: Sequence[str]) -> dict[str, int]:
    """How often each caption occurs, most frequent first, then as they came."""
    return dict(Counter(prompts).most_common())
