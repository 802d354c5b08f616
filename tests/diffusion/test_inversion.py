"""The path is diffusers' own, walked forwards; walked backwards it leads to where the same steps start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from medgen.diffusion.inversion import DeterministicPath, Predict, denoise, invert
from medgen.diffusion.objectives import Objective, ObjectiveConfig
from medgen.diffusion.sampling import set_timesteps
from medgen.models.denoiser import SequenceTransformer

STEPS = 8


@pytest.fixture(scope="module")
def predict() -> Predict:
    torch.manual_seed(0)
    denoiser = SequenceTransformer(context_dim=8, width=16, depth=1, heads=2).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.15)

    def one(latents: torch.Tensor, level: float) -> torch.Tensor:
        levels = torch.full((len(latents), 1), level)
        prediction: torch.Tensor = denoiser(latents[:, None], levels, torch.zeros_like(levels))
        return prediction[:, 0]

    return one


def schedulers() -> dict[str, Any]:
    return {
        "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "epsilon": DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=True),
        "v": DDIMScheduler(
            clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
        ),
    }


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_the_steps_are_those_of_diffusers(kind: str, predict: Predict) -> None:
    scheduler = schedulers()[kind]
    path = DeterministicPath.of(scheduler, STEPS)
    assert path.kind == kind and len(path.levels) == STEPS and path.coefficients[-1] == (1.0, 0.0)
    timesteps = set_timesteps(scheduler, STEPS, torch.device("cpu"))
    assert [level for _, level in timesteps] == pytest.approx(list(path.levels))
    state = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = theirs = state
    for index, (timestep, level) in enumerate(timesteps):
        ours = path.step(ours, predict(ours, level), index)
        theirs = scheduler.step(predict(theirs, level), timestep, theirs, return_dict=False)[0]
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(denoise(predict, path, state, 0), ours)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v"])
def test_inversion_leads_back_and_refining_matters(kind: str, predict: Predict) -> None:
    path = DeterministicPath.of(schedulers()[kind], STEPS)
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    start = path.start(0.6)
    errors = []
    for refinements in (1, 3, 12):
        states = invert(predict, path, clean, start, refinements)
        assert len(states) == STEPS + 1 - start and states[-1] is clean
        errors.append(float((denoise(predict, path, states[0], start) - clean).abs().max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_noise_is_added_as_the_objective_does() -> None:
    objective = Objective(ObjectiveConfig(kind="v"))
    path = DeterministicPath.of(objective.scheduler(), STEPS)
    clean, noise = torch.randn(2, 1, 4, 8, 8), torch.randn(2, 1, 4, 8, 8)
    expected = objective.add_noise(clean, noise, torch.full((2, 1), path.levels[3]))
    torch.testing.assert_close(path.add_noise(clean, noise, 3), expected)


def test_any_scheduler_of_the_kind_gives_the_path_and_is_left_as_it_was() -> None:
    config = dict(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1).config)
    ddim = DDIMScheduler.from_config(config)
    pndm = PNDMScheduler.from_config(config, skip_prk_steps=True)
    assert DeterministicPath.of(pndm, 10) == DeterministicPath.of(ddim, 10)  # its own timesteps hold one twice
    assert pndm.num_inference_steps is None
    flow = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    assert DeterministicPath.of(flow, 4) == DeterministicPath.of(FlowMatchEulerDiscreteScheduler(shift=3.0), 4)


def test_strength_counts_steps_and_what_has_no_path_is_refused() -> None:
    path = DeterministicPath.of(FlowMatchEulerDiscreteScheduler(), 10)
    assert [path.start(strength) for strength in (1.0, 0.5, 0.01)] == [0, 5, 9]
    with pytest.raises(ValueError, match="strength must lie"):
        path.start(0.0)
    with pytest.raises(ValueError, match="no fixed path"):
        DeterministicPath.of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 10)
    with pytest.raises(ValueError, match="'sample'"):
        DeterministicPath.of(DDIMScheduler(prediction_type="sample"), 10)
    with pytest.raises(ValueError, match="refinements"):
        invert(lambda latents, level: latents, path, torch.zeros(1, 4, 8, 8), 5, 0)
