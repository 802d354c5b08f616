"""Sampling: any scheduler that fits recovers a distribution known in closed form; known frames stay; seeds belong to sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.guidance import Guidance, guided
from medgen.diffusion.objectives import Objective, ObjectiveConfig
from medgen.diffusion.sampling import sample_frames, set_timesteps

MEAN, STD = 0.7, 0.4


class GaussianDenoiser(nn.Module):
    """The exact denoiser of data ~ N(MEAN, STD²), for any objective."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective, self.weight = objective, nn.Parameter(torch.zeros(()))

    def forward(self, latents: Tensor, levels: Tensor, times: Tensor, context: Tensor | None = None, **rest: Any) -> Tensor:
        mean = MEAN if context is None else MEAN + context.mean((1, 2)).view(-1, 1, 1, 1, 1)
        signal, sigma = (c[..., None, None, None] for c in self.objective._coefficients(levels))
        variance = signal**2 * STD**2 + sigma**2
        noise = sigma * (latents - signal * mean) / variance
        x0 = mean + signal * STD**2 * (latents - signal * mean) / variance
        return self.objective.target(x0, noise, levels)


def objective(kind: str) -> Objective:
    return Objective(ObjectiveConfig.model_validate({"kind": kind}))


def blank(batch: int = 2, frames: int = 1, known: Tensor | None = None, context: Tensor | None = None) -> FrameBatch:
    flags = torch.zeros(batch, frames, dtype=torch.bool)
    latents = torch.zeros(batch, frames, 1, 32, 32)
    return FrameBatch(latents, torch.zeros(batch, frames), flags if known is None else known, ~flags, context)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("flow", None),
        ("flow", FlowMatchHeunDiscreteScheduler()),
        ("flow", DPMSolverMultistepScheduler(**FLOW)),
        ("flow", UniPCMultistepScheduler(**FLOW)),
        ("epsilon", None),
        ("v", None),
        ("v", DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                            prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=False)),
    ],
)  # fmt: skip
def test_a_gaussian_is_recovered(kind: str, scheduler: Any) -> None:
    o = objective(kind)
    frames = blank()
    x = sample_frames(GaussianDenoiser(o), scheduler or o.scheduler(), frames, 40, Guidance(), torch.Generator().manual_seed(0))
    assert abs(x.mean() - MEAN) < 0.03
    assert abs(x.std() - STD) < 0.04


def test_known_frames_come_back_as_they_were() -> None:
    o = objective("flow")
    known = torch.tensor([[True, False, True]] * 2)
    frames = blank(2, 3, known)
    frames.latents[:, 0], frames.latents[:, 2] = 5.0, -3.0
    levels_seen = []

    class Watching(GaussianDenoiser):
        def forward(self, latents: Tensor, levels: Tensor, *rest: Any, **named: Any) -> Tensor:
            levels_seen.append(levels)
            assert (latents[:, 0] == 5).all() and (latents[:, 2] == -3).all()
            return super().forward(latents, levels, *rest, **named)

    x = sample_frames(Watching(o), o.scheduler(), frames, 4, Guidance(), torch.Generator().manual_seed(0))
    assert torch.equal(x[:, 0], frames.latents[:, 0]) and torch.equal(x[:, 2], frames.latents[:, 2])
    assert all(torch.equal(levels == 0, known) for levels in levels_seen)
    assert abs(x[:, 1].mean() - MEAN) < 0.2


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    o = objective("flow")
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5)]
    together = sample_frames(GaussianDenoiser(o), o.scheduler(), blank(3), 4, Guidance(), seeds)
    alone = sample_frames(GaussianDenoiser(o), o.scheduler(), blank(1), 4, Guidance(), [torch.Generator().manual_seed(4)])
    assert torch.equal(together[1:2], alone)


