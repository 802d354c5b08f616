"""Training the KL autoencoder on films or frames of clips: L1 + L2 + KL, optionally perceptual and adversarial (from libraries).

After Rombach et al. 2022 (latent diffusion) and MONAI's chest X-ray recipe. The export is the autoencoder's folder, with the
per-channel statistics of its latents over the training data in its configuration.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from monai.losses import PatchAdversarialLoss, PerceptualLoss
from monai.networks.nets import PatchDiscriminator
from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from medgen.config import Config, ConfigError
from medgen.models.autoencoder import (
    AutoencoderConfig,
    PatchAutoencoderKL,
    build_autoencoder,
    downsampling,
    set_latent_statistics,
)
from medgen.seeds import generator
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CXRData
from medgen.tasks.echo_data import EchoFrames


class ReconstructionConfig(Config):
    """Weights of the autoencoder's losses; a weight of 0 leaves that loss out."""

    l1: float = Field(1.0, ge=0)
    l2: float = Field(0.0, ge=0)
    kl: float = Field(1e-4, ge=0, description="per latent element")
    perceptual: float = Field(0.0, ge=0)
    perceptual_weights: Path | None = Field(
        None, description="local state dict of a torchvision ResNet-50 (ImageNet or RadImageNet); needed where perceptual > 0"
    )
    adversarial: float = Field(0.0, ge=0, description="best in a second run that starts from a trained autoencoder (init_from)")
    discriminator_channels: int = Field(64, gt=0)


def _kind_of_data(data: Any) -> str:
    names = data if isinstance(data, dict) else type(data).model_fields
    return "<frames>" if "frames_per_clip" in names else "<films>"


# A section with `frames_per_clip` is of echo clips; told apart by that alone, so that an error speaks of one kind only.
ImageData = Annotated[Annotated[CXRData, Tag("<films>")] | Annotated[EchoFrames, Tag("<frames>")], Discriminator(_kind_of_data)]


class AutoencoderRecipe(Config):
    """configs/autoencoder/*.yaml"""

    data: ImageData
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    loss: ReconstructionConfig = ReconstructionConfig()
    decoder_only: bool = Field(
        False, description="leave the encoder of `autoencoder.init_from` as it is, so that models of its latents stay valid"
    )
    statistics_images: int = Field(4096, gt=0, description="training images over which latent statistics are taken")
    train: TrainConfig


