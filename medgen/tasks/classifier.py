"""The finding classifier's task: labelled films → which findings, on which side → a folder that judges generated images.

Augmentation is mild and never flips: a flipped film would teach that left and right do not matter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from monai.losses import DiceLoss
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from medgen.config import Config, ConfigError
from medgen.data.dataset import CXRDataset
from medgen.data.images import ImagePreprocessing
from medgen.data.records import FINDINGS, CXRRecord, Manifest
from medgen.models.classifier import OUTPUTS, FindingClassifier, finding_targets
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CXRData, split_of

PLACES = 32  # cells along a side of the coarse masks
RARITY = 4.0  # weight of a cell that holds a finding


class ClassifierModel(Config):
    """Shape of the network; see `FindingClassifier`."""

    init_from: str | None = Field(None, description="folder of a trained classifier to go on from, whose shape then counts")
    channels: tuple[int, ...] = (32, 64, 64)
    stem_stride: int = Field(4, gt=0, description="pixels of the first convolution's step")
    layers_per_block: int = Field(1, gt=0)
    feature_channels: int = Field(32, ge=8)
    norm_groups: int = Field(8, gt=0)


class JudgeAugmentation(Config):
    """Random changes that no finding or side depends on; 0 switches one off. There is no flip on purpose.

    Applied to whole batches: film by film (as `medgen.data.dataset.Augmentation`) they would take longer than the training step.
    """

    rotation: float = Field(5.0, ge=0, le=30, description="largest turn, degrees")
    shift: float = Field(0.05, ge=0, le=0.5, description="largest shift, as a share of the image")
    scale: float = Field(0.05, ge=0, lt=1, description="largest change of size, as a share")
    contrast: float = Field(0.15, ge=0, lt=1, description="largest change of contrast, as a share")
    brightness: float = Field(0.1, ge=0, description="largest added intensity, on the scale [-1,1]")
    noise: float = Field(0.02, ge=0, description="largest standard deviation of added noise, on the scale [-1,1]")


class ClassifierRecipe(Config):
    """`medgen train classifier --config ...`."""

    data: CXRData
    model: ClassifierModel = ClassifierModel()
    augmentation: JudgeAugmentation = JudgeAugmentation()
    positive_weight: float = Field(
        4.0, ge=1, description="ceiling of the weight that makes up for findings being rarer than their absence"
    )
    place_weight: float = Field(2.0, ge=0, description="weight of learning where findings are, for records that come with masks")
    train: TrainConfig


class LabelledFilms(Dataset[dict[str, Any]]):
    """{"id", "image" [1,H,W] in [-1,1], "targets" and "mask" [len(OUTPUTS)], "places" [len(FINDINGS),32,32]} of every record.

    Where a record names a mask file (`extra["mask"]`, bit k of a pixel: FINDINGS[k] is there, as digital patients have it), "places"
    holds it on a coarse grid; otherwise it is -1, which carries no loss.
    """

    def __init__(self, data: CXRData, manifest: Manifest) -> None:
        self.films = CXRDataset(manifest, data.preprocessing, prompts=None, cache=data.cache)
        self.targets = [finding_targets(record.labels) for record in manifest.records]
        self.masks = [record.extra.get("mask") for record in manifest.records]
        self.root, self.fingerprint = manifest.root, manifest.sha256

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, (targets, mask) = self.films[index], self.targets[index]
        places = torch.full((len(FINDINGS), PLACES, PLACES), -1.0)
        if (path := self.masks[index]) is not None:
            places = read_places(self.root / path)
        return {"id": item["id"], "image": item["image"], "targets": targets, "mask": mask, "places": places}


def read_places(path: Path) -> Tensor:
    """The square mask file at `path` as [len(FINDINGS),32,32] float32: 1 where any pixel of the cell belongs to the finding.

    Raises `ConfigError` if its side is not a multiple of 32.
    """
    with Image.open(path) as image:
        bits = np.array(image, dtype=np.uint8)
    cell, rest = divmod(bits.shape[0], PLACES)
    if rest or bits.shape[0] != bits.shape[1]:
        raise ConfigError(
            f"{path} is {bits.shape[1]}x{bits.shape[0]} pixels; a mask must be square, its side a multiple of {PLACES}"
        )
    cells = np.bitwise_or.reduce(bits.reshape(PLACES, cell, PLACES, cell), axis=(1, 3))
    return torch.from_numpy(np.unpackbits(cells[None], axis=0, bitorder="little")[: len(FINDINGS)].astype(np.float32))


class ClassifierTask:
    """Task: masked binary cross-entropy over `OUTPUTS`; uncertain findings carry no loss."""

    name = "classifier"

    def __init__(self, recipe: ClassifierRecipe) -> None:
        self.recipe = recipe
        train = split_of(recipe.data, "train")
        assert train is not None  # `split_of` raises where a manifest has no training split
        self.manifest_name, self.manifest_hash = train.name, train.sha256
        self.weights = positive_weights(train.records, recipe.positive_weight)

    def modules(self) -> dict[str, nn.Module]:
        shape, size = self.recipe.model, self.recipe.data.preprocessing.size
        if shape.init_from is None:
            return {"model": FindingClassifier(image_size=size, **shape.model_dump(exclude={"init_from"}))}
        model = FindingClassifier.from_pretrained(shape.init_from, dtype=torch.float32, use_safetensors=True)
        assert isinstance(model, FindingClassifier)
        if model.outputs != OUTPUTS or model.config["image_size"] != size:
            raise ConfigError(
                f"model.init_from: {shape.init_from} was trained for {len(model.outputs)} outputs at {model.config['image_size']} "
                f"pixels, this recipe has {len(OUTPUTS)} at {size}"
            )
        return {"model": model}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        manifest = split_of(self.recipe.data, split)
        return [] if manifest is None else LabelledFilms(self.recipe.data, manifest)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """images [B,1,H,W] in [-1,1], targets and mask [B,len(OUTPUTS)], places [B,len(FINDINGS),32,32]."""
        tensors = {key: torch.stack([item[key] for item in items]) for key in ("image", "targets", "mask", "places")}
        return {"ids": [str(item["id"]) for item in items], "images": tensors.pop("image"), **tensors}

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        model, images, places = modules[which], batch["images"], batch["places"]
        assert isinstance(model, FindingClassifier)
        if model.training:
            images, places = augment(images, places, self.recipe.augmentation, generator)
        logits, seen = (value.float() for value in model.with_places(images))
        mask, targets = batch["mask"], batch["targets"]
        weights = self.weights.to(logits.device)
        losses = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
        correct = ((logits > 0) == targets.bool()).float()
        total = mask.sum().clamp(min=1)
        loss, where = (losses * mask).sum() / total, place_loss(seen, places)
        logs = {"findings": loss.detach(), "places": where.detach(), "accuracy": (correct * mask).sum().detach() / total}
        return loss + self.recipe.place_weight * where, logs

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        return {}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The classifier in float16 with thresholds chosen on the validation split, and a model card with its AUROC there."""
        model = modules["model"]
        assert isinstance(model, FindingClassifier)
        validation = self.dataset("val")
        if not len(validation):
            raise ConfigError(f"{self.recipe.data.manifest} has no 'val' split: the judge's thresholds and AUROC need one")
        scores, targets, mask = self._scores(model, validation)
        results = [_output_result(*columns) for columns in zip(scores.T, targets.T, mask.T, strict=True)]
        thresholds = [result["threshold"] for result in results]
        patients = f"{self.manifest_name} ({self.manifest_hash[:12]})"
        # diffusers' own notes go: one would put the defaults back in place of what is set here, one names this machine's folders
        shape = {name: value for name, value in model.config.items() if not name.startswith("_")}
        shipped = FindingClassifier.from_config({**shape, "thresholds": thresholds, "patients": patients})
        shipped.load_state_dict(model.state_dict())
        nn.Module.half(shipped)  # diffusers' own `half` warns about modules to keep in float32, of which there are none
        shipped.save_pretrained(folder)
        facts = {"images": len(validation), "outputs": dict(zip(OUTPUTS, results, strict=True))}
        (folder / "validation.json").write_text(json.dumps(facts, indent=1))
        (folder / "README.md").write_text(model_card(facts, self.recipe.data.preprocessing, self.manifest_name))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        return None  # nothing frozen

    @torch.no_grad()
    def _scores(self, model: FindingClassifier, data: Any) -> tuple[Tensor, Tensor, Tensor]:
        device, size = next(model.parameters()).device, self.recipe.train.batch_size
        parts = []
        for start in range(0, len(data), size):
            batch = self.collate([data[i] for i in range(start, min(start + size, len(data)))])
            scores = model(batch["images"].to(device)).float().sigmoid().cpu()
            parts.append((scores, batch["targets"], batch["mask"]))
        scores, targets, mask = (torch.cat(column) for column in zip(*parts, strict=True))
        return scores, targets, mask


