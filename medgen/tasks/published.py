"""Fine-tuning a published text-to-image checkpoint on films: Stable Diffusion and kin, PixArt, Sana; in full or by LoRA.

The RoentGen recipe (Chambon et al. 2022) is one configuration of it. Networks, text encoders and schedulers are diffusers' own, and so
is the export: a full fine-tune loads with the pipeline's own class, a LoRA with `load_lora_weights`.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError, save_config
from medgen.data.caption_noise import NoisyCaptions, caption_variants
from medgen.data.latent_cache import LatentCache, TokenCache, cache_key, module_hash
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.objectives import Objective, ObjectiveConfig, denoising_loss
from medgen.models.adopted import AdoptedDenoiser, DenoiserWithText
from medgen.models.autoencoder import downsampling, encode_moments
from medgen.seeds import generator as seeded
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CachedFilms, CXRData
from medgen.tasks.text_to_cxr import SamplingDefaults

_LORA_FILE = "pytorch_lora_weights.safetensors"


class PublishedConfig(Config):
    """Which checkpoint, and which of its weights are trained."""

    path: str = Field(..., description="folder or hub id of a Stable Diffusion, PixArt or Sana pipeline (safetensors)")
    method: Literal["full", "lora"] = "full"
    train_text_encoder: bool = Field(False, description="with `full`: the text encoder learns along (RoentGen's best variant)")
    lora_rank: int = Field(16, ge=1)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    merge: bool = Field(False, description="with `lora`: also export the whole pipeline with the LoRA merged in")


class PublishedRecipe(Config):
    """configs/text_to_cxr/roentgen_sd15.yaml, sana_lora.yaml"""

    data: CXRData
    published: PublishedConfig
    min_snr_gamma: float | None = Field(None, gt=0, description="for epsilon and v models; 5 is usual")
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    cache: Path | None = Field(None, description="folder of cached latents and, where the text encoder is frozen, tokens")
    sampling: SamplingDefaults = SamplingDefaults(num_inference_steps=50, guidance_scale=4.0)
    preview_prompts: tuple[str, ...] = ("No acute cardiopulmonary abnormality.", "Large left pleural effusion.")
    train: TrainConfig


class PublishedTextToCXR:
    """Reports and films in, a fine-tuned pipeline out. One module, "model"."""

    name = "text-to-cxr"

    def __init__(self, recipe: PublishedRecipe) -> None:
        self.recipe = recipe
        self.pipeline = _load(recipe.published.path)
        self.part = "unet" if hasattr(self.pipeline, "unet") else "transformer"
        self.objective = Objective(_objective_of(self.pipeline.scheduler, recipe.min_snr_gamma))
        self._tokens: TokenCache | None = None
        size, side = recipe.data.preprocessing.size, downsampling(self.pipeline.vae)
        if size % side:
            raise ConfigError(f"data.preprocessing.size: {size} is not a multiple of this checkpoint's downsampling, {side}")
        if recipe.published.train_text_encoder and recipe.published.method == "lora":
            raise ConfigError("published.train_text_encoder: a LoRA trains the denoiser only; use method: full")
        for module in (self.pipeline.vae, self.pipeline.text_encoder, self.network):
            module.requires_grad_(False).eval()

    @property
    def network(self) -> Any:
        """The U-Net or transformer."""
        return getattr(self.pipeline, self.part)

    def modules(self) -> dict[str, nn.Module]:
        """The denoiser: all of it, or its LoRA; with the text encoder where that is trained."""
        published, continuous = self.recipe.published, self.objective.config.kind == "flow"
        if published.method == "lora":
            if not hasattr(self.network, "add_adapter"):
                raise ConfigError(f"published.method: diffusers has no LoRA for {type(self.network).__name__}; use method: full")
            self.network.add_adapter(LoraConfig(r=published.lora_rank, lora_alpha=published.lora_rank, init_lora_weights="gaussian",
                                                target_modules=list(published.lora_targets)))  # fmt: skip
        else:
            self.network.requires_grad_(True)
        denoiser = AdoptedDenoiser(self.network, self.objective.config.num_train_timesteps, continuous)
        if not published.train_text_encoder:
            return {"model": denoiser}
        return {"model": DenoiserWithText(denoiser, self.pipeline.text_encoder.requires_grad_(True))}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """Latent moments and prompts from the cache, or images and prompts."""
        films = self.recipe.data.dataset(split)
        words = self.recipe.data.prompts.random_words if split == "train" else 0
        if isinstance(films, list):
            return films
        if self.recipe.cache is None:
            return NoisyCaptions(films, words) if words else films
        prompts = [films.prompt(index) for index in range(len(films))]
        spoken = caption_variants(prompts, [record.record_id for record in films.manifest.records], words) if words else prompts
        if not self.recipe.published.train_text_encoder:
            key = cache_key("published tokens", module_hash(self.pipeline.text_encoder), type(self.pipeline).__name__)
            self._tokens = TokenCache.build(self.recipe.cache / "tokens", [*spoken, ""], self._encode, key, batch_size=16)
        cached = CachedFilms(self._latents(films), prompts)
        return NoisyCaptions(cached, words) if words else cached

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{"ids", "prompts", "mean" and "std" [B,C,h,w] or "images" [B,1,H,W]}"""
        batch: dict[str, Any] = {key: [item[name] for item in items] for key, name in (("ids", "id"), ("prompts", "prompt"))}
        for source, name in (("mean", "mean"), ("std", "std"), ("image", "images")):
            if source in items[0]:
                batch[name] = torch.stack([item[source] for item in items])
        return batch

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The checkpoint's own objective on this batch; a dropped caption is the empty prompt, as these models were trained."""
        if "images" in batch:
            with torch.no_grad():
                mean, std = (moment.float() for moment in encode_moments(self.pipeline.vae, batch["images"]))
        else:
            mean, std = batch["mean"], batch["std"]
        latents = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
        dropped = torch.rand(len(mean), generator=generator, device=mean.device) < self.recipe.caption_dropout
        prompts = ["" if drop else prompt for drop, prompt in zip(dropped.tolist(), batch["prompts"])]
        model = modules[which]
        if self._tokens is not None:
            context, mask = (t.to(mean.device) for t in self._tokens.batch(prompts))
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and isinstance(model, DenoiserWithText)):
                context, mask = self._encode(prompts)
        denoiser = model.denoiser if isinstance(model, DenoiserWithText) else model
        frames = FrameBatch.single(latents, context, mask)
        return denoising_loss(denoiser, self.objective, frames, generator), {}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """The preview prompts, all from the same noise."""
        self.pipeline.set_progress_bar_config(disable=True)
        prompts, size = list(self.recipe.preview_prompts), self.recipe.data.preprocessing.size
        images: Tensor = self.pipeline(
            prompts, height=size, width=size, generator=[seeded("preview", seed) for _ in prompts], output_type="pt",
            **self.recipe.sampling.model_dump(),
        ).images  # fmt: skip
        return {"samples": (2 * images - 1).clamp(-1, 1).float().cpu()}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The pipeline's folder, or its LoRA file (and, if asked for, the merged pipeline below `merged/`)."""
        self.pipeline.vae.to(memory_format=torch.contiguous_format)
        if self.recipe.published.method == "full":
            self.pipeline.save_pretrained(folder, safe_serialization=True)
        else:
            layers = get_peft_model_state_dict(self.network)
            if self.part == "unet":
                layers = convert_state_dict_to_diffusers(layers)
            self.pipeline.save_lora_weights(folder, **{f"{self.part}_lora_layers": layers}, safe_serialization=True)
            if self.recipe.published.merge:
                self._save_merged(folder / "merged")
        save_config(self.recipe.data.preprocessing, folder / "preprocessing.yaml")

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the frozen parts; the autoencoder stays in float32, which it needs (its range does not fit half precision)."""
        self.pipeline.vae.to(device)
        self.pipeline.text_encoder.to(device, torch.float32 if self.recipe.published.train_text_encoder else dtype)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B,N,D] and mask [B,N], from the pipeline's own encoder with the settings that its own call uses."""
        encode = self.pipeline.encode_prompt
        called = inspect.signature(self.pipeline.__call__).parameters
        accepted = inspect.signature(encode).parameters
        shared = ("clean_caption", "complex_human_instruction", "max_sequence_length")
        settings = {name: called[name].default for name in shared if name in called and name in accepted}
        device = next(self.pipeline.text_encoder.parameters()).device
        result = encode(prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, **settings)
        tokens = result[0].float()
        mask = result[1].bool() if len(result) == 4 else torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens, mask

    def _latents(self, films: Any) -> LatentCache:
        assert self.recipe.cache is not None
        device = "cuda" if torch.cuda.is_available() and not self.recipe.train.cpu else "cpu"
        vae = self.pipeline.vae.to(device)
        ids = [record.record_id for record in films.manifest.records]
        key = cache_key(
            "latents", module_hash(vae), self.recipe.data.preprocessing.model_dump_json(), films.manifest.sha256, *ids
        )
        root = self.recipe.cache / "latents"
        return LatentCache.build(
            root, films, lambda images: encode_moments(vae, images), key, ids=ids, batch_size=8, device=device
        )

    def _save_merged(self, folder: Path) -> None:
        merged = copy.deepcopy(self.network)
        merged.fuse_lora()
        merged.unload_lora()
        own = self.network
        setattr(self.pipeline, self.part, merged)
        self.pipeline.save_pretrained(folder, safe_serialization=True)
        setattr(self.pipeline, self.part, own)


