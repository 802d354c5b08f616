"""The one training loop. A run is a folder; the same command again continues it, bit for bit on a CPU in fp32.

All state is weights, moments, averages and counters: every draw is seeded by (run seed, purpose, micro step, rank), the data
order by (seed, epoch). OUT/ holds config.yaml, metrics.jsonl, checkpoints/step-*/, previews/*.png and, at the end, export/.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast, gather_object
from torch import Tensor, nn

from medgen.config import Config, ConfigError, save_config
from medgen.data.order import EpochView, SampleOrder, loader, move
from medgen.seeds import generator, stable_seed
from medgen.stopping import STOP, StopRequested
from medgen.tasks.base import EMAConfig, Task, TrainConfig
from medgen.training.checkpoint import fsync, newest, write_checkpoint
from medgen.training.folder import open_folder
from medgen.training.guards import EXIT_STOPPED, NonFiniteError, suspects
from medgen.training.memory import DTYPES, say_memory
from medgen.training.report import Reporter, memory_gb
from medgen.training.trained import TrainedModule, load_scaler, read_small, switch_on

__all__ = ["EXIT_STOPPED", "EMAConfig", "TrainConfig", "TrainResult", "train"]

_COUNTERS = ("step", "samples", "bad_in_a_row", "validated_step", "window", "last")  # what a checkpoint holds of a `Trainer`


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands: `stopped` means a signal ended it early and the same call continues it."""

    folder: Path
    step: int
    stopped: bool
    metrics: dict[str, float]


def train(task: Task, config: TrainConfig, run_config: Config) -> TrainResult:
    """Train `task` to `config.steps`, from the newest sound checkpoint of `config.out` if there is one.

    Raises `ConfigError` if the folder belongs to another configuration, `MemoryPreflightError` if a step would not fit,
    `NonFiniteError` after `config.max_nonfinite` bad steps in a row, `CheckpointError` for a checkpoint that cannot be used.
    """
    with STOP.listening():
        trainer: Trainer | None = None
        try:
            trainer = Trainer(task, config, run_config)
            return trainer.run()
        except StopRequested:  # before the first step: nothing to save that is not saved already
            return TrainResult(config.out, 0 if trainer is None else trainer.step, True, {})
        finally:
            if trainer is not None:
                trainer.close()


