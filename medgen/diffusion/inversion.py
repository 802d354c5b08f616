"""The deterministic path between a clean latent and its noise, walked both ways: Euler for a flow, DDIM for epsilon and v.

Inversion finds the noisy latent from which the same steps lead back to a given clean one. The usual approximation (the prediction
at the wrong end of each step: DDIM inversion, Dhariwal & Nichol 2021) drifts; here every step is solved for its true start by fixed
point (Pan et al. 2023, AIDI; Garibi et al. 2024, ReNoise).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from medgen.diffusion.sampling import set_timesteps

Kind = Literal["flow", "epsilon", "v"]
Predict = Callable[[Tensor, float], Tensor]
"""A denoiser with its conditions: latents [B,C,*S] at a noise level in (0, 1] → what its objective predicts, same shape."""
_KINDS: dict[str, Kind] = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class DeterministicPath:
    """`levels` [N] of noise as the denoiser is told them, falling; x_t = signal * x0 + noise * e with `coefficients` [N+1] (signal, noise).

    The last coefficients are (1, 0): the clean latent.
    """

    kind: Kind
    levels: tuple[float, ...]
    coefficients: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, scheduler: Any, num_steps: int) -> DeterministicPath:
        """The path of `num_steps` steps through the noise schedule of any diffusers scheduler, which is left as it is.

        Raises `ValueError` for one that is neither flow, epsilon nor v, or whose shift depends on the image.
        """
        config = scheduler.config
        flow = type(scheduler).__name__.startswith("FlowMatch")
        kind = "flow" if flow else _KINDS.get(config.get("prediction_type", "epsilon"))
        if kind is None:
            raise ValueError(
                f"a scheduler with prediction_type {config.prediction_type!r} has no path here: use flow, epsilon or v"
            )
        if config.get("use_dynamic_shifting"):
            raise ValueError("a flow whose shift depends on the image's size has no fixed path; set use_dynamic_shifting: false")
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, not {num_steps}")
        if kind == "flow":
            shift = config.get("shift") or config.get("flow_shift") or 1.0
            euler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.num_train_timesteps, shift=shift)
            levels = tuple(level for _, level in set_timesteps(euler, num_steps, torch.device("cpu")))
            pairs = [(1 - float(sigma), float(sigma)) for sigma in euler.sigmas]
            return cls(kind, levels, tuple(pairs))
        ddim = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
        steps = set_timesteps(ddim, num_steps, torch.device("cpu"))
        alphas = [float(ddim.alphas_cumprod[int(t)]) for t, _ in steps]
        return cls(kind, tuple(level for _, level in steps), (*((a**0.5, (1 - a) ** 0.5) for a in alphas), (1.0, 0.0)))

    def start(self, strength: float) -> int:
        """The step from which `strength` in (0, 1] of all steps are left (at least one)."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength must lie in (0, 1], not {strength}")
        count = len(self.levels)
        return count - max(1, round(strength * count))

    def add_noise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """The state before step `index` that `noise` makes of `clean`."""
        signal, sigma = self.coefficients[index]
        return signal * clean + sigma * noise

    def step(self, state: Tensor, prediction: Tensor, index: int) -> Tensor:
        """The state after step `index`; `prediction` is the denoiser's for the state before it."""
        keep, turn = self._linear(index)
        return keep * state + turn * prediction

    def undo(self, after: Tensor, prediction: Tensor, index: int) -> Tensor:
        """The state before step `index` if `prediction` is what the denoiser would have said of it."""
        keep, turn = self._linear(index)
        return (after - turn * prediction) / keep

    def _linear(self, index: int) -> tuple[float, float]:
        """Every deterministic step is keep * state + turn * prediction."""
        (signal, sigma), (next_signal, next_sigma) = self.coefficients[index], self.coefficients[index + 1]
        if self.kind == "flow":
            return 1.0, next_sigma - sigma
        if self.kind == "v":  # a rotation (Salimans & Ho 2022, appendix D)
            return signal * next_signal + sigma * next_sigma, next_sigma * signal - next_signal * sigma
        return next_signal / signal, next_sigma - next_signal * sigma / signal


@torch.no_grad()
def invert(predict: Predict, path: DeterministicPath, clean: Tensor, start: int, refinements: int = 3) -> list[Tensor]:
    """States [N+1-start] before steps `start`, `start`+1, ... and after the last (= `clean`): `denoise` from the first returns `clean`.

    `refinements`: fixed-point evaluations per step; 1 is the usual approximate inversion with the prediction at the step's own level.
    """
    if refinements < 1:
        raise ValueError(f"refinements must be at least 1, not {refinements}")
    states = [clean]
    for index in reversed(range(start, len(path.levels))):
        before = states[-1]
        for _ in range(refinements):
            before = path.undo(states[-1], predict(before, path.levels[index]), index)
        states.append(before)
    return states[::-1]


@torch.no_grad()
def denoise(
    predict: Predict,
    path: DeterministicPath,
    state: Tensor,
    start: int,
    before_step: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """The clean latent to which the steps from `start` on lead; `before_step(index, state)` may change a state first."""
    for index in range(start, len(path.levels)):
        if before_step is not None:
            state = before_step(index, state)
        state = path.step(state, predict(state, path.levels[index]), index)
    return state
