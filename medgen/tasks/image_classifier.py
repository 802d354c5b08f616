"""Training a torchvision classifier of findings on real, synthetic or mixed films: what a hospital would train for itself.

Films come from one or more manifests, each cut down by patient (a smaller share lies inside a larger one) and mixed by share.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from medgen.config import Config, ConfigError
from medgen.data.dataset import PreparedImages
from medgen.data.images import ImagePreprocessing
from medgen.data.records import FINDINGS, CXRRecord, Finding, Manifest, read_manifest
from medgen.models.classifier import finding_targets
from medgen.models.image_classifier import ImageClassifier, Network
from medgen.tasks.base import TrainConfig
from medgen.tasks.classifier import JudgeAugmentation, augment
from medgen.tasks.shares import first_patients, first_records, shuffled


class Thinning(Config):
    """Makes a finding rare: patients who show it are left out until it is in so many of the films that say of it yes or no."""

    finding: Finding
    prevalence: float = Field(..., gt=0, lt=1)


class FilmSource(Config):
    """Films of the training split of one manifest, or some of them. What is drawn depends on `data.seed` and the ids alone."""

    manifest: Path = Field(..., description="a manifest of films with a training split")
    rare: Thinning | None = Field(None, description="before anything else, thin out a finding")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the patients; a smaller share lies inside every larger one")
    films: int | None = Field(None, gt=0, description="then this many films; fewer lie inside more. Default: all")
    share: float | None = Field(
        None, gt=0, description="weight of the source in a batch, relative to the others'; default: as many as it has films"
    )


class ImageClassifierData(Config):
    """Films to learn from, and those that are watched meanwhile."""

    sources: tuple[FilmSource, ...] = Field(..., min_length=1)
    validation: Path | None = Field(None, description="manifest whose split `val` is watched (of real patients)")
    findings: tuple[Finding, ...] = Field(get_args(Finding), min_length=1, description="what to predict")
    seed: int = Field(0, description="which patients and films a smaller share has")
    preprocessing: ImagePreprocessing = ImagePreprocessing()
    cache: Path | None = Field(None, description="folder for preprocessed images; default: none are kept")
    in_memory: bool = Field(False, description="keep decoded films in memory, in 256 grey values")

    @model_validator(mode="after")
    def _shares(self) -> ImageClassifierData:
        if len({source.share is None for source in self.sources}) > 1:
            raise ValueError("give every source a share, or none")
        return self


class ImageClassifierModel(Config):
    """Shape and start of the network; see `ImageClassifier`."""

    network: Network = "resnet18"
    width: int = Field(64, ge=8, multiple_of=8, description="channels of the first stage; 64 is as published")
    weights: Path | None = Field(None, description="local file of torchvision's ImageNet weights (.pth or .safetensors)")
    init_from: Path | None = Field(None, description="folder of a trained classifier to go on from, whose shape then counts")


class ImageClassifierRecipe(Config):
    """`medgen train image-classifier --config ...`."""

    data: ImageClassifierData
    model: ImageClassifierModel = ImageClassifierModel()
    augmentation: JudgeAugmentation = JudgeAugmentation()
    train: TrainConfig


class Films:
    """Manifests and preprocessed films, read once and shared by all trainings of a process; `in_memory` keeps the films too."""

    def __init__(self, preprocessing: ImagePreprocessing, cache: Path | None = None, in_memory: bool = False) -> None:
        self.prepare = PreparedImages(preprocessing.model_copy(update={"range": (-1.0, 1.0)}), cache)
        self._kept: dict[Path, NDArray[np.uint8]] | None = {} if in_memory else None
        self._manifests: dict[Path, Manifest] = {}

    def manifest(self, path: Path) -> Manifest:
        """The manifest of films at `path`, all splits."""
        if path not in self._manifests:
            self._manifests[path] = read_manifest(path)
        return self._manifests[path]

    def image(self, path: Path) -> Tensor:
        """[1,S,S] float32 in [-1,1]."""
        if self._kept is None:
            return self.prepare(path)
        if path not in self._kept:
            self._kept[path] = ((self.prepare(path).numpy()[0] + 1) * 127.5).round().astype(np.uint8)
        return torch.from_numpy(self._kept[path].astype(np.float32) / np.float32(127.5) - 1)[None]


class FindingFilms(Dataset[dict[str, Any]]):
    """{"id", "image" [1,S,S] in [-1,1], "targets" and "mask" [F]} of the films of one or more manifests.

    With `shares`, an epoch is as long as all films together, and each source fills its share of it: a source that is too small
    comes again, one that is too large goes on in the next epoch where it stopped.
    """

    def __init__(
        self, manifests: Sequence[Manifest], findings: Sequence[str], films: Films, shares: Sequence[float] | None = None
    ) -> None:
        self.films, self.epoch = films, 0
        self.records = [(manifest, record) for manifest in manifests for record in manifest.records]
        self.targets, self.mask = targets_of((record for _, record in self.records), findings)
        self.sizes = [len(manifest) for manifest in manifests]
        weights = self.sizes if shares is None else shares
        ends = [round(len(self.records) * sum(weights[: i + 1]) / sum(weights)) for i in range(len(weights))]
        self.slots = list(zip([0, *ends[:-1]], ends, strict=True))  # which indices of an epoch each source fills
        content = json.dumps(
            [[manifest.sha256 for manifest in manifests], [r.record_id for _, r in self.records], ends, *findings]
        )
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's films the next items are."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def place(self, index: int) -> int:
        """Which of `records` stands at `index` of this epoch."""
        source = next(i for i, (_, end) in enumerate(self.slots) if index < end)
        start, end = self.slots[source]
        return sum(self.sizes[:source]) + (self.epoch * (end - start) + index - start) % self.sizes[source]

    def __getitem__(self, index: int) -> dict[str, Any]:
        at = self.place(index)
        manifest, record = self.records[at]
        image = self.films.image(manifest.image_path(record))
        return {"id": record.record_id, "image": image, "targets": self.targets[at], "mask": self.mask[at]}


def targets_of(records: Iterable[CXRRecord], findings: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Targets and mask (0: uncertain, counts nothing), each [N,F] float32."""
    columns = [FINDINGS.index(name) for name in findings]
    pairs = [finding_targets(record.labels) for record in records]
    targets, mask = (torch.stack(values)[:, columns] for values in zip(*pairs, strict=True))
    return targets, mask