class Trainer:
    """One run in one process. Counters: `step` (optimiser steps), `samples` (consumed by all ranks), `bad_in_a_row`."""

    def __init__(self, task: Task, config: TrainConfig, run_config: Config) -> None:
        AcceleratorState._reset_state()  # a notebook trains several tasks, each with its own precision
        self.task, self.config, self.run_config = task, config, run_config
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.accumulate,
            cpu=config.cpu,
            step_scheduler_with_optimizer=False,
        )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ConfigError(
                "DeepSpeed keeps its optimiser state in pickles: use configs/accelerate/fsdp.yaml, which shards the same"
            )
        self.device, self.dtype = self.accelerator.device, DTYPES[config.mixed_precision]
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.step = self.samples = self.bad_in_a_row = self.validated_step = 0
        self.window: dict[str, list[float]] = {}  # name → [sum, count] since the last logged step
        self.last: dict[str, float] = {}
        if self.accelerator.is_main_process:
            open_folder(config, run_config)
        self.accelerator.wait_for_everyone()

        torch.manual_seed(stable_seed("weights", config.seed))
        self.modules = {name: module.to(self.device) for name, module in task.modules().items()}
        task.to(self.device, self.dtype)
        self.dataset, self.validation = task.dataset("train"), task.dataset("val")
        for module in self.modules.values():
            module.train()
            switch_on(module, config)
        preflight = say_memory(task, self.modules, self.dataset, config, self.device) if config.preflight else ""
        self.trained = [TrainedModule(task, name, self.modules, config, self.accelerator) for name in self.modules]
        metrics_bytes = self._resume()
        self.report = Reporter(config, run_config, self.accelerator.is_main_process, self.step, metrics_bytes)
        count = sum(p.numel() for trained in self.trained for p in trained.parameters())
        self.report.say(
            f"{task.name}: {count / 1e6:.2f} M trained parameters, {len(self.dataset)} samples, {self.world} process(es) on "
            f"{self.device}, mixed precision {config.mixed_precision}. {preflight}"
        )
        if self.step:
            self.report.say(f"continuing {config.out} from step {self.step}")

    def run(self) -> TrainResult:
        """Take the remaining steps, then export."""
        batches = self.batches()
        if self.step and not self._border(fresh=False):
            return self._stop()
        started, measured_from = time.monotonic(), self.step
        while self.step < self.config.last_step:
            values = self.take_step(batches)
            if values is None:
                return self._stop()
            stop = values.pop("stop")
            for name, value in values.items():
                entry = self.window.setdefault(name, [0.0, 0])
                self.window[name] = [entry[0] + value, entry[1] + 1]
            rate = (self.step - measured_from) * self._step_samples / (time.monotonic() - started)
            self.report.progress(self.step, values.get("loss", float("nan")), rate, self.device)
            if self._due(self.config.log_every):
                self._log(rate)
            if stop or not self._border(fresh=True):
                return self._stop()
            if self._due(self.config.checkpoint_every):
                self._save()
        if self.step > measured_from or not (self.config.out / "export").exists():
            self._export()
        return TrainResult(self.config.out, self.step, False, self.last)

    def close(self) -> None:
        """Release files and the prepared modules."""
        if hasattr(self, "report"):
            self.report.close()
        self.accelerator.free_memory()

    # --- one optimiser step ---

    @property
    def _step_samples(self) -> int:
        return self.config.batch_size * self.world * self.config.accumulate

    def batches(self) -> Iterator[dict[str, Any]]:
        where = (self.config.seed, self.config.batch_size, self.samples, self.rank, self.world)
        sharded = hasattr(self.dataset, "order")  # reads fastest in an order of its own, just as pure a function of its place
        self.order: SampleOrder = self.dataset.order(*where) if sharded else SampleOrder(len(self.dataset), *where)
        pin = self.device.type == "cuda"
        return iter(loader(self.dataset, self.order, self.task.collate, self.config.workers, pin))

    def take_step(self, batches: Iterator[dict[str, Any]]) -> dict[str, float] | None:
        """Accumulate, check, update. Returns the step's means over micro batches and ranks; None if stopped before the update."""
        logs: dict[str, list[Tensor]] = {}
        for trained in self.trained:
            trained.remember_buffers()
        for part in range(self.config.accumulate):
            if STOP.requested and self.world == 1:
                # What this step has done so far is dropped: the checkpoint is of the last step, this one will be taken again.
                for trained in self.trained:
                    trained.undo_buffers()
                return None
            batch = move(next(batches), self.device)
            with self.accelerator.accumulate(*(trained.wrapped for trained in self.trained)):
                for name, value in self._backward(batch, self.step * self.config.accumulate + part):
                    logs.setdefault(name, []).append(value)
        values, bad = self._agree(logs)
        stop = values.pop("stop")
        if bad:
            self._refuse_step(logs)
        else:
            bad = not all([trained.update() for trained in self.trained])  # noqa: C419 - every module is stepped
        for trained in self.trained:
            trained.advance()
        self.step += 1
        self.samples += self._step_samples
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if self.bad_in_a_row >= self.config.max_nonfinite:
            raise NonFiniteError(
                f"{self.bad_in_a_row} steps in a row were not finite (last: step {self.step}); the samples are named in "
                f"{self.config.out / 'metrics.jsonl'}. If the data are sound, lower train.learning_rate, or use bf16, not fp16"
            )
        return {"stop": stop} if bad else {"stop": stop, **values}

    def _backward(self, batch: dict[str, Any], micro: int) -> Iterator[tuple[str, Tensor]]:
        for i, trained in enumerate(self.trained):
            self._seed_dropout("dropout", micro, trained.name)
            draws = generator("train", self.config.seed, micro, self.rank, trained.name, device=self.device)
            with ExitStack() as stack:
                for other in self.trained:
                    if other is not trained:
                        stack.enter_context(other.frozen())
                loss, extra = trained.wrapped(batch, draws)
                self.accelerator.backward(loss)
            prefix = "" if i == 0 else f"{trained.name}/"
            for name, value in {"loss": loss, **extra}.items():
                yield prefix + name, torch.as_tensor(value, device=self.device).detach()

    def _seed_dropout(self, purpose: str, number: int, name: str) -> None:
        """Reseed the global generator, from which dropout draws. (`torch.manual_seed` costs a stack trace where CUDA sleeps.)"""
        seed = stable_seed(purpose, self.config.seed, number, self.rank, name)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _agree(self, logs: dict[str, list[Tensor]]) -> tuple[dict[str, float], bool]:
        """One small reduction per step: means over ranks, whether anything is not finite anywhere, whether anyone must stop."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        means = {name: torch.stack(values).to(wide).mean() for name, values in logs.items()}
        for i, trained in enumerate(self.trained):
            norm = self.accelerator.clip_grad_norm_(trained.parameters(), self.config.max_grad_norm)
            means["grad_norm" if i == 0 else f"{trained.name}/grad_norm"] = torch.as_tensor(norm, device=self.device).to(wide)
        stop = torch.tensor(float(STOP.requested), device=self.device, dtype=wide)
        vector = torch.stack([stop, *means.values()]).detach()
        if self.world > 1:
            vector = self.accelerator.reduce(vector, "mean")
        numbers = vector.tolist()
        values = dict(zip(("stop", *means), numbers))
        # With loss scaling an overflowing gradient is no fault: the scaler skips that step by itself and lowers its scale.
        watched = ("loss",) if self.accelerator.scaler is not None else ("loss", "grad_norm")
        losses = [values[name] for name in values if name.split("/")[-1] in watched]
        return values, not all(abs(value) < float("inf") for value in losses)

    def _refuse_step(self, logs: dict[str, list[Tensor]]) -> None:
        """Drop the gradients on every rank and name the samples: those with bad inputs, else of bad batches, else of the step."""
        losses = [name for name in logs if name.split("/")[-1] == "loss"]
        starts = [self.samples + part * self.config.batch_size * self.world for part in range(self.config.accumulate)]
        finite = [all(bool(logs[name][part].isfinite()) for name in losses) for part in range(self.config.accumulate)]
        # The order is a pure function of its place: what was in the step can be read once more.
        found = gather_object([suspects(EpochView(self.dataset), [self.order.batch(start) for start in starts], finite)])
        guilty = sorted(next(union for kind in zip(*found) if (union := set().union(*kind))))
        self.report.event("nonfinite", self.step + 1, ids=guilty)
        shown = ", ".join(guilty[:8]) + (f" and {len(guilty) - 8} more" if len(guilty) > 8 else "")
        self.report.say(f"step {self.step + 1}: the loss or its gradient is not finite, no update applied; samples: {shown}")
        for trained in self.trained:
            trained.undo_buffers()
            trained.optimizer.zero_grad(set_to_none=True)
            if self.accelerator.scaler is not None:
                trained.optimizer.step()  # without gradients: only the loss scale moves

    # --- what happens between steps ---

    def _due(self, every: int) -> bool:
        """Whether that is due now which is done `every` so many steps (0: never) and after the last one."""
        return every > 0 and (self.step % every == 0 or self.step == self.config.last_step)

    def _log(self, rate: float) -> None:
        values = {name: total / count for name, (total, count) in self.window.items()}
        self.window = {}
        self.last = {**self.last, **values}
        rates = {"lr" if i == 0 else f"{t.name}/lr": float(t.scheduler.get_last_lr()[0]) for i, t in enumerate(self.trained)}
        values |= {"epoch": self.samples / len(self.dataset), "samples": self.samples, **rates}
        self.report.log("train", self.step, {**values, "samples_per_second": rate, "memory_gb": memory_gb(self.device)})

    def _border(self, fresh: bool) -> bool:
        """Validation and previews that are due at this step; false if stopped meanwhile. Redone on resume where interrupted."""
        if self._due(self.config.validate_every) and self.validated_step != self.step and len(self.validation):
            with self._averaged():
                if not self._validate():
                    return False
            self.validated_step = self.step
        if fresh and self._due(self.config.preview_every):
            self._show(lambda modules: self.report.pictures(self.step, self.task.preview(modules, self.config.seed)))
        return True

    @torch.no_grad()
    def _validate(self) -> bool:
        order = SampleOrder(len(self.validation), self.config.seed, self.config.batch_size, 0, self.rank, self.world)
        count = min(self.config.validation_batches, -(-len(self.validation) // (self.config.batch_size * self.world)))
        batches = iter(loader(self.validation, order, self.task.collate, 0, False))
        if self.world > 1:
            broadcast([buffer for module in self.modules.values() for buffer in module.buffers()])  # running statistics are local
        sums: dict[str, Tensor] = {}
        for number in range(count):
            batch = move(next(batches), self.device)
            for i, trained in enumerate(self.trained):
                self._seed_dropout("val dropout", number, trained.name)
                draws = generator("val", self.config.seed, number, self.rank, trained.name, device=self.device)
                loss, extra = trained.wrapped(batch, draws)
                for name, value in {"loss": loss, **extra}.items():
                    key = name if i == 0 else f"{trained.name}/{name}"
                    sums[key] = sums.get(key, torch.zeros((), device=self.device)) + torch.as_tensor(value, device=self.device)
            if self._anyone_stops():
                return False
        means = self.accelerator.reduce(torch.stack(list(sums.values())) / count, "mean").tolist()
        values = dict(zip(sums, means))
        self.last |= {f"val/{name}": value for name, value in values.items()}
        self.report.log("val", self.step, values)
        return True

    def _anyone_stops(self) -> bool:
        return bool(self.accelerator.reduce(torch.tensor(float(STOP.requested), device=self.device), "sum").item())

    @torch.no_grad()
    def _show(self, use: Callable[[dict[str, nn.Module]], None]) -> None:
        """Let the main process `use` the modules, whole, averaged and in evaluation mode."""
        sharded = any(trained.sharded for trained in self.trained)
        snapshots = {trained.name: trained.snapshot() for trained in self.trained} if sharded else {}
        if self.accelerator.is_main_process:
            if sharded:
                modules = self.task.modules()
                for name, module in modules.items():
                    module.load_state_dict({**snapshots[name]["model"], **snapshots[name]["ema"]}, strict=False)
                use({name: module.to(self.device).eval() for name, module in modules.items()})
            else:
                with self._averaged():
                    use(self.modules)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """EMA weights and evaluation mode inside the block."""
        modes = {module: module.training for module in self.modules.values()}
        with ExitStack() as stack:
            for trained in self.trained:
                stack.enter_context(trained.averaged())
            for module in modes:
                module.eval()
            try:
                yield
            finally:
                for module, mode in modes.items():
                    module.train(mode)

    # --- saving, resuming, ending ---

    def _save(self) -> None:
        main = self.accelerator.is_main_process
        snapshots = [trained.snapshot() if main or trained.sharded else {} for trained in self.trained]
        if main:
            write = partial(self._write, snapshots)
            write_checkpoint(self.config.out / "checkpoints", self.step, write, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _write(self, snapshots: list[dict[str, dict[str, Tensor]]], folder: Path) -> None:
        modules = {trained.name: trained.save(folder, snapshot) for trained, snapshot in zip(self.trained, snapshots)}
        scaler = self.accelerator.scaler
        state = {
            **{name: getattr(self, name) for name in _COUNTERS},
            "metrics_bytes": self.report.durable_bytes(),
            "world": self.world,
            "dataset_length": self._data()[0],
            "fingerprint": self._data()[1],
            "modules": modules,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        save_config(self.run_config, folder / "config.yaml")

    def _data(self) -> tuple[int, str | None]:
        return len(self.dataset), getattr(self.dataset, "fingerprint", None)

    def _resume(self) -> int:
        """Load the newest sound checkpoint, if any; returns how many bytes of metrics.jsonl belong to it."""
        root = self.config.out / "checkpoints"
        if self.accelerator.is_main_process:
            newest(root)  # sets damaged ones aside before anyone reads
        self.accelerator.wait_for_everyone()
        folder = newest(root)
        if folder is None:
            return 0
        state = read_small(folder)
        before, now = (state["dataset_length"], state["fingerprint"]), self._data()
        if before != now:
            raise ConfigError(
                f"{self.config.out} was trained on other data: {before[0]} samples (fingerprint {before[1]}), now {now[0]} "
                f"({now[1]}). Choose another train.out, or restore the data"
            )
        for trained in self.trained:
            trained.load(folder, state["modules"][trained.name])
        load_scaler(self.accelerator, state["scaler"])
        for name in _COUNTERS:
            setattr(self, name, state[name])
        return int(state["metrics_bytes"])

    def _stop(self) -> TrainResult:
        if self.step:
            self._save()
        self.report.say(f"stopped by a signal and saved at step {self.step}; the same command continues")
        return TrainResult(self.config.out, self.step, True, self.last)

    def _export(self) -> None:
        def write(modules: dict[str, nn.Module]) -> None:
            final, temporary = self.config.out / "export", self.config.out / ".export.tmp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self.task.export(modules, temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            fsync(self.config.out)
            self.report.say(f"done: {final}")

        self._show(write)
