"""What a run tells: `metrics.jsonl` at full precision always, TensorBoard and W&B where wanted, a live line on the terminal."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.utils import save_image

from medgen.config import Config
from medgen.tasks.base import TrainConfig

_LIVE_SECONDS = 0.25  # between updates of the live line
_QUIET_SECONDS = 30.0  # between lines where the output is a file rather than a terminal


class Reporter:
    """Writes for the main process; on the others every call is silent."""

    def __init__(self, config: TrainConfig, run_config: Config, main: bool, step: int, metrics_bytes: int) -> None:
        self.main, self.config = main, config
        self._started = self._printed = time.monotonic()
        self._first = step
        self._board: Any = None
        self._wandb: Any = None
        self._live: Progress | None = None
        if not main:
            return
        path = config.out / "metrics.jsonl"
        self._file = path.open("ab")
        # Lines written after the checkpoint belong to steps that are about to be taken again.
        self._file.truncate(min(metrics_bytes, path.stat().st_size))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1 if step else None)
        if config.wandb_project:
            import wandb

            self._wandb = wandb.init(
                project=config.wandb_project,
                name=config.out.name,
                id=config.out.name,
                resume="allow",
                config=run_config.model_dump(mode="json"),
            )
        self._console = Console(stderr=True)
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
            )
            self._bar = self._live.add_task(config.out.name, total=config.steps, completed=step, text="")
            self._live.start()

    def log(self, kind: str, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl; floats keep every digit (`repr`), so that two runs can be compared exactly."""
        if not self.main:
            return
        self._file.write((json.dumps({"kind": kind, "step": step, **values}) + "\n").encode())
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def event(self, kind: str, step: int, **fields: Any) -> None:
        """A line of metrics.jsonl that is not a measurement."""
        if self.main:
            self._file.write((json.dumps({"kind": kind, "step": step, **fields}) + "\n").encode())
            self._file.flush()

    def progress(self, step: int, loss: float, samples_per_second: float, device: torch.device) -> None:
        """Move the live line; where the output is not a terminal, print one every half minute."""
        now = time.monotonic()
        pause = _QUIET_SECONDS if self._live is None else _LIVE_SECONDS
        if not self.main or (now - self._printed < pause and step < self.config.steps):
            return
        self._printed = now
        text = f"loss {loss:.4f}  {samples_per_second:.1f} samples/s  {memory_gb(device):.1f} GB"
        if self._live is not None:
            self._live.update(self._bar, completed=step, text=text)
        else:
            per_step = (now - self._started) / max(1, step - self._first)
            left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.config.steps - step)))
            self.say(f"step {step}/{self.config.steps}  {text}  left {left}")

    def say(self, text: str) -> None:
        """A line for the person who is watching."""
        if self.main:
            print(text, file=sys.stderr, flush=True) if self._live is None else self._live.console.print(text)

    def pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        """Save preview grids [N,C,H,W] in [-1,1] as `previews/step-...-NAME.png`."""
        if not self.main:
            return
        folder = self.config.out / "previews"
        for name, images in pictures.items():
            folder.mkdir(exist_ok=True)
            images = images.detach().float().cpu().clamp(-1, 1) / 2 + 0.5
            save_image(images, folder / f"step-{step:08d}-{name}.png", nrow=max(1, round(len(images) ** 0.5)))
            if self._board is not None:
                self._board.add_images(f"preview/{name}", images, step)

    def durable_bytes(self) -> int:
        """Length of metrics.jsonl after forcing it to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Stop the live line and close every file."""
        if not self.main:
            return
        if self._live is not None:
            self._live.stop()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file.close()


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB (1e9 bytes): on the GPU where it is one, of the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