def _load(path: str) -> Any:
    """The pipeline, from safetensors only, without a safety checker (it takes films for nudity and blackens them)."""
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"published.path: cannot load a diffusers pipeline from {path!r}: {error}") from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.register_modules(safety_checker=None)
        pipeline.register_to_config(requires_safety_checker=False)
    if not hasattr(pipeline, "encode_prompt") or not (hasattr(pipeline, "unet") or hasattr(pipeline, "transformer")):
        raise ConfigError(f"published.path: {type(pipeline).__name__} is not a text-to-image pipeline that medgen can fine-tune")
    return pipeline


def _objective_of(scheduler: Any, min_snr_gamma: float | None) -> ObjectiveConfig:
    """What the checkpoint was trained for, read from its scheduler."""
    config = scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if type(scheduler).__name__.startswith("FlowMatch") or kind == "flow_prediction":
        if min_snr_gamma is not None:
            raise ConfigError("min_snr_gamma: this checkpoint is a flow, which is weighted by its levels; remove the key")
        shift = config.get("shift") or config.get("flow_shift") or 1.0
        return ObjectiveConfig(kind="flow", shift=shift, num_train_timesteps=config.num_train_timesteps)
    kinds: dict[str, Literal["epsilon", "v"]] = {"epsilon": "epsilon", "v_prediction": "v"}
    if kind not in kinds:
        raise ConfigError(f"published.path: a scheduler with prediction_type {kind!r} is neither epsilon, v nor a flow")
    return ObjectiveConfig(
        kind=kinds[kind],
        min_snr_gamma=min_snr_gamma,
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        zero_terminal_snr=bool(config.get("rescale_betas_zero_snr", False)),
    )