class AutoencoderTask:
    """Images in, images out. Modules: "model" and, with an adversarial loss, "discriminator"."""

    name = "autoencoder"

    def __init__(self, recipe: AutoencoderRecipe) -> None:
        self.recipe = recipe
        self.adversarial = PatchAdversarialLoss(criterion="least_squares")
        self.perceptual: PerceptualLoss | None = None
        if recipe.loss.perceptual > 0:
            weights = recipe.loss.perceptual_weights
            if weights is None or not weights.is_file():
                raise ConfigError(
                    f"loss.perceptual_weights: no file at {weights}; a state dict of a torchvision ResNet-50 is needed where "
                    "loss.perceptual > 0"
                )
            self.perceptual = PerceptualLoss(2, "resnet50", pretrained_path=str(weights)).requires_grad_(False).eval()

    def modules(self) -> dict[str, nn.Module]:
        """The autoencoder, and the discriminator if its loss counts."""
        model = build_autoencoder(self.recipe.autoencoder)
        side, size = downsampling(model), self.recipe.data.preprocessing.size
        if size % side:
            raise ConfigError(f"data.preprocessing.size: {size} is not a multiple of the autoencoder's downsampling, {side}")
        if self.recipe.decoder_only:
            if self.recipe.autoencoder.init_from is None:
                raise ConfigError(
                    "decoder_only: a new encoder must be trained; give autoencoder.init_from, a trained autoencoder"
                )
            for part in (model.encoder, model.quant_conv):
                part.requires_grad_(False)
        modules: dict[str, nn.Module] = {"model": model}
        if self.recipe.loss.adversarial > 0:
            channels = self.recipe.loss.discriminator_channels
            modules["discriminator"] = PatchDiscriminator(2, channels, in_channels=1, norm="INSTANCE")
        return modules

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """Films of the manifest, or some frames of each clip."""
        data = self.recipe.data
        return data.dataset(split, with_prompts=False) if isinstance(data, CXRData) else data.dataset(split)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{"images" [B,1,H,W], "ids"}; clips of k frames make a batch k times as large as their number."""
        images = _images(items).contiguous(memory_format=torch.channels_last)
        return {"images": images, "ids": [item["id"] for item in items]}

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of "model" or of "discriminator"."""
        images: Tensor = batch["images"]
        model = modules["model"]
        inputs = _grey_to_channels(images, model)
        if which == "discriminator":
            with torch.no_grad():
                reconstruction = _grey(model(inputs, generator)[0])
            fake, real = (modules["discriminator"](x)[-1] for x in (reconstruction, images))
            loss = self.adversarial(fake, target_is_real=False, for_discriminator=True) + self.adversarial(
                real, target_is_real=True, for_discriminator=True
            )
            return 0.5 * loss, {}
        decoded, posterior = model(inputs, generator, sample=model.training)
        reconstruction = _grey(decoded)
        terms = self._terms(modules, images, reconstruction)
        weights = self.recipe.loss
        terms["kl"] = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        total = sum((getattr(weights, name) * value for name, value in terms.items()), images.new_zeros(()))
        logged: dict[str, float | Tensor] = {name: value.detach() for name, value in terms.items()}
        if not model.training:
            logged |= reconstruction_quality(reconstruction, images)
        return total, logged

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """Eight held-out films, their reconstructions and the difference, ten times enlarged."""
        images = self._preview_images.to(next(modules["model"].parameters()).device)
        if not len(images):
            return {}
        decoded, _ = modules["model"](_grey_to_channels(images, modules["model"]), sample=False)
        reconstruction = _grey(decoded).clamp(-1, 1)
        difference = (10 * (reconstruction - images)).clamp(-1, 1)
        return {"reconstruction": torch.cat([images, reconstruction, difference]).cpu()}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Measure the latents' statistics over training images and save the autoencoder's folder."""
        model = modules["model"]
        assert isinstance(model, PatchAutoencoderKL)
        if not self.recipe.decoder_only:
            set_latent_statistics(model, *self._latent_statistics(model))
        model.save_pretrained(folder, safe_serialization=True)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the perceptual network."""
        if self.perceptual is not None:
            self.perceptual.to(device)

    def _terms(self, modules: dict[str, nn.Module], images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        weights = self.recipe.loss
        terms = {"l1": functional.l1_loss(reconstruction, images)}
        if weights.l2 > 0:
            terms["l2"] = functional.mse_loss(reconstruction, images)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual((reconstruction + 1) / 2, (images + 1) / 2)
        if "discriminator" in modules and weights.adversarial > 0:
            fake = modules["discriminator"](reconstruction)[-1]
            terms["adversarial"] = self.adversarial(fake, target_is_real=True, for_discriminator=False)
        return terms

    @cached_property
    def _preview_images(self) -> Tensor:
        data = self.dataset("val")
        count = min(8, len(data))
        return _images([data[i * len(data) // count] for i in range(count)])[:8] if count else torch.empty(0)

    @torch.no_grad()
    def _latent_statistics(self, model: PatchAutoencoderKL) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel of the raw latents (posterior variance included) of evenly chosen images."""
        data, device = self.dataset("train"), next(model.parameters()).device
        count = min(self.recipe.statistics_images, len(data))
        chosen = torch.randperm(len(data), generator=generator("latent statistics", self.recipe.train.seed))[:count].tolist()
        size = self.recipe.train.batch_size
        first, second = [], []
        for start in range(0, count, size):
            images = _images([data[i] for i in chosen[start : start + size]]).to(device)
            posterior = model.encode(_grey_to_channels(images, model)).latent_dist
            first.append(posterior.mean.double().mean((2, 3)))
            second.append((posterior.mean.double() ** 2 + posterior.var.double()).mean((2, 3)))
        mean = torch.cat(first).mean(0)
        return mean, (torch.cat(second).mean(0) - mean**2).clamp(min=1e-12).sqrt()


def reconstruction_quality(reconstruction: Tensor, images: Tensor) -> dict[str, float | Tensor]:
    """Mean PSNR (dB) and SSIM over images [B,1,H,W] in [-1,1]."""
    reconstruction, images = reconstruction.float().clamp(-1, 1), images.float()
    return {
        "psnr": peak_signal_noise_ratio(reconstruction, images, data_range=2.0, dim=(1, 2, 3)),
        "ssim": _as_tensor(structural_similarity_index_measure(reconstruction, images, data_range=2.0)),
    }


def _images(items: list[dict[str, Any]]) -> Tensor:
    """[B,1,H,W] of items that hold one image [1,H,W] or several [K,1,H,W]."""
    return torch.cat([item["image"].reshape(-1, *item["image"].shape[-3:]) for item in items])


def _as_tensor(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _grey_to_channels(images: Tensor, model: nn.Module) -> Tensor:
    """The grey image as often as `model` has input channels (3 in the Stable Diffusion family)."""
    assert isinstance(model, PatchAutoencoderKL)
    return images.expand(-1, int(model.config.in_channels), -1, -1)


def _grey(images: Tensor) -> Tensor:
    return images.mean(1, keepdim=True).float()
