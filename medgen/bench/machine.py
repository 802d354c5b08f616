"""What a bench's figures depend on: the machine, its load, and the matrix products that it can do per second."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device) -> dict[str, Any]:
    """Device, cores, threads, load and versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # other work on the machine makes the figures worse
    return {
        "name": name, "device": device.type, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": load,
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of `work`, waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of five square matrix products: what no training step can exceed here.

    A processor without instructions for a precision multiplies 40 times as slowly; smaller matrices tell that in a second, not in 40.
    """
    side = 8192 if device.type == "cuda" else 1536
    if device.type == "cpu":
        probe = torch.ones(256, 256, dtype=dtype)
        probe @ probe
        side = 512 if seconds(lambda: probe @ probe, device) * (side / 256) ** 3 > 1 else side
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(5))


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