def test_guidance_goes_beyond_the_condition_and_only_where_it_acts() -> None:
    o = objective("flow")
    calls = []

    class Counting(GaussianDenoiser):
        def forward(self, latents: Tensor, *rest: Any, **named: Any) -> Tensor:
            calls.append(len(latents))
            return super().forward(latents, *rest, **named)

    conditioned, without = blank(context=torch.full((2, 3, 1), 0.5)), blank(context=torch.zeros(2, 1, 1))

    def mean(guidance: Guidance) -> float:
        calls.clear()
        g = torch.Generator().manual_seed(0)
        return float(sample_frames(Counting(o), o.scheduler(), conditioned, 8, guidance, g, without).mean())

    plain = mean(Guidance(1.0))
    assert calls == [2] * 8
    assert mean(Guidance(3.0)) > plain + 0.3
    assert calls == [4] * 8
    assert plain < mean(Guidance(3.0, levels=(0.4, 0.8)))
    assert 0 < calls.count(4) < 8
    with pytest.raises(ValueError, match="unconditional"):
        sample_frames(GaussianDenoiser(o), o.scheduler(), conditioned, 2, Guidance(3.0))


def test_guidance_in_closed_form() -> None:
    conditional, unconditional = torch.randn(2, 2, 1, 1, 8, 8)
    torch.testing.assert_close(guided(conditional, unconditional, Guidance(1.0)), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, Guidance(0.0)), unconditional)
    tame = guided(conditional, unconditional, Guidance(7.0, rescale=1.0))
    torch.testing.assert_close(tame.flatten(1).std(1), conditional.flatten(1).std(1))


def test_conditions_are_guided_apart() -> None:
    full, one, other = torch.randn(3, 2, 1, 1, 8, 8)
    torch.testing.assert_close(guided(full, [one], Guidance((3.0,))), guided(full, one, Guidance(3.0)))
    torch.testing.assert_close(guided(full, [one, other], Guidance((1.0, 1.0))), full)
    both = guided(full, [one, other], Guidance((2.0, 4.0)))
    torch.testing.assert_close(both, full + (full - one) + 3 * (full - other))
    with pytest.raises(ValueError, match="1 predictions to be guided from, 2 scales"):
        guided(full, [one], Guidance((2.0, 2.0)))


def test_several_conditions_cost_an_evaluation_each_unless_their_scale_is_one() -> None:
    o = objective("flow")
    calls = []

    class Counting(GaussianDenoiser):
        def forward(self, latents: Tensor, *rest: Any, **named: Any) -> Tensor:
            calls.append(len(latents))
            return super().forward(latents, *rest, **named)

    full, first, second = (blank(context=torch.full((2, n, 1), value)) for n, value in ((3, 0.5), (2, 0.25), (1, 0.0)))

    def mean(*scales: float) -> float:
        calls.clear()
        g = torch.Generator().manual_seed(0)
        return float(sample_frames(Counting(o), o.scheduler(), full, 8, Guidance(scales), g, [first, second]).mean())

    plain = mean(1.0, 1.0)
    assert calls == [2] * 8
    assert mean(1.0, 3.0) > mean(3.0, 1.0) > plain + 0.1
    assert calls == [4] * 8
    assert mean(1.0, 3.0) < mean(3.0, 3.0)
    assert calls == [6] * 8
    with pytest.raises(ValueError, match="needs 3 unconditional batches, not 2"):
        mean(2.0, 2.0, 2.0)


def test_features_of_frames_reach_the_denoiser_and_are_absent_where_dropped() -> None:
    o = objective("flow")
    seen: list[tuple[Tensor, Tensor]] = []

    class Watching(GaussianDenoiser):
        def forward(self, latents: Tensor, *rest: Any, features: Tensor, feature_mask: Tensor, **named: Any) -> Tensor:
            seen.append((features, feature_mask))
            return super().forward(latents, *rest, **named)

    bare = blank(2, 3)
    given = replace(bare, features=torch.ones(2, 3, 4), feature_mask=torch.tensor([[True, True, False]] * 2))
    sample_frames(Watching(o), o.scheduler(), given, 2, Guidance(2.0), torch.Generator().manual_seed(0), bare)
    features, mask = seen[0]
    assert features.shape == (4, 3, 4) and mask.tolist() == [[True, True, False]] * 2 + [[False] * 3] * 2
    with pytest.raises(ValueError, match="features has shape"):
        replace(bare, features=torch.ones(2, 4, 4))


def test_a_shifted_flow_is_shifted_once() -> None:
    steps = set_timesteps(FlowMatchEulerDiscreteScheduler(shift=3.0), 4, torch.device("cpu"))
    expected = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25)]
    assert [level for _, level in steps] == pytest.approx(expected)
