"""`medgen bench sample`: seconds per chest X-ray at a pipeline's own settings, and at other numbers of steps, on this machine."""

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
from medgen.sampling.cases import Case, TextConditions
from medgen.sampling.request import Dtype, choose_device, resolve_settings
from medgen.sampling.sampler import Lanes, jobs_of, sample
from medgen.sampling.source import find_pipeline, load_pipeline
from medgen.sampling.text_to_cxr import TextSampling

PROMPT = "Small left pleural effusion. No pneumothorax."


@dataclass(frozen=True)
class SampleTimes:
    """What was measured: the machine, the pipeline, and one row per number of steps."""

    machine: dict[str, Any]
    pipeline: dict[str, Any]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        name, threads = self.machine["name"], self.machine["threads"]
        table = Table(title=f"{self.pipeline['model']} on {name}, {threads} threads, torch {self.machine['torch']}")
        for heading in ("steps", "batch", "s per image", "images/s", "s for one alone"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            shipped = " (own)" if row["shipped"] else ""
            seconds, alone = row["seconds_per_image"], row["seconds_alone"]
            table.add_row(
                f"{row['steps']}{shipped}", str(row["batch_size"]), f"{seconds:.3f}", f"{1 / seconds:.2f}", f"{alone:.3f}"
            )
        console = Console(width=110)
        with console.capture() as captured:
            console.print(table)
        return captured.get()


def bench_sample(
    pipeline: str = "digital_chest",
    batch_size: int = 8,
    steps: tuple[int, ...] = (10, 25, 50),
    repeats: int = 3,
    device: str | None = None,
    dtype: Dtype = "float32",
    out: Path | None = None,
) -> SampleTimes:
    """Time sampling (network, decoding, PNG encoding) after a warm-up: medians, at the pipeline's own guidance and scheduler.

    Args:
        pipeline: a shipped pipeline's name or a pipeline folder.
        batch_size: images in flight at once.
        steps: numbers of denoising steps to time beside the pipeline's own.
        repeats: batches timed per number of steps.
        device: cpu, cuda, ...; the best there is if not given.
        dtype: precision of the network.
        out: also write the figures to this JSON file.
    """
    where, source = choose_device(device), find_pipeline(pipeline)
    loaded = load_pipeline(source, getattr(torch, dtype), where)
    own = resolve_settings(source, loaded, None, None)["num_inference_steps"]
    rows = []
    for count in sorted({own, *steps}):
        settings = resolve_settings(source, loaded, count, None)
        together = _seconds(loaded, settings, Lanes(where, batch_size), repeats) / batch_size
        alone = _seconds(loaded, settings, Lanes(where, 1), 1)
        rows.append(
            {
                "steps": count,
                "shipped": count == own,
                "batch_size": batch_size,
                "seconds_per_image": together,
                "seconds_alone": alone,
            }
        )
    result = SampleTimes(machine(where), {**resolve_settings(source, loaded, None, None), "dtype": dtype}, rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": result.machine, "pipeline": result.pipeline, "rows": rows}, indent=2) + "\n")
    return result


def _seconds(pipeline: Any, settings: dict[str, Any], lanes: Lanes, repeats: int) -> float:
    """Median seconds of one batch."""
    task = TextSampling(settings, 8, False)
    jobs = jobs_of([Case("bench", 0, lanes.batch_size, TextConditions(prompt=PROMPT))])
    seconds = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        for trajectory in sample(pipeline, jobs, task.draw, lanes):
            task.files(trajectory)
        if repeat:  # the first is warm-up
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
