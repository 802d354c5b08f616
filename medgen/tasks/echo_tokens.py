"""From an ECG to a beating heart, ECHOPulse's way: the whole story of the masked-token generator in one file.

A frozen video tokenizer makes codes of a window; some are hidden; the token transformer learns to tell them from the rest, the ECG and
the other conditions of `ecg_to_echo`, each of which may be missing. The export is a `MaskedECGToEchoPipeline`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medgen.config import Config, ConfigError
from medgen.data.ecg import LEADS
from medgen.data.ecg_window import MARGIN_SECONDS
from medgen.data.echo_dataset import EchoDataset
from medgen.diffusion.masked_tokens import hide, masked_loss
from medgen.models.denoiser import DenoiserConfig
from medgen.models.echo_conditioner import ConditionedDenoiser, EchoConditionerConfig, EchoConditions, build_conditioner
from medgen.models.token_transformer import TokenTransformer, build_token_transformer
from medgen.models.video_tokenizer import load_video_tokenizer
from medgen.pipelines.card import write_echo_card
from medgen.pipelines.masked_ecg_to_echo import MaskedECGToEchoPipeline, of_token_frames
from medgen.seeds import generator as seeded
from medgen.tasks.base import TrainConfig
from medgen.tasks.ecg_to_echo import ConditionDropout, KnownFrames, conditions_of, dropped, known_frames
from medgen.tasks.echo_data import EchoData

_PREVIEW_CLIPS, _PREVIEW_FRAMES = 4, 8


class FrozenTokenizer(Config):
    """The tokenizer whose codes are learned."""

    path: str = Field(..., description="folder of a trained video tokenizer, or of a pipeline that has one")


class MaskedSamplingDefaults(Config):
    """What the exported pipeline does when it is not told otherwise; previews too."""

    num_inference_steps: int = Field(16, ge=1)
    guidance_scale: float | dict[str, float] = Field(1.0, description="one number, or one for each condition; 1 costs nothing")
    overlap: int = Field(8, ge=1, description="frames of a window that the next one goes on from, at least")
    temperature: float = Field(1.0, ge=0)
    choice_temperature: float = Field(4.5, ge=0)
    num_frames: int | None = Field(
        None, ge=1, description="of a clip; longer than data.preprocessing.frames it is joined from windows"
    )


class EchoTokensRecipe(Config):
    """configs/ecg_to_echo/*_tokens.yaml"""

    data: EchoData
    tokenizer: FrozenTokenizer
    conditioner: EchoConditionerConfig = EchoConditionerConfig()
    denoiser: DenoiserConfig = DenoiserConfig(patch_size=1, temporal_every=1, time_periods=(0.2, 8.0))
    token_dim: int = Field(128, ge=2, description="width of a code's embedding")
    dropout: ConditionDropout = ConditionDropout()
    known: KnownFrames = KnownFrames()
    middle: float = Field(
        0.2, ge=0, lt=1, description="share of batches without the token frame that holds one frame: a clip's middle"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    cache: Path | None = Field(
        None, description="folder of resized clips and prepared ECGs; without it each is prepared every time"
    )
    sampling: MaskedSamplingDefaults = MaskedSamplingDefaults()
    export_dtype: Literal["float32", "float16"] = "float16"
    train: TrainConfig


class EchoTokens:
    """Clips with their ECG in, token transformer and conditioner out. One module, "model"."""

    name = "echo-tokens"

    def __init__(self, recipe: EchoTokensRecipe) -> None:
        self.recipe = recipe
        self.tokenizer = load_video_tokenizer(recipe.tokenizer.path)
        size, patch = recipe.data.preprocessing.size, int(self.tokenizer.config.patch_size)
        if size % patch:
            raise ConfigError(f"data.preprocessing.size: {size} is not a multiple of the tokenizer's patch, {patch}")
        if recipe.denoiser.temporal_every == 0 and recipe.denoiser.init_from is None:
            raise ConfigError("denoiser.temporal_every: 0 leaves every token frame alone; a video needs attention in time")
        frames = recipe.data.preprocessing.frames
        for name, value in (("known.longest", recipe.known.longest), ("sampling.overlap", recipe.sampling.overlap)):
            if value >= frames:
                raise ConfigError(f"{name}: {value} of the {frames} frames of data.preprocessing; some must be left to make")

    def modules(self) -> dict[str, nn.Module]:
        """The token transformer with its conditioner."""
        recipe = self.recipe
        conditioner = build_conditioner(recipe.conditioner, recipe.data.ecg.rate, recipe.denoiser.init_from)
        denoiser = build_token_transformer(
            recipe.denoiser,
            recipe.token_dim,
            codebook_size=int(self.tokenizer.config.codebook_size),
            codes_per_place=int(self.tokenizer.config.codes_per_place),
            context_dim=conditioner.width,
            feature_dim=conditioner.feature_dim,
        )
        return {"model": ConditionedDenoiser(denoiser, conditioner)}

    def dataset(self, split: Literal["train", "val"]) -> EchoDataset | list[Any]:
        """Windows of clips with their ECG."""
        data = self.recipe.data.dataset(split)
        if data is None:
            return []
        data.cache, data.seed = self.recipe.cache, self.recipe.train.seed
        return data

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The items' tensors stacked, "present" [B,T] and "ids"; a shorter clip is filled up with its last frame."""
        frames, rate = self.recipe.data.preprocessing.frames, self.recipe.data.ecg.rate
        return {"ids": [item["id"] for item in items], **_stacked([_padded(item, frames, rate) for item in items])}

    @torch.no_grad()
    def tokens(self, batch: dict[str, Any]) -> tuple[Tensor, EchoConditions, Tensor]:
        """Codes [B,T',h,w,G] of a batch, the conditions of its token frames, and which of these are there [B,T']."""
        span = int(self.tokenizer.config.frames_per_token)
        first = torch.arange(0, batch["present"].shape[1] + span - 1, span) - span + 1  # of each token frame
        present = batch["present"][:, first.clamp(min=0)]
        return self.tokenizer.encode(batch["videos"]), of_token_frames(conditions_of(batch), span), present

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Cross-entropy of the hidden codes, and how many of them are named right."""
        model = modules[which]
        assert isinstance(model, ConditionedDenoiser) and isinstance(model.denoiser, TokenTransformer)
        codes, conditions, present = self.tokens(batch)
        if float(torch.rand((), generator=generator, device=codes.device)) < self.recipe.middle and codes.shape[1] > 2:
            codes, conditions, present = codes[:, 1:], _later(conditions), present[:, 1:]
        span = int(self.tokenizer.config.frames_per_token)
        known = known_frames(
            present, self.recipe.known.model_copy(update={"longest": -(-self.recipe.known.longest // span)}), generator
        )
        inputs, levels, hidden = hide(codes, known | ~present, model.denoiser.mask_code, generator)
        context, context_times, context_mask, features, feature_mask = model.conditioner(
            dropped(conditions, self.recipe.dropout, generator)
        )
        logits = model.denoiser(
            inputs,
            levels,
            conditions.times,
            present=present,
            context=context,
            context_times=context_times,
            context_mask=context_mask,
            features=features,
            feature_mask=feature_mask,
        )
        right = ((logits.argmax(-1) == codes) & hidden).sum() / hidden.sum().clamp(min=1)
        return masked_loss(logits, codes, hidden, self.recipe.label_smoothing), {"accuracy": right}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """A row for each of four clips' conditions: eight of the frames generated; the same frames of the real clips."""
        batch, device = self._preview_batch, next(modules["model"].parameters()).device
        if batch is None:
            return {}
        pipeline = self.pipeline(modules)
        pipeline.set_progress_bar_config(disable=True)
        clips, count = batch["present"].shape
        defaults, generators = self.recipe.sampling, [seeded("preview", seed, i) for i in range(clips)]
        conditions = conditions_of(batch).to(device)
        codes = pipeline.sample(conditions, defaults.num_inference_steps, defaults.guidance_scale, generators)
        shown = torch.linspace(0, count - 1, min(count, _PREVIEW_FRAMES)).round().long()
        made = 2 * pipeline.decode(codes)[:, shown].cpu() - 1
        return {"samples": made.flatten(0, 1)[:, None], "real": batch["videos"][:, shown].flatten(0, 1)}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The pipeline's folder, in half precision unless the recipe says otherwise, with a model card."""
        pipeline = self.pipeline(modules)
        if self.recipe.export_dtype == "float16":
            for name in ("tokenizer", "denoiser", "conditioner"):
                setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)).half())
        for name in ("tokenizer", "denoiser", "conditioner"):  # diffusers notes where each came from: nobody else's business
            getattr(pipeline, name).register_to_config(_name_or_path="")
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_echo_card(folder, self.recipe.train.out.name, pipeline, self.recipe)

    def pipeline(self, modules: dict[str, nn.Module]) -> MaskedECGToEchoPipeline:
        """These weights as a pipeline (shared, not copied)."""
        model = modules["model"]
        assert isinstance(model, ConditionedDenoiser) and isinstance(model.denoiser, TokenTransformer)
        shape = self.recipe.data.preprocessing
        clip = shape.model_copy(update={"frames": self.recipe.sampling.num_frames or shape.frames})
        return MaskedECGToEchoPipeline(
            tokenizer=self.tokenizer,
            denoiser=model.denoiser,
            conditioner=model.conditioner,
            preprocessing=clip.model_dump(mode="json"),
            window=shape.frames,
            ecg_preparation=self.recipe.data.ecg.model_dump(mode="json"),
            **self.recipe.sampling.model_dump(exclude={"num_frames"}),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the tokenizer; it stays in float32 (a code must not depend on the compute type)."""
        self.tokenizer.to(device)

    @cached_property
    def _preview_batch(self) -> dict[str, Any] | None:
        data = self.dataset("val") or self.dataset("train")
        count = min(_PREVIEW_CLIPS, len(data))
        return self.collate([data[i * len(data) // count] for i in range(count)]) if count else None


def _later(conditions: EchoConditions) -> EchoConditions:
    """Without the first token frame, on the clock of the second."""
    moved = conditions.times[:, 1:2]
    return replace(
        conditions,
        times=conditions.times[:, 1:] - moved,
        phase=None if conditions.phase is None else conditions.phase[:, 1:],
        ecg_start=None if conditions.ecg_start is None else conditions.ecg_start - moved[:, 0],
    )


def _padded(item: dict[str, Any], frames: int, ecg_rate: float) -> dict[str, Tensor]:
    """An item of `EchoDataset` as tensors of one size: `frames` frames, and the ECG around as many."""
    count = len(item["video"])
    missing, fps = frames - count, float(item["fps"])
    rest = (torch.arange(count, frames) - (count - 1)) / fps + item["times"][-1]
    values = {
        "videos": torch.cat([item["video"], item["video"][-1:].expand(missing, -1, -1, -1)]),
        "present": torch.arange(frames) < count,
        "times": torch.cat([item["times"], rest]).float(),
        "phase": functional.pad(item["phase"], (0, 0, 0, missing), value=torch.nan),
        **{name: torch.tensor(item[name]) for name in ("ejection_fraction", "view", "fps")},
    }
    samples, window = round(((frames - 1) / fps + 2 * MARGIN_SECONDS) * ecg_rate), item["ecg"]
    signal, leads, recorded = (
        torch.zeros(len(LEADS), samples),
        torch.zeros(len(LEADS), dtype=torch.bool),
        torch.zeros(samples, dtype=torch.bool),
    )
    if window is not None:
        signal[:, : window.signal.shape[1]] = torch.from_numpy(window.signal)
        leads, recorded[: len(window.sample_mask)] = torch.from_numpy(window.lead_mask), torch.from_numpy(window.sample_mask)
    return {**values, "ecg": signal, "lead_mask": leads, "sample_mask": recorded, "ecg_start": torch.tensor(-MARGIN_SECONDS)}


def _stacked(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
