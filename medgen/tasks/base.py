"""What a task is (data → batch → loss → pipeline) and how any task is trained (`TrainConfig`).

A recipe composes both: `class MyRecipe(Config): data: ...; train: TrainConfig`. Tasks import nothing from `medgen.training`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config


@runtime_checkable
class Task(Protocol):
    """Everything in which one training differs from another; the loop in `medgen.training.loop` knows nothing else.

    All randomness of `loss` comes from its `generator` (dropout aside: the loop reseeds the global generator every micro step),
    and an item of `dataset` depends only on its index, or on (epoch, index) where the data set offers `set_epoch(epoch)`.
    """

    name: str

    def modules(self) -> dict[str, nn.Module]:
        """The trained modules by name, one optimiser each, stepped in this order. What is frozen stays inside the task.

        Called once per run, and again to gather sharded weights. Parameters with `requires_grad=False` (the base under LoRA) are
        neither trained nor averaged.
        """
        ...

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """A picklable map-style data set; its items are dicts with an "id". It may be empty for "val".

        An optional attribute `fingerprint: str` names its content: a run refuses to resume on other data.
        """
        ...

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch: tensors (or anything with `.to(device)`), plus "ids", a list of str as long as the batch."""
        ...

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The scalar loss of module `which` and further scalars to log. `generator` lives on the device of the batch.

        Only `modules[which]` is trainable during the call; the others have `requires_grad` off, gradients still flow through.
        """
        ...

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """Pictures to look at, by name: [N,1,H,W] or [N,3,H,W] in [-1,1]. EMA weights are swapped in. May be empty."""
        ...

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """Write what the run is for (a pipeline or model folder, safetensors) into the existing, empty `folder`."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move what is frozen to `device`; `dtype` is the compute type (float32, bfloat16 or float16)."""
        ...


class EMAConfig(Config):
    """Exponential moving average of the weights (`diffusers.training_utils.EMAModel`)."""

    decay: float = Field(0.9999, ge=0, le=1)
    warmup: bool = Field(True, description="decay grows as 1 - (1 + step / inv_gamma) ** -power up to `decay`")
    inv_gamma: float = 1.0
    power: float = 0.75
    exclude: tuple[str, ...] = Field(("discriminator",), description="modules without an average")


class TrainConfig(Config):
    """How a task is trained. Steps are optimiser steps; batch sizes are per process."""

    out: Path = Field(..., description="folder of the run; the same command again resumes it")
    seed: int = 0
    steps: int = Field(..., gt=0)
    stop_at: int | None = Field(
        None, gt=0, description="end here; the schedule still goes to `steps`, so that a later run can go on"
    )
    batch_size: int = Field(16, gt=0)
    accumulate: int = Field(1, gt=0, description="micro batches per optimiser step")
    learning_rate: float = Field(1e-4, gt=0)
    learning_rates: dict[str, float] = Field({}, description="by module name, where it differs from `learning_rate`")
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    warmup_steps: int = Field(100, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = Field(1.0, gt=0)
    ema: EMAConfig | None = EMAConfig()

    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    gradient_checkpointing: bool = False
    compile: bool = False
    cpu: bool = Field(False, description="stay on the CPU even where a GPU is present")
    workers: int = Field(0, ge=0, description="loader processes per training process")
    preflight: bool = Field(True, description="estimate the memory of a step and stop with advice before it runs out")

    log_every: int = Field(10, gt=0)
    checkpoint_every: int = Field(1000, gt=0)
    keep: int = Field(2, gt=0, description="checkpoints kept")
    validate_every: int = Field(1000, ge=0, description="0: never")
    validation_batches: int = Field(8, gt=0, description="per process")
    preview_every: int = Field(1000, ge=0, description="0: never")
    max_nonfinite: int = Field(10, gt=0, description="stop after this many steps in a row with a NaN or Inf")
    tensorboard: bool = True
    wandb_project: str | None = None

    @property
    def last_step(self) -> int:
        """The step after which this run exports and ends."""
        return min(self.steps, self.stop_at or self.steps)
