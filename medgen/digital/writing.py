"""Writing digital patients to disk: many cores, one order, resumable after a kill, a manifest at the end."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import track

from medgen.data.records import Record, Split, write_manifest
from medgen.seeds import stable_seed

R = TypeVar("R", bound=Record)
SPLIT_SHARES: tuple[tuple[Split, float], ...] = (("train", 0.8), ("val", 0.1), ("test", 0.1))


def split_of(patient_id: str) -> Split:
    """A patient's split: a pure function of the patient, so that more patients never move one across."""
    share = stable_seed("split", patient_id) / 2**63
    for name, part in SPLIT_SHARES:
        if share < part:
            return name
        share -= part
    return "test"


def write_patients(
    out: Path,
    patients: int,
    work: Callable[[int], list[R]],
    record: type[R],
    settings: Mapping[str, Any],
    *,
    name: str,
    what: str,
    keep: int | None = None,
    processes: int | None = None,
) -> list[R]:
    """Call `work(index)` for every patient, write `manifest.parquet` of (the first `keep`) records below `out`; return them.

    `work` writes the patient's files and must be picklable. The same call again goes on where it stopped: finished patients are
    listed in `progress.jsonl`, which the manifest replaces. `settings` tell one data set from another; `what` is counted on screen.
    Raises `ValueError` if `out` was begun with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    progress = out / "progress.jsonl"
    done = _resume(progress, dict(settings), record)
    left = range(len(done), patients)
    processes = processes or len(os.sched_getaffinity(0))
    console, started, before = Console(stderr=True), time.perf_counter(), sum(map(len, done))
    with progress.open("a") as log:
        for records in track(
            _each(work, left, processes), total=len(left), description=f"digital patients: {what}", console=console
        ):
            log.write(json.dumps([dataclasses.asdict(r) for r in records]) + "\n")
            log.flush()
            done.append(records)
    flat = [r for records in done for r in records][:keep]
    write_manifest(flat, out / "manifest.parquet", name=name, source=f"medgen {name.replace('-', ' ')} {json.dumps(settings)}")
    if left:
        rate = (sum(map(len, done)) - before) / (time.perf_counter() - started)
        console.print(f"{rate:.1f} {what}/s on {processes} cores")
    progress.unlink()
    return flat


def _each(work: Callable[[int], list[R]], indices: range, processes: int) -> Any:
    if processes <= 1 or len(indices) < 8:  # starting workers takes longer
        yield from map(work, indices)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, indices, chunksize=4)


def _resume(progress: Path, settings: dict[str, Any], record: type[R]) -> list[list[R]]:
    if not progress.exists():
        progress.write_text(json.dumps(settings) + "\n")
        return []
    lines = progress.read_text().split("\n")[:-1]  # a killed writer leaves at most one unfinished last line
    if not lines or json.loads(lines[0]) != settings:
        raise ValueError(
            f"{progress} was begun with other settings ({lines[0] if lines else 'none'}): finish that run or use another --out"
        )
    progress.write_text("".join(line + "\n" for line in lines))
    reader = TypeAdapter(list[record])  # type: ignore[valid-type]
    return [reader.validate_json(line) for line in lines[1:]]