def positive_weights(records: Sequence[CXRRecord], ceiling: float) -> Tensor:
    """√(negatives / positives) of each output, from 1 to `ceiling`, [len(OUTPUTS)]: rare findings are not drowned out."""
    targets, mask = (torch.stack(column) for column in zip(*(finding_targets(record.labels) for record in records), strict=True))
    positives = (targets * mask).sum(0)
    return ((mask.sum(0) - positives) / positives.clamp(min=1)).sqrt().clamp(1.0, ceiling)


def place_loss(seen: Tensor, places: Tensor) -> Tensor:
    """Cross-entropy and Dice loss of `seen` (logits [B,F,h,w]) against `places` [B,F,H,W]; images without a mask (< 0) count nothing.

    Dice is taken over the whole batch, so that a finding of a few cells weighs as much as one of half the lungs.
    """
    known = places.flatten(1).amin(1) > -0.5
    if not known.any():
        return seen.sum() * 0.0
    target = functional.adaptive_max_pool2d(places[known], list(seen.shape[-2:])).clamp(0, 1)
    dice = DiceLoss(sigmoid=True, batch=True)(seen[known], target)
    rarity = torch.tensor(RARITY, device=seen.device)  # most cells of most films hold no finding
    return cast(Tensor, dice + functional.binary_cross_entropy_with_logits(seen[known], target, pos_weight=rarity))


