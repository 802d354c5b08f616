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
from torch.distributed.tensor import DTensor, distribute_tensor

from medgen.config import ConfigError
from medgen.tasks.base import Task, TrainConfig
from medgen.training.checkpoint import CheckpointError, read_json, read_tensors, write_tensors


class LossModule(nn.Module):
    """`task.loss` as a forward pass, so that DDP, FSDP and autocast wrap whatever the task calls, not only `module.forward`."""

    def __init__(self, task: Task, name: str, module: nn.Module, others: dict[str, nn.Module]) -> None:
        super().__init__()
        self.module = module
        self._no_split_modules = getattr(module, "_no_split_modules", None)  # FSDP shards these one by one
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

    @property
    def sharded(self) -> bool:
        """Whether each rank holds only a part of every weight (FSDP)."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters())

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
        try:
            self._hold(self.ema.shadow_params)
            yield
        finally:
            self._hold(kept)

    @torch.no_grad()
    def _hold(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values):  # one by one: sharded tensors know no foreach copy
            parameter.copy_(value)

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

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        """Whole tensors of the weights, the average and the optimiser, by kind. Where weights are sharded, every rank must call this."""
        state = self.optimizer.state_dict()["state"]
        kinds = {
            "model": self._weights(),
            "optimizer": {f"{self.names[i]}:{key}": value for i, entry in state.items() for key, value in entry.items()},
            "ema": {} if self.ema is None else dict(zip(self.names, self.ema.shadow_params)),
        }
        return {kind: {name: _whole(value) for name, value in tensors.items()} for kind, tensors in kinds.items()}

    def save(self, folder: Path, snapshot: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Write a snapshot below `folder`; returns the small state for JSON."""
        for kind, tensors in snapshot.items():
            if tensors:
                write_tensors(folder / kind / f"{self.name}.safetensors", tensors)
        small: dict[str, Any] = {"scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"}}
        return small if self.ema is None else {**small, "ema_step": self.ema.optimization_step}

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
                # Fused AdamW walks raw memory: moments must lie as their (maybe channels-last, maybe sharded) parameter does.
                value = _assign(torch.empty_like(parameters[i], dtype=value.dtype), value)
            state.setdefault(i, {})[field] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.scheduler.load_state_dict({**small["scheduler"], "lr_lambdas": [None] * len(self.scheduler.base_lrs)})
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr()):
            group["lr"] = rate

    def _copy(self, path: Path, targets: dict[str, Tensor]) -> None:
        tensors = read_tensors(path)
        if wrong := sorted(set(tensors) ^ set(targets)) or sorted(k for k in targets if tensors[k].shape != targets[k].shape):
            raise CheckpointError(f"{path} is of another model: {', '.join(wrong[:5])} differ (of {len(wrong)})")
        for key, target in targets.items():
            _assign(target, tensors[key])


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _assign(target: Tensor, value: Tensor) -> Tensor:
    """Copy a whole `value` into `target`, of which this rank may hold only its shard."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
    return target


def load_scaler(accelerator: Accelerator, state: dict[str, Any] | None) -> None:
    """Restore fp16 loss scaling, where it is in use."""
    if accelerator.scaler is not None and state:
        accelerator.scaler.load_state_dict(state)


def read_small(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return read_json(folder / "state.json")


def switch_on(module: nn.Module, config: TrainConfig) -> None:
    """Gradient checkpointing and compilation, where the configuration asks for them."""
    if config.gradient_checkpointing:
        method = getattr(module, "enable_gradient_checkpointing", None) or getattr(module, "gradient_checkpointing_enable", None)
        if method is None:
            raise ConfigError(f"train.gradient_checkpointing: {type(module).__name__} does not offer it; set it to false")
        method()
    if config.compile:
        module.compile()
