"""The KL autoencoder: diffusers' AutoencoderKL, built from a small configuration, with normalised latents per channel.

Images are [B,1,H,W] in [-1,1]; latents are [B,C,H/f,W/f] with zero mean and unit variance over the training data.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from pydantic import Field
from torch import Tensor

from medgen.config import Config, ConfigError
from medgen.models.folders import component


class AutoencoderConfig(Config):
    """The shape of an autoencoder; the downsampling factor is `patch_size * 2 ** (len(block_out_channels) - 1)`."""

    init_from: str | None = Field(None, description="folder or hub id of a trained AutoencoderKL; the shape is then its own")
    patch_size: int = Field(1, ge=1, description="pixels folded into channels first: convolutions then run at H / patch_size")
    block_out_channels: tuple[int, ...] = (64, 128, 128, 256)
    layers_per_block: int = Field(1, ge=1)
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    mid_block_attention: bool = True
    sample_size: int = Field(128, ge=8)


# A saved pipeline finds out how to load a component by the base classes that its module names: `ModelMixin` must stay importable here.
class PatchAutoencoderKL(AutoencoderKL):
    """AutoencoderKL on folded pixels: the same network, with pixel-unshuffle before it and pixel-shuffle after it.

    Full-resolution convolutions on few channels are most of the time of a small autoencoder and almost none of its quality.
    With `patch_size=1` this is AutoencoderKL, weights included. `forward` is what training needs (and works under DDP).
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 128,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        patch_size: int = 1,
    ) -> None:
        area = patch_size**2
        super().__init__(
            in_channels=in_channels * area,
            out_channels=out_channels * area,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        # The parent's decorated constructor has just recorded the folded channel counts; the configuration keeps the image's own.
        self.register_to_config(in_channels=in_channels, out_channels=out_channels)

    def _encode(self, x: Tensor) -> Tensor:
        return super()._encode(F.pixel_unshuffle(x, self.config.patch_size))

    def _decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        image = F.pixel_shuffle(super()._decode(z, return_dict=False)[0], self.config.patch_size)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self, images: Tensor, generator: torch.Generator | None = None, sample: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction [B,C,H,W] of `images` and the posterior it was decoded from (its mode unless `sample`)."""
        posterior = self.encode(images).latent_dist
        latents = posterior.sample(generator) if sample else posterior.mode()
        return self.decode(latents).sample, posterior


def build_autoencoder(config: AutoencoderConfig) -> PatchAutoencoderKL:
    """A new autoencoder, or the trained one at `config.init_from` (any AutoencoderKL folder or hub id)."""
    if config.init_from is not None:
        model = PatchAutoencoderKL.from_pretrained(component(config.init_from, "vae"), dtype=torch.float32, use_safetensors=True)
        return model.to(memory_format=torch.channels_last)
    stages = len(config.block_out_channels)
    if wrong := [width for width in config.block_out_channels if width % config.norm_num_groups]:
        raise ConfigError(
            f"autoencoder.block_out_channels: {wrong} are not multiples of norm_num_groups={config.norm_num_groups}"
        )
    model = PatchAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=config.sample_size,
        mid_block_add_attention=config.mid_block_attention,
        patch_size=config.patch_size,
    )
    return model.to(memory_format=torch.channels_last)


def load_autoencoder(path: str | Path) -> PatchAutoencoderKL:
    """The trained autoencoder at `path` (folder or hub id; safetensors only), frozen, in evaluation mode and float32."""
    model = PatchAutoencoderKL.from_pretrained(component(path, "vae"), dtype=torch.float32, use_safetensors=True)
    return model.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def downsampling(vae: ModelMixin) -> int:
    """Pixels per latent position along one side."""
    if "block_out_channels" in vae.config:
        return int(vae.config.get("patch_size", 1)) * 2 ** (len(vae.config.block_out_channels) - 1)
    return int(vae.spatial_compression_ratio)  # AutoencoderDC (Sana)


def encode_moments(vae: ModelMixin, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation [B,C,H/f,W/f] of the normalised latents of `images` [B,1,H,W] in [-1,1].

    A model of three channels (the Stable Diffusion family) sees the grey image three times; one without a posterior has std 0.
    """
    side = downsampling(vae)
    if images.shape[-1] % side or images.shape[-2] % side:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels: both sides must be multiples of {side}")
    channels = vae.config.in_channels
    encoded = vae.encode(images.expand(-1, channels, -1, -1) if channels != images.shape[1] else images)
    if hasattr(encoded, "latent"):  # deterministic: AutoencoderDC
        mean, std = encoded.latent, torch.zeros_like(encoded.latent)
    else:
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    shift, scale = _statistics(vae, mean)
    return (mean - shift) / scale, std / scale


def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Images [B,1,H,W] in [-1,1] of normalised latents [B,C,H/f,W/f]."""
    shift, scale = _statistics(vae, latents)
    images = vae.decode(latents * scale + shift).sample
    return images.mean(1, keepdim=True).clamp(-1, 1)


def set_latent_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Write per-channel statistics of raw latents ([C] each) into the configuration (buffers would be lost to the EMA)."""
    vae.register_to_config(latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))


def _statistics(vae: ModelMixin, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale that broadcast over `like`: per channel where known, diffusers' scalar factors otherwise."""
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        moments = like.new_tensor([config["latents_mean"], config["latents_std"]])
        return moments[0].view(1, -1, 1, 1), moments[1].view(1, -1, 1, 1)
    return like.new_tensor(config.get("shift_factor") or 0.0), like.new_tensor(1 / config["scaling_factor"])
