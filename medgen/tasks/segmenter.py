"""The video segmenter's task: echo clips with masks → a folder that measures volumes in generated videos.

Frames are drawn from every clip anew in each epoch. Augmentation changes how the machine is set, never where anything lies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from monai.losses import DiceCELoss
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision.transforms.functional import gaussian_blur

from medgen.config import Config, ConfigError
from medgen.data.echo_records import EchoRecord
from medgen.data.images import to_square
from medgen.data.records import Manifest, read_manifest
from medgen.data.video import load_video
from medgen.models.segmenter import STRUCTURES, VideoSegmenter
from medgen.seeds import stable_seed
from medgen.tasks.base import TrainConfig


class SegmenterData(Config):
    """Clips to learn from: records whose annotations hold `masks` [T,H,W] (values of `STRUCTURES`)."""

    manifest: Path = Field(..., description="an echo manifest with splits train and val")
    size: int = Field(112, ge=8, description="side in pixels; other films are padded to a square and resized")
    frames_per_clip: int = Field(8, ge=1, description="drawn from a clip for one item")


class SegmenterModel(Config):
    """Shape of the network; see `VideoSegmenter`."""

    patch_size: int = Field(4, gt=0)
    channels: tuple[int, ...] = (32, 48, 64)
    norm_groups: int = Field(8, gt=0)


class MachineAugmentation(Config):
    """Random settings of the ultrasound machine, and what a generator's decoder may add; 0 switches one off."""

    contrast: float = Field(0.25, ge=0, lt=1, description="largest change of contrast, as a share")
    brightness: float = Field(0.2, ge=0, description="largest added intensity, on the scale [-1,1]")
    noise: float = Field(0.08, ge=0, description="largest standard deviation of added noise, on the scale [-1,1]")
    blur: float = Field(0.5, ge=0, le=1, description="share of batches blurred slightly")


class SegmenterRecipe(Config):
    """`medgen train segmenter --config ...`."""

    data: SegmenterData
    model: SegmenterModel = SegmenterModel()
    augmentation: MachineAugmentation = MachineAugmentation()
    train: TrainConfig


class MaskedFrames(Dataset[dict[str, Any]]):
    """{"id", "frames" [K,1,S,S] in [-1,1], "masks" [K,S,S] long} of every clip that has masks.

    With `varied`, K frames are drawn anew in every epoch; otherwise they are K evenly spaced ones. Raises `ConfigError` where no
    record has masks.
    """

    def __init__(self, manifest: Manifest[EchoRecord], data: SegmenterData, varied: bool, seed: int = 0) -> None:
        self.records = [record for record in manifest.records if record.annotations is not None]
        if not self.records:
            raise ConfigError(f"{data.manifest}: none of its {len(manifest)} records has annotations with masks")
        self.root, self.size, self.count = manifest.root, data.size, data.frames_per_clip
        self.varied, self.seed, self.epoch = varied, seed, 0
        self.fingerprint = manifest.sha256

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        frames, masks = read_masked(self.root, record)
        chosen = np.linspace(0, len(frames) - 1, self.count).round().astype(int)
        if self.varied:
            rng = np.random.default_rng(stable_seed("segmenter frames", self.seed, self.epoch, index))
            chosen = np.sort(rng.choice(len(frames), self.count, replace=len(frames) < self.count))
        grey = to_square(torch.from_numpy(frames[chosen]).float() / 255, self.size, pad=True)
        return {"id": record.record_id, "frames": grey[:, None] * 2 - 1, "masks": square_masks(masks[chosen], self.size)}


