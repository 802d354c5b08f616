"""What the denoiser learns: rectified flow, epsilon or v, with one noise level per frame.

Levels lie in [0, 1]: for a flow the level is sigma (x_t = (1 - sigma) x_0 + sigma noise, target noise - x_0: the sign of diffusers);
for epsilon and v it is timestep / num_train_timesteps of a diffusers noise schedule. Level 0 is a known frame: no noise.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config
from medgen.diffusion.frames import FrameBatch


class ObjectiveConfig(Config):
    """Flow matching (Lipman 2023, logit-normal times of Esser 2024), epsilon (Ho 2020) or v (Salimans & Ho 2022)."""

    kind: Literal["flow", "epsilon", "v"] = "flow"
    levels: Literal["logit_normal", "uniform"] = Field("logit_normal", description="density of noise levels (flow only)")
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0, description="flow: > 1 moves training and sampling to higher noise (larger latents)")
    min_snr_gamma: float | None = Field(None, gt=0, description="min-SNR weight (Hang 2023) for epsilon and v; 5 is usual")
    num_train_timesteps: int = Field(1000, gt=1)
    beta_start: float = Field(0.00085, gt=0)
    beta_end: float = Field(0.012, gt=0)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    zero_terminal_snr: bool = Field(False, description="the last timestep is pure noise (v only: epsilon is undefined there)")


class Objective:
    """Noising and loss for one `ObjectiveConfig`. Shapes: latents [B,T,C,*S]; levels, known, present [B,T]."""

    def __init__(self, config: ObjectiveConfig) -> None:
        if config.kind == "flow" and config.min_snr_gamma is not None:
            raise ValueError("objective.min_snr_gamma is for epsilon and v; a flow is weighted by its density of levels")
        if config.kind == "epsilon" and config.zero_terminal_snr:
            raise ValueError("objective.zero_terminal_snr with epsilon is undefined at the last timestep; use kind: v")
        self.config = config

    def sample_levels(self, batch: int, frames: int, known: Tensor, generator: torch.Generator) -> Tensor:
        """[B,T] levels, drawn once per sequence (its frames are generated together); known frames get 0."""
        config = self.config
        if config.kind == "flow":
            scheme = "logit_normal" if config.levels == "logit_normal" else "none"
            drawn = compute_density_for_timestep_sampling(
                scheme, batch, config.logit_mean, config.logit_std, device=generator.device, generator=generator
            )
            drawn = config.shift * drawn / (1 + (config.shift - 1) * drawn)
        else:
            # from 1: level 0 means a known frame
            steps = torch.randint(1, config.num_train_timesteps, (batch,), device=generator.device, generator=generator)
            drawn = steps / config.num_train_timesteps
        return drawn.float().to(known.device)[:, None].expand(batch, frames).masked_fill(known, 0.0)

    def add_noise(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """x_t at `levels`. At level 0 exactly `x0`, for every kind: a known frame is never touched."""
        signal, sigma = (_over(c, x0) for c in self._coefficients(levels))
        return torch.where(_over(levels, x0) > 0, signal * x0 + sigma * noise, x0)

    def target(self, x0: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What a perfect denoiser returns."""
        if self.config.kind == "flow":
            return noise - x0
        if self.config.kind == "epsilon":
            return noise
        signal, sigma = (_over(c, x0) for c in self._coefficients(levels))
        return signal * noise - sigma * x0

    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, levels: Tensor, known: Tensor, present: Tensor) -> Tensor:
        """Weighted mean squared error over the frames that are present and not known (0 where there is none)."""
        error = (prediction.float() - self.target(x0, noise, levels).float()) ** 2
        counted = (present & ~known).float()
        per_frame = error.flatten(2).mean(2) * self._weights(levels)
        return (per_frame * counted).sum() / counted.sum().clamp(min=1)

    def scheduler(self) -> SchedulerMixin:
        """The diffusers scheduler that samples what this objective trained."""
        config = self.config
        if config.kind == "flow":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=config.shift)
        return DPMSolverMultistepScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            prediction_type="epsilon" if config.kind == "epsilon" else "v_prediction",
            rescale_betas_zero_snr=config.zero_terminal_snr,
            timestep_spacing="trailing",
        )

    def _coefficients(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise coefficients [B,T] of x_t."""
        if self.config.kind == "flow":
            return 1 - levels, levels
        alpha_bar = self._alphas_cumprod.to(levels.device)[self._timesteps(levels)]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def _weights(self, levels: Tensor) -> Tensor:
        gamma = self.config.min_snr_gamma
        if gamma is None:
            return torch.ones_like(levels)
        signal, sigma = self._coefficients(levels)
        snr = (signal / sigma) ** 2
        # eq. 5 of Hang et al. 2023 and, for v, its SNR + 1: finite also where SNR is 0
        return snr.clamp(max=gamma) / (snr if self.config.kind == "epsilon" else snr + 1)

    def _timesteps(self, levels: Tensor) -> Tensor:
        return (levels * self.config.num_train_timesteps).round().long().clamp(0, self.config.num_train_timesteps - 1)

    @cached_property
    def _alphas_cumprod(self) -> Tensor:
        config = self.config
        return DDPMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule=config.beta_schedule,
            rescale_betas_zero_snr=config.zero_terminal_snr,
        ).alphas_cumprod


def _over(per_frame: Tensor, latents: Tensor) -> Tensor:
    """[B,T] shaped to broadcast over [B,T,C,*S]."""
    return per_frame.reshape(per_frame.shape + (1,) * (latents.ndim - 2))


def denoising_loss(denoiser: nn.Module, objective: Objective, frames: FrameBatch, generator: torch.Generator) -> Tensor:
    """One training example of every task: noise the unknown frames of `frames`, denoise them, compare. Scalar."""
    x0 = frames.latents.float()
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    batch, count = frames.times.shape
    levels = objective.sample_levels(batch, count, frames.known, generator)
    prediction = denoiser(objective.add_noise(x0, noise, levels), levels, frames.times, **frames.conditions())
    return objective.loss(prediction, x0, noise, levels, frames.known, frames.present)
