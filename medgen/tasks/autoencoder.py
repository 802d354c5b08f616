"""Training the KL autoencoder on films, frames of clips or visits' images, in 2D and 3D: L1 + L2 + KL, optionally perceptual and
adversarial (from libraries).

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
from medgen.data.visit_images import VisitPreprocessing
from medgen.data.volumes import middle_coronal
from medgen.models.autoencoder import (
    AutoencoderConfig,
    build_autoencoder,
    downsampling,
    encoder_parts,
    set_latent_statistics,
)
from medgen.seeds import generator
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CXRData
from medgen.tasks.echo_data import EchoFrames
from medgen.tasks.visit_data import VisitData

PREPROCESSING = "preprocessing.json"
"""In an exported folder: the `VisitPreprocessing` of the visits that the autoencoder learned from."""


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


def visit_preprocessing(autoencoder: str | Path) -> VisitPreprocessing | None:
    """How the visits were prepared that the autoencoder in this folder learned from; None where it learned from other images."""
    path = Path(autoencoder) / PREPROCESSING
    return VisitPreprocessing.model_validate_json(path.read_text()) if path.is_file() else None


def _kind_of_data(data: Any) -> str:
    if isinstance(data, VisitData):
        return "<visits>"
    names = data if isinstance(data, dict) else type(data).model_fields
    if isinstance(data, dict) and isinstance(data.get("preprocessing"), dict) and "dim" in data["preprocessing"]:
        return "<visits>"
    return "<frames>" if "frames_per_clip" in names else "<films>"


# A section with `frames_per_clip` is of echo clips, one with `preprocessing.dim` of visits; told apart by that alone, so that an
# error speaks of one kind only.
ImageData = Annotated[
    Annotated[CXRData, Tag("<films>")] | Annotated[EchoFrames, Tag("<frames>")] | Annotated[VisitData, Tag("<visits>")],
    Discriminator(_kind_of_data),
]


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
        self.dims = recipe.data.preprocessing.dim if isinstance(recipe.data, VisitData) else 2
        self.perceptual: PerceptualLoss | None = None
        if recipe.loss.perceptual > 0:
            weights = recipe.loss.perceptual_weights
            if weights is None or not weights.is_file():
                raise ConfigError(
                    f"loss.perceptual_weights: no file at {weights}; a state dict of a torchvision ResNet-50 is needed where "
                    "loss.perceptual > 0"
                )
            # of a volume, the slices along each axis (a fifth of them, drawn anew)
            perceptual = PerceptualLoss(self.dims, "resnet50", pretrained_path=str(weights), fake_3d_ratio=0.2)
            self.perceptual = perceptual.requires_grad_(False).eval()

    def modules(self) -> dict[str, nn.Module]:
        """The autoencoder, and the discriminator if its loss counts."""
        model = build_autoencoder(self.recipe.autoencoder, self.dims)
        side, size = downsampling(model), self.recipe.data.preprocessing.size
        if any(length % side for length in ((size,) if isinstance(size, int) else size)):
            raise ConfigError(f"data.preprocessing.size: {size} is not a multiple of the autoencoder's downsampling, {side}")
        if self.recipe.decoder_only:
            if self.recipe.autoencoder.init_from is None:
                raise ConfigError(
                    "decoder_only: a new encoder must be trained; give autoencoder.init_from, a trained autoencoder"
                )
            for part in encoder_parts(model):
                part.requires_grad_(False)
        modules: dict[str, nn.Module] = {"model": model}
        if self.recipe.loss.adversarial > 0:
            channels = self.recipe.loss.discriminator_channels
            modules["discriminator"] = PatchDiscriminator(self.dims, channels, in_channels=1, norm="INSTANCE")
        return modules

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """Films of the manifest, some frames of each clip, or the images of all visits."""
        data = self.recipe.data
        if isinstance(data, VisitData):
            return data.images(split, least=1) or []
        return data.dataset(split, with_prompts=False) if isinstance(data, CXRData) else data.dataset(split)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{"images" [B,1,*S], "ids"}; clips of k frames make a batch k times as large as their number."""
        images = self._images(items)
        if self.dims == 2:
            images = images.contiguous(memory_format=torch.channels_last)
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
        """Eight held-out films, their reconstructions and the difference, ten times enlarged; of volumes the middle coronal slice."""
        images = self._preview_images.to(next(modules["model"].parameters()).device)
        if not len(images):
            return {}
        decoded, _ = modules["model"](_grey_to_channels(images, modules["model"]), sample=False)
        reconstruction = _grey(decoded).clamp(-1, 1)
        difference = (10 * (reconstruction - images)).clamp(-1, 1)
        return {"reconstruction": as_pictures(torch.cat([images, reconstruction, difference])).cpu()}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Measure the latents' statistics over training images and save the autoencoder's folder."""
        model: Any = modules["model"]
        if not self.recipe.decoder_only:
            set_latent_statistics(model, *self._latent_statistics(model))
        model.save_pretrained(folder, safe_serialization=True)
        if isinstance(self.recipe.data, VisitData):
            (folder / PREPROCESSING).write_text(self.recipe.data.preprocessing.model_dump_json(indent=1))

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
        return self._images([data[i * len(data) // count] for i in range(count)])[:8] if count else torch.empty(0)

    def _images(self, items: list[dict[str, Any]]) -> Tensor:
        """[B,1,*S] of items that hold one image [1,*S] or several [K,1,*S]."""
        return torch.cat([item["image"].reshape(-1, *item["image"].shape[-1 - self.dims :]) for item in items])

    @torch.no_grad()
    def _latent_statistics(self, model: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel of the raw latents (posterior variance included) of evenly chosen images."""
        data, device = self.dataset("train"), next(model.parameters()).device
        count = min(self.recipe.statistics_images, len(data))
        chosen = torch.randperm(len(data), generator=generator("latent statistics", self.recipe.train.seed))[:count].tolist()
        size = self.recipe.train.batch_size
        first, second = [], []
        for start in range(0, count, size):
            images = self._images([data[i] for i in chosen[start : start + size]]).to(device)
            posterior = model.encode(_grey_to_channels(images, model)).latent_dist
            centre, spread = posterior.mean.double().flatten(2), posterior.var.double().flatten(2)
            first.append(centre.mean(2))
            second.append((centre**2 + spread).mean(2))
        mean = torch.cat(first).mean(0)
        return mean, (torch.cat(second).mean(0) - mean**2).clamp(min=1e-12).sqrt()