def drawn(source: FilmSource, films: Films, seed: int) -> Manifest:
    """The training records that `source` leaves, in an order of their own. Raises `ConfigError` where it asks for more than there is."""
    manifest = films.manifest(source.manifest)
    records = [record for record in manifest.records if record.split == "train"]
    if not records:
        raise ConfigError(f"{source.manifest}: none of its {len(manifest)} records is in split 'train'")
    if source.rare is not None:
        records = thinned(records, source.rare, seed, source.manifest)
    records = first_patients(records, source.fraction, seed)
    return replace(manifest, records=tuple(first_records(records, source.films, seed, "films", source.manifest)))


def thinned(records: Sequence[CXRRecord], rare: Thinning, seed: int, where: Path) -> list[CXRRecord]:
    """`records` without as many patients who show the finding as brings it down to its prevalence. Uncertain films stay.

    Raises `ConfigError` if the finding is rarer already, or if not one film would be left.
    """
    targets, mask = (values[:, 0].bool().tolist() for values in targets_of(records, (rare.finding,)))
    shown = [record for record, positive, known in zip(records, targets, mask, strict=True) if positive and known]
    others = sum(mask) - len(shown)
    wanted = round(rare.prevalence * others / (1 - rare.prevalence))
    if not 1 <= wanted <= len(shown):
        raise ConfigError(
            f"{where}: {rare.finding} in {rare.prevalence:.2%} of the films would be {wanted} of them; there are {len(shown)} that "
            f"show it and {others} that do not"
        )
    count, leave, films_of = 0, set[str](), Counter(record.patient_id for record in shown)
    for patient in shuffled(films_of, "rare", seed):
        if count + films_of[patient] > wanted and count:
            leave.add(patient)
        else:
            count += films_of[patient]
    return [record for record in records if record.patient_id not in leave]


