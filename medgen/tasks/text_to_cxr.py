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
from torch.utils.data import Dataset

from medgen.config import Config, ConfigError, load_config
from medgen.data.caption_noise import TOKENS_PER_WORD, NoisyCaptions, caption_variants
from medgen.data.dataset import CXRDataset
from medgen.data.latent_cache import LatentCache, TokenCache, cache_key, module_hash, pad_tokens
from medgen.data.shards import ShardDataset, write_shards
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

SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")


class FrozenAutoencoder(Config):
    """The autoencoder whose latents are learned."""

    path: str = Field(..., description="folder or hub id of a trained autoencoder, or a pipeline folder that has one")


class SamplingDefaults(Config):
    """What the exported pipeline does when it is not told otherwise; previews too."""

    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float = Field(3.0, ge=0)


class Shards(Config):
    """Latents, prompts and tokens that `medgen data shards` wrote, for sets larger than a disk."""

    path: str = Field(..., description="folder, or any fsspec address (s3://, gs://, https://): it holds train/ and val/")
    cache: Path | None = Field(None, description="local folder for shards of an address elsewhere")
    cache_gb: float = Field(100.0, gt=0, description="size of that folder; the least recently used shards go")
    mix: int = Field(4, ge=1, description="shards that are shuffled together")


class TextToCXRRecipe(Config):
    """configs/text_to_cxr/*.yaml"""

    data: CXRData
    autoencoder: FrozenAutoencoder
    text_encoder: TextEncoderConfig
    denoiser: DenoiserConfig = DenoiserConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of examples without their report, for guidance")
    cache: Path | None = Field(None, description="folder of cached latents and tokens; without it every step encodes anew")
    shards: Shards | None = Field(None, description="read from here instead of `cache`; data.manifest is then not opened")
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
        """Latent moments and prompts from shards or the cache, or images and prompts."""
        if self.recipe.shards is not None:
            if self.recipe.data.prompts.random_words:
                raise ConfigError("data.prompts.random_words: captions in shards are fixed; set it to 0, or read from `cache`")
            return self._shards(self.recipe.shards, split)
        words = self.recipe.data.prompts.random_words if split == "train" else 0
        limit = self.recipe.text_encoder.max_tokens - TOKENS_PER_WORD * words
        data = self.recipe.data.model_copy(update={"prompts": self.recipe.data.prompts.model_copy(update={"max_tokens": limit})})
        films = data.dataset(split, count_tokens=self.conditioner.count_tokens)
        if isinstance(films, list):
            return films
        if self.recipe.cache is None:
            return NoisyCaptions(films, words) if words else films
        prompts = self._prompts(films, self.recipe.cache / "prompts")
        spoken = caption_variants(prompts, [record.record_id for record in films.manifest.records], words) if words else prompts
        if not self.recipe.text_encoder.trained:
            key = cache_key("tokens", module_hash(self.conditioner.encoder), self._vocabulary)
            self._tokens = TokenCache.build(self.recipe.cache / "tokens", spoken, self.conditioner.encode, key)
        cached = CachedFilms(self._latents(films), prompts)
        return NoisyCaptions(cached, words) if words else cached

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{"ids", "mean" and "std" [B,C,h,w] or "images" [B,1,H,W], "tokens" [B,N,D] or "token_ids" [B,N], "mask" [B,N]}"""
        prompts = [item["prompt"] for item in items]
        batch: dict[str, Any] = {"ids": [item["id"] for item in items]}
        if "mean" in items[0]:
            batch |= {name: torch.stack([item[name] for item in items]) for name in ("mean", "std")}
        else:
            batch["images"] = torch.stack([item["image"] for item in items])
        if "tokens" in items[0]:
            batch["tokens"], batch["mask"] = pad_tokens([item["tokens"] for item in items])
        elif self._tokens is not None:
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
        for name in ("vae", "denoiser"):  # diffusers notes where each came from: nobody else's business
            getattr(pipeline, name).register_to_config(_name_or_path="")
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

    def write_shards(self, folder: Path, samples_per_shard: int = 1000) -> None:
        """Write what this recipe's `cache` holds as shards `folder`/train and `folder`/val; continues where it was stopped.

        Raises `ConfigError` if the recipe has no cache to write.
        """
        if self.recipe.cache is None:
            raise ConfigError("cache: shards hold cached latents and tokens, so name the folder to keep them in")
        for split in SPLITS:
            films = self.dataset(split)
            items = _WithTokens(films, self._tokens) if self._tokens is not None and len(films) else films
            write_shards(items, folder / split, samples_per_shard=samples_per_shard, made_with=self._made_with)

    def _shards(self, shards: Shards, split: Literal["train", "val"]) -> ShardDataset:
        data = ShardDataset(f"{shards.path.rstrip('/')}/{split}", shards.cache, shards.cache_gb, shards.mix)
        if wrong := [name for name, mark in self._made_with.items() if data.made_with.get(name) != mark]:
            raise ConfigError(
                f"shards.path: {shards.path} was written with another {' and another '.join(wrong)} than this recipe's: take those "
                "back, or write the shards again with `medgen data shards`"
            )
        return data

    @cached_property
    def _made_with(self) -> dict[str, str]:
        """What cached items depend on besides the records."""
        marks = {"autoencoder": module_hash(self.vae), "preprocessing": self.recipe.data.preprocessing.model_dump_json()}
        if self.recipe.text_encoder.trained:
            return marks
        return {**marks, "text encoder": cache_key(module_hash(self.conditioner.encoder), self._vocabulary)}

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


class _WithTokens(Dataset[dict[str, Any]]):
    """The items of `films` with the "tokens" [n,D] of their prompts."""

    def __init__(self, films: CachedFilms, tokens: TokenCache) -> None:
        self.films, self.tokens, self.fingerprint = films, tokens, films.fingerprint

    def __len__(self) -> int:
        return len(self.films)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.films[index]
        return {**item, "tokens": self.tokens[item["prompt"]]}


def write_training_shards(config: Path, out: Path, samples_per_shard: int = 1000) -> Path:
    """Encode what a text-to-CXR recipe trains on, and write it as WebDataset shards, for a bucket or a cluster's shared disk.

    Then set `shards.path` in the recipe to `out`, or to where it was copied. The same command again continues.

    Args:
        config: a text-to-CXR recipe that names a `cache`.
        out: folder to write train/ and val/ into.
        samples_per_shard: films per shard; every training process needs at least one shard.
    """
    recipe = load_config(TextToCXRRecipe, config).model_copy(update={"shards": None})
    TextToCXR(recipe).write_shards(out, samples_per_shard)
    return out


def _denoiser(model: nn.Module) -> SequenceTransformer:
    denoiser = model.denoiser if isinstance(model, DenoiserWithText) else model
    assert isinstance(denoiser, SequenceTransformer)
    return denoiser