def reconstruction_quality(reconstruction: Tensor, images: Tensor) -> dict[str, float | Tensor]:
    """Mean PSNR (dB) and SSIM over images [B,1,*S] in [-1,1]."""
    reconstruction, images = reconstruction.float().clamp(-1, 1), images.float()
    return {
        "psnr": peak_signal_noise_ratio(reconstruction, images, data_range=2.0, dim=tuple(range(1, images.ndim))),
        "ssim": _as_tensor(structural_similarity_index_measure(reconstruction, images, data_range=2.0)),
    }


def as_pictures(images: Tensor) -> Tensor:
    """Pictures [B,1,H,W] as they are; of volumes [B,1,D,H,W] the middle coronal slice, of a stack of few slices the middle one."""
    if images.ndim == 4:
        return images
    depth, height = images.shape[2:4]
    return images[:, :, depth // 2] if 2 * depth <= height else middle_coronal(images)


def _as_tensor(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _grey_to_channels(images: Tensor, model: Any) -> Tensor:
    """The grey image as often as `model` has input channels (3 in the Stable Diffusion family)."""
    return images.expand(-1, int(model.config.in_channels), *(-1,) * (images.ndim - 2))


def _grey(images: Tensor) -> Tensor:
    return images.mean(1, keepdim=True).float()
