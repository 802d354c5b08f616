"""From some signals of a heart to its whole ECG: missing leads from the leads there are, or an ECG from a pulse wave.

A window of prepared signals becomes a sequence of short frames at real seconds; each frame carries the best linear guess from the
given signals as its features, and a rectified flow learns what that guess leaves over. What is not given is masked before the guess.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError
from medgen.data.ecg import ECGPreparation
from medgen.data.ecg_dataset import SignalDataset
from medgen.data.ecg_records import ECGRecord
from medgen.data.records import ManifestError, read_manifest
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.objectives import Objective, ObjectiveConfig, denoising_loss
from medgen.models.denoiser import DenoiserConfig, SequenceTransformer, build_denoiser
from medgen.models.signal_autoencoder import SignalAutoencoder, SignalError, fit_signal_autoencoder
from medgen.pipelines.ecg_translation import ECGTranslationPipeline, signal_frames, write_translation_card
from medgen.seeds import generator as seeded
from medgen.tasks.base import TrainConfig

_STATISTICS_WINDOWS = 512


class SignalData(Config):
    """Which recordings, which signals of them, and how they are cut."""

    manifest: Path
    signals: tuple[str, ...] = Field(..., description="leads, and PPG: what the model knows of; those not given are generated")
    preparation: ECGPreparation = ECGPreparation(rate=125)
    frame_samples: int = Field(16, ge=2, description="samples of one frame (a token)")
    latent_channels: int = Field(32, ge=1, description="principal components kept of a frame")
    window_frames: int = Field(20, ge=2, description="frames trained together")
    cache: Path | None = Field(None, description="folder of prepared signals; without it every start prepares them anew")


class GivenSignals(Config):
    """What is given in training: one of `subsets`, or, in a share `random` of the examples, any signals (one to all but one)."""

    subsets: tuple[tuple[str, ...], ...] = Field(..., min_length=1, description="the first is what the pipeline is for")
    random: float = Field(0.0, ge=0, le=1)


class ECGTranslationRecipe(Config):
    """configs/ecg_translation/*.yaml"""

    data: SignalData
    given: GivenSignals
    denoiser: DenoiserConfig = DenoiserConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    num_inference_steps: int = Field(8, ge=1)
    export_dtype: Literal["float32", "float16"] = "float16"
    train: TrainConfig


class ECGTranslation:
    """Recordings in, a denoiser of linear regression's residual out. One module, "model"."""

    name = "ecg-translation"

    def __init__(self, recipe: ECGTranslationRecipe) -> None:
        self.recipe, data = recipe, recipe.data
        self.objective = Objective(recipe.objective)
        try:
            blank = SignalAutoencoder(list(data.signals), data.frame_samples, data.latent_channels)
        except SignalError as error:
            raise ConfigError(f"data.signals: {error}") from None
        self._features = blank.feature_width
        for subset in recipe.given.subsets:
            if not subset or not set(subset) <= set(data.signals):
                raise ConfigError(f"given.subsets: {list(subset)} must be some of data.signals ({', '.join(data.signals)})")
        if recipe.denoiser.patch_size != 1:
            raise ConfigError(f"denoiser.patch_size: a latent frame is one place wide, so 1, not {recipe.denoiser.patch_size}")

    def modules(self) -> dict[str, nn.Module]:
        """The denoiser of latent frames [L,1]; the guess and the given signals' names are features of each frame."""
        channels = self.recipe.data.latent_channels
        return {"model": build_denoiser(self.recipe.denoiser, channels, 1, spatial_dims=1, feature_dim=self._features)}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """Windows of the recordings in which every signal is good; none for a split that the manifest does not have."""
        data = self.recipe.data
        try:
            manifest = read_manifest(data.manifest, split, record=ECGRecord)
        except ManifestError:
            if split == "train" or not data.manifest.is_file():
                raise
            return []
        seconds = data.window_frames * data.frame_samples / data.preparation.rate
        return SignalDataset(manifest, data.signals, data.preparation, seconds, data.cache)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{"ids", "signals" [B,N,S]}"""
        return {"ids": [item["id"] for item in items], "signals": torch.stack([item["signals"] for item in items])}

    @cached_property
    def autoencoder(self) -> SignalAutoencoder:
        """Fitted to the training signals: a pure function of data and recipe."""
        data, recipe = self.dataset("train"), self.recipe.data
        step = max(len(data) // _STATISTICS_WINDOWS, 1)
        signals = torch.stack([data[i]["signals"] for i in range(0, len(data), step)])
        given = self.draw_given(len(signals), seeded("given", "statistics"))
        return fit_signal_autoencoder(recipe.signals, signals, given, recipe.frame_samples, recipe.latent_channels)

    def draw_given(self, count: int, generator: torch.Generator) -> Tensor:
        """[count,N] bool: what each example is given."""
        names, given, device = self.recipe.data.signals, self.recipe.given, generator.device
        table = torch.tensor([[name in subset for name in names] for subset in given.subsets], device=device)
        chosen = table[torch.randint(len(table), (count,), generator=generator, device=device)]
        order = torch.rand(count, len(names), generator=generator, device=device).argsort(1).argsort(1)
        size = torch.randint(1, max(len(names), 2), (count, 1), generator=generator, device=device)
        anyhow = torch.rand(count, 1, generator=generator, device=device) < given.random
        return torch.where(anyhow, order < size, chosen)

    def frames(self, batch: dict[str, Any], generator: torch.Generator) -> FrameBatch:
        """What the guess from the given signals leaves over [B,T,L,1], and that guess as features."""
        signals = batch["signals"]
        given = self.draw_given(len(signals), generator)
        guess = self.autoencoder.guess(signals, given)
        frames = signal_frames(self.autoencoder, guess, given, self.recipe.data.preparation.rate)
        return dataclasses.replace(frames, latents=self.autoencoder.encode(signals, guess, given))

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The objective's loss on this batch."""
        return denoising_loss(modules[which], self.objective, self.frames(batch, generator), generator), {}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """Held-out windows: the true leads (black), the linear guess (grey) and two trajectories (colour) of what is missing."""
        data = self.dataset("val") or self.dataset("train")
        signals = torch.stack([data[i]["signals"] for i in range(min(2, len(data)))])
        pipeline = self.pipeline(modules)
        pipeline.set_progress_bar_config(disable=True)
        codec = self.autoencoder
        given = codec.given(self.recipe.given.subsets[0]).expand(len(signals), -1)
        drawn = pipeline.translate(signals, given, 2, generator=[seeded("preview", seed, i) for i in range(2 * len(signals))])
        guess = codec.mixing.float() @ codec.guess(signals, given)
        return {"leads": _picture(codec.names, given, signals, guess, drawn)}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The pipeline's folder, in half precision unless the recipe says otherwise, with a model card."""
        pipeline = self.pipeline(modules)
        if self.recipe.export_dtype == "float16":
            pipeline.denoiser = copy.deepcopy(pipeline.denoiser).half()
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_translation_card(folder, self.recipe.train.out.name, pipeline, self.recipe)

    def pipeline(self, modules: dict[str, nn.Module]) -> ECGTranslationPipeline:
        """These weights as a pipeline (shared, not copied)."""
        data, model = self.recipe.data, modules["model"]
        assert isinstance(model, SequenceTransformer)
        return ECGTranslationPipeline(
            autoencoder=self.autoencoder,
            denoiser=model,
            scheduler=self.objective.scheduler(),
            preparation=data.preparation.model_dump(mode="json"),
            window_frames=data.window_frames,
            num_inference_steps=self.recipe.num_inference_steps,
            default_given=",".join(self.recipe.given.subsets[0]),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """The statistics go along."""
        self.autoencoder.to(device)


def _picture(names: tuple[str, ...], given: Tensor, signals: Tensor, guess: Tensor, drawn: Tensor) -> Tensor:
    """[B,3,H,W] in [-1,1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = []
    for b in range(len(signals)):
        figure = Figure(figsize=(8, 0.9 * len(names)), dpi=80, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for i, (name, axes) in enumerate(zip(names, np.atleast_1d(figure.subplots(len(names), 1, sharex=True)))):
            axes.plot(signals[b, i].cpu(), color="black", linewidth=1)
            if not given[b, i] and name != "PPG":
                axes.plot(guess[b, i].cpu(), color="0.65", linewidth=1)
                axes.plot(drawn[b, :, i].cpu().T, linewidth=0.8)
            axes.set_ylabel(f"{name}*" if given[b, i] else name, rotation=0, fontsize=8)
            axes.tick_params(labelsize=6)
        canvas.draw()
        pictures.append(torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(pictures)
