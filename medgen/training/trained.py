"""One trained module with everything that belongs to it: its loss as a module, optimiser, schedule and average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from medgen.tasks.base import Task, TrainConfig
from medgen.training.checkpoint import CheckpointError, read_json, read_tensors, write_tensors


class LossModule(nn.Module):
    """`task.loss` as a forward pass, so that DDP, FSDP and autocast wrap whatever the task calls, not only `module.forward`."""

    def __init__(self, task: Task, name: str, module: nn.Module, others: dict[str, nn.Module]) -> None:
        super().__init__()
        self.module = module
        self._task, self._name = task, name
        self._others = tuple(others.items())  # in a tuple: not submodules of this one

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss and scalars to log."""
        return self._task.loss({**dict(self._others), self._name: self.module}, batch, self._name, generator)


class TrainedModule:
    """A module of the task under training. `wrapped` is what Accelerate prepared; `module` is the task's own object."""

    def __init__(
        self, task: Task, name: str, modules: dict[str, nn.Module], config: TrainConfig, accelerator: Accelerator
    ) -> None:
        self.name, self.module = name, modules[name]
        self.names = [key for key, value in self.module.named_parameters() if value.requires_grad]
        if not self.names:
            raise ValueError(f"module {name!r} of task {task.name!r} has no parameter to train")
        others = {key: value for key, value in modules.items() if key != name}
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=config.learning_rates.get(name, config.learning_rate),
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scheduler = get_scheduler(
            config.schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
        )
        self.wrapped, self.optimizer = accelerator.prepare(LossModule(task, name, self.module, others), optimizer)
        self._kept_buffers: list[Tensor] = []
        self.ema: EMAModel | None = None
        if config.ema and name not in config.ema.exclude:
            self.ema = EMAModel(
                self.parameters(),
                decay=config.ema.decay,
                use_ema_warmup=config.ema.warmup,
                inv_gamma=config.ema.inv_gamma,
                power=config.ema.power,
                foreach=True,
            )

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of `names`."""
        return [value for value in self.module.parameters() if value.requires_grad]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No gradients for this module inside the block: another module's loss is being computed."""
        parameters = self.parameters()
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the module holds its averaged weights."""
        if self.ema is None:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self.parameters()]
        self.ema.copy_to(self.parameters())
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self.parameters()), kept)

    def remember_buffers(self) -> None:
        """Keep the running statistics as they are before a step: its forward passes move them, even if it is not applied."""
        self._kept_buffers = [buffer.detach().clone() for buffer in self.module.buffers()]

    def undo_buffers(self) -> None:
        """Put the running statistics back to where `remember_buffers` saw them."""
        for buffer, kept in zip(self.module.buffers(), self._kept_buffers):
            buffer.copy_(kept)

    def update(self) -> bool:
        """Apply the gradients; false where fp16 loss scaling found an overflow and skipped the step."""
        self.optimizer.step()
        if self.optimizer.step_was_skipped:
            return False
        if self.ema is not None:
            self.ema.step(self.parameters())
        return True

    def advance(self) -> None:
        """Clear the gradients and move the schedule by one step."""
        self.optimizer.zero_grad()
        self.scheduler.step()

    def _weights(self) -> dict[str, Tensor]:
        tied = {key for key, _ in self.module.named_parameters(remove_duplicate=False)}
        buffers = {key: value for key, value in self.module.state_dict().items() if key not in tied}
        return {**dict(zip(self.names, self.parameters())), **buffers}

    def save(self, folder: Path) -> dict[str, Any]:
        """Write weights, average and optimiser tensors below `folder`; returns the small state for JSON."""
        write_tensors(folder / "model" / f"{self.name}.safetensors", self._weights())
        state = self.optimizer.state_dict()["state"]
        moments = {f"{self.names[i]}:{key}": value for i, entry in state.items() for key, value in entry.items()}
        write_tensors(folder / "optimizer" / f"{self.name}.safetensors", moments)
        small: dict[str, Any] = {"scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"}}
        if self.ema is not None:
            write_tensors(folder / "ema" / f"{self.name}.safetensors", dict(zip(self.names, self.ema.shadow_params)))
            small["ema_step"] = self.ema.optimization_step
        return small

    def load(self, folder: Path, small: dict[str, Any]) -> None:
        """Read what `save` wrote. Raises `CheckpointError` where the checkpoint is of another model."""
        self._copy(folder / "model" / f"{self.name}.safetensors", self._weights())
        if self.ema is not None:
            self._copy(folder / "ema" / f"{self.name}.safetensors", dict(zip(self.names, self.ema.shadow_params)))
            self.ema.optimization_step = small["ema_step"]
        state: dict[int, dict[str, Tensor]] = {}
        positions = {name: i for i, name in enumerate(self.names)}
        parameters = self.parameters()
        for key, value in read_tensors(folder / "optimizer" / f"{self.name}.safetensors").items():
            name, _, field = key.rpartition(":")
            i = positions[name]
            if value.shape == parameters[i].shape:
                # Fused AdamW walks raw memory: moments must lie as their (maybe channels-last) parameter does.
                value = torch.empty_like(parameters[i], dtype=value.dtype, device="cpu").copy_(value)
            state.setdefault(i, {})[field] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.scheduler.load_state_dict({**small["scheduler"], "lr_lambdas": [None] * len(self.scheduler.base_lrs)})
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
            group["lr"] = rate

    @torch.no_grad()
    def _copy(self, path: Path, targets: dict[str, Tensor]) -> None:
        tensors = read_tensors(path)
        if wrong := sorted(set(tensors) ^ set(targets)) or sorted(k for k in targets if tensors[k].shape != targets[k].shape):
            raise CheckpointError(f"{path} is of another model: {', '.join(wrong[:5])} differ (of {len(wrong)})")
        for key, target in targets.items():
            target.copy_(tensors[key])


def load_scaler(accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """Restore fp16 loss scaling, where it is in use."""
    if accelerator.scaler is not None and state:
        accelerator.scaler.load_state_dict(state)


def read_small(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return read_json(folder / "state.json")
