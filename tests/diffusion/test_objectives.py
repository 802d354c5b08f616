"""Objectives against their closed forms and against diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.objectives import Objective, ObjectiveConfig, denoising_loss

KINDS = ("flow", "epsilon", "v")


def objective(kind: str = "flow", **options: object) -> Objective:
    return Objective(ObjectiveConfig.model_validate({"kind": kind, **options}))


def draws(batch: int = 4, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, frames, 2, 4, 4, generator=g), torch.randn(batch, frames, 2, 4, 4, generator=g)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_has_no_loss(kind: str) -> None:
    x0, noise = draws()
    o = objective(kind, **({} if kind == "flow" else {"min_snr_gamma": 5.0}))
    known = torch.zeros(4, 3, dtype=torch.bool)
    levels = o.sample_levels(4, 3, known, torch.Generator().manual_seed(1))
    target = o.target(x0, noise, levels)
    assert o.loss(target, x0, noise, levels, known, ~known) == 0
    assert o.loss(target + 0.1, x0, noise, levels, known, ~known) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_known_frames_are_given_clean_and_not_learned(kind: str) -> None:
    x0, noise = draws()
    o = objective(kind)
    known = torch.tensor([[True, False, False]] * 4)
    present = torch.tensor([[True, True, False]] * 4)
    levels = o.sample_levels(4, 3, known, torch.Generator().manual_seed(1))
    assert (levels[:, 0] == 0).all() and (levels[:, 1:] > 0).all()
    assert torch.equal(o.add_noise(x0, noise, levels)[:, 0], x0[:, 0])
    wrong = o.target(x0, noise, levels).clone()
    wrong[:, 0] += 100  # known
    wrong[:, 2] += 100  # absent
    assert o.loss(wrong, x0, noise, levels, known, present) == 0
    assert o.loss(wrong, x0, noise, levels, torch.ones_like(known), present) == 0  # nothing to learn: 0, not NaN


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_noising_and_velocity_are_those_of_diffusers(kind: str) -> None:
    x0, noise = (x[:, 0] for x in draws())
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    steps = torch.tensor([1, 250, 700, 999])
    levels = (steps / 1000)[:, None]
    o = objective(kind)
    torch.testing.assert_close(o.add_noise(x0[:, None], noise[:, None], levels)[:, 0], theirs.add_noise(x0, noise, steps))
    expected = noise if kind == "epsilon" else theirs.get_velocity(x0, noise, steps)
    torch.testing.assert_close(o.target(x0[:, None], noise[:, None], levels)[:, 0], expected)


def test_flow_is_a_straight_line_with_the_sign_of_diffusers() -> None:
    x0, noise = draws()
    o, levels = objective("flow"), torch.full((4, 3), 0.3)
    x = o.add_noise(x0, noise, levels)
    torch.testing.assert_close(x - 0.3 * o.target(x0, noise, levels), x0)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_min_snr_weights(kind: str) -> None:
    """Hang 2023: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v."""
    x0, noise = draws(3, 1)
    o = objective(kind, min_snr_gamma=5.0)
    steps = torch.tensor([5, 400, 990])
    levels = (steps / 1000)[:, None]
    known = torch.zeros(3, 1, dtype=torch.bool)
    snr = compute_snr(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), steps)
    weights = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    loss = o.loss(o.target(x0, noise, levels) + 1, x0, noise, levels, known, ~known)  # error 1 everywhere
    torch.testing.assert_close(loss, weights.mean(), rtol=1e-4, atol=0)


def test_min_snr_stays_finite_where_nothing_is_left_of_the_signal() -> None:
    x0, noise = draws(1, 1)
    o = objective("v", min_snr_gamma=5.0, zero_terminal_snr=True)
    known = torch.zeros(1, 1, dtype=torch.bool)
    assert o.loss(x0 * 0, x0, noise, torch.tensor([[0.999]]), known, ~known).isfinite()


def test_logit_normal_levels_and_their_shift() -> None:
    known = torch.zeros(4000, 1, dtype=torch.bool)
    plain = objective("flow").sample_levels(4000, 1, known, torch.Generator().manual_seed(0))
    shifted = objective("flow", shift=3.0).sample_levels(4000, 1, known, torch.Generator().manual_seed(0))
    assert abs(plain.median() - 0.5) < 0.02
    assert abs(plain.logit().std() - 1) < 0.05
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


def test_a_sequence_has_one_level_and_its_generator_decides_it() -> None:
    known = torch.zeros(4, 3, dtype=torch.bool)
    first, second = (objective().sample_levels(4, 3, known, torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(first, second) and (first == first[:, :1]).all() and len(first[:, 0].unique()) == 4


@pytest.mark.parametrize(("kind", "options"), [("flow", {"min_snr_gamma": 5.0}), ("epsilon", {"zero_terminal_snr": True})])
def test_combinations_that_cannot_be(kind: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="objective"):
        objective(kind, **options)


def test_the_training_step_passes_the_frames_on() -> None:
    seen = {}

    class Spy(torch.nn.Module):
        def forward(self, latents: torch.Tensor, levels: torch.Tensor, times: torch.Tensor, **rest: object) -> torch.Tensor:
            seen.update(rest, levels=levels)
            return torch.zeros_like(latents)

    x0, _ = draws(2, 3)
    known = torch.tensor([[True, False, False], [False, False, True]])
    frames = FrameBatch(x0, torch.zeros(2, 3), known, torch.ones_like(known), context=torch.randn(2, 4, 5))
    assert denoising_loss(Spy(), objective(), frames, torch.Generator().manual_seed(9)) > 0
    assert torch.equal(seen["levels"] == 0, known)
    assert seen["context"] is frames.context


def test_a_frame_batch_says_which_part_does_not_fit() -> None:
    x0, _ = draws(2, 3)
    flags = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="times has shape"):
        FrameBatch(x0, torch.zeros(2, 2), flags, flags)
    with pytest.raises(ValueError, match="context_mask has shape"):
        FrameBatch(x0, torch.zeros(2, 3), flags, flags, torch.zeros(2, 4, 5), None, torch.ones(2, 3))
