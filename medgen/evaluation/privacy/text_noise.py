"""How hard a caption pulls: ‖ε(x_t, t, c) − ε(x_t, t, ∅)‖, which is large for captions whose film was memorised (Wen et al. 2024).

Where the films were memorised without their captions too (few films, dropped captions), it is small instead: both conditions lead to
the film, while a caption that was never met disagrees with the empty one. Either way training captions stand out from held-out ones.

No film is needed: x_t is what the pipeline's own sampler passes through on its way from fixed noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen.diffusion.guidance import Guidance, guided
from medgen.diffusion.sampling import set_timesteps
from medgen.evaluation.alignment import auroc
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.privacy.predictor import NoisePredictor
from medgen.evaluation.privacy.subjects import FEWEST_PATIENTS, Step, Subjects
from medgen.evaluation.statistics import Estimate, Floats, group_bootstrap
from medgen.seeds import generator

LEVELS = (0.3, 0.5, 0.7, 0.9)  # where noised films are looked at
HIGH, SHOWN = 0.01, 8
Norms = NDArray[np.float32]


@dataclass(frozen=True)
class Caption:
    """One caption of the training set with its norm, in multiples of the held-out captions' median."""

    text: str
    record_id: str
    norm: float


@dataclass(frozen=True)
class TextNoise:
    """Norms of training captions against those of held-out captions of the same kind.

    auc: how often a training caption pulls harder than a held-out one. ratio: median of the former ÷ median of the latter. high: share
    of training captions that pull harder than 99 % of the held-out ones. shared: captions in both sets, left out. train, heldout: the
    norms, one a caption. strongest: the training captions that pull hardest.
    """

    auc: Estimate
    ratio: Estimate
    high: Estimate
    shared: int
    steps: int
    draws: int
    train: tuple[float, ...]
    heldout: tuple[float, ...]
    strongest: tuple[Caption, ...]


def text_noise(
    predictor: NoisePredictor,
    train: Subjects,
    heldout: Subjects,
    steps: int = 10,
    draws: int = 2,
    seed: int = 0,
    step: Step = lambda captions: None,
) -> TextNoise:
    """Norms along the sampler's path of every distinct caption of both sides; intervals by patient. `step` is told how many are done."""
    mine, theirs = train.by_caption(), heldout.by_caption()
    shared = mine.keys() & theirs.keys()
    sides = [{text: row for text, row in side.items() if text not in shared} for side in (mine, theirs)]
    if min(map(len, sides)) < FEWEST_PATIENTS:
        raise EvaluationError(
            f"{len(shared)} captions occur in both sets, which leaves {len(sides[0])} of training and {len(sides[1])} held-out ones to "
            f"compare; {FEWEST_PATIENTS} of each are needed: audit more patients, or take longer captions (sections: both)"
        )
    near, far = (norms_along_path(predictor, list(side), steps, draws, seed, step=step).mean(1) for side in sides)
    values, member = np.concatenate([near, far]), np.arange(len(near) + len(far)) < len(near)
    groups = [who.patients[row] for who, side in zip((train, heldout), sides, strict=True) for row in side.values()]

    def statistic(rows: NDArray[np.intp]) -> Floats:
        drawn, inside = values[rows], member[rows]
        if inside.all() or not inside.any():
            return np.full(3, np.nan)
        high = (drawn[inside] > np.quantile(drawn[~inside], 1 - HIGH)).mean()
        return np.array([auroc(drawn, inside), np.median(drawn[inside]) / np.median(drawn[~inside]), high])

    area, ratio, high = group_bootstrap(statistic, groups, seed)
    middle, texts = float(np.median(far)), list(sides[0])
    strongest = tuple(
        Caption(texts[i], train.records[sides[0][texts[i]]].record_id, float(near[i] / middle)) for i in np.argsort(-near)[:SHOWN]
    )
    return TextNoise(area, ratio, high, len(shared), steps, draws, tuple(map(float, near)), tuple(map(float, far)), strongest)


