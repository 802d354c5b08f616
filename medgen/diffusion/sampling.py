"""Sampling: from noise to latent frames, with any diffusers scheduler; known frames are never touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
    unconditional: FrameBatch | Sequence[FrameBatch] | None = None,
    noise: Tensor | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Latents [B,T,C,*S]: the unknown frames of `frames` generated, the known ones as they were.

    `frames.latents` matters only where `known` (and as shape). `unconditional` is the same batch with the conditions dropped; it is
    needed where `guidance.scale` is not 1. With several scales: one such batch for each, without its condition; where the scale is
    1 it is not looked at. One generator per sequence makes each independent of its batch. `noise` [B,T,C,*S] replaces
    the drawn start. `after_step(index, timestep, latents)` may change the latents.
    """
    guidance, weaker = _needed(guidance, unconditional)
    timesteps = set_timesteps(scheduler, num_steps, frames.latents.device)
    if noise is None:
        noise = randn_tensor(
            frames.latents.shape, generator=_listed(generator), device=frames.latents.device, dtype=torch.float32
        )
    known = frames.known.reshape(frames.known.shape + (1,) * (frames.latents.ndim - 2))
    clean = frames.latents.float()
    latents = noise.float() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    extra = {"generator": _listed(generator)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    joined = _joined([frames, *weaker]) if weaker else None
    for index, (timestep, level) in enumerate(timesteps):
        inputs = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        inputs = torch.where(known, clean, inputs)
        if joined is not None and guidance.acts_at(level):
            count = 1 + len(weaker)
            conditional, *without = _predict(denoiser, joined, torch.cat([inputs] * count), level).chunk(count)
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


def _needed(guidance: Guidance, given: FrameBatch | Sequence[FrameBatch] | None) -> tuple[Guidance, list[FrameBatch]]:
    """The scales that are not 1, and the batches that belong to them."""
    wanted = [scale for scale in guidance.scales if scale != 1.0]
    if not wanted:
        return replace(guidance, scale=1.0), []
    batches = [] if given is None else [given] if isinstance(given, FrameBatch) else list(given)
    if len(batches) != len(guidance.scales):
        raise ValueError(
            f"guidance scale {guidance.scale} needs {len(guidance.scales)} unconditional batches, not {len(batches)}"
        )
    return replace(guidance, scale=tuple(wanted)), [b for b, scale in zip(batches, guidance.scales) if scale != 1.0]


def _predict(denoiser: nn.Module, frames: FrameBatch, latents: Tensor, level: float) -> Tensor:
    levels = torch.full(frames.times.shape, level, device=latents.device).masked_fill(frames.known, 0.0)
    dtype = next(denoiser.parameters()).dtype
    prediction: Tensor = denoiser(latents.to(dtype), levels, frames.times, **frames.conditions(dtype))
    return prediction


def _joined(batches: Sequence[FrameBatch]) -> FrameBatch:
    """Several batches as one, shorter contexts padded."""
    names = ("latents", "times", "known", "present")
    values: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
    for kind, parts in (
        (("context", "context_times", "context_mask"), list(_contexts(batches))),
        (("features", "feature_mask"), list(_features(batches))),
    ):
        for i, name in enumerate(kind):
            values[name] = None if parts[0][i] is None else torch.cat([part[i] for part in parts])
    return FrameBatch(**values)


def _contexts(batches: Sequence[FrameBatch]) -> Iterator[tuple[Any, Any, Any]]:
    """(context, times, mask) of each, of equal length; a batch without context gets tokens that its mask hides."""
    given = [frames for frames in batches if frames.context is not None]
    if not given:
        yield from [(None, None, None)] * len(batches)
        return
    length = max(f.context.shape[1] for f in given if f.context is not None)
    timed = any(f.context_times is not None for f in given)
    for frames in batches:
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


def _features(batches: Sequence[FrameBatch]) -> Iterator[tuple[Any, Any]]:
    """(features, mask) of each; a batch without features has them nowhere."""
    given = next((frames.features for frames in batches if frames.features is not None), None)
    for frames in batches:
        if given is None:
            yield None, None
        elif frames.features is None:
            yield torch.zeros_like(given), torch.zeros_like(frames.known)
        else:
            yield frames.features, torch.ones_like(frames.known) if frames.feature_mask is None else frames.feature_mask


def _listed(generator: Generators) -> Any:
    return list(generator) if isinstance(generator, Sequence) else generator
