"""A real, tiny task and its command line: what the training tests run, kill and resume.

A linear regression with dropout and draws of its own; small enough that a process spends its time in start-up.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgen.config import Config, load_config
from medgen.tasks.base import TrainConfig
from medgen.training.checkpoint import write_tensors
from medgen.training.guards import EXIT_STOPPED


class TinyRecipe(Config):
    train: TrainConfig
    samples: int = 22
    nan_samples: tuple[int, ...] = ()
    kill_after: int | None = None  # micro steps after which the process kills itself
    kill_with: int = signal.SIGKILL
    stop_in_validation: bool = False


class Points(torch.utils.data.Dataset):
    def __init__(self, n: int, nan: tuple[int, ...], purpose: str) -> None:
        draws = torch.Generator().manual_seed(len(purpose))
        self.x, self.nan, self.epoch = torch.randn(n, 6, generator=draws), nan, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        x = torch.full((6,), math.nan) if i in self.nan else self.x[i] + 0.01 * self.epoch
        return {"id": f"point-{i}", "x": x}


class TinyTask:
    name = "tiny"

    def __init__(self, recipe: TinyRecipe) -> None:
        self.recipe, self.calls = recipe, 0

    def modules(self) -> dict[str, nn.Module]:
        # Dropout draws from the global generator, batch norm has running statistics, the convolution is not contiguous in memory.
        model = nn.Sequential(
            nn.Linear(6, 32),
            nn.Dropout(0.2),
            nn.GELU(),
            nn.Unflatten(1, (2, 4, 4)),
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.Linear(16, 6),
        )
        return {"model": model.to(memory_format=torch.channels_last), "discriminator": nn.Linear(6, 1)}

    def dataset(self, split: str) -> Points:
        return Points(self.recipe.samples, self.recipe.nan_samples, split) if split == "train" else Points(5, (), split)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {"ids": [item["id"] for item in items], "x": torch.stack([item["x"] for item in items])}

    def loss(self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator) -> Any:
        if torch.is_grad_enabled() and which == "model":
            self.calls += 1
            if self.calls == self.recipe.kill_after:
                os.kill(os.getpid(), self.recipe.kill_with)
        elif self.recipe.stop_in_validation and not torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGTERM)
        x = batch["x"]
        out = modules["model"](x + 0.1 * torch.randn(x.shape, generator=generator))
        real, fake = modules["discriminator"](x), modules["discriminator"](out)
        if which == "discriminator":
            return (nn.functional.softplus(-real) + nn.functional.softplus(fake)).mean(), {}
        error = (out - x).square().mean()
        return error + 0.1 * nn.functional.softplus(-fake).mean(), {"error": error}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        return {"noise": torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed))}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        write_tensors(folder / "model.safetensors", modules["model"].state_dict())

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        pass


def recipe(out: Path, **values: Any) -> TinyRecipe:
    """Micro batches of 4, two per step: 22 samples give epochs that end inside an accumulation."""
    train = {
        "out": out,
        "steps": 14,
        "batch_size": 4,
        "accumulate": 2,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "mixed_precision": "no",
        "cpu": True,
        "checkpoint_every": 4,
        "validate_every": 6,
        "validation_batches": 2,
        "preview_every": 0,
        "log_every": 3,
        "tensorboard": False,
        "preflight": False,
        **values.pop("train", {}),
    }
    return TinyRecipe(train=TrainConfig(**train), **values)


def main(path: str) -> None:
    from medgen.training.loop import train

    torch.set_num_threads(1)
    settings = load_config(TinyRecipe, path)
    run_config = settings.model_copy(update={"kill_after": None, "kill_with": signal.SIGKILL, "stop_in_validation": False})
    if train(TinyTask(settings), settings.train, run_config).stopped:
        raise SystemExit(EXIT_STOPPED)


def child(path: str, environment: dict[str, str], log: str) -> None:
    """Entry point of a process of the fork server."""
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    main(path)


if __name__ == "__main__":
    main(sys.argv[1])
