"""Runs a pipeline over cases: a case's files depend on (model, settings, case, seed) only, not on batch, shard or neighbours.

How that is kept. Matrix products round differently with the number of rows and of threads: between batch 1 and 8, or 1 and 2
threads, values move by 1e-6, and 0.4 % of the 16-bit pixels of the shipped pipeline change (torch 2.10, CPU). So on a CPU every
trajectory runs alone, on a fixed number of threads (one unless asked otherwise), and a batch is that many trajectories in flight
over all cores. That takes 1.4 times the processor time of a true batch of 8, part of which comes back because the cores need
not wait for each other. On an accelerator the network always sees exactly `batch_size` lanes, the last batch filled up, and the
batch size is one of the settings; there a longer prompt beside an image, which pads its tokens, can still move its last bits.
"""

from __future__ import annotations

import copy
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from medgen.sampling.cases import C, Case, Trajectory, trajectory_name
from medgen.sampling.gates import Gate, Judged, judge
from medgen.sampling.output import OutputFolder
from medgen.seeds import stable_seed

R = TypeVar("R")


class SamplingError(ValueError):
    """Samples that cannot be made or kept; the message says which case and what to do."""


@dataclass(frozen=True)
class Job(Generic[C]):
    """One trajectory to be sampled; `attempt` counts the draws that gates rejected before this one."""

    case: Case[C]
    index: int
    attempt: int = 0

    @property
    def name(self) -> str:
        """Stem of its files."""
        return trajectory_name(self.case, self.index)

    @property
    def noise_seed(self) -> int:
        """Seed of all randomness of this attempt at the trajectory."""
        first = self.case.noise_seed(self.index)
        return stable_seed("attempt", first, self.attempt) if self.attempt else first

    def generator(self) -> torch.Generator:
        """The trajectory's own randomness; always on the CPU, so that every device starts from the same noise."""
        return torch.Generator("cpu").manual_seed(self.noise_seed)


# A task's sampling call: a pipeline and jobs (never more than one batch) -> their trajectories in the same order.
Draw = Callable[[Any, Sequence[Job[C]]], list[Trajectory[C]]]


@dataclass(frozen=True)
class Shard:
    """The part of the work that this process does: jobs `index`, `index + count`, ..."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str | None = None) -> Shard:
        """From "0/3", "1/3" or "2/3"; from None, what torchrun or accelerate launched (RANK, WORLD_SIZE), else everything."""
        if text is None:
            text = f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise SamplingError(f"shard {text!r}: expected index/count with the index from 0, for example 0/3, 1/3 and 2/3")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Lanes:
    """How trajectories share the machine; see the top of this file.

    `batch_size`: trajectories in flight. `threads`: CPU threads of each (more suits one large model on many cores).
    """

    device: torch.device
    batch_size: int
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 1:
                raise SamplingError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def settings(self) -> dict[str, Any]:
        """What of this changes the last bits of an image, for the metadata."""
        if self.device.type == "cpu":
            return {"device": "cpu", "threads": self.threads}
        return {"device": self.device.type, "batch_size": self.batch_size}


def run(
    pipeline: Any,
    cases: Sequence[Case[C]],
    draw: Draw[C],
    files: Callable[[Trajectory[C]], Mapping[str, bytes]],
    metadata: Callable[[Job[C]], dict[str, Any]],
    folder: OutputFolder,
    lanes: Lanes,
    shard: Shard,
    progress: bool = True,
    measured: Callable[[Trajectory[C]], Mapping[str, Any]] = lambda trajectory: {},
    gates: Sequence[Gate] = (),
    retries: int = 0,
) -> int:
    """Sample this shard's trajectories that `folder` does not hold yet, each written as soon as it is there; return how many.

    `files` gives a trajectory's files (name -> content), `metadata` a job's line, with its main file as `file_name`; `measured`
    adds to the line what is only known of the finished trajectory. What `gates` reject is drawn again up to `retries` times, then
    missing; `folder` keeps a line of every rejection. Raises `SamplingError` if the pipeline returns NaN.
    """
    if retries < 0:
        raise SamplingError(f"retries must be 0 or more, not {retries}")
    done = folder.finished().keys() | (folder.given_up(retries) if gates else set())
    mine = jobs_of(cases)[shard.index :: shard.count]
    jobs = [job for job in mine if metadata(job)["file_name"] not in done]
    # Closed also when writing fails, so that no thread goes on sampling behind the error.
    new = 0
    with closing(sample(pipeline, jobs, _through(gates, retries, draw), lanes)) as outcomes:
        for outcome in _with_progress(outcomes, len(jobs), len(mine), progress):
            # Rejections first: with the image's line the trajectory is finished, and nothing of it may be missing.
            folder.reject([{**_rejected(metadata(job)), "gates": judged.gates} for job, judged in outcome.rejected])
            if outcome.trajectory is None:
                continue
            trajectory, new = outcome.trajectory, new + 1
            job = Job(trajectory.case, trajectory.index, trajectory.attempt)
            passed = {"attempt": job.attempt, "gates": outcome.judged.line()} if gates else {}
            folder.write(files(trajectory), {**metadata(job), **measured(trajectory), **passed})
    return new


@dataclass(frozen=True)
class Outcome(Generic[C]):
    """What became of one job: its trajectory with the gates' verdicts, or None after the last attempt; and what was rejected."""

    trajectory: Trajectory[C] | None
    judged: Judged
    rejected: tuple[tuple[Job[C], Judged], ...] = ()


