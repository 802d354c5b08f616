"""From a report to a chest X-ray: the whole story of the first task in one file.

Latents (drawn from the cached posterior of a frozen autoencoder) and tokens of the report (cached, or from a text encoder that is
trained along) make sequences of one frame; the denoiser learns them; the export is a `TextToCXRPipeline`.
"""

from __future__ import annotations

import copy
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError
from medgen.data.dataset import CXRDataset
from medgen.data.latent_cache import LatentCache, TokenCache, cache_key, module_hash
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.objectives import Objective, ObjectiveConfig, denoising_loss
from medgen.models.adopted import DenoiserWithText
from medgen.models.autoencoder import downsampling, encode_moments, load_autoencoder
from medgen.models.conditioners import TextConditioner, TextEncoderConfig, embed_tokens
from medgen.models.denoiser import DenoiserConfig, SequenceTransformer, build_denoiser
from medgen.pipelines.card import write_model_card
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.seeds import generator as seeded
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CachedFilms, CXRData


class FrozenAutoencoder(Config):
    """The autoencoder whose latents are learned."""

    path: str = Field(..., description="folder or hub id of a trained autoencoder, or a pipeline folder that has one")


class SamplingDefaults(Config):
    """What the exported pipeline does when it is not told otherwise; previews too."""

    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float = Field(3.0, ge=0)


class TextToCXRRecipe(Config):
    """configs/text_to_cxr/*.yaml"""

    data: CXRData
    autoencoder: FrozenAutoencoder
    text_encoder: TextEncoderConfig
    denoiser: DenoiserConfig = DenoiserConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of examples without their report, for guidance")
    cache: Path | None = Field(None, description="folder of cached latents and tokens; without it every step encodes anew")
    sampling: SamplingDefaults = SamplingDefaults()
    preview_prompts: tuple[str, ...] = ("No acute cardiopulmonary abnormality.", "Large left pleural effusion.")
    export_dtype: Literal["float32", "float16"] = "float16"
    train: TrainConfig


