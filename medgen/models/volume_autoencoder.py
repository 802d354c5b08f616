"""The KL autoencoder of volumes: MONAI's AutoencoderKL in 3D on folded voxels, saved and loaded as any diffusers model.

Volumes are [B,1,D,H,W] in [-1,1]; latents are [B,C,D/f,H/f,W/f]. Everything that `medgen.models.autoencoder` offers takes it.
Importing this module imports MONAI's networks, which takes seconds: code for images never does.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from monai.networks.nets import AutoencoderKL
from monai.networks.utils import pixelshuffle, pixelunshuffle
from torch import Tensor, nn

_FIRST_LOG_VARIANCE = -5.0


class VolumeAutoencoderKL(ModelMixin, ConfigMixin):
    """Cubes of `patch_size` voxels become channels, then MONAI's 3D network halves the sides once per further stage.

    Full-resolution 3D convolutions are nearly all of the time and memory of a volume autoencoder: folded, 64³ voxels are a grid of
    16³ (patch 4) before the first convolution. With `patch_size=1` this is MONAI's network, weights included (below "network.").
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (64, 128),
        layers_per_block: int = 1,
        latent_channels: int = 8,
        norm_num_groups: int = 8,
        sample_size: int | tuple[int, int, int] = 64,
        mid_block_add_attention: bool = False,
        patch_size: int = 4,
        scaling_factor: float = 1.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.network = AutoencoderKL(
            spatial_dims=3,
            in_channels=in_channels * patch_size**3,
            out_channels=out_channels * patch_size**3,
            num_res_blocks=layers_per_block,
            channels=block_out_channels,
            attention_levels=(False,) * len(block_out_channels),
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            with_encoder_nonlocal_attn=mid_block_add_attention,
            with_decoder_nonlocal_attn=mid_block_add_attention,
        )
        # A new encoder would hide its first small means under noise of standard deviation 1: the decoder learns hundreds of steps later.
        log_variance = self.network.quant_conv_log_sigma.conv
        nn.init.zeros_(log_variance.weight)
        nn.init.constant_(log_variance.bias, _FIRST_LOG_VARIANCE)

    def encode(self, volumes: Tensor) -> AutoencoderKLOutput:
        """The posterior of the raw latents of `volumes` [B,1,D,H,W] (deterministic: nothing is drawn)."""
        net = self.network
        hidden = self._through(net.encoder, pixelunshuffle(volumes, 3, self.config.patch_size))
        # MONAI calls it log sigma, takes it for log sigma²; so do we
        moments = torch.cat([net.quant_conv_mu(hidden), net.quant_conv_log_sigma(hidden)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Volumes [B,1,D,H,W] of raw latents."""
        net = self.network
        folded = self._through(net.decoder, net.post_quant_conv(latents))
        return DecoderOutput(sample=pixelshuffle(folded, 3, self.config.patch_size))

    def forward(
        self, volumes: Tensor, generator: torch.Generator | None = None, sample: bool = True
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction [B,1,D,H,W] of `volumes` and the posterior it was decoded from (its mode unless `sample`)."""
        posterior = self.encode(volumes).latent_dist
        latents = posterior.sample(generator) if sample else posterior.mode()
        return self.decode(latents).sample, posterior

    def _through(self, part: nn.Module, x: Tensor) -> Tensor:
        """`part` block by block, each recomputed in the backward pass where gradients are checkpointed."""
        assert isinstance(part.blocks, nn.ModuleList)
        for block in part.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x)
            else:
                x = block(x)
        return x
