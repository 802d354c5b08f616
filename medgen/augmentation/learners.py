"""What the networks of an experiment learn: findings on films, or the ejection fraction of echo clips. Nothing else of it differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from medgen.augmentation.experiment_config import ClipExperiment, FilmExperiment
from medgen.augmentation.outcomes import EJECTION_FRACTION, FINDINGS, Outcome
from medgen.config import ConfigError
from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, Manifest
from medgen.tasks import ejection_fraction, image_classifier
from medgen.tasks.base import TrainConfig
from medgen.tasks.ejection_fraction import ClipSource, EjectionFractionRecipe, EjectionFractionTask, MeasuredClips, read_clips
from medgen.tasks.image_classifier import Films, FilmSource, FindingFilms, ImageClassifierRecipe, ImageClassifierTask


class Learner(Protocol):
    """One experiment's: manifests are read once, and all its trainings share them. N items, F `columns` of truths and predictions."""

    outcome: Outcome
    columns: tuple[str, ...]

    def manifest(self, path: Path) -> Manifest[Any]:
        """The records at `path` that can be learned from, all splits."""

    def source(self, manifest: Path, fraction: float = 1.0, count: int | None = None, real: bool = False) -> Any:
        """Training items of a manifest, as the task's recipes name them."""

    def drawn(self, source: Any, seed: int) -> Manifest[Any]:
        """The records of a source."""

    def refuse_constant(self, records: Sequence[Any], where: str) -> None:
        """Raise `ConfigError` naming what does not vary among `records`: nothing could be learned or tested there."""

    def dataset(self, manifest: Manifest[Any]) -> Any:
        """Items of a manifest, with `records`: a (manifest, record) for each of them."""

    def truths(self, items: Any) -> tuple[Tensor, Tensor]:
        """Truth and whether it is known, each [N,F]."""

    def task(self, sources: Sequence[Any], seed: int, train: TrainConfig, init_from: Path | None) -> tuple[Any, Any]:
        """The task of one training with its recipe, which is complete in itself: `medgen train` takes it too."""

    def predict(self, model: nn.Module, items: Any, batch_size: int) -> Tensor:
        """What the network says of every item, [N,F], as `loss` and `scores` take it."""

    def loss(self, predicted: Tensor, items: Any) -> float:
        """By which a checkpoint is chosen."""

    def scores(self, predicted: Tensor) -> Tensor:
        """Probabilities, or percent, [N,F]."""

    def facts(self, items: Any) -> dict[str, Any]:
        """What run.json says of the training items' truths."""


class FindingLearner:
    """Findings on films."""

    outcome = FINDINGS

    def __init__(self, experiment: FilmExperiment) -> None:
        self.experiment = experiment
        self.columns: tuple[str, ...] = tuple(experiment.findings)
        self.films = Films(experiment.preprocessing, experiment.cache, experiment.in_memory)

    def manifest(self, path: Path) -> Manifest[CXRRecord]:
        return self.films.manifest(path)

    def source(self, manifest: Path, fraction: float = 1.0, count: int | None = None, real: bool = False) -> FilmSource:
        return FilmSource(manifest=manifest, fraction=fraction, films=count, rare=self.experiment.rare if real else None)

    def drawn(self, source: FilmSource, seed: int) -> Manifest[CXRRecord]:
        return image_classifier.drawn(source, self.films, seed)

    def refuse_constant(self, records: Sequence[CXRRecord], where: str) -> None:
        targets, mask = image_classifier.targets_of(records, self.columns)
        shown, known = (targets * mask).sum(0).int().tolist(), mask.sum(0).int().tolist()
        wrong = [f"{name} ({n} of {k})" for name, n, k in zip(self.columns, shown, known, strict=True) if n == 0 or n == k]
        if wrong:
            raise ConfigError(
                f"{where}: only one class of {', '.join(wrong)} films show it; leave it out of `findings`, or take more patients"
            )

    def dataset(self, manifest: Manifest[CXRRecord]) -> FindingFilms:
        return FindingFilms([manifest], self.columns, self.films)

    def truths(self, items: FindingFilms) -> tuple[Tensor, Tensor]:
        return items.targets.to(torch.int8), items.mask.bool()

    def task(
        self, sources: Sequence[FilmSource], seed: int, train: TrainConfig, init_from: Path | None
    ) -> tuple[ImageClassifierTask, ImageClassifierRecipe]:
        e = self.experiment
        model = e.model if init_from is None else e.model.model_copy(update={"weights": None, "init_from": init_from})
        data = {
            "sources": sources, "validation": e.real if train.validate_every else None, "findings": e.findings, "seed": seed,
            "preprocessing": e.preprocessing, "cache": e.cache, "in_memory": e.in_memory,
        }  # fmt: skip
        recipe = ImageClassifierRecipe.model_validate(
            {"data": data, "model": model, "augmentation": e.augmentation, "train": train}
        )
        return ImageClassifierTask(recipe, self.films), recipe

    def predict(self, model: nn.Module, items: FindingFilms, batch_size: int) -> Tensor:
        return image_classifier.predict(model, items, batch_size)

    def loss(self, predicted: Tensor, items: FindingFilms) -> float:
        return float(image_classifier.masked_loss(predicted, items.targets, items.mask))

    def scores(self, predicted: Tensor) -> Tensor:
        return predicted.sigmoid()

    def facts(self, items: FindingFilms) -> dict[str, Any]:
        shown = (items.targets * items.mask).sum(0).int().tolist()
        return {"positives": dict(zip(self.columns, shown, strict=True))}