@torch.no_grad()
def norms_along_path(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    steps: int = 10,
    draws: int = 2,
    seed: int = 0,
    batch_size: int = 16,
    step: Step = lambda captions: None,
) -> Norms:
    """Root mean square over latent numbers of ε(x_t, c) − ε(x_t, ∅), [N,draws], averaged over the `steps` of the pipeline's sampler.

    Draw k starts every caption from the same noise, seeded by (`seed`, k): captions differ by their words alone. The guidance is
    the pipeline's own. Wen et al. take the plain norm; per number it does not depend on the size of the film.
    """
    found = np.zeros((len(prompts), draws), dtype=np.float32)
    for rows in _chunks(len(prompts), batch_size):
        texts = [prompts[row] for row in rows]
        spoken, empty = predictor.captions(texts), predictor.captions([""] * len(texts))
        for draw in range(draws):
            noise = _noise(predictor, seed, draw).expand(len(texts), -1, -1, -1)
            # samplers that add noise on their way add the same to every caption
            on_the_way = [generator("text noise on the way", seed, draw) for _ in texts]
            found[list(rows), draw] = _along_path(predictor, noise, spoken, empty, steps, on_the_way)
        step(len(rows))
    return found


@torch.no_grad()
def norms_at_films(
    predictor: NoisePredictor,
    prompts: Sequence[str],
    latents: Tensor,
    levels: Sequence[float] = LEVELS,
    draws: int = 2,
    seed: int = 0,
    batch_size: int = 16,
) -> Norms:
    """The same at x_t made of each caption's own film, `latents` [N,C,h,w], at fixed levels: [N,draws], averaged over `levels`.

    Two forward passes a level and draw: the cheap, smooth form for a search that holds the training films anyway.
    """
    found = np.zeros((len(prompts), draws), dtype=np.float32)
    for rows in _chunks(len(prompts), batch_size):
        texts, clean = [prompts[row] for row in rows], latents[list(rows)].to(predictor.device)
        spoken, empty = predictor.captions(texts), predictor.captions([""] * len(texts))
        for draw in range(draws):
            noise = _noise(predictor, seed, draw)
            for level in levels:
                noisy = predictor.noised(clean, noise, level)
                pull = predictor.predict(noisy, level, spoken) - predictor.predict(noisy, level, empty)
                found[list(rows), draw] += _rms(pull) * predictor.noise_per_output(level) / len(levels)
    return found


def _along_path(
    predictor: NoisePredictor,
    noise: Tensor,
    spoken: tuple[Tensor, Tensor],
    empty: tuple[Tensor, Tensor],
    steps: int,
    generators: list[torch.Generator],
) -> Norms:
    """One draw: [B]."""
    scheduler = predictor.pipeline.scheduler
    scale = predictor.pipeline.config.get("guidance_scale")
    guidance = Guidance(7.5 if scale is None else float(scale))  # diffusers' own where the pipeline names none
    timesteps = set_timesteps(scheduler, steps, noise.device)
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    found = np.zeros(len(noise), dtype=np.float32)
    for timestep, level in timesteps:
        inputs = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        conditional, without = (predictor.predict(inputs, level, words) for words in (spoken, empty))
        found += _rms(conditional - without) * predictor.noise_per_output(level) / steps
        latents = scheduler.step(guided(conditional, without, guidance), timestep, latents, **extra, return_dict=False)[0]
    return found


def _noise(predictor: NoisePredictor, seed: int, draw: int) -> Tensor:
    return torch.randn(predictor.latent_shape, generator=generator("text noise", seed, draw)).to(predictor.device)[None]


def _rms(values: Tensor) -> Norms:
    norms: Norms = values.flatten(1).square().mean(1).sqrt().cpu().numpy()
    return norms


def _chunks(count: int, size: int) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
