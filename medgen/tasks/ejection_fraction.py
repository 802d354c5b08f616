"""Training an R(2+1)D network to read the ejection fraction off echo clips: real, synthetic or both.

What a synthetic clip is worth to a user is measured with it; the judge of generated clips is another network (a segmenter).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import ConcatDataset, Dataset

from medgen.config import Config, ConfigError
from medgen.data.clips import VideoPreprocessing
from medgen.data.echo_dataset import EchoDataset
from medgen.data.echo_records import EchoRecord
from medgen.data.records import Manifest, read_manifest
from medgen.models.ejection_fraction import EjectionFractionRegressor
from medgen.tasks.base import TrainConfig
from medgen.tasks.shares import first_patients, first_records


class ClipSource(Config):
    """Clips of the training split of one manifest, or of some of its patients."""

    manifest: Path = Field(..., description="a manifest of echo clips with a training split")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the patients; a smaller share lies inside every larger one")
    clips: int | None = Field(None, gt=0, description="then this many clips; fewer lie inside more. Default: all")


class EjectionFractionData(Config):
    """Clips to learn from, and those that are watched meanwhile. Clips without an ejection fraction are left out."""

    sources: tuple[ClipSource, ...] = Field(..., min_length=1)
    validation: Path | None = Field(None, description="manifest whose split `val` is watched (of real patients)")
    seed: int = Field(0, description="which patients and clips a smaller share has")
    preprocessing: VideoPreprocessing = VideoPreprocessing(fps=25.0)
    cache: Path | None = Field(None, description="folder for resized clips; default: none are kept")


class EjectionFractionModel(Config):
    """Shape of the network; see `EjectionFractionRegressor`."""

    width: int = Field(64, ge=8, multiple_of=8, description="channels of the first stage; 64 is as published")
    init_from: Path | None = Field(None, description="folder of a trained regressor to go on from, whose shape then counts")


class ClipAugmentation(Config):
    """Random changes that the ejection fraction does not depend on; the same for all frames of a clip."""

    shift: float = Field(0.08, ge=0, le=0.5, description="largest shift, as a share of the frame")
    contrast: float = Field(0.15, ge=0, lt=1, description="largest change of contrast, as a share")
    brightness: float = Field(0.1, ge=0, description="largest added intensity, on the scale [-1,1]")


class EjectionFractionRecipe(Config):
    """`medgen train ejection-fraction --config ...`."""

    data: EjectionFractionData
    model: EjectionFractionModel = EjectionFractionModel()
    augmentation: ClipAugmentation = ClipAugmentation()
    windows: int = Field(4, ge=1, description="windows of a longer clip whose estimates are averaged on validation clips")
    train: TrainConfig


class MeasuredClips(Dataset[dict[str, Any]]):
    """{"id", "video" [T,1,S,S] in [-1,1], "ejection_fraction" percent} of clips whose fraction is known, from several manifests.

    A clip shorter than T frames stands still at its end; of a longer one every epoch shows another window.
    """

    def __init__(self, manifests: list[Manifest[EchoRecord]], data: EjectionFractionData) -> None:
        manifests = [measured(manifest) for manifest in manifests]
        self.records = [(manifest, record) for manifest in manifests for record in manifest.records]
        self.parts = [EchoDataset(manifest, data.preprocessing, cache=data.cache, seed=data.seed) for manifest in manifests]
        self.items: ConcatDataset[dict[str, Any]] = ConcatDataset(self.parts)
        self.frames = data.preprocessing.frames
        self.fractions = np.array([record.ejection_fraction for _, record in self.records], dtype=np.float64)  # percent
        content = json.dumps([[m.sha256, *(r.record_id for r in m.records)] for m in manifests])
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's windows the next items are."""
        for part in self.parts:
            part.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.items[index]
        video: Tensor = item["video"]
        missing = self.frames - len(video)
        video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)]) if missing > 0 else video
        return {"id": item["id"], "video": video, "ejection_fraction": float(item["ejection_fraction"])}


def measured(manifest: Manifest[EchoRecord]) -> Manifest[EchoRecord]:
    """`manifest` without the clips whose ejection fraction nobody knows. Raises `ConfigError` if none is left."""
    kept = tuple(record for record in manifest.records if record.ejection_fraction is not None)
    if not kept:
        raise ConfigError(f"{manifest.name}: none of its {len(manifest)} clips has an ejection fraction")
    return replace(manifest, records=kept)


def read_clips(path: Path) -> Manifest[EchoRecord]:
    """The clips of a manifest whose ejection fraction is known, all splits."""
    return measured(read_manifest(path, record=EchoRecord))


Reader = Callable[[Path], Manifest[EchoRecord]]


def drawn(source: ClipSource, seed: int, read: Reader = read_clips) -> Manifest[EchoRecord]:
    """The training clips that `source` leaves, in an order of their own. Raises `ConfigError` where it asks for more than there is."""
    manifest = read(source.manifest)
    records = [record for record in manifest.records if record.split == "train"]
    if not records:
        raise ConfigError(f"{source.manifest}: none of its {len(manifest)} measured clips is in split 'train'")
    records = first_patients(records, source.fraction, seed)
    return replace(manifest, records=tuple(first_records(records, source.clips, seed, "clips", source.manifest)))


