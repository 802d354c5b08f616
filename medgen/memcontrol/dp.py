"""Fine-tuning with a guarantee: differentially private LoRA (DP-SGD, Abadi et al. 2016, in opacus). The unit is a patient.

Not the one loop of `medgen.training`: the guarantee rests on Poisson sampling of patients (batches of random size, maybe empty), on a
gradient per patient that is clipped before any sum, and on an accountant that counts the same steps; the loop has fixed batches,
accumulates summed gradients and clips those. Its checkpoints are used, and a resumed run is the same run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from torch import Tensor

from medgen.config import Config, ConfigError, load_config
from medgen.data.order import move
from medgen.data.records import read_manifest
from medgen.diffusion.objectives import denoising_loss
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.masks import Adaptation
from medgen.memcontrol.task import FineTuning, MaskedTextToCXR, Start
from medgen.memcontrol.trials import write_json
from medgen.seeds import generator, stable_seed
from medgen.stopping import STOP
from medgen.tasks.text_to_cxr import TextToCXR
from medgen.training.checkpoint import newest, read_json, read_tensors, write_checkpoint, write_tensors
from medgen.training.folder import open_folder
from medgen.training.guards import EXIT_STOPPED


@dataclass(frozen=True)
class Privacy:
    """What was spent: (ε, δ) of a patient in or out of the training set, by opacus' Rényi accountant."""

    epsilon: float
    delta: float
    noise_multiplier: float
    max_grad_norm: float
    patients: int
    sample_rate: float
    steps: int
    unit: str = "patient"
    accountant: str = "rdp"
    covers: str = (
        "the released weights, for one added or removed patient with all films and captions. Not: the choice of settings by looking at "
        "these patients, the pipeline that was started from, or an attacker who can predict the seeded random numbers (they are "
        "reproducible on purpose; keep the seed secret)"
    )


def train_private(
    config: Path,
    out: Path,
    epsilon: float = 8.0,
    delta: float | None = None,
    max_grad_norm: float = 0.1,
    learning_rate: float = 1e-3,
    overrides: tuple[str, ...] = (),
) -> Path:
    """Fine-tune LoRA layers with differential privacy, every patient's influence bounded; the same command again continues.

    The export is a pipeline folder with the LoRA merged in; OUT/privacy.json says what was spent.

    Args:
        config: a memcontrol recipe; its `train` section says the steps, the expected patients of a step (batch_size) and the seed.
        out: folder of the run.
        epsilon: the budget at the end; the noise follows from it.
        delta: chance that the guarantee does not hold; 1 / (10 x patients) if not given, and below 1 / patients always.
        max_grad_norm: to which a patient's gradient is clipped.
        learning_rate: of AdamW.
        overrides: `section.field=value` of the recipe.
    """
    settings = load_config(MemControlConfig, config, (*overrides, f"train.out={out}", f"train.learning_rate={learning_rate}"))
    with STOP.listening():
        run = PrivateRun(settings, epsilon, delta, max_grad_norm)
        while run.step < settings.train.steps:
            if STOP.requested:
                run.save()
                raise SystemExit(EXIT_STOPPED)
            run.take_step()
            if run.step % settings.train.checkpoint_every == 0:
                run.save()
        return run.export()


class _PrivateFineTuning(Config):
    run: FineTuning
    epsilon: float
    delta: float
    max_grad_norm: float


