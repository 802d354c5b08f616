"""What the steps of the demo share: the folder, the pipeline, how much of everything, and how long it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from medgen.sampling.source import PipelineSource


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    films: int = 160
    steps: int = 14
    kill_after: int = 9
    checkpoint_every: int = 3
    measured: int = 40
    least: int = 3
    pairs: int = 5
    sampling_steps: int | None = None  # None: as many as the pipeline itself takes
    clips: int = 8
    echo_steps: int | None = None
    followed: int = 12
    shown: int = 3
    futures: int = 8
    progression_steps: int | None = None
    read: int = 16


QUICK = Sizes(
    films=48, steps=4, kill_after=3, checkpoint_every=2, measured=16, least=1, pairs=2, sampling_steps=4, clips=2, echo_steps=2,
    followed=5, shown=1, futures=2, progression_steps=2, read=4,
)  # fmt: skip
"""For tests."""


@dataclass
class Session:
    """One demo. `echo` and `progression` name those pipelines; `steps` grows: name, duration and folder of each step that is done."""

    out: Path
    source: PipelineSource
    sizes: Sizes = Sizes()
    echo: str = "digital_echo"
    progression: str = "digital_progression"
    training_films: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False))

    @contextmanager
    def step(self, name: str, folder: str) -> Iterator[Path]:
        """Announce and time one step; yields its folder."""
        self.console.print(f"[bold]{len(self.steps) + 1}[/]  {name}")
        start = time.monotonic()
        yield self.out / folder
        seconds = time.monotonic() - start
        record = self.out / "steps.json"  # a second run finds the work done: what counts is how long it took
        times = json.loads(record.read_text()) if record.exists() else {}
        times[folder] = max(seconds, times.get(folder, 0.0))
        record.write_text(json.dumps(times))
        self.steps.append(
            {"name": name, "seconds": times[folder], "time": duration(times[folder]), "path": f"{self.out}/{folder}"}
        )

    def say(self, text: str) -> None:
        """A line for the person who is watching."""
        self.console.print(f"   [dim]{text}[/]")

    @property
    def name(self) -> str:
        """How `--pipeline` finds the pipeline: by its name where it is a shipped one."""
        return self.source.name if self.source.folder.parent.name == "pretrained" else str(self.source.folder)

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """How the pipeline's training films were prepared."""
        return dict(self._read("model_index.json")["preprocessing"])

    @cached_property
    def max_tokens(self) -> int:
        """Tokens that the pipeline's text encoder reads."""
        return int(self._read("tokenizer/tokenizer_config.json")["model_max_length"])

    def _read(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.source.folder / name).read_text("utf-8"))
        return values


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line that is still being written is left out."""
    whole, _, _ = path.read_text("utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def read_grey(path: Path) -> np.ndarray:
    """A grey picture file as [H,W] float32 in [0,1]."""
    values: np.ndarray = np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255
    return values


def words(name: str) -> str:
    """ "pleural_effusion_left" → "pleural effusion, left"."""
    for side in ("left", "right"):
        if name.endswith(f"_{side}"):
            return f"{name.removesuffix(f'_{side}').replace('_', ' ')}, {side}"
    return name.replace("_", " ")


def duration(seconds: float) -> str:
    """ "3 min 12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
