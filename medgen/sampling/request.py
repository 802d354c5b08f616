"""What every sampling request has, whatever its task: the settings that decide its results, the device, and what came back."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch

from medgen import __version__
from medgen.sampling.output import REJECTED
from medgen.sampling.sampler import SamplingError
from medgen.sampling.source import PipelineSource

CONTACT_SHEET = "contact_sheet.png"
Dtype = Literal["float32", "bfloat16", "float16"]
_SETTINGS = ("model", "model_sha256", "num_inference_steps", "guidance_scale", "scheduler", "medgen", "diffusers", "torch")
# What only the sampler may say about a result: a case with such a field is refused.
RESERVED = frozenset(
    {
        *_SETTINGS,
        "file_name",
        "files",
        "sha256",
        "attempt",
        "gates",
        "trajectory",
        "noise_seed",
        "synthetic",
        "dtype",
        "device",
        "threads",
        "batch_size",
    }
)


@dataclass(frozen=True)
class Sampled:
    """What one call did: `new` of `total` `items`; `complete` when the folder holds all of them, from every shard.

    Of a gated run also its `gates` as outputs name them, how many attempts they `rejected` so far (from every shard), and the names of
    the trajectories that are `missing` because every attempt was; those count as done.
    """

    out: Path
    new: int
    total: int
    complete: bool
    items: str = "images"
    gates: tuple[str, ...] = ()
    rejected: int = 0
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        there = self.total - len(self.missing)
        if not self.complete:
            text = f"{self.out}: {self.new} new {self.items}; the rest of {self.total} is up to the other shards"
        elif not self.new:
            text = f"{self.out}: all {there} {self.items} were already there, nothing to do"
        else:
            text = f"{self.out}: {self.new} new {self.items}, all {there} there; see {self.out / CONTACT_SHEET}"
        return "\n".join([text, *self._gated()])

    def _gated(self) -> list[str]:
        if not self.gates:
            return []
        lines = [f"gates {', '.join(self.gates)}: {self.rejected} attempts rejected (see {self.out / REJECTED})"]
        if self.missing:
            named = ", ".join(self.missing[:10]) + (f" and {len(self.missing) - 10} more" if len(self.missing) > 10 else "")
            lines.append(f"MISSING {len(self.missing)} of {self.total} {self.items}, every attempt rejected: {named}")
        return lines


def resolve_settings(
    source: PipelineSource, pipeline: Any, steps: int | None, guidance: float | Mapping[str, float] | None
) -> dict[str, Any]:
    """What decides the results besides the cases, as the metadata say it; what is None is the pipeline's own choice.

    `guidance`: one scale, or one per condition where the pipeline composes them.
    """
    steps = _default(pipeline, "num_inference_steps") if steps is None else steps
    guidance = _default(pipeline, "guidance_scale") if guidance is None else guidance
    if steps < 1:
        raise SamplingError(f"steps must be at least 1, not {steps}")
    scales = guidance if isinstance(guidance, Mapping) else {"guidance": guidance}
    for name, scale in scales.items():
        if not 0 <= scale < 1000:
            raise SamplingError(f"{name} must be between 0 and 1000, not {scale}")
    kept = {name: float(scale) for name, scale in scales.items()} if isinstance(guidance, Mapping) else float(guidance)
    scheduler = getattr(pipeline, "scheduler", None)
    versions = (__version__, diffusers.__version__, torch.__version__)
    return dict(
        zip(
            _SETTINGS, (source.name, source.sha256, int(steps), kept, scheduler and type(scheduler).__name__, *map(str, versions))
        )
    )


def _default(pipeline: Any, name: str) -> Any:
    """What the pipeline itself would use: from its saved configuration, else from its signature."""
    value = pipeline.config.get(name)
    return inspect.signature(pipeline.__call__).parameters[name].default if value is None else value


def choose_device(name: str | None) -> torch.device:
    """The device by name, tried; None: this process's GPU if there is one, else the CPU."""
    if name is None:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SamplingError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
