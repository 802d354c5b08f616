"""`medgen bench generators`: generators of echo clips side by side: seconds per clip, function evaluations, parameters, quality."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from medgen.bench.machine import machine
from medgen.data.ecg import ECG
from medgen.digital.ecg import simulate_ecg
from medgen.digital.rhythm import draw_rhythm
from medgen.sampling.request import choose_device
from medgen.sampling.source import find_pipeline, load_pipeline
from medgen.seeds import generator

_MARGIN = 1.5  # seconds of ECG around the clip
_QUALITY = {
    "HR MAE bpm": ("generated", "heart_rate", "mae"),
    "ED ms": ("generated", "phase", "ed", "median_ms"),
    "ES ms": ("generated", "phase", "es", "median_ms"),
    "EF R²": ("generated", "ejection_fraction", "r2"),
    "EF MAE": ("generated", "ejection_fraction", "mae"),
    "FVD ÷ floor": ("videos", "metrics", "frechet", "ratio"),
}
"""Column → where it lies in an evaluation's metrics.json."""


@dataclass(frozen=True)
class GeneratorTimes:
    """What was measured: the machine, the clip, and one row per pipeline and number of steps."""

    machine: dict[str, Any]
    clip: dict[str, Any]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        measures = list(dict.fromkeys(name for row in self.rows for name in row["quality"]))
        name, threads, frames = self.machine["name"], self.machine["threads"], self.clip["frames"]
        table = Table(title=f"clips of {frames} frames on {name}, {threads} threads, torch {self.machine['torch']}")
        for heading in ("pipeline", "kind", "M parameters", "steps", "evaluations", "s per clip", "CPU s", *measures):
            table.add_column(heading, justify="left" if heading in ("pipeline", "kind") else "right")
        for row in self.rows:
            values = (f"{row['quality'][name]:.3g}" if name in row["quality"] else "" for name in measures)
            parameters = f"{row['parameters'] / 1e6:.2f}"
            seconds = (f"{row['seconds_per_clip']:.2f}", f"{row['cpu_seconds_per_clip']:.2f}")
            table.add_row(
                row["pipeline"], row["kind"], parameters, str(row["steps"]), f"{row['evaluations']:g}", *seconds, *values
            )
        console = Console(width=110 + 12 * len(measures))
        with console.capture() as captured:
            console.print(table)
        return captured.get()


def bench_generators(
    pipelines: tuple[str, ...] = ("digital_echo",),
    steps: tuple[int, ...] = (),
    frames: int = 32,
    repeats: int = 3,
    quality: tuple[Path, ...] = (),
    device: str | None = None,
    out: Path | None = None,
) -> GeneratorTimes:
    """Time one clip after a warm-up: medians, each pipeline at its own steps and guidance, from the same ECG.

    Args:
        pipelines: shipped pipelines' names or pipeline folders.
        steps: numbers of steps to time beside each pipeline's own.
        frames: of the clip.
        repeats: clips timed per number of steps.
        quality: for each pipeline a folder that `medgen evaluate ecg-to-echo` wrote: its headline figures stand beside the times.
        device: cpu, cuda, ...; the best there is if not given.
        out: also write the figures to this JSON file.
    """
    if quality and len(quality) != len(pipelines):
        raise ValueError(f"{len(quality)} evaluations for {len(pipelines)} pipelines: give one for each, in the same order")
    where, rows = choose_device(device), []
    for index, name in enumerate(pipelines):
        source = find_pipeline(name)
        pipeline = load_pipeline(source, torch.float32, where)
        pipeline.set_progress_bar_config(disable=True)
        own = int(pipeline.config.num_inference_steps)
        known = headline(quality[index]) if quality else {}
        for count in (own, *(n for n in steps if n != own)):
            rows.append(
                {
                    "pipeline": source.name,
                    "kind": type(pipeline).__name__,
                    "parameters": sum(p.numel() for part in _networks(pipeline) for p in part.parameters()),
                    "steps": count,
                    "shipped": count == own,
                    **_cost(pipeline, count, frames, repeats),
                    "quality": known if count == own else {},
                }
            )
    result = GeneratorTimes(machine(where), {"frames": frames, "repeats": repeats}, rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": result.machine, "clip": result.clip, "rows": rows}, indent=2) + "\n")
    return result


def _cost(pipeline: Any, steps: int, frames: int, repeats: int) -> dict[str, float]:
    """Median seconds of one clip, by the clock and of this process on the CPU (what other work on the machine does not change so
    much), and the network's evaluations in it (a batch of two rows is two)."""
    evaluations = 0

    def count(_: Any, given: tuple[Any, ...]) -> None:
        nonlocal evaluations
        evaluations += len(given[0])

    ecg, seconds = _ecg(frames / float(pipeline.config.preprocessing["fps"])), []
    worked: list[float] = []
    hook = pipeline.denoiser.register_forward_pre_hook(count)
    for repeat in range(repeats + 1):
        start, start_cpu = time.perf_counter(), time.process_time()
        pipeline(
            ecg,
            ejection_fraction=55.0,
            view="A4C",
            num_frames=frames,
            num_inference_steps=steps,
            generator=generator("bench", repeat),
        )
        if repeat:  # the first is warm-up
            seconds.append(time.perf_counter() - start)
            worked.append(time.process_time() - start_cpu)
    hook.remove()
    return {
        "evaluations": evaluations / (repeats + 1),
        "seconds_per_clip": statistics.median(seconds),
        "cpu_seconds_per_clip": statistics.median(worked),
    }


def _ecg(seconds: float) -> ECG:
    """Twelve leads of a sinus rhythm of 70 per minute; second 0 is the clip's first frame."""
    rhythm = draw_rhythm(0, "sinus", 70.0, -_MARGIN, seconds + _MARGIN, 0.05)
    return simulate_ecg(rhythm, 0, start=-_MARGIN, end=seconds + _MARGIN)[0]


def _networks(pipeline: Any) -> list[torch.nn.Module]:
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def headline(folder: Path) -> dict[str, float]:
    """The figures of an evaluation that stand for quality, by name; those that it has. `ValueError` where the folder holds none."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no metrics.json: give a folder that `medgen evaluate ecg-to-echo` wrote")
    figures, found = json.loads(path.read_text()), {}
    for name, keys in _QUALITY.items():
        value: Any = figures
        for key in (*keys, "value"):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[name] = float(value)
    return found
