"""Real processes, cheaply: a fork server imports the loop once, every training below it is a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from tiny import TinyRecipe, child, recipe

from medgen.config import save_config

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["medgen.training.loop", "torch.distributed"])


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class Launch:
    """One start of a training in `world` processes, as torchrun would start it."""

    def __init__(self, settings: TinyRecipe, world: int = 1) -> None:
        out = settings.train.out
        out.parent.mkdir(parents=True, exist_ok=True)
        path, self.log = out.with_suffix(".yaml"), out.with_suffix(".log")
        save_config(settings, path)
        port = free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(world):
            environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
            if world > 1:
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "LOCAL_WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }
            process = _CONTEXT.Process(target=child, args=(str(path), environment, str(self.log)))
            process.start()
            self.processes.append(process)

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds: float = 90) -> int:
        """The exit code (the first that is not 0); a process that outlives `seconds` fails the test."""
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, limit - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            self.signal(signal.SIGKILL)
            pytest.fail(f"still running after {seconds} s:\n{self.output()}")
        return next((p.exitcode for p in self.processes if p.exitcode), 0)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def final_state(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Every tensor of the last checkpoint and export, and every line of metrics.jsonl without its timings."""
    last = sorted((out / "checkpoints").glob("step-*[0-9]"))[-1]
    tensors = {}
    for path in (*last.rglob("*.safetensors"), *(out / "export").glob("*.safetensors")):
        name = path.relative_to(last) if last in path.parents else path.relative_to(out)
        tensors |= {f"{name}:{key}": value for key, value in load_file(path).items()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("samples_per_second", "memory_gb")
    return tensors, [{key: value for key, value in line.items() if key not in timed} for line in lines]


def assert_same_run(out: Path, reference: Path) -> None:
    """Weights, averages, moments and every logged loss are equal bit for bit."""
    tensors, lines = final_state(out)
    expected, expected_lines = final_state(reference)
    assert tensors.keys() == expected.keys()
    differences = {k: (tensors[k].double() - expected[k].double()).abs().max().item() for k in tensors if tensors[k].numel()}
    assert max(differences.values()) == 0.0, {k: v for k, v in differences.items() if v}
    assert lines == expected_lines


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same training left alone, in one process and in two: what every interrupted run must equal."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    launches = {world: Launch(recipe(folder / f"world{world}"), world) for world in (1, 2)}
    for launch in launches.values():
        assert launch.wait() == 0, launch.output()
    return {world: folder / f"world{world}" for world in launches}