class TextToCXR:
    """Reports and films in, a denoiser out. One module, "model"."""

    name = "text-to-cxr"

    def __init__(self, recipe: TextToCXRRecipe) -> None:
        self.recipe = recipe
        self.objective = Objective(recipe.objective)
        self.vae = load_autoencoder(recipe.autoencoder.path)
        self.conditioner = TextConditioner.from_config(recipe.text_encoder)
        self._tokens: TokenCache | None = None
        size = recipe.data.preprocessing.size
        side = downsampling(self.vae) * recipe.denoiser.patch_size
        if size % side:
            raise ConfigError(f"data.preprocessing.size: {size} is not a multiple of {side}, a token's side in pixels")
        if recipe.data.preprocessing.range != (-1.0, 1.0):
            raise ConfigError("data.preprocessing.range: an autoencoder reads images in [-1, 1]")

    def modules(self) -> dict[str, nn.Module]:
        """The denoiser; with the text encoder where that is trained."""
        denoiser = build_denoiser(self.recipe.denoiser, self.vae.config.latent_channels, self.conditioner.width)
        if not self.recipe.text_encoder.trained:
            return {"model": denoiser}
        return {"model": DenoiserWithText(denoiser, self.conditioner.encoder)}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """Latent moments and prompts from the cache, or images and prompts."""
        limit = self.recipe.text_encoder.max_tokens
        data = self.recipe.data.model_copy(update={"prompts": self.recipe.data.prompts.model_copy(update={"max_tokens": limit})})
        films = data.dataset(split, count_tokens=self.conditioner.count_tokens)
        if self.recipe.cache is None or isinstance(films, list):
            return films
        prompts = self._prompts(films, self.recipe.cache / "prompts")
        if not self.recipe.text_encoder.trained:
            key = cache_key("tokens", module_hash(self.conditioner.encoder), self._vocabulary)
            self._tokens = TokenCache.build(self.recipe.cache / "tokens", prompts, self.conditioner.encode, key)
        return CachedFilms(self._latents(films), prompts)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{"ids", "mean" and "std" [B,C,h,w] or "images" [B,1,H,W], "tokens" [B,N,D] or "token_ids" [B,N], "mask" [B,N]}"""
        prompts = [item["prompt"] for item in items]
        batch: dict[str, Any] = {"ids": [item["id"] for item in items]}
        if "mean" in items[0]:
            batch |= {name: torch.stack([item[name] for item in items]) for name in ("mean", "std")}
        else:
            batch["images"] = torch.stack([item["image"] for item in items])
        if self._tokens is not None:
            batch["tokens"], batch["mask"] = self._tokens.batch(prompts)
        else:
            batch["token_ids"], batch["mask"] = self.conditioner.tokenize(prompts)
        return batch

    def frames(self, modules: dict[str, nn.Module], batch: dict[str, Any], generator: torch.Generator) -> FrameBatch:
        """Sequences of one frame with their reports; some without, where the captions are dropped."""
        if "mean" in batch:
            mean, std = batch["mean"], batch["std"]
        else:
            with torch.no_grad():
                mean, std = (moment.float() for moment in encode_moments(self.vae, batch["images"]))
        latents = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        mask: Tensor = batch["mask"]
        kept = torch.rand(len(mask), generator=generator, device=mask.device) >= self.recipe.caption_dropout
        return FrameBatch.single(latents, self._context(modules["model"], batch), mask & kept[:, None])

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The objective's loss on this batch."""
        frames = self.frames(modules, batch, generator)
        return denoising_loss(_denoiser(modules[which]), self.objective, frames, generator), {}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """The preview prompts, all from the same noise."""
        pipeline = self.pipeline(modules)
        pipeline.set_progress_bar_config(disable=True)
        prompts = list(self.recipe.preview_prompts)
        generators = [seeded("preview", seed) for _ in prompts]
        images: Tensor = pipeline(prompts, generator=generators, output_type="pt", return_dict=False)[0]
        return {"samples": (2 * images - 1).cpu()}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The pipeline's folder, in half precision unless the recipe says otherwise, with a model card."""
        pipeline = self.pipeline(modules)
        if self.recipe.export_dtype == "float16":
            for name in ("vae", "denoiser", "text_encoder"):
                setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)).half())
        pipeline.vae.register_to_config(_name_or_path="")  # diffusers notes where it was loaded from: nobody else's business
        pipeline.save_pretrained(folder, safe_serialization=True)
        write_model_card(folder, self.recipe.train.out.name, pipeline, self.recipe)

    def pipeline(self, modules: dict[str, nn.Module]) -> TextToCXRPipeline:
        """These weights as a pipeline (shared, not copied)."""
        model = modules["model"]
        tokenizer = copy.deepcopy(self.conditioner.tokenizer)
        tokenizer.model_max_length = self.conditioner.max_tokens
        return TextToCXRPipeline(
            vae=self.vae,
            denoiser=_denoiser(model),
            text_encoder=model.text_encoder if isinstance(model, DenoiserWithText) else self.conditioner.encoder,
            tokenizer=tokenizer,
            scheduler=self.objective.scheduler(),
            preprocessing=self.recipe.data.preprocessing.model_dump(mode="json"),
            **self.recipe.sampling.model_dump(),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the frozen models; the autoencoder stays in float32 (half precision costs it grey values)."""
        self.vae.to(device)
        self.conditioner.encoder.to(device)

    def _context(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        if "tokens" in batch:
            tokens: Tensor = batch["tokens"]
            return tokens
        if isinstance(model, DenoiserWithText):
            return embed_tokens(model.text_encoder, batch["token_ids"], batch["mask"])
        with torch.no_grad():
            return self.conditioner.embed(batch["token_ids"], batch["mask"])

    def _latents(self, films: CXRDataset) -> LatentCache:
        assert self.recipe.cache is not None
        device = "cuda" if torch.cuda.is_available() and not self.recipe.train.cpu else "cpu"
        vae = self.vae.to(device)
        ids = [record.record_id for record in films.manifest.records]
        preprocessing = self.recipe.data.preprocessing.model_dump_json()
        key = cache_key("latents", module_hash(vae), preprocessing, films.manifest.sha256, *ids)
        root = self.recipe.cache / "latents"
        return LatentCache.build(root, films, lambda images: encode_moments(vae, images), key, ids=ids, device=device)

    @cached_property
    def _vocabulary(self) -> str:
        """What decides the tokens of a prompt besides the encoder."""
        return cache_key(sorted(self.conditioner.tokenizer.get_vocab().items()), self.conditioner.max_tokens)

    def _prompts(self, films: CXRDataset, folder: Path) -> list[str]:
        """The prompt of every record, composed and measured once (token counts of long reports take longer than a training step)."""
        settings = films.prompts.model_dump_json() if films.prompts is not None else ""
        ids = [record.record_id for record in films.manifest.records]
        path = folder / f"{cache_key('prompts', films.manifest.sha256, settings, self._vocabulary, *ids)}.json"
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps([films.prompt(index) for index in range(len(films))]))
            temporary.replace(path)
        prompts: list[str] = json.loads(path.read_text())
        return prompts


def _denoiser(model: nn.Module) -> SequenceTransformer:
    denoiser = model.denoiser if isinstance(model, DenoiserWithText) else model
    assert isinstance(denoiser, SequenceTransformer)
    return denoiser
