"""From an ECG to a beating heart: the whole story of the flow generator in one file.

Latents of an echo clip's frames (drawn from the cached posterior of a frozen autoencoder) are learned by the sequence denoiser,
conditioned on the ECG's unpooled tokens, each frame's cardiac phase, ejection fraction, view and frame rate; any of them may be
missing. Some frames are known: the first, or those that continue a clip. The export is an `ECGToEchoPipeline`.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from medgen.config import Config, ConfigError
from medgen.data.latent_cache import module_hash
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.objectives import Objective, ObjectiveConfig, denoising_loss
from medgen.models.autoencoder import downsampling, encode_moments, load_autoencoder
from medgen.models.denoiser import DenoiserConfig, SequenceTransformer, build_denoiser
from medgen.models.ecg_encoders import load_ecg_encoder
from medgen.models.echo_conditioner import (
    CONDITIONS,
    ConditionedDenoiser,
    EchoConditionerConfig,
    EchoConditions,
    build_conditioner,
)
from medgen.pipelines.card import write_echo_card
from medgen.pipelines.ecg_to_echo import ECGToEchoPipeline
from medgen.seeds import generator as seeded
from medgen.tasks.base import TrainConfig
from medgen.tasks.echo_data import CachedClips, EchoData, cached_clips
from medgen.tasks.text_to_cxr import FrozenAutoencoder

_PREVIEW_CLIPS = _PREVIEW_FRAMES = 5  # a square of pictures, a clip in each row


class FrozenECGEncoder(Config):
    """A published encoder (ECGFounder, ST-MEM) that listens beside our own; its tokens are cached."""

    path: str = Field(
        ..., description="folder made by `medgen.models.ecg_encoders.import_checkpoint`, or a pipeline that has one"
    )


class ConditionDropout(Config):
    """Shares of clips that are learned without a condition, each drawn by itself, so that each can be left out and guided alone."""

    ecg: float = Field(0.1, ge=0, lt=1)
    ejection_fraction: float = Field(0.1, ge=0, lt=1)
    view: float = Field(0.1, ge=0, lt=1)
    fps: float = Field(0.1, ge=0, lt=1)
    everything: float = Field(0.1, ge=0, lt=1, description="clips without any condition")
    leads: float = Field(0.3, ge=0, lt=1, description="clips of whose leads only a random part is shown")


class KnownFrames(Config):
    """Which frames of a clip are given, not generated, in training."""

    first: float = Field(0.25, ge=0, le=1, description="share of clips whose first frame is known")
    continuing: float = Field(
        0.25, ge=0, le=1, description="share of clips that continue another: 1 to `longest` frames are known"
    )
    longest: int = Field(16, ge=1, description="most frames that a continuing clip shares with the one before")


class EchoSamplingDefaults(Config):
    """What the exported pipeline does when it is not told otherwise; previews too."""

    num_inference_steps: int = Field(12, ge=1)
    guidance_scale: float | dict[str, float] = Field(1.0, description="one number, or one for each condition; 1 costs nothing")
    overlap: int = Field(8, ge=1, description="frames that the windows of a long clip share at least")


class ECGToEchoRecipe(Config):
    """configs/ecg_to_echo/*.yaml"""

    data: EchoData
    autoencoder: FrozenAutoencoder
    ecg_encoder: FrozenECGEncoder | None = None
    conditioner: EchoConditionerConfig = EchoConditionerConfig()
    denoiser: DenoiserConfig = DenoiserConfig(temporal_every=2, time_periods=(0.2, 8.0))
    objective: ObjectiveConfig = ObjectiveConfig()
    dropout: ConditionDropout = ConditionDropout()
    known: KnownFrames = KnownFrames()
    shown_frames: int | None = Field(
        None,
        ge=2,
        description="of each window, learn only this many frames at random, at their times: more hearts for the same work",
    )
    cache: Path = Field(..., description="folder of cached clips: latents of every frame and prepared ECGs, computed once")
    sampling: EchoSamplingDefaults = EchoSamplingDefaults()
    export_dtype: Literal["float32", "float16"] = "float16"
    train: TrainConfig


class ECGToEcho:
    """Clips with their ECG in, denoiser and conditioner out. One module, "model"."""

    name = "ecg-to-echo"

    def __init__(self, recipe: ECGToEchoRecipe) -> None:
        self.recipe = recipe
        self.objective = Objective(recipe.objective)
        self.vae = load_autoencoder(recipe.autoencoder.path)
        self.ecg_encoder = None if recipe.ecg_encoder is None else load_ecg_encoder(recipe.ecg_encoder.path)
        self.scheduler = self.objective.scheduler()
        side, shape = downsampling(self.vae) * recipe.denoiser.patch_size, recipe.data.preprocessing
        if shape.size % side:
            raise ConfigError(f"data.preprocessing.size: {shape.size} is not a multiple of {side}, a token's side in pixels")
        if recipe.denoiser.temporal_every == 0 and recipe.denoiser.init_from is None:
            raise ConfigError("denoiser.temporal_every: 0 leaves every frame alone; a video needs attention in time, 2 is usual")
        for name, frames in (("known.longest", recipe.known.longest), ("sampling.overlap", recipe.sampling.overlap)):
            if frames >= shape.frames:
                raise ConfigError(
                    f"{name}: {frames} of the {shape.frames} frames of data.preprocessing; some must be left to make"
                )

    def modules(self) -> dict[str, nn.Module]:
        """The denoiser with its conditioner."""
        recipe = self.recipe
        encoded = 0 if self.ecg_encoder is None else self.ecg_encoder.width
        conditioner = build_conditioner(recipe.conditioner, recipe.data.ecg.rate, recipe.denoiser.init_from, encoded)
        channels = int(self.vae.config.latent_channels)
        denoiser = build_denoiser(recipe.denoiser, channels, conditioner.width, feature_dim=conditioner.feature_dim)
        return {"model": ConditionedDenoiser(denoiser, conditioner)}

    def dataset(self, split: Literal["train", "val"]) -> CachedClips | list[Any]:
        """Windows of cached clips; the first call computes what is missing."""
        clips = self.recipe.data.dataset(split)
        if clips is None:
            return []
        device = "cuda" if torch.cuda.is_available() and not self.recipe.train.cpu else "cpu"
        vae = self.vae.to(device)
        cached = cached_clips(
            clips,
            self.recipe.data,
            lambda images: encode_moments(vae, images),
            module_hash(vae),
            self.recipe.cache / "clips",
            device,
            self.recipe.train.seed,
            self.ecg_encoder,
        )
        cached.shown = self.recipe.shown_frames if split == "train" else None
        return cached

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The items' tensors stacked, and "ids"; tokens of a published encoder are padded (times NaN)."""
        batch: dict[str, Any] = {"ids": [item["id"] for item in items]}
        for name in (name for name in items[0] if name != "id"):
            values, filling = [item[name] for item in items], torch.nan if name == "encoded_times" else 0.0
            padded = name.startswith("encoded")
            batch[name] = pad_sequence(values, batch_first=True, padding_value=filling) if padded else torch.stack(values)
        return batch

    def frames(self, model: ConditionedDenoiser, batch: dict[str, Any], generator: torch.Generator) -> FrameBatch:
        """Clips with what they are conditioned on, some of it dropped, and some frames known."""
        mean: Tensor = batch["mean"]
        latents = mean + batch["std"] * torch.randn(mean.shape, generator=generator, device=mean.device)
        conditions = dropped(conditions_of(batch), self.recipe.dropout, generator)
        context, context_times, context_mask, features, feature_mask = model.conditioner(conditions)
        known = known_frames(batch["present"], self.recipe.known, generator)
        return FrameBatch(
            latents, batch["times"], known, batch["present"], context, context_times, context_mask, features, feature_mask
        )

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The objective's loss on this batch."""
        model = modules[which]
        assert isinstance(model, ConditionedDenoiser)
        return denoising_loss(model.denoiser, self.objective, self.frames(model, batch, generator), generator), {}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """A row for each of five clips: frames generated from its conditions; the same frames of the real clip."""
        batch, device = self._preview_batch, next(modules["model"].parameters()).device
        if batch is None:
            return {}
        pipeline = self.pipeline(modules)
        pipeline.set_progress_bar_config(disable=True)
        clips, count = batch["present"].shape
        generators = [seeded("preview", seed, i) for i in range(clips)]
        defaults = self.recipe.sampling
        conditions = conditions_of(batch).to(device)
        latents = pipeline.sample(conditions, defaults.num_inference_steps, defaults.guidance_scale, generators)
        shown = torch.linspace(0, count - 1, min(count, _PREVIEW_FRAMES)).round().long()
        pictures = {"samples": latents, "real": batch["mean"].float().to(device)}
        return {name: 2 * pipeline.decode(clip[:, shown]).flatten(0, 1)[:, None].cpu() - 1 for name, clip in pictures.items()}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The pipeline's folder, in half precision unless the recipe says otherwise, with a model card."""
        pipeline = self.pipeline(modules)
        if self.recipe.export_dtype == "float16":
            for name in ("vae", "denoiser", "conditioner"):
                setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)).half())
        for name in ("vae", "denoiser", "conditioner"):  # diffusers notes where each came from: nobody else's business
            getattr(pipeline, name).register_to_config(_name_or_path="")
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_echo_card(folder, self.recipe.train.out.name, pipeline, self.recipe)

    def pipeline(self, modules: dict[str, nn.Module]) -> ECGToEchoPipeline:
        """These weights as a pipeline (shared, not copied)."""
        model = modules["model"]
        assert isinstance(model, ConditionedDenoiser) and isinstance(model.denoiser, SequenceTransformer)
        return ECGToEchoPipeline(
            vae=self.vae,
            denoiser=model.denoiser,
            conditioner=model.conditioner,
            scheduler=self.scheduler,
            ecg_encoder=self.ecg_encoder,
            preprocessing=self.recipe.data.preprocessing.model_dump(mode="json"),
            ecg_preparation=self.recipe.data.ecg.model_dump(mode="json"),
            **self.recipe.sampling.model_dump(),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the autoencoder; it stays in float32 (half precision costs it grey values)."""
        self.vae.to(device)

    @cached_property
    def _preview_batch(self) -> dict[str, Any] | None:
        data = self.dataset("val") or self.dataset("train")
        count = min(_PREVIEW_CLIPS, len(data))
        return self.collate([data[i * len(data) // count] for i in range(count)]) if count else None


def conditions_of(batch: dict[str, Any]) -> EchoConditions:
    """What a batch of `CachedClips` items is conditioned on."""
    return EchoConditions(**{field.name: batch.get(field.name) for field in fields(EchoConditions)})  # type: ignore[arg-type]


def dropped(conditions: EchoConditions, share: ConditionDropout, generator: torch.Generator) -> EchoConditions:
    """The same clips, some without some of their conditions."""
    clips, device = len(conditions.times), conditions.times.device
    draws = torch.rand(len(CONDITIONS) + 2, clips, generator=generator, device=device)
    nothing = draws[0] < share.everything
    lost = {name: (draw < getattr(share, name)) | nothing for name, draw in zip(CONDITIONS, draws[2:])}
    return conditions.some_leads(draws[1] < share.leads, generator).drop(lost)


def known_frames(present: Tensor, known: KnownFrames, generator: torch.Generator) -> Tensor:
    """[B,T] bool: the first frame of some clips, the first few of others; never all that a clip has."""
    draw, length = torch.rand(2, len(present), generator=generator, device=present.device)
    counts = (1 + (length * known.longest).long()) * (draw < known.continuing)
    counts = torch.where((draw >= known.continuing) & (draw < known.continuing + known.first), 1, counts)
    counts = torch.minimum(counts, present.sum(1) - 1)
    return torch.arange(present.shape[1], device=present.device) < counts[:, None]
