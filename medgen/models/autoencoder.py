"""The KL autoencoder: diffusers' AutoencoderKL, built from a small configuration, with normalised latents per channel.

Images are [B,1,H,W] in [-1,1]; latents are [B,C,H/f,W/f] with zero mean and unit variance over the training data. Volumes
[B,1,D,H,W] have MONAI's network (`medgen.models.volume_autoencoder`) behind the same functions: *S stands for the sides of either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError
from medgen.models.folders import component

if TYPE_CHECKING:
    from medgen.models.volume_autoencoder import VolumeAutoencoderKL

    KLAutoencoder: TypeAlias = "PatchAutoencoderKL | VolumeAutoencoderKL"

_VOLUMES = "VolumeAutoencoderKL"  # a class known by its name, so that images never import MONAI's networks


class AutoencoderConfig(Config):
    """The shape of an autoencoder; the downsampling factor is `patch_size * 2 ** (len(block_out_channels) - 1)`."""

    init_from: str | None = Field(None, description="folder or hub id of a trained AutoencoderKL; the shape is then its own")
    patch_size: int = Field(
        1, ge=1, description="pixels (of a side) folded into channels first: convolutions run at H / patch_size"
    )
    block_out_channels: tuple[int, ...] = (64, 128, 128, 256)
    layers_per_block: int = Field(1, ge=1)
    latent_channels: int = Field(4, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    mid_block_attention: bool = True
    sample_size: Annotated[int, Field(ge=8)] | tuple[int, int, int] = Field(
        128, description="side of images and cubes; of other volumes depth, height and width"
    )


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


def build_autoencoder(config: AutoencoderConfig, spatial_dims: Literal[2, 3] = 2) -> KLAutoencoder:
    """A new autoencoder, or the trained one at `config.init_from` (any AutoencoderKL folder or hub id)."""
    if config.init_from is not None:
        model = _load(config.init_from)
        if spatial_dims_of(model) != spatial_dims:
            raise ConfigError(
                f"autoencoder.init_from: {config.init_from} is of {spatial_dims_of(model)}D images, this recipe's are {spatial_dims}D"
            )
        return model
    if wrong := [width for width in config.block_out_channels if width % config.norm_num_groups]:
        raise ConfigError(
            f"autoencoder.block_out_channels: {wrong} are not multiples of norm_num_groups={config.norm_num_groups}"
        )
    shape = config.model_dump(exclude={"init_from", "mid_block_attention"})
    shape["mid_block_add_attention"] = config.mid_block_attention
    if spatial_dims == 3:
        from medgen.models.volume_autoencoder import VolumeAutoencoderKL

        return VolumeAutoencoderKL(**shape)
    if not isinstance(config.sample_size, int):
        raise ConfigError(f"autoencoder.sample_size: images are square, so it is one number, not {config.sample_size}")
    stages = len(config.block_out_channels)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages}
    return PatchAutoencoderKL(**blocks, **shape).to(memory_format=torch.channels_last)


def load_autoencoder(path: str | Path) -> KLAutoencoder:
    """The trained autoencoder at `path` (folder or hub id; safetensors only), frozen, in evaluation mode and float32."""
    return _load(path).requires_grad_(False).eval()


def _load(path: str | Path) -> KLAutoencoder:
    """The model of the class that the folder's configuration names; one of images where that is a class of diffusers' own."""
    folder = component(path, "vae")
    saved = Path(folder) / "config.json"
    if saved.is_file() and json.loads(saved.read_text()).get("_class_name") == _VOLUMES:
        from medgen.models.volume_autoencoder import VolumeAutoencoderKL

        return VolumeAutoencoderKL.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    model = PatchAutoencoderKL.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.to(memory_format=torch.channels_last)


def spatial_dims_of(vae: ModelMixin) -> Literal[2, 3]:
    """Whether `vae` is of images (2) or of volumes (3)."""
    return 3 if type(vae).__name__ == _VOLUMES else 2


def encoder_parts(vae: KLAutoencoder) -> tuple[nn.Module, ...]:
    """The modules between an image and its posterior: what stays as it is where only the decoder learns."""
    if isinstance(vae, PatchAutoencoderKL):
        return vae.encoder, vae.quant_conv
    return vae.network.encoder, vae.network.quant_conv_mu, vae.network.quant_conv_log_sigma


def downsampling(vae: ModelMixin) -> int:
    """Pixels per latent position along one side."""
    if "block_out_channels" in vae.config:
        return int(vae.config.get("patch_size", 1)) * 2 ** (len(vae.config.block_out_channels) - 1)
    return int(vae.spatial_compression_ratio)  # AutoencoderDC (Sana)


def encode_moments(vae: ModelMixin, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation [B,C,*S/f] of the normalised latents of `images` [B,1,*S] in [-1,1].

    A model of three channels (the Stable Diffusion family) sees the grey image three times; one without a posterior has std 0.
    """
    side = downsampling(vae)
    if any(size % side for size in images.shape[2:]):
        raise ValueError(f"images of {tuple(images.shape[2:])} pixels: all sides must be multiples of {side}")
    channels = vae.config.in_channels
    encoded = vae.encode(images.expand(-1, channels, -1, -1) if channels != images.shape[1] else images)
    if hasattr(encoded, "latent"):  # deterministic: AutoencoderDC
        mean, std = encoded.latent, torch.zeros_like(encoded.latent)
    else:
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    shift, scale = _statistics(vae, mean)
    return (mean - shift) / scale, std / scale


def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Images [B,1,*S] in [-1,1] of normalised latents [B,C,*S/f]."""
    shift, scale = _statistics(vae, latents)
    images = vae.decode(latents * scale + shift).sample
    return images.mean(1, keepdim=True).clamp(-1, 1)


def set_latent_statistics(vae: KLAutoencoder, mean: Tensor, std: Tensor) -> None:
    """Write per-channel statistics of raw latents ([C] each) into the configuration (buffers would be lost to the EMA)."""
    vae.register_to_config(latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))


def _statistics(vae: ModelMixin, like: Tensor) -> tuple[Tensor, Tensor]:
    """Shift and scale that broadcast over `like`: per channel where known, diffusers' scalar factors otherwise."""
    config = vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        moments = like.new_tensor([config["latents_mean"], config["latents_std"]])
        shift, scale = moments.view(2, 1, -1, *(1,) * (like.ndim - 2))
        return shift, scale
    return like.new_tensor(config.get("shift_factor") or 0.0), like.new_tensor(1 / config["scaling_factor"])