def read_masked(root: Path, record: EchoRecord) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Frames and masks, both uint8 [T,H,W], of a record. Raises `ConfigError` where they do not fit together."""
    frames = load_video(root / record.video, record.fps).frames
    with np.load(root / str(record.annotations), allow_pickle=False) as annotations:
        masks = annotations.get("masks")
    if masks is None or masks.shape != frames.shape or masks.max(initial=0) >= len(STRUCTURES):
        found = "no masks" if masks is None else f"masks {list(masks.shape)} with values up to {masks.max(initial=0)}"
        raise ConfigError(
            f"{record.record_id}: {record.annotations} holds {found}; expected masks {list(frames.shape)} with values below "
            f"{len(STRUCTURES)} ({', '.join(STRUCTURES)})"
        )
    return frames, masks


def square_masks(masks: NDArray[np.uint8], size: int) -> Tensor:
    """Masks [K,H,W] padded to a square and resized like their frames, to the nearest value: [K,size,size] long."""
    values = torch.from_numpy(masks)
    height, width = values.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    values = functional.pad(values, (left, side - width - left, top, side - height - top))
    if side != size:
        values = functional.interpolate(values[:, None], (size, size), mode="nearest-exact")[:, 0]
    return values.long()


class SegmenterTask:
    """Task: cross-entropy and Dice over the four structures."""

    name = "segmenter"

    def __init__(self, recipe: SegmenterRecipe) -> None:
        self.recipe = recipe
        self.manifest = read_manifest(recipe.data.manifest, "train", record=EchoRecord)
        self.criterion = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": VideoSegmenter(image_size=self.recipe.data.size, **self.recipe.model.model_dump())}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        if split == "train":
            return MaskedFrames(self.manifest, self.recipe.data, varied=True, seed=self.recipe.train.seed)
        if all(record.split != "val" for record in read_manifest(self.recipe.data.manifest, record=EchoRecord).records):
            return []
        held_out = read_manifest(self.recipe.data.manifest, "val", record=EchoRecord)
        return MaskedFrames(held_out, self.recipe.data, varied=False)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """frames [B*K,1,S,S] in [-1,1], masks [B*K,S,S], ids."""
        frames, masks = (torch.cat([item[key] for item in items]) for key in ("frames", "masks"))
        return {"ids": [str(item["id"]) for item in items], "frames": frames, "masks": masks}

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        model, frames, masks = modules[which], batch["frames"], batch["masks"]
        if model.training:
            frames = augment(frames, self.recipe.augmentation, generator)
        logits = model(frames).float()
        loss = cast(Tensor, self.criterion(logits, masks[:, None]))
        with torch.no_grad():
            scores = dice(logits.argmax(1), masks)
        return loss, {f"dice_{name}": score for name, score in zip(STRUCTURES[1:], scores, strict=True)}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        return {}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The segmenter in float16, and a model card with its Dice on the validation split."""
        model = modules["model"]
        assert isinstance(model, VideoSegmenter)
        validation = self.dataset("val")
        if not len(validation):
            raise ConfigError(f"{self.recipe.data.manifest} has no 'val' split: the judge's Dice needs one")
        scores = self._scores(model, validation)
        patients = f"{self.manifest.name} ({self.manifest.sha256[:12]})"
        # Without diffusers' private keys: `from_config` would put fields back that were left at their defaults before.
        fields = {key: value for key, value in model.config.items() if not key.startswith("_")}
        shipped = VideoSegmenter.from_config({**fields, "patients": patients})
        shipped.load_state_dict(model.state_dict())
        nn.Module.half(shipped)  # diffusers' own `half` warns about modules to keep in float32, of which there are none
        shipped.save_pretrained(folder)
        facts = {"clips": len(validation), "dice": dict(zip(STRUCTURES[1:], scores, strict=True))}
        (folder / "validation.json").write_text(json.dumps(facts, indent=1))
        (folder / "README.md").write_text(model_card(facts, self.recipe, self.manifest.name))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        return None  # nothing frozen

    @torch.no_grad()
    def _scores(self, model: VideoSegmenter, data: Any) -> list[float]:
        device, size = next(model.parameters()).device, self.recipe.train.batch_size
        seen, true = [], []
        for start in range(0, len(data), size):
            batch = self.collate([data[i] for i in range(start, min(start + size, len(data)))])
            seen.append(model(batch["frames"].to(device)).argmax(1).cpu())
            true.append(batch["masks"])
        return [float(score) for score in dice(torch.cat(seen), torch.cat(true))]


def dice(seen: Tensor, true: Tensor) -> Tensor:
    """2|A∩B| / (|A|+|B|) of every structure but the background, over all frames [N,H,W] of class indices: [3]."""
    scores = []
    for value in range(1, len(STRUCTURES)):
        a, b = seen == value, true == value
        scores.append(2 * (a & b).sum() / (a.sum() + b.sum()).clamp(min=1))
    return torch.stack(scores)


def augment(frames: Tensor, config: MachineAugmentation, generator: torch.Generator) -> Tensor:
    """`frames` [N,1,H,W] in [-1,1] with other contrast, brightness and noise, each by its own draw; some batches slightly blurred."""
    count, device = frames.shape[0], frames.device

    def draw(largest: float) -> Tensor:
        return (torch.rand(count, generator=generator, device=device) * 2 - 1)[:, None, None, None] * largest

    share, width = torch.rand(2, generator=generator, device=device).tolist()
    if share < config.blur:
        frames = gaussian_blur(frames, [3, 3], [0.3 + 0.6 * width])
    noise = torch.randn(frames.shape, generator=generator, device=device) * draw(config.noise).abs()
    changed = (frames + 1) * (1 + draw(config.contrast)) - 1 + draw(config.brightness) * (frames > -0.98) + noise
    return changed.clamp(-1, 1)


def model_card(facts: dict[str, Any], recipe: SegmenterRecipe, manifest_name: str) -> str:
    """Markdown: what the segmenter is for, what it saw, how well it segments."""
    rows = "\n".join(f"| {name.replace('_', ' ')} | {score:.4f} |" for name, score in facts["dice"].items())
    return f"""---
library_name: medgen
tags: [echocardiography, segmentation, evaluation]
---
# Echo video segmenter

Segments LV cavity, myocardium and left atrium in every frame of an apical echo clip. medgen uses it as the independent judge of
generated videos (volume curve, ejection fraction, heart rate, timing of end-diastole and end-systole) and, through its features,
as the encoder `digital-echo-judge` of the Fréchet video distance. **Not for clinical use.**

- Trained on: {manifest_name}, split `train`; checked on {facts["clips"]} clips of other patients (split `val`).
- Input: one channel, {recipe.data.size} x {recipe.data.size} pixels, values in [-1, 1]; frame by frame.
- Volumes: area-length method, V = 8 A² / (3 π L), in cubic pixels unless the pixel's size is known.

| structure | Dice (val) |
|---|---|
{rows}
"""