class EjectionFractionTask:
    """Task: squared error of the ejection fraction, in units of its spread among the training clips."""

    name = "ejection-fraction"

    def __init__(self, recipe: EjectionFractionRecipe, read: Reader = read_clips) -> None:
        self.recipe, data = recipe, recipe.data
        manifests = [drawn(source, data.seed, read) for source in data.sources]
        self.validation = None if data.validation is None else read_manifest(data.validation, "val", record=EchoRecord)
        if self.validation is not None:
            shared = {r.patient_id for m in manifests for r in m.records} & {r.patient_id for r in self.validation.records}
            if shared:
                named = ", ".join(sorted(shared)[:5])
                raise ConfigError(f"{len(shared)} patients are among the training and the validation clips: {named}")
        self.training = MeasuredClips(manifests, data)

    def modules(self) -> dict[str, nn.Module]:
        shape, fractions = self.recipe.data.preprocessing, self.training.fractions
        clips: dict[str, Any] = {"frames": shape.frames, "size": shape.size, "fps": shape.fps}
        start = self.recipe.model.init_from
        if start is None:
            spread = {"mean": round(float(fractions.mean()), 4), "std": round(max(float(fractions.std()), 1.0), 4)}
            return {"model": EjectionFractionRegressor(self.recipe.model.width, **clips, **spread)}
        model = EjectionFractionRegressor.from_pretrained(start, dtype=torch.float32, use_safetensors=True)
        assert isinstance(model, EjectionFractionRegressor)
        if theirs := {key: model.config[key] for key, value in clips.items() if model.config[key] != value}:
            raise ConfigError(f"model.init_from: {start} was trained on clips of {theirs}, this recipe asks for {clips}")
        return {"model": model}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        if split == "train":
            return self.training
        return [] if self.validation is None else MeasuredClips([self.validation], self.recipe.data)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """clips [B,T,1,S,S] in [-1,1], fractions [B] percent, ids."""
        fractions = torch.tensor([item["ejection_fraction"] for item in items])
        return {
            "ids": [str(item["id"]) for item in items],
            "clips": torch.stack([item["video"] for item in items]),
            "fractions": fractions,
        }

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        model, clips = modules[which], batch["clips"]
        assert isinstance(model, EjectionFractionRegressor)
        if model.training:
            clips = augment(clips, self.recipe.augmentation, generator)
        error = model(clips) - batch["fractions"]
        return ((error / model.config["std"]) ** 2).mean(), {"mae_percent": error.detach().abs().mean()}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        return {}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The regressor, with its error on the validation clips where there are some."""
        model = modules["model"]
        assert isinstance(model, EjectionFractionRegressor)
        model.save_pretrained(folder)
        validation = self.dataset("val")
        if len(validation):
            seen = predict(model, validation, self.recipe.train.batch_size, self.recipe.windows)
            facts = {"clips": len(validation), **agreement(seen, validation.fractions)}
            (folder / "validation.json").write_text(json.dumps(facts, indent=1))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        return None  # nothing frozen


def augment(clips: Tensor, config: ClipAugmentation, generator: torch.Generator) -> Tensor:
    """`clips` [B,T,1,S,S] in [-1,1] shifted, brightened and stretched, each by its own draw; what moves in is black."""
    count, device, side = len(clips), clips.device, clips.shape[-1]

    def draw(largest: float) -> Tensor:
        return (torch.rand(count, generator=generator, device=device) * 2 - 1) * largest

    theta = torch.eye(2, 3, device=device).repeat(count, 1, 1)
    theta[:, 0, 2], theta[:, 1, 2] = draw(2 * config.shift), draw(2 * config.shift)
    frames = clips[:, :, 0].float()
    grid = functional.affine_grid(theta, [count, frames.shape[1], side, side], align_corners=False)
    moved = functional.grid_sample(frames + 1, grid, align_corners=False) - 1
    contrast, brightness = (value[:, None, None, None] for value in (1 + draw(config.contrast), draw(config.brightness)))
    return (moved * contrast + brightness).clamp(-1, 1)[:, :, None].to(clips.dtype)


@torch.no_grad()
def predict(model: nn.Module, clips: MeasuredClips, batch_size: int, windows: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Ejection fraction [N] in percent of every clip, the mean over `windows` of its windows."""
    device, total = next(model.parameters()).device, np.zeros(len(clips))
    for epoch in range(windows):
        clips.set_epoch(epoch)
        for start in range(0, len(clips), batch_size):
            rows = range(start, min(start + batch_size, len(clips)))
            videos = torch.stack([clips[i]["video"] for i in rows]).to(device)
            total[rows.start : rows.stop] += model(videos).double().cpu().numpy()
    return total / windows


def agreement(seen: Any, true: Any) -> dict[str, float | None]:
    """MAE and RMSE (percentage points), R² and Pearson's r of ejection fractions [N]; None where the truth does not vary."""
    error = seen - true
    varies = len(true) > 2 and true.std() > 0 and seen.std() > 0
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "r2": float(1 - (error**2).mean() / true.var()) if varies else None,
        "r": float(np.corrcoef(seen, true)[0, 1]) if varies else None,
        "mae_of_the_mean": float(np.abs(true - true.mean()).mean()),  # what saying the mean every time would give
    }
