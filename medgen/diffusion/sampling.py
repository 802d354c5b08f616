"""Sampling: from noise to latent frames, with any diffusers scheduler; known frames are never touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.guidance import Guidance, guided

Generators = torch.Generator | Sequence[torch.Generator] | None
AfterStep = Callable[[int, Any, Tensor], Tensor]


@torch.no_grad()
def sample_frames(
    denoiser: nn.Module,
    scheduler: Any,
    frames: FrameBatch,
    num_steps: int,
    guidance: Guidance,
    generator: Generators = None,
    unconditional: FrameBatch | None = None,
    noise: Tensor | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Latents [B,T,C,*S]: the unknown frames of `frames` generated, the known ones as they were.

    `frames.latents` matters only where `known` (and as shape). `unconditional` is the same batch with the conditions dropped; it is
    needed where `guidance.scale` is not 1. One generator per sequence makes each independent of its batch. `noise` [B,T,C,*S] replaces
    the drawn start. `after_step(index, timestep, latents)` may change the latents.
    """
    if guidance.scale != 1.0 and unconditional is None:
        raise ValueError(f"guidance scale {guidance.scale} needs the unconditional batch")
    timesteps = set_timesteps(scheduler, num_steps, frames.latents.device)
    if noise is None:
        noise = randn_tensor(
            frames.latents.shape, generator=_listed(generator), device=frames.latents.device, dtype=torch.float32
        )
    known = frames.known.reshape(frames.known.shape + (1,) * (frames.latents.ndim - 2))
    clean = frames.latents.float()
    latents = noise.float() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    extra = {"generator": _listed(generator)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    both = None if unconditional is None or guidance.scale == 1.0 else _joined(frames, unconditional)
    for index, (timestep, level) in enumerate(timesteps):
        inputs = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        inputs = torch.where(known, clean, inputs)
        if both is not None and guidance.acts_at(level):
            conditional, without = _predict(denoiser, both, torch.cat([inputs, inputs]), level).chunk(2)
            prediction = guided(conditional, without, guidance)
        else:
            prediction = _predict(denoiser, frames, inputs, level)
        latents = scheduler.step(prediction.float(), timestep, latents, **extra, return_dict=False)[0]
        if after_step is not None:
            latents = after_step(index, timestep, latents)
    return torch.where(known, clean, latents)


def set_timesteps(scheduler: Any, num_steps: int, device: torch.device) -> list[tuple[Tensor, float]]:
    """The scheduler's timesteps with their noise levels in (0, 1], both as this package's objectives define them."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # Its own spacing would apply `shift` twice; from explicit sigmas it is applied once.
        scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)
    count = scheduler.config.num_train_timesteps
    # Level 0 would say "known": the last timestep of some schedules is 0, and is trained as 1.
    return [(t, max(float(t), 1.0) / count) for t in scheduler.timesteps]


def _predict(denoiser: nn.Module, frames: FrameBatch, latents: Tensor, level: float) -> Tensor:
    levels = torch.full(frames.times.shape, level, device=latents.device).masked_fill(frames.known, 0.0)
    dtype = next(denoiser.parameters()).dtype
    prediction: Tensor = denoiser(
        latents.to(dtype),
        levels,
        frames.times,
        present=frames.present if frames.times.shape[1] > 1 else None,
        context=None if frames.context is None else frames.context.to(dtype),
        context_times=frames.context_times,
        context_mask=frames.context_mask,
    )
    return prediction


def _joined(first: FrameBatch, second: FrameBatch) -> FrameBatch:
    """Both batches as one, the shorter context padded."""
    names = ("latents", "times", "known", "present")
    values = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    parts = list(_contexts(first, second))
    context, times, mask = (None if parts[0][i] is None else torch.cat([part[i] for part in parts]) for i in range(3))
    return FrameBatch(**values, context=context, context_times=times, context_mask=mask)


def _contexts(first: FrameBatch, second: FrameBatch) -> Iterator[tuple[Any, Any, Any]]:
    """(context, times, mask) of both, of equal length; a batch without context gets tokens that its mask hides."""
    given = [frames for frames in (first, second) if frames.context is not None]
    if not given:
        yield from ((None, None, None), (None, None, None))
        return
    length = max(f.context.shape[1] for f in given if f.context is not None)
    timed = any(f.context_times is not None for f in given)
    for frames in (first, second):
        context = frames.context
        if context is None:
            context = given[0].context.new_zeros(len(frames.times), 0, given[0].context.shape[2])  # type: ignore[union-attr]
        mask, times = frames.context_mask, frames.context_times
        if mask is None:
            mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
        if timed and times is None:
            times = context.new_zeros(context.shape[:2])
        missing = length - context.shape[1]
        pad = nn.functional.pad
        yield pad(context, (0, 0, 0, missing)), None if times is None else pad(times, (0, missing)), pad(mask, (0, missing))


def _listed(generator: Generators) -> Any:
    return list(generator) if isinstance(generator, Sequence) else generator