class EjectionFractionLearner:
    """The ejection fraction (percent) of echo clips."""

    outcome = EJECTION_FRACTION
    columns: tuple[str, ...] = ("ejection_fraction",)

    def __init__(self, experiment: ClipExperiment) -> None:
        self.experiment = experiment
        self._manifests: dict[Path, Manifest[EchoRecord]] = {}

    def manifest(self, path: Path) -> Manifest[EchoRecord]:
        if path not in self._manifests:
            self._manifests[path] = read_clips(path)
        return self._manifests[path]

    def source(self, manifest: Path, fraction: float = 1.0, count: int | None = None, real: bool = False) -> ClipSource:
        return ClipSource(manifest=manifest, fraction=fraction, clips=count)

    def drawn(self, source: ClipSource, seed: int) -> Manifest[EchoRecord]:
        return ejection_fraction.drawn(source, seed, self.manifest)

    def refuse_constant(self, records: Sequence[EchoRecord], where: str) -> None:
        if len(different := {record.ejection_fraction for record in records}) < 2:
            raise ConfigError(
                f"{where}: all {len(records)} clips have the ejection fraction {different.pop():g} %; take more patients"
            )

    def dataset(self, manifest: Manifest[EchoRecord]) -> MeasuredClips:
        return MeasuredClips([manifest], self._recipe([self.source(self.experiment.real)], 0, self.experiment.train, None).data)

    def truths(self, items: MeasuredClips) -> tuple[Tensor, Tensor]:
        truth = torch.from_numpy(items.fractions)[:, None]
        return truth, torch.ones_like(truth, dtype=torch.bool)

    def task(
        self, sources: Sequence[ClipSource], seed: int, train: TrainConfig, init_from: Path | None
    ) -> tuple[EjectionFractionTask, EjectionFractionRecipe]:
        recipe = self._recipe(sources, seed, train, init_from)
        return EjectionFractionTask(recipe, self.manifest), recipe

    def _recipe(
        self, sources: Sequence[ClipSource], seed: int, train: TrainConfig, init_from: Path | None
    ) -> EjectionFractionRecipe:
        e = self.experiment
        model = e.model if init_from is None else e.model.model_copy(update={"init_from": init_from})
        data = {
            "sources": sources, "validation": e.real if train.validate_every else None, "seed": seed,
            "preprocessing": e.preprocessing, "cache": e.cache,
        }  # fmt: skip
        return EjectionFractionRecipe.model_validate(
            {"data": data, "model": model, "augmentation": e.augmentation, "windows": e.windows, "train": train}
        )

    def predict(self, model: nn.Module, items: MeasuredClips, batch_size: int) -> Tensor:
        return torch.from_numpy(ejection_fraction.predict(model, items, batch_size, self.experiment.windows))[:, None]

    def loss(self, predicted: Tensor, items: MeasuredClips) -> float:
        return float(mse_loss(predicted, self.truths(items)[0]))

    def scores(self, predicted: Tensor) -> Tensor:
        return predicted

    def facts(self, items: MeasuredClips) -> dict[str, Any]:
        fractions = items.fractions
        spread = {"mean": round(float(fractions.mean()), 2), "std": round(float(fractions.std()), 2)}
        return {"ejection_fraction": {**spread, "below_40": int(np.count_nonzero(fractions < 40))}}


def learner_of(experiment: FilmExperiment | ClipExperiment) -> Learner:
    """The learner of an experiment's task."""
    return FindingLearner(experiment) if isinstance(experiment, FilmExperiment) else EjectionFractionLearner(experiment)