class ImageClassifierTask:
    """Task: masked binary cross-entropy, unweighted, so that probabilities stay calibrated; films are never mirrored."""

    name = "image-classifier"

    def __init__(self, recipe: ImageClassifierRecipe, films: Films | None = None) -> None:
        self.recipe, data = recipe, recipe.data
        self.films = films or Films(data.preprocessing, data.cache, data.in_memory)

    def modules(self) -> dict[str, nn.Module]:
        model = build(self.recipe.model, self.recipe.data)
        return {"model": model.to(memory_format=torch.channels_last)}  # a third faster on a CPU, and what tensor cores want

    def dataset(self, split: Literal["train", "val"]) -> Any:
        data = self.recipe.data
        if split == "train":
            shares = [source.share for source in data.sources if source.share is not None]
            manifests = [drawn(source, self.films, data.seed) for source in data.sources]
            return FindingFilms(manifests, data.findings, self.films, shares or None)
        if data.validation is None:
            return []
        manifest = self.films.manifest(data.validation)
        records = tuple(record for record in manifest.records if record.split == "val")
        if not records:
            raise ConfigError(f"data.validation: {data.validation} has no record in split 'val'")
        return FindingFilms([replace(manifest, records=records)], data.findings, self.films)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """images [B,1,S,S] in [-1,1], targets and mask [B,F], ids."""
        images, targets, mask = (torch.stack([item[key] for item in items]) for key in ("image", "targets", "mask"))
        return {"ids": [str(item["id"]) for item in items], "images": images, "targets": targets, "mask": mask}

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        model, images = modules[which], batch["images"]
        if model.training:
            nowhere = torch.full((len(images), 1, 1, 1), -1.0, device=images.device)  # these films come without masks
            images, _ = augment(images, nowhere, self.recipe.augmentation, generator)
        logits = model(images).float()
        return masked_loss(logits, batch["targets"], batch["mask"]), {}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        return {}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The classifier, with its AUROC on the validation split where there is one."""
        model = modules["model"]
        assert isinstance(model, ImageClassifier)
        model.save_pretrained(folder)
        validation = self.dataset("val")
        if len(validation):
            scores = predict(model, validation, self.recipe.train.batch_size)
            values = aurocs(scores, validation.targets, validation.mask)
            facts = {"images": len(validation), "auroc": dict(zip(self.recipe.data.findings, values, strict=True))}
            (folder / "validation.json").write_text(json.dumps(facts, indent=1))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        return None  # nothing frozen


def build(shape: ImageClassifierModel, data: ImageClassifierData) -> ImageClassifier:
    """The network as the recipe starts it. Raises `ConfigError` where `init_from` is of other findings or another size."""
    size = data.preprocessing.size
    if shape.init_from is None:
        model = ImageClassifier(shape.network, shape.width, size, data.findings)
        if shape.weights is not None:
            model.load_published(shape.weights)
        return model
    trained = ImageClassifier.from_pretrained(shape.init_from, dtype=torch.float32, use_safetensors=True)
    assert isinstance(trained, ImageClassifier)
    if trained.outputs != data.findings or trained.config["image_size"] != size:
        raise ConfigError(
            f"model.init_from: {shape.init_from} was trained for {', '.join(trained.outputs)} at {trained.config['image_size']} "
            f"pixels, this recipe asks for {', '.join(data.findings)} at {size}"
        )
    return trained


def masked_loss(logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean binary cross-entropy of `logits` [B,F] where `mask` is 1."""
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (losses * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def predict(model: nn.Module, films: FindingFilms, batch_size: int) -> Tensor:
    """Logits [N,F] float32 of all `films` in their order, on the CPU."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(films), batch_size):
        images = torch.stack([films[i]["image"] for i in range(start, min(start + batch_size, len(films)))])
        parts.append(model(images.to(device, memory_format=torch.channels_last)).float().cpu())
    return torch.cat(parts)


def aurocs(scores: Tensor, targets: Tensor, mask: Tensor) -> list[float | None]:
    """Area under the ROC curve of every column of `scores` [N,F]; None where one class is missing."""
    from sklearn.metrics import roc_auc_score

    result: list[float | None] = []
    for score, target, known in zip(scores.T, targets.T, mask.bool().T, strict=True):
        truth = target[known].numpy()
        result.append(float(roc_auc_score(truth, score[known].double().numpy())) if 0 < truth.sum() < len(truth) else None)
    return result
