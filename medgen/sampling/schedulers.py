"""Short names for the samplers of diffusers, and which of them fit a pipeline: flow models and diffusion models do not mix."""

from __future__ import annotations

import difflib
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerMixin

# Name -> (class in diffusers, settings that differ from the pipeline's own scheduler).
_FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}
# Samples are latents, so nothing may be clipped to [-1, 1]; diffusers clips by default where a scheduler has the option.
_DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
}


def scheduler_names(scheduler: SchedulerMixin) -> list[str]:
    """The short names that fit a pipeline whose own scheduler is `scheduler`."""
    return sorted(_FLOW if _is_flow(scheduler) else _DIFFUSION)


def named_scheduler(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """A fresh scheduler by short name, with the noise schedule and prediction type of the pipeline's `current` one.

    Raises `ValueError`, listing the names that fit, for an unknown name or one made for the other kind of model.
    """
    table = _FLOW if _is_flow(current) else _DIFFUSION
    if name not in table:
        kind, other = ("flow", _DIFFUSION) if _is_flow(current) else ("diffusion", _FLOW)
        near = difflib.get_close_matches(name, table, 1)
        reason = "is for diffusion models" if other is _DIFFUSION else "is for flow models"
        problem = f"{reason}, this pipeline is a {kind} model" if name in other else "is unknown"
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"scheduler {name!r} {problem}{hint}; choose from: {', '.join(sorted(table))}")
    class_name, changes = table[name]
    settings = dict(current.config)
    if _is_flow(current):
        # The two families of flow samplers name the same time shift differently.
        shift = settings.get("shift", settings.get("flow_shift", 1.0))
        settings |= {"shift": shift, "flow_shift": shift}
    accepted = getattr(diffusers, class_name)
    return accepted.from_config({key: value for key, value in settings.items() if not key.startswith("_")}, **changes)


def _is_flow(scheduler: SchedulerMixin) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("prediction_type") == "flow_prediction"
