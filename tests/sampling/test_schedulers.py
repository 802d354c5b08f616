"""Short scheduler names fit the kind of model, keep its noise schedule, and never clip latents."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from medgen.sampling.schedulers import named_scheduler, scheduler_names

DIFFUSION = DDPMScheduler(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction", clip_sample=False
)
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize("name", scheduler_names(DIFFUSION))
def test_diffusion_schedulers_keep_the_noise_schedule(name: str) -> None:
    scheduler = named_scheduler(name, DIFFUSION)
    assert torch.equal(scheduler.betas, DIFFUSION.betas) and scheduler.config.prediction_type == "v_prediction"
    assert not scheduler.config.get("clip_sample", False)


@pytest.mark.parametrize("name", scheduler_names(FLOW))
def test_flow_schedulers_keep_the_time_shift_and_solve_the_flow(name: str) -> None:
    """From pure noise, with the true velocity of a flow to the point 2: every solver must arrive there."""
    scheduler = named_scheduler(name, FLOW)
    assert scheduler.config.get("shift", scheduler.config.get("flow_shift")) == 3.0
    scheduler.set_timesteps(20)
    target, x = torch.full((1, 1, 2, 2), 2.0), torch.tensor([[[[-1.0, 0.5], [0.1, 1.3]]]])
    noise = x.clone()
    for t in scheduler.timesteps:
        x = scheduler.step(noise - target, t, x).prev_sample
    assert torch.allclose(x, target, atol=2e-2)


def test_going_back_and_forth_between_flow_schedulers_loses_nothing() -> None:
    there = named_scheduler("dpm++", FLOW)
    assert scheduler_names(there) == scheduler_names(FLOW)
    assert named_scheduler("euler", there).config.shift == 3.0


@pytest.mark.parametrize(
    ("name", "own", "words"),
    [
        ("ddim", FLOW, "'ddim' is for diffusion models, this pipeline is a flow model; choose from: dpm.., euler, heun, unipc"),
        ("hein", FLOW, "did you mean 'heun'"),
        ("karras", DDIMScheduler(), "'karras' is unknown; choose from: ddim, ddpm"),
    ],
)
def test_a_scheduler_that_does_not_fit_names_those_that_do(name: str, own: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        named_scheduler(name, own)