def _through(gates: Sequence[Gate], retries: int, draw: Draw[C]) -> Callable[[Any, Sequence[Job[C]]], list[Outcome[C]]]:
    """`draw`, repeated for what `gates` reject, each repetition with as many lanes as the first."""

    def drawn(pipeline: Any, jobs: Sequence[Job[C]]) -> list[Outcome[C]]:
        pending = list({job.name: job for job in jobs}.values())  # an accelerator's last batch is filled up
        rejected: dict[str, list[tuple[Job[C], Judged]]] = {job.name: [] for job in pending}
        outcomes: dict[str, Outcome[C]] = {}
        while pending:
            lanes = pending + pending[-1:] * (len(jobs) - len(pending))
            again = []
            for job, trajectory in zip(pending, draw(pipeline, lanes), strict=False):
                _check_finite(job, trajectory)
                judged = judge(gates, trajectory)
                if not judged.passed:
                    rejected[job.name].append((job, judged))
                if judged.passed or job.attempt >= retries:
                    kept = replace(trajectory, attempt=job.attempt) if judged.passed else None
                    outcomes[job.name] = Outcome(kept, judged, tuple(rejected[job.name]))
                else:
                    again.append(replace(job, attempt=job.attempt + 1))
            pending = again
        return [outcomes[job.name] for job in jobs]

    return drawn


def _check_finite(job: Job[C], trajectory: Trajectory[C]) -> None:
    if not np.isfinite(trajectory.frames).all():
        raise SamplingError(
            f"case {job.case.case_id!r}, trajectory {job.index}: the pipeline returned NaN or infinity, nothing of it was "
            "written; try dtype float32, or check the weights"
        )


def _rejected(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("file_name", "case_id", "trajectory", "attempt", "noise_seed") if key in line}


def jobs_of(cases: Sequence[Case[C]]) -> list[Job[C]]:
    """Every trajectory asked for, in the order of the cases."""
    return [Job(case, index) for case in cases for index in range(case.n)]


def sample(
    pipeline: Any, jobs: Sequence[Job[C]], draw: Callable[[Any, Sequence[Job[C]]], list[R]], lanes: Lanes
) -> Generator[R, None, None]:
    """Yield what `draw` gives for each job (a trajectory), in order, at most `lanes.batch_size` in flight."""
    if lanes.device.type == "cpu":
        yield from _one_by_one(pipeline, jobs, draw, lanes)
    else:
        yield from _in_batches(pipeline, jobs, draw, lanes.batch_size)


def _one_by_one(
    pipeline: Any, jobs: Sequence[Job[C]], draw: Callable[[Any, Sequence[Job[C]]], list[R]], lanes: Lanes
) -> Iterator[R]:
    workers = max(1, min(lanes.batch_size, torch.get_num_threads() // lanes.threads))
    idle: SimpleQueue[Any] = SimpleQueue()
    for _ in range(workers):
        idle.put(_sharing_weights(pipeline))

    def one(job: Job[C]) -> R:
        mine = idle.get()
        try:
            return draw(mine, [job])[0]
        finally:
            idle.put(mine)

    in_flight: deque[Future[R]] = deque()
    with _threads(lanes.threads):
        pool = ThreadPoolExecutor(workers)
        try:
            for job in jobs:
                in_flight.append(pool.submit(one, job))
                if len(in_flight) >= lanes.batch_size:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _in_batches(
    pipeline: Any, jobs: Sequence[Job[C]], draw: Callable[[Any, Sequence[Job[C]]], list[R]], size: int
) -> Iterator[R]:
    for start in range(0, len(jobs), size):
        batch = list(jobs[start : start + size])
        yield from draw(pipeline, batch + batch[-1:] * (size - len(batch)))[: len(batch)]


def _sharing_weights(pipeline: Any) -> Any:
    """A second pipeline over the same weights: schedulers count their steps, so each thread needs its own."""
    twin = copy.copy(pipeline)
    if getattr(pipeline, "scheduler", None) is not None:  # masked-token decoding has none
        twin.scheduler = copy.deepcopy(pipeline.scheduler)
    return twin


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.2f}/s")


def _with_progress(outcomes: Iterator[R], missing: int, total: int, shown: bool) -> Iterator[R]:
    columns = [TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), _Speed(), TextColumn("ETA"), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), disable=not shown or not missing) as bar:
        task = bar.add_task("", total=total, completed=total - missing)
        for outcome in outcomes:
            yield outcome
            bar.advance(task)
