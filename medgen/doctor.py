"""`medgen doctor`: what this machine can do, found by trying it: devices, precision, attention backends, memory, and every recipe.

Nothing is believed that was not run: an attention backend counts only when its operator gives the right numbers on the device.
"""

from __future__ import annotations

import importlib.metadata
import json as json_module
import platform
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from medgen.bench.machine import machine, matmul_ceiling
from medgen.training.memory import free_bytes

PACKAGES = (
    "torch", "torchvision", "diffusers", "transformers", "accelerate", "monai", "peft", "torchmetrics", "xformers", "flash-attn",
    "pydicom", "diffdrr", "wandb",
)  # fmt: skip


def doctor(json: bool = False, configs: Path = Path("configs")) -> None:
    """Say what this machine can do and what each recipe would need here. Takes some seconds: everything is tried, nothing guessed.

    Args:
        json: print one JSON object instead of tables.
        configs: folder of recipes (<task>/<recipe>.yaml).
    """
    from medgen.estimates import estimate_recipes

    found = examine()
    best = next((device for device in found["devices"] if device["device"] != "cpu"), found["devices"][0])
    found["recipes"] = [estimate.judged(best) for estimate in estimate_recipes(configs)]
    if json:
        print(json_module.dumps(found, indent=2))
    else:
        show(found)


def examine() -> dict[str, Any]:
    """Everything about the machine, as plain data: software, devices (with precision and attention), memory and disk."""
    devices = [examine_device(torch.device("cpu"))]
    devices += [examine_device(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(examine_device(torch.device("mps")))
    return {
        "software": software(),
        "devices": devices,
        "disk": {"folder": str(Path.cwd()), "free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1)},
    }


def software() -> dict[str, str | None]:
    """Version of Python, the system and every package that matters; None where it is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def examine_device(device: torch.device) -> dict[str, Any]:
    """Name, memory, measured matrix-product speed per precision, and attention backends of one device."""
    total, free = _memory(device)
    return {
        "device": str(device),
        "name": device_name(device),
        "memory_gb": round(total / 1e9, 1),
        "free_gb": round(free / 1e9, 1),
        "tflops": {name: matmul_tflops(device, dtype) for name, dtype in _precisions(device).items()},
        "attention": attention_backends(device),
    }


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Measured ceiling of square matrix products in TFLOP/s; None where the precision does not run."""
    try:
        return float(f"{matmul_ceiling(dtype, device) / 1e12:.3g}")
    except RuntimeError:
        return None


def attention_backends(device: torch.device) -> dict[str, str]:
    """Backend → "works" or the reason why not, each tried on [1,64,2,32] against the plain formula."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q = torch.linspace(-1, 1, 64 * 2 * 32, device=device).sin().view(1, 64, 2, 32).to(dtype)
    expected = _plain_attention(q)
    tried = {f"sdpa {name}": _try(partial(_sdpa, q, backend), expected) for name, backend in _SDPA.items()}
    tried["xformers"] = _try(lambda: _xformers(q), expected)
    tried["flash-attn"] = _try(lambda: _flash(q), expected)
    return tried


_SDPA = {
    "math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION, "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}  # fmt: skip


def _plain_attention(q: torch.Tensor) -> torch.Tensor:
    x = q.float().transpose(1, 2)
    return ((x @ x.mT / x.shape[-1] ** 0.5).softmax(-1) @ x).transpose(1, 2)


def _sdpa(q: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
    x = q.transpose(1, 2)
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(x, x, x).transpose(1, 2)


def _xformers(q: torch.Tensor) -> torch.Tensor:
    if q.device.type != "cuda":
        raise RuntimeError("needs a CUDA device")  # and importing it takes seconds
    from xformers.ops import memory_efficient_attention

    result: torch.Tensor = memory_efficient_attention(q, q, q)
    return result


def _flash(q: torch.Tensor) -> torch.Tensor:
    from flash_attn import flash_attn_func

    result: torch.Tensor = flash_attn_func(q, q, q)
    return result


def _try(attention: Callable[[], torch.Tensor], expected: torch.Tensor) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            difference = (attention().float() - expected).abs().max().item()
    except ImportError:
        return "not installed"
    except (RuntimeError, NotImplementedError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return (
            "not on this device"
            if said.startswith(("No viable backend", "No available kernel", "No operator found"))
            else said[:80]
        )
    return "works" if difference < 0.02 else f"wrong by {difference:.2g}"


def _precisions(device: torch.device) -> dict[str, torch.dtype]:
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return named if device.type == "cpu" else {**named, "float16": torch.float16}


def _memory(device: torch.device) -> tuple[int, int]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    return psutil.virtual_memory().total, free_bytes(device)


def device_name(device: torch.device) -> str:
    """The processor's or GPU's own name, with what counts about it."""
    facts = machine(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{facts['name']} (compute capability {major}.{minor})"
    return f"{facts['name']}, {facts['cores']} cores"


def show(found: dict[str, Any]) -> None:
    """Print what `examine` (and the recipes' estimates) found as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("software", "version", box=None, header_style="bold")
    for name, version in found["software"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    console.print(table)
    for device in found["devices"]:
        table = Table(device["device"], device["name"], box=None, header_style="bold")
        table.add_row("memory", f"{device['free_gb']:.1f} of {device['memory_gb']:.1f} GB free")
        for name, speed in device["tflops"].items():
            table.add_row(name, f"{speed:.3g} TFLOP/s" if speed else "[yellow]does not run[/]")
        for name, state in device["attention"].items():
            table.add_row(name, f"[green]{state}[/]" if state == "works" else f"[dim]{state}[/]")
        console.print()
        console.print(table)
    if found.get("recipes"):
        console.print()
        console.print(_recipe_table(found["recipes"]))
    console.print(f"\n[bold]disk[/]  {found['disk']['free_gb']:.1f} GB free in {found['disk']['folder']}")


def _recipe_table(recipes: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="a training step of each recipe here", title_justify="left", box=None, header_style="bold")
    for column in ("recipe", "parameters", "batch", "memory", "operations", "about"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    for needs in recipes:
        name = f"{needs['task']} {needs['recipe']}"
        if needs["problem"]:
            table.add_row(name, f"[dim]{needs['problem']}[/]")
            continue
        memory = f"{needs['need_gb']:.1f} GB" if needs["fits"] else f"[red]{needs['need_gb']:.1f} GB, too much[/]"
        seconds = f"{needs['step_seconds']:.2g} s" if needs["step_seconds"] else "?"
        table.add_row(
            name,
            f"{needs['parameters'] / 1e6:.1f} M",
            str(needs["batch_size"]),
            memory,
            f"{needs['step_flop'] / 1e12:.2g} TFLOP",
            seconds,
        )
    return table
