"""Memory preflight: what a training step needs against what is free, said before it runs out and with what to lower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from medgen.data.order import move
from medgen.tasks.base import Task, TrainConfig

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Compute type by `TrainConfig.mixed_precision`."""

_RESERVE = 0.92  # of the free memory; the rest is fragmentation, kernels' workspaces and the loader


class MemoryPreflightError(MemoryError):
    """The next step would not fit; the message says what it needs and what to lower."""


def free_bytes(device: torch.device) -> int:
    """Free memory of the device; on a CPU the smaller of the machine's and the container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free


def activation_bytes(task: Task, modules: dict[str, nn.Module], name: str, batch: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for the backward pass of one loss on `batch` (each storage counted once)."""
    device = next(modules[name].parameters()).device
    weights = {parameter.untyped_storage().data_ptr() for parameter in modules[name].parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, unpack),
        torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
    ):
        loss, _ = task.loss(modules, batch, name, torch.Generator(device=device).manual_seed(0))
    del loss
    return sum(kept.values())


def check_memory(
    parameters: int, averaged: int, activations: int, samples: int, config: TrainConfig, device: torch.device
) -> str:
    """One line on what a step needs beyond the weights that are loaded already; raises `MemoryPreflightError` if too much.

    `parameters` and `averaged` are counts of trained and averaged fp32 numbers; `activations` are bytes for `samples` samples.
    """
    per_sample = activations / samples
    parts = {
        "gradients": 4 * parameters,
        "optimiser": 8 * parameters,
        "average": 4 * averaged,
        f"activations ({config.batch_size} × {per_sample / 1e6:.1f} MB)": round(per_sample * config.batch_size),
    }
    need, free = sum(parts.values()), round(free_bytes(device) * _RESERVE)
    line = f"a step needs {need / 1e9:.2f} GB more (" + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in parts.items())
    line += f"); {free / 1e9:.2f} GB are free on {device}"
    if need <= free:
        return line
    static = 12 * parameters + 4 * averaged
    fitting = int((free - static) // per_sample) if per_sample and free > static else 0
    if fitting >= 1:
        advice = [f"train.batch_size to {fitting} or less (and raise train.accumulate to keep the effective batch)"]
    else:
        advice = ["the model's size, or shard it with configs/accelerate/fsdp.yaml"]
    if not config.gradient_checkpointing:
        advice.append("or set train.gradient_checkpointing=true")
    if config.mixed_precision == "no":
        advice.append("or set train.mixed_precision=bf16")
    raise MemoryPreflightError(f"{line}. Lower {', '.join(advice)}; train.preflight=false tries anyway")


def say_memory(task: Task, modules: dict[str, nn.Module], dataset: Any, config: TrainConfig, device: torch.device) -> str:
    """Measure the activations of two samples and say what a step of `config` needs; raises `MemoryPreflightError` if too much."""
    items = [dataset[i % len(dataset)] for i in range(min(2, config.batch_size))]
    batch, dtype = move(task.collate(items), device), DTYPES[config.mixed_precision]
    activations = max(activation_bytes(task, modules, name, batch, dtype) for name in modules)
    counts = {name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in modules.items()}
    averaged = sum(n for name, n in counts.items() if config.ema and name not in config.ema.exclude)
    return check_memory(sum(counts.values()), averaged, activations, len(items), config, device)
