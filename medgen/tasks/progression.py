"""From the past to the next visit: the whole story of longitudinal progression in one file.

Latents of a patient's visits are frames at their dates. Some are known, some missing, some to be forecast, or filled in between; the
sequence denoiser learns what the known ones, carried on in time, do not show (`medgen.diffusion.anchors`), conditioned on gaps, treatments,
covariates and sentences of reports, any of which may be missing. `deterministic: true` trains the same network as a regressor: the
baseline that any generative forecast has to beat. The export is a `ProgressionPipeline`.
"""

from __future__ import annotations

import copy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError
from medgen.data.latent_cache import LatentCache, cache_key, module_hash
from medgen.diffusion.anchors import anchors
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.objectives import Objective, ObjectiveConfig, denoising_loss
from medgen.models.autoencoder import downsampling, encode_moments, load_autoencoder
from medgen.models.conditioners import TextConditioner, TextEncoderConfig
from medgen.models.denoiser import DenoiserConfig, SequenceTransformer, build_denoiser
from medgen.models.echo_conditioner import ConditionedDenoiser
from medgen.models.progression_conditioner import (
    CONDITIONS,
    ProgressionConditioner,
    ProgressionConditionerConfig,
    ProgressionConditions,
    build_progression_conditioner,
)
from medgen.pipelines.card import write_progression_card
from medgen.pipelines.progression import ProgressionPipeline, encode_sentences
from medgen.seeds import generator as seeded
from medgen.tasks.autoencoder import as_pictures
from medgen.tasks.base import TrainConfig
from medgen.tasks.text_to_cxr import FrozenAutoencoder
from medgen.tasks.visit_data import CachedVisits, VisitData, collate_visits

_PREVIEW_SERIES = _PREVIEW_VISITS = 5  # a square of pictures, a patient in each row
_MEASURED_SERIES = 512  # of which the spread of residuals is measured


class KnownVisits(Config):
    """Which visits are given, not generated, in training; the rest is forecast, or filled in between."""

    between: float = Field(0.2, ge=0, le=1, description="share of series whose last visit is known, too (in-betweening)")
    missing: float = Field(0.3, ge=0, lt=1, description="share of the past visits that are left out, at least one stays")
    repeated: float = Field(
        0.1, ge=0, le=1, description="share of series in which a visit repeats the last known one: a gap of zero"
    )
    noise: float = Field(0.1, ge=0, description="largest standard deviation of noise on known latents, against drift")


class ConditionDropout(Config):
    """Shares of series that are learned without a condition, so that each can be left out and guided alone."""

    events: float = Field(0.1, ge=0, lt=1)
    covariates: float = Field(0.1, ge=0, lt=1)
    reports: float = Field(0.3, ge=0, lt=1)
    everything: float = Field(0.05, ge=0, lt=1)


class ProgressionDefaults(Config):
    """What the exported pipeline does when it is not told otherwise; previews too."""

    num_inference_steps: int = Field(12, ge=1)
    guidance_scale: float | dict[str, float] = Field(1.0, description="one number, or one for each condition; 1 costs nothing")
    context_noise: float = Field(0.05, ge=0, description="autoregressive: noise on what was generated before it becomes known")


class ProgressionRecipe(Config):
    """configs/progression/*.yaml"""

    data: VisitData
    autoencoder: FrozenAutoencoder
    reports: TextEncoderConfig | None = Field(
        None, description="text encoder whose sentences condition the course; never trained here"
    )
    conditioner: ProgressionConditionerConfig = ProgressionConditionerConfig()
    denoiser: DenoiserConfig = DenoiserConfig(temporal_every=1, time_periods=(4.0, 4000.0))
    objective: ObjectiveConfig = ObjectiveConfig()
    known: KnownVisits = KnownVisits()
    dropout: ConditionDropout = ConditionDropout()
    shown_visits: int = Field(5, ge=2, description="visits of a series that one example shows, at random")
    deterministic: bool = Field(False, description="learn the mean of the future instead of its distribution: the baseline")
    cache: Path = Field(..., description="folder of cached latents, computed once")
    sampling: ProgressionDefaults = ProgressionDefaults()
    export_dtype: Literal["float32", "float16"] = "float16"
    train: TrainConfig


