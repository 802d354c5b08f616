"""Published networks behind the denoiser's own call: a Stable Diffusion U-Net, a PixArt or Sana transformer from diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

ADOPTED = (UNet2DConditionModel, PixArtTransformer2DModel, SanaTransformer2DModel)


class AdoptedDenoiser(nn.Module):
    """`network` with the signature of `SequenceTransformer`, for sequences of one frame.

    Levels become the network's own timesteps: whole ones for a diffusion model, any for a flow (`continuous`).
    """

    def __init__(self, network: nn.Module, num_train_timesteps: int, continuous: bool) -> None:
        super().__init__()
        if not isinstance(network, ADOPTED):
            names = ", ".join(kind.__name__ for kind in ADOPTED)
            raise ValueError(f"{type(network).__name__} cannot be adopted: medgen knows how to call {names}")
        self.network, self.num_train_timesteps, self.continuous = network, num_train_timesteps, continuous

    def enable_gradient_checkpointing(self) -> None:
        """As the network itself does it."""
        self.network.enable_gradient_checkpointing()

    def forward(
        self,
        latents: Tensor,
        levels: Tensor,
        times: Tensor,
        present: Tensor | None = None,
        context: Tensor | None = None,
        context_times: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """latents [B,1,C,h,w], levels [B,1], context [B,N,D], context_mask [B,N] → [B,1,C,h,w]. Times are not looked at."""
        if latents.shape[1] != 1:
            raise ValueError(f"{type(self.network).__name__} denoises single frames, not sequences of {latents.shape[1]}")
        frame, timesteps = latents[:, 0], levels[:, 0] * self.num_train_timesteps
        if not self.continuous:
            timesteps = timesteps.round().long().clamp(0, self.num_train_timesteps - 1)
        if isinstance(self.network, UNet2DConditionModel):  # its padding is part of the text, as CLIP was trained
            output = self.network(frame, timesteps, encoder_hidden_states=context).sample
        else:
            timesteps = timesteps * getattr(self.network.config, "timestep_scale", 1.0)
            mask = None if context_mask is None else context_mask.to(frame.dtype)
            extra = self._resolution(frame)
            output = self.network(
                frame, encoder_hidden_states=context, encoder_attention_mask=mask, timestep=timesteps, **extra
            ).sample
        return output[:, None, : latents.shape[2]]  # a learned variance, where there is one, is left alone

    def _resolution(self, frame: Tensor) -> dict[str, Any]:
        """PixArt's micro-conditions (Chen 2024): the image's size in pixels and its aspect ratio."""
        if not isinstance(self.network, PixArtTransformer2DModel):
            return {}
        if not self.network.config.use_additional_conditions:
            return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        height, width = (8 * side for side in frame.shape[-2:])
        size = torch.tensor([[float(height), float(width)]], device=frame.device, dtype=frame.dtype).repeat(len(frame), 1)
        return {"added_cond_kwargs": {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}}


class DenoiserWithText(nn.Module):
    """A denoiser and the text encoder that is trained along with it: one set of weights for optimiser and average."""

    def __init__(self, denoiser: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.denoiser, self.text_encoder = denoiser, text_encoder

    def enable_gradient_checkpointing(self) -> None:
        """For both."""
        self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        self.text_encoder.gradient_checkpointing_enable()  # type: ignore[operator]
