"""The demo's training: three processes of `medgen train`, one of them shot with kill -9, and the proof that it did not matter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from safetensors import safe_open

from medgen.config import Config, save_config
from medgen.demo.page import loss_chart
from medgen.demo.session import Session, read_lines
from medgen.tasks.text_to_cxr import TextToCXRRecipe


class DemoError(RuntimeError):
    """A step of the demo that failed; the message says which and shows its last words."""


@dataclass(frozen=True)
class Resumed:
    """What the three processes left: losses by step, the step of the kill and the one of the checkpoint, and the difference."""

    alone: list[tuple[int, float]]
    before: list[tuple[int, float]]
    after: list[tuple[int, float]]
    checkpoint: int
    difference: float
    tensors: int


def train_and_resume(session: Session, manifest: Path) -> dict[str, Any]:
    """Fine-tune the pipeline's denoiser: alone, and killed and resumed; the page's part about it."""
    with session.step("training, a kill -9, and the same command again", "training") as folder:
        folder.mkdir(parents=True, exist_ok=True)
        recipe = write_recipe(session, manifest, folder)
        result = run_three(session, recipe, folder)
    return describe(session, result)


def write_recipe(session: Session, manifest: Path, folder: Path) -> Path:
    """The recipe of the fine-tuning: the shipped pipeline's own parts, its denoiser trained on."""
    shipped, sizes = str(session.source.folder), session.sizes
    recipe = TextToCXRRecipe.model_validate({
        "data": {"manifest": manifest, "preprocessing": session.preprocessing, "prompts": {"sections": "mixed", "view": True}},
        "autoencoder": {"path": shipped},
        "text_encoder": {"path": shipped, "max_tokens": session.max_tokens},
        "denoiser": {"init_from": shipped},
        "cache": folder / "cache",
        "export_dtype": "float32",
        # On the CPU in float32 resuming is exact to the last bit; with cuDNN and bf16 it is as exact as their kernels.
        "train": {
            "out": folder / "run", "steps": sizes.steps, "batch_size": 16, "learning_rate": 1e-4, "schedule": "constant_with_warmup",
            "warmup_steps": 4, "mixed_precision": "no", "cpu": True, "ema": {"decay": 0.99}, "log_every": 1, "preflight": False,
            "checkpoint_every": sizes.checkpoint_every, "validate_every": 0, "preview_every": 0, "tensorboard": False,
        },
    })  # fmt: skip
    assert isinstance(recipe, Config)
    path = folder / "recipe.yaml"
    save_config(recipe, path)
    return path


def run_three(session: Session, recipe: Path, folder: Path) -> Resumed:
    """Start, kill, start again; meanwhile another run that nobody disturbs."""
    sizes, disturbed, alone = session.sizes, folder / "killed-and-resumed", folder / "left-alone"
    before: list[tuple[int, float]] = []
    if not (disturbed / "export").exists():
        process = start(recipe, disturbed)
        before = wait_for_step(process, disturbed, sizes.kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
        session.say(f"kill -9 at step {before[-1][0]}; now the same command again")
    else:
        before = losses(disturbed)[: sizes.kill_after]
    undisturbed = start(recipe, alone)
    resumed = start(recipe, disturbed)
    for process, out in ((resumed, disturbed), (undisturbed, alone)):
        finish(process, out)
    after = losses(disturbed)
    checkpoint = before[-1][0] // sizes.checkpoint_every * sizes.checkpoint_every
    difference, tensors = largest_difference(alone / "export", disturbed / "export")
    return Resumed(losses(alone), before, [entry for entry in after if entry[0] > checkpoint], checkpoint, difference, tensors)


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """`medgen train text-to-cxr --config RECIPE train.out=OUT`, on one thread, its words in OUT.log."""
    command = [sys.executable, "-m", "medgen.cli", "train", "text-to-cxr", "--config", str(recipe), f"train.out={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for_step(process: subprocess.Popen[bytes], out: Path, step: int) -> list[tuple[int, float]]:
    """Losses so far, as soon as step `step` is done."""
    while True:
        ended = process.poll() is not None
        seen = losses(out)
        if seen and seen[-1][0] >= step:
            return seen
        if ended:
            raise failure(process, out)
        time.sleep(0.02)


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for the end. Raises `DemoError` with the run's last words if it failed."""
    if process.wait() != 0:
        raise failure(process, out)


def failure(process: subprocess.Popen[bytes], out: Path) -> DemoError:
    """The error of a training that ended too soon."""
    said = out.with_suffix(".log").read_text(errors="replace").strip().splitlines()
    return DemoError(f"training into {out} ended with code {process.returncode}: " + "\n".join(said[-8:]))


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run, in the order of the steps; a line that is still being written does not count."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    return [(line["step"], line["loss"]) for line in read_lines(path) if line["kind"] == "train"]


def largest_difference(one: Path, other: Path) -> tuple[float, int]:
    """Largest absolute difference between two exported denoisers, and how many tensors were compared."""
    paths = [next((folder / "denoiser").glob("*.safetensors")) for folder in (one, other)]
    with safe_open(paths[0], "pt") as first, safe_open(paths[1], "pt") as second:
        names = list(first.keys())
        if set(names) != set(second.keys()):
            return float("inf"), len(names)
        return max(float((first.get_tensor(name) - second.get_tensor(name)).abs().max()) for name in names), len(names)


def describe(session: Session, result: Resumed) -> dict[str, Any]:
    """The page's words about the training."""
    killed, sizes = result.before[-1][0], session.sizes
    same = result.difference == 0
    exact = "identical, bit for bit" if same else f"different by up to {result.difference:.1e}"
    events = [
        ("", f"started from the shipped weights, <b>{sizes.steps} steps</b> of 16 films"),
        ("", f"a checkpoint every {sizes.checkpoint_every} steps: complete or absent, never half"),
        ("kill", f"<b>kill -9</b> after step {killed}: no warning, no clean-up"),
        ("ok", f"the same command again: found step {result.checkpoint}, took the steps after it once more"),
        ("ok" if same else "kill", f"all {result.tensors} tensors of both runs are <b>{exact}</b>"),
    ]
    return {
        "films": session.training_films, "steps": sizes.steps, "killed_at": killed,
        "verdict": f"The weights of the two are {exact}.",
        "chart": loss_chart(result.alone, result.before, result.after),
        "events": [(kind, Markup(text)) for kind, text in events],
    }  # fmt: skip