class Progression:
    """Visits in, denoiser and conditioner out. One module, "model"."""

    name = "progression"

    def __init__(self, recipe: ProgressionRecipe) -> None:
        self.recipe = recipe
        self.objective = Objective(recipe.objective)
        self.vae = load_autoencoder(recipe.autoencoder.path)
        self.text = None if recipe.reports is None else TextConditioner.from_config(recipe.reports)
        self.scheduler = self.objective.scheduler()
        if recipe.reports is not None and recipe.reports.trained:
            raise ConfigError("reports.trained: sentences are encoded once, by a frozen text encoder; set it to false")
        if recipe.denoiser.temporal_every == 0 and recipe.denoiser.init_from is None:
            raise ConfigError("denoiser.temporal_every: 0 leaves every visit alone; 1 is usual")
        side = downsampling(self.vae) * recipe.denoiser.patch_size
        if wrong := [n for n in recipe.data.preprocessing.shape if n % side]:
            raise ConfigError(f"data.preprocessing.size: {wrong[0]} is not a multiple of {side}, a token's side in pixels")

    def modules(self) -> dict[str, nn.Module]:
        """The denoiser with its conditioner."""
        recipe = self.recipe
        spoken = 0 if self.text is None else self.text.width
        conditioner = build_progression_conditioner(recipe.conditioner, spoken, recipe.denoiser.init_from)
        channels, dims = int(self.vae.config.latent_channels), recipe.data.preprocessing.dim
        denoiser = build_denoiser(recipe.denoiser, channels, conditioner.width, dims, conditioner.feature_dim)
        return {"model": ConditionedDenoiser(denoiser, conditioner)}

    def dataset(self, split: Literal["train", "val"]) -> CachedVisits | list[Any]:
        """Series of cached latents; the first call computes what is missing."""
        images = self.recipe.data.images(split)
        if images is None:
            return []
        device = "cuda" if torch.cuda.is_available() and not self.recipe.train.cpu else "cpu"
        vae = self.vae.to(device)
        key = cache_key("visits", module_hash(vae), images.fingerprint)
        latents = LatentCache.build(
            self.recipe.cache / "visits", images, lambda x: encode_moments(vae, x), key, ids=images.ids, device=device
        )
        shown = self.recipe.shown_visits
        return CachedVisits(images.manifest.records, latents, self._conditioner, self._encode_report, shown)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The items' tensors, padded and stacked, with "present" and "ids"."""
        return collate_visits(items)

    def frames(self, model: ConditionedDenoiser, batch: dict[str, Any], generator: torch.Generator) -> FrameBatch:
        """Series whose unknown frames hold residuals to their anchors, in units of their spread: what is to be generated."""
        latents, times, present, known = visible(batch, self.recipe.known, generator)
        conditions = dropped(conditions_of(batch, times, known), self.recipe.dropout, generator)
        context, context_times, context_mask, features = model.conditioner(conditions)
        strength = self.recipe.known.noise * torch.rand(len(latents), generator=generator, device=latents.device)
        noisy = latents + _over(strength[:, None], latents) * torch.randn(
            latents.shape, generator=generator, device=latents.device
        )
        unit = torch.tensor(self.residual_std, device=latents.device).reshape(1, 1, -1, *(1,) * (latents.ndim - 3))
        residual = (latents - anchors(noisy, times, known)) / unit
        x0 = torch.where(_over(known, latents), noisy, residual)
        return FrameBatch(x0, times, known, present, context, context_times, context_mask, features)

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The objective's loss on this batch; of a regressor the squared error of its one guess."""
        model = modules[which]
        assert isinstance(model, ConditionedDenoiser)
        frames = self.frames(model, batch, generator)
        if not self.recipe.deterministic:
            return denoising_loss(model.denoiser, self.objective, frames, generator), {}
        known = _over(frames.known, frames.latents)
        guess = model.denoiser(frames.latents * known, (~frames.known).float(), frames.times, **frames.conditions())
        counted = (frames.present & ~frames.known).float()
        error = ((guess.float() - frames.latents) ** 2).flatten(2).mean(2)
        return (error * counted).sum() / counted.sum().clamp(min=1), {}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """A row for each of five patients: the first half of the visits shown as known, the rest as drawn; and the real ones."""
        batch = self._preview_batch
        if batch is None:
            return {}
        pipeline, device = self.pipeline(modules), next(modules["model"].parameters()).device
        pipeline.set_progress_bar_config(disable=True)
        latents, present = batch["latents"].to(device), batch["present"].to(device)
        known = torch.arange(present.shape[1], device=device) < present.sum(1, keepdim=True).div(2, rounding_mode="floor")
        conditions = conditions_of(batch, batch["times"], known.cpu()).to(device)
        noise = torch.stack([torch.randn(one.shape, generator=seeded("preview", seed, i)) for i, one in enumerate(latents)])
        defaults = self.recipe.sampling
        drawn = pipeline.sample(
            latents, conditions, defaults.num_inference_steps, defaults.guidance_scale, noise.to(device), present
        )
        return {name: _pictures(pipeline, rows, present) for name, rows in (("samples", drawn), ("real", latents))}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The pipeline's folder, in half precision unless the recipe says otherwise, with a model card."""
        pipeline = self.pipeline(modules)
        if self.recipe.export_dtype == "float16":
            for name in ("vae", "denoiser", "conditioner", "text_encoder"):
                if (module := getattr(pipeline, name)) is not None:
                    setattr(pipeline, name, copy.deepcopy(module).half())
        for name in ("vae", "denoiser", "conditioner"):  # diffusers notes where each came from: nobody else's business
            getattr(pipeline, name).register_to_config(_name_or_path="")
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_progression_card(folder, self.recipe.train.out.name, pipeline, self.recipe)

    def pipeline(self, modules: dict[str, nn.Module]) -> ProgressionPipeline:
        """These weights as a pipeline (shared, not copied)."""
        model, recipe = modules["model"], self.recipe
        assert isinstance(model, ConditionedDenoiser) and isinstance(model.denoiser, SequenceTransformer)
        tokenizer = None if self.text is None else copy.deepcopy(self.text.tokenizer)
        if tokenizer is not None and self.text is not None:
            tokenizer.model_max_length = self.text.max_tokens
        series = self._train.series
        return ProgressionPipeline(
            vae=self.vae,
            denoiser=model.denoiser,
            conditioner=model.conditioner,
            scheduler=self.scheduler,
            text_encoder=None if self.text is None else self.text.encoder,
            tokenizer=tokenizer,
            preprocessing=recipe.data.preprocessing.model_dump(mode="json"),
            time_unit=series[0].time_unit,
            residual_std=self.residual_std,
            max_history=recipe.shown_visits - 1,
            deterministic=recipe.deterministic,
            **recipe.sampling.model_dump(),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the autoencoder; it stays in float32 (half precision costs it grey values)."""
        self.vae.to(device)

    @cached_property
    def residual_std(self) -> list[float]:
        """Standard deviation [C] of the difference between one visit's latents and the next one's, over the training series."""
        data = self._train
        total, count = torch.zeros(int(self.vae.config.latent_channels), dtype=torch.float64), 0
        for index in range(0, len(data), max(1, len(data) // _MEASURED_SERIES)):
            steps = data[index]["latents"].double().diff(dim=0).transpose(0, 1).flatten(1)  # [C, ...]
            total, count = total + (steps**2).sum(1), count + steps.shape[1]
        return [float(value) for value in (total / max(count, 1)).sqrt().clamp(min=1e-3)]

    @cached_property
    def _train(self) -> CachedVisits:
        data = self.dataset("train")
        assert isinstance(data, CachedVisits)
        return data

    @cached_property
    def _conditioner(self) -> ProgressionConditioner:
        """Its names, not its weights: how covariates and treatments are numbered."""
        spoken = 0 if self.text is None else self.text.width
        return build_progression_conditioner(self.recipe.conditioner, spoken, self.recipe.denoiser.init_from)

    @cached_property
    def _encode_report(self) -> Any:
        text = self.text
        if text is None:
            return None
        return lru_cache(maxsize=None)(lambda report: encode_sentences(text, report))

    @cached_property
    def _preview_batch(self) -> dict[str, Any] | None:
        data = self.dataset("val") or self._train
        count = min(_PREVIEW_SERIES, len(data))
        return self.collate([data[i * len(data) // count] for i in range(count)]) if count else None


def visible(batch: dict[str, Any], shares: KnownVisits, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents [B,T,C,*S], times, present and known [B,T] of one example of each series: what is known of it, missing, repeated."""
    latents, times, present = batch["latents"], batch["times"], batch["present"]
    rows, frames = present.shape
    count = present.sum(1)
    draw = torch.rand(4, rows, generator=generator, device=latents.device)
    index = torch.arange(frames, device=latents.device)
    past = 1 + (draw[0] * (count - 1)).long().clamp(max=frames - 2)  # 1 to count - 1 visits are past
    known = index < past[:, None]
    lost = torch.rand(present.shape, generator=generator, device=latents.device)
    keeper = lost.masked_fill(~known, 2.0).argmin(1, keepdim=True)  # one past visit always stays
    kept = known & ((lost >= shares.missing) | (index == keeper))
    gone = known & ~kept
    last = kept.long().mul(index + 1).amax(1) - 1
    # the first visit after the past repeats the last known one
    repeat = draw[1] < shares.repeated
    target = past.clamp(max=frames - 1)
    here = (index == target[:, None]) & repeat[:, None]
    series = torch.arange(rows, device=latents.device)
    latents = torch.where(_over(here, latents), latents[series, last][:, None], latents)
    times = torch.where(here, times[series, last][:, None], times)
    present = present & ~gone
    between = (draw[2] < shares.between) & (count > past + 1) & ~repeat
    kept = (kept | ((index == (count - 1)[:, None]) & between[:, None])) & present
    return latents, times, present, kept


def conditions_of(batch: dict[str, Any], times: Tensor, known: Tensor) -> ProgressionConditions:
    """What a batch of `CachedVisits` items is conditioned on; only known visits have spoken."""
    names = ("event_kind", "event_times", "event_values", "events_known", "numbers", "words")
    given = {name: batch[name] for name in names}
    if "sentences" in batch:
        visit = batch["sentence_visit"].to(known.device)
        heard = (visit >= 0) & known.gather(1, visit.clamp(min=0))
        spoken_at = times.gather(1, visit.clamp(min=0))
        given |= {"sentences": batch["sentences"], "sentence_times": torch.where(heard, spoken_at, torch.nan)}
    return ProgressionConditions(times=times, known=known, **given)


def dropped(conditions: ProgressionConditions, share: ConditionDropout, generator: torch.Generator) -> ProgressionConditions:
    """The same series, some without some of their conditions."""
    rows, device = len(conditions.times), conditions.times.device
    draws = torch.rand(len(CONDITIONS) + 1, rows, generator=generator, device=device)
    nothing = draws[0] < share.everything
    return conditions.drop({name: (d < getattr(share, name)) | nothing for name, d in zip(CONDITIONS, draws[1:])})


def _pictures(pipeline: ProgressionPipeline, latents: Tensor, present: Tensor) -> Tensor:
    """[N,1,H,W] in [-1,1]: a row of `_PREVIEW_VISITS` for each series, grey where there is no visit; of volumes the middle slice."""
    images = pipeline._images(latents[:, :_PREVIEW_VISITS])
    images = as_pictures(images.flatten(0, 1)[:, None])[:, 0].unflatten(0, images.shape[:2])
    images = torch.where(_over(present[:, :_PREVIEW_VISITS], images), images, torch.full_like(images, 0.5))
    if missing := _PREVIEW_VISITS - images.shape[1]:
        images = torch.cat([images, torch.full_like(images[:, :1], 0.5).expand(-1, missing, -1, -1)], 1)
    return 2 * images.flatten(0, 1)[:, None].cpu() - 1


def _over(per_frame: Tensor, latents: Tensor) -> Tensor:
    """[B,T] (or [B,1]) shaped to broadcast over [B,T,...]."""
    return per_frame.reshape(per_frame.shape + (1,) * (latents.ndim - 2))