class PrivateRun:
    """One private training on one device. All its random numbers are functions of (seed, step)."""

    def __init__(self, config: MemControlConfig, epsilon: float, delta: float | None, max_grad_norm: float) -> None:
        self.config, self.step, self.accountant = config, 0, RDPAccountant()
        start = Start.of(config)
        base = start.task(config.train, config.inner.caption_dropout)
        if not isinstance(base, TextToCXR):
            raise ConfigError(
                f"pipeline: private training is of medgen's own pipelines; {config.pipeline} has a published network"
            )
        adaptation = Adaptation(method="lora", rank=config.rank)
        self.task, self.base, self.device = MaskedTextToCXR(base, adaptation), base, start.predictor.device
        self.films_of = _films_of_patients(config)
        count, train = len(self.films_of), config.train
        if train.batch_size > count:
            raise ConfigError(f"train.batch_size: {train.batch_size} expected patients a step, but there are {count}")
        self.delta = 1 / (10 * count) if delta is None else delta
        if not 0 < self.delta < 1 / count:
            raise ConfigError(
                f"delta: {self.delta:g} for {count} patients; from 1 / patients on, publishing one record would pass"
            )
        self.rate = train.batch_size / count
        self.noise = float(get_noise_multiplier(
            target_epsilon=epsilon, target_delta=self.delta, sample_rate=self.rate, steps=train.steps, accountant="rdp"
        ))  # fmt: skip
        recorded = FineTuning(memcontrol=config, adaptation=adaptation, train=train)
        open_folder(train, _PrivateFineTuning(run=recorded, epsilon=epsilon, delta=self.delta, max_grad_norm=max_grad_norm))
        torch.manual_seed(stable_seed("weights", train.seed))
        self.model = self.task.modules()["model"].to(self.device).train()
        self.task.to(self.device, torch.float32)
        self.films = self.task.dataset("train")
        trained = [value for value in self.model.parameters() if value.requires_grad]
        self.wrapped = GradSampleModule(self.model, batch_first=True, loss_reduction="mean")
        inner = torch.optim.AdamW(
            trained, lr=train.learning_rate, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
        self.optimizer = DPOptimizer(
            inner, noise_multiplier=self.noise, max_grad_norm=max_grad_norm, expected_batch_size=train.batch_size
        )
        self._resume()

    def take_step(self) -> float:
        """One step of DP-SGD; the mean loss of its patients (NaN where none was drawn)."""
        seed = self.config.train.seed
        draws = generator("private", seed, self.step, device=self.device)
        rows = self._patients()
        loss = torch.tensor(float("nan"))
        if rows:
            batch = move(self.task.collate([self.films[row] for row in rows]), self.device)
            frames = self.base.frames({"model": self.model}, batch, draws)
            loss = denoising_loss(self.wrapped, self.base.objective, frames, draws)
            loss.backward()
        else:  # a step without anyone still adds its noise, or its emptiness would be seen
            for value in self.optimizer.params:
                value.grad_sample = value.new_zeros((0, *value.shape))
        self.optimizer.generator = generator("private noise", seed, self.step, device=self.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.accountant.step(noise_multiplier=self.noise, sample_rate=self.rate)
        self.step += 1
        return float(loss.detach())

    def _patients(self) -> list[int]:
        """Each patient with the same chance, one film of each: a patient's whole influence on a step is one clipped gradient."""
        rows, seed = [], self.config.train.seed
        for name, films in self.films_of.items():
            draw = stable_seed("drawn", seed, self.step, name)
            if draw / 2**63 < self.rate:
                rows.append(films[stable_seed("film", seed, self.step, name) % len(films)])
        return rows

    @property
    def spent(self) -> Privacy:
        """So far."""
        epsilon = float(self.accountant.get_epsilon(self.delta)) if self.step else 0.0
        clip = float(self.optimizer.max_grad_norm)
        return Privacy(epsilon, self.delta, self.noise, clip, len(self.films_of), self.rate, self.step)

    def save(self) -> None:
        """A checkpoint from which the same run goes on."""

        def write(folder: Path) -> None:
            names = {id(value): name for name, value in self.model.named_parameters()}
            tensors = {name: value.data for name, value in self.model.named_parameters() if value.requires_grad}
            moments = {
                f"{names[id(value)]}:{key}": moment
                for value, state in self.optimizer.original_optimizer.state.items()
                for key, moment in state.items()
            }
            write_tensors(folder / "model.safetensors", tensors)
            write_tensors(folder / "optimizer.safetensors", moments)
            (folder / "state.json").write_text(json.dumps({"step": self.step, "history": self.accountant.history}))

        write_checkpoint(self.config.train.out / "checkpoints", self.step, write, self.config.train.keep)

    def _resume(self) -> None:
        folder = newest(self.config.train.out / "checkpoints")
        if folder is None:
            return
        state = read_json(folder / "state.json")
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in read_tensors(folder / "model.safetensors").items():
                parameters[name].copy_(value)
        for key, moment in read_tensors(folder / "optimizer.safetensors").items():
            name, _, kind = key.rpartition(":")
            held: dict[str, Tensor] = self.optimizer.original_optimizer.state[parameters[name]]
            held[kind] = moment if kind == "step" else moment.to(self.device)
        self.step, self.accountant.history = state["step"], [tuple(entry) for entry in state["history"]]

    def export(self) -> Path:
        """The pipeline's folder, with privacy.json in it and beside it."""
        out, spent = self.config.train.out, asdict(self.spent)
        final, temporary = out / "export", out / ".export.tmp"
        if not final.exists():
            self.save()
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            self.wrapped.to_standard_module()
            self.task.export({"model": self.model.eval()}, temporary)
            write_json(temporary / "privacy.json", spent)
            temporary.rename(final)
        write_json(out / "privacy.json", spent)
        print(f"(epsilon, delta) = ({spent['epsilon']:.2f}, {spent['delta']:.1e}) for a patient: {final}")
        return final


def _films_of_patients(config: MemControlConfig) -> dict[str, list[int]]:
    """Rows of the training split by patient."""
    found: dict[str, list[int]] = {}
    for row, record in enumerate(read_manifest(config.data.manifest, "train").records):
        found.setdefault(record.patient_id, []).append(row)
    return found