def augment(images: Tensor, places: Tensor, config: JudgeAugmentation, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`images` [B,1,H,W] in [-1,1] turned, shifted, scaled, brightened and noised, each by its own draw; `places` move along."""
    count, device = images.shape[0], images.device

    def draw(largest: float) -> Tensor:
        return (torch.rand(count, generator=generator, device=device) * 2 - 1) * largest

    theta = torch.zeros(count, 2, 3, device=device)
    angle, size = torch.deg2rad(draw(config.rotation)), 1 + draw(config.scale)
    theta[:, 0, 0] = theta[:, 1, 1] = size * angle.cos()
    theta[:, 1, 0], theta[:, 0, 1] = size * angle.sin(), -size * angle.sin()
    theta[:, 0, 2], theta[:, 1, 2] = draw(2 * config.shift), draw(2 * config.shift)

    def move(values: Tensor) -> Tensor:  # what moves in from outside is black, and holds no finding
        grid = functional.affine_grid(theta, list(values.shape), align_corners=False)
        return functional.grid_sample(values, grid, align_corners=False)

    contrast, brightness = (1 + draw(config.contrast))[:, None, None, None], draw(config.brightness)[:, None, None, None]
    noise = torch.randn(images.shape, generator=generator, device=device) * draw(config.noise).abs()[:, None, None, None]
    changed = (move(images.float() + 1) - 1) * contrast + brightness + noise
    known = places.flatten(1).amin(1) > -0.5
    moved = torch.where(known[:, None, None, None], move(places), places)
    return changed.clamp(-1, 1).to(images.dtype), moved


def _output_result(scores: Tensor, targets: Tensor, mask: Tensor) -> dict[str, float | int | None]:
    """AUROC and threshold of one output (probabilities, targets and mask [N]); None and 0.5 where a class is missing.

    The threshold is the one nearest to 0.5 among those whose sensitivity + specificity is within 0.02 of the best: with few
    positives the best alone is an accident.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    known = mask.bool()
    truth, values = targets[known].numpy(), scores[known].double().numpy()
    positives = int(truth.sum())
    counts = {"positives": positives, "negatives": len(truth) - positives}
    if min(counts.values()) == 0:
        return {"auroc": None, "threshold": 0.5, **counts}
    false, true, levels = roc_curve(truth, values, drop_intermediate=False)
    cuts = (levels + np.append(levels[1:], 0.0)) / 2  # between two scores, so that none sits on the threshold
    good = np.isfinite(cuts) & (true - false >= (true - false).max() - 0.02)
    threshold = float(cuts[good][np.abs(cuts[good] - 0.5).argmin()])
    return {"auroc": float(roc_auc_score(truth, values)), "threshold": threshold, **counts}


def model_card(facts: dict[str, Any], preprocessing: ImagePreprocessing, manifest_name: str) -> str:
    """Markdown: what the classifier is for, what it saw, and its AUROC for every output."""
    rows = "\n".join(
        f"| {name} | {'not measured' if r['auroc'] is None else format(r['auroc'], '.3f')} | {r['positives']} | {r['negatives']} | "
        f"{r['threshold']:.2f} |"
        for name, r in facts["outputs"].items()
    )
    return f"""---
library_name: medgen
tags: [chest-x-ray, classifier, evaluation]
---
# Finding classifier

Says which of {len(OUTPUTS)} findings and sides a frontal chest film shows. medgen uses it as the independent judge of generated
images and, through its penultimate features, as an encoder for distribution distances. **Not for clinical use.**

- Trained on: {manifest_name}, split `train`; checked on {facts["images"]} films of other patients (split `val`).
- Input: one channel, {preprocessing.size} x {preprocessing.size} pixels, values in {list(preprocessing.range)}; padded to a square.
- Labels: from the reports; findings stated as uncertain carry no loss. Sides are the patient's own.
- Never shown a mirrored film: left and right stay what they are.

| output | AUROC (val) | positives | negatives | threshold |
|---|---|---|---|---|
{rows}
"""
