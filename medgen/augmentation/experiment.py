"""`medgen augment train`: the same network on real, synthetic and mixed films or clips, at shares of the real data and over seeds.

Every run takes equally many optimiser steps, so that more data are not more training, and starts from the same weights and real
patients as the other arms of its seed. RUNS/<arm>/<percent>/<seed>/ is skipped where it is complete; the same command continues.
What is learned, findings or the ejection fraction, is the business of `learners`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from torch import nn

from medgen.augmentation.cohorts import Cohorts, open_cohorts, sources
from medgen.augmentation.experiment_config import ClipExperiment, FilmExperiment, load_experiment
from medgen.augmentation.learners import Learner, learner_of
from medgen.config import ConfigError, save_config
from medgen.training.checkpoint import checkpoints, read_tensors
from medgen.training.guards import EXIT_STOPPED
from medgen.training.loop import train as train_task

Experiment = FilmExperiment | ClipExperiment
# A later call may ask for more arms and seeds; what the manifests hold is compared, not where they lie.
_FREE = ("task", "arms", "seeds", "real", "synthetic", "external", "cache")
_TELLING = ("out", "workers", "preflight", "log_every", "tensorboard", "wandb_project", "cpu")  # of `train`: change no weight


@dataclass(frozen=True)
class Run:
    """One training: an arm at a fraction of the real patients with a seed."""

    arm: str
    fraction: float
    seed: int

    @property
    def folder(self) -> str:
        """Below the experiment's folder."""
        return f"{self.arm}/{self.fraction * 100:g}/{self.seed}"


def train(config: Path, overrides: tyro.conf.Positional[tuple[str, ...]] = (), shard: int = 0, shards: int = 1) -> None:
    """Train every run of an augmentation experiment that is not complete yet, and predict its validation, test and external sets.

    Writes OUT/<arm>/<percent>/<seed>/ with predictions.parquet, run.json and model/, and OUT/experiment.json.

    Args:
        config: the experiment, one of configs/augmentation/*.yaml.
        overrides: further words section.field=value override any field of it.
        shard: which part of the runs this process takes, counted from 0.
        shards: how many processes share the runs.
    """
    if not 0 <= shard < shards:
        raise ConfigError(f"shard {shard} of {shards}: shards are counted from 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("the runs of an experiment are shared out by --shard and --shards, one process each, not by a launcher")
    experiment = load_experiment(config, overrides)
    cohorts = open_cohorts(experiment.real, experiment.synthetic, experiment.external, learner_of(experiment))
    runs = plan_runs(experiment, cohorts)
    claim(experiment, cohorts, runs)
    for number, run in enumerate(runs):
        if number % shards == shard and not (experiment.train.out / run.folder / "run.json").exists():
            print(f"run {number + 1} of {len(runs)}: {run.folder}", flush=True)
            take(run, experiment, cohorts)
            summarise(experiment, cohorts, runs)
    done = summarise(experiment, cohorts, runs)
    print(f"{done} of {len(runs)} runs are complete: {experiment.train.out / 'experiment.json'}")


def plan_runs(experiment: Experiment, cohorts: Cohorts) -> list[Run]:
    """Every run, whole seeds first so that an interrupted experiment can be read. Raises `ConfigError` if one cannot be done."""
    runs = [
        Run(arm, fraction, seed)
        for seed in experiment.seeds
        for arm, fractions in experiment.arms.items()
        for fraction in fractions
    ]
    for run in runs:
        if run.fraction == max(experiment.arms[run.arm]):  # a small share of the patients may well lack a finding: run.json tells
            learner, taken = cohorts.learner, _sources(experiment, run, cohorts.learner)
            records = [record for source in taken for record in learner.drawn(source, run.seed).records]
            items = learner.outcome.items
            learner.refuse_constant(
                records, f"training {items} of arm {run.arm!r}, seed {run.seed}, at {run.fraction:g} of the real patients"
            )
    return runs


def _sources(experiment: Experiment, run: Run, learner: Learner) -> tuple[Any, ...]:
    return sources(run.arm, run.fraction, run.seed, experiment.real, experiment.synthetic, learner)


def take(run: Run, experiment: Experiment, cohorts: Cohorts) -> None:
    """Train, choose the checkpoint, predict, and leave `run.json` as the sign that the run is complete."""
    started, folder, steps = time.process_time(), experiment.train.out / run.folder, experiment.train.steps
    learner, init_from = cohorts.learner, None
    if run.arm == "pretrained":
        first = round(experiment.pretraining * steps)
        init_from, steps = pretrained(experiment, run.seed, first, learner), steps - first
    taken = _sources(experiment, run, learner)
    task = _train(experiment, learner, taken, run.seed, folder / "training", steps, init_from)
    sets = cohorts.sets(run.fraction if experiment.validate_on_fraction else 1.0, run.seed)
    model, chosen = choose(task.modules()["model"], folder / "training", sets["val"], experiment, learner)
    write_predictions(folder / "predictions.parquet", model, sets, experiment, learner)
    model.save_pretrained(folder / "model")
    trained, items = task.dataset("train"), learner.outcome.items
    from_real = [record for manifest, record in trained.records if manifest.sha256 == cohorts.real.sha256]
    facts = {
        "arm": run.arm, "fraction": run.fraction, "seed": run.seed, "folder": run.folder,
        f"real_{items}": len(from_real), "real_patients": len({record.patient_id for record in from_real}),
        f"synthetic_{items}": len(trained) - len(from_real), **learner.facts(trained), **chosen,
        "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip
    if run.arm == "pretrained" and cohorts.synthetic is not None:
        facts[f"synthetic_{items}"] = len(cohorts.synthetic)
    _write_json(folder / "run.json", facts)
    for name in ("checkpoints", "export"):  # the chosen weights are in model/
        shutil.rmtree(folder / "training" / name)


def pretrained(experiment: Experiment, seed: int, steps: int, learner: Learner) -> Path:
    """The folder of the network that has seen all synthetic items, and no real one, for `steps`; all fractions share it."""
    assert experiment.synthetic is not None
    out = experiment.train.out / "pretrained" / "synthetic" / str(seed)
    export = out / "export"
    if not export.exists():
        _train(experiment, learner, (learner.source(experiment.synthetic),), seed, out, steps)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return export


def _train(
    experiment: Experiment, learner: Learner, taken: tuple[Any, ...], seed: int, out: Path, steps: int, init_from: Path | None = None
) -> Any:  # fmt: skip
    """The task, trained."""
    config = experiment.train.model_copy(update={"out": out, "seed": seed, "steps": steps})
    task, recipe = learner.task(taken, seed, config, init_from)
    if train_task(task, config, recipe).stopped:
        raise SystemExit(EXIT_STOPPED)
    return task


def choose(model: Any, training: Path, val: Any, experiment: Experiment, learner: Learner) -> tuple[Any, dict[str, Any]]:
    """`model` with the weights of the candidate that has the smallest loss on the real items of `val`, and which it was."""
    device = torch.device("cuda" if torch.cuda.is_available() and not experiment.train.cpu else "cpu")
    model = model.to(device).eval()
    best: tuple[float, int, dict[str, torch.Tensor]] | None = None
    losses = {}
    for folder in checkpoints(training / "checkpoints"):
        weights, step = _weights(folder), int(folder.name.split("-")[1])
        model.load_state_dict(weights)
        loss = learner.loss(learner.predict(model, val, experiment.train.batch_size), val)
        losses[str(step)] = round(loss, 6)
        if best is None or loss < best[0]:
            best = (loss, step, weights)
    if best is None:
        raise ConfigError(f"{training} holds no checkpoint; remove the folder to train this run again")
    model.load_state_dict(best[2])
    return model, {"selected_step": best[1], "val_loss": round(best[0], 6), "candidates": losses}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint where it has an average, its own otherwise."""
    weights, average = read_tensors(folder / "model" / "model.safetensors"), folder / "ema" / "model.safetensors"
    return weights | (read_tensors(average) if average.exists() else {})


def write_predictions(path: Path, model: nn.Module, sets: dict[str, Any], experiment: Experiment, learner: Learner) -> None:
    """record_id, patient_id, set, and for each column truth_ (0 or 1, or percent), mask_ (false: uncertain) and p_ (probability, or
    percent read), of the items of all `sets`."""
    tables = []
    for name, items in sets.items():
        scores = learner.scores(learner.predict(model, items, experiment.train.batch_size)).numpy()
        truth, known = (values.numpy() for values in learner.truths(items))
        records = [record for _, record in items.records]
        columns: dict[str, Any] = {"record_id": [r.record_id for r in records], "patient_id": [r.patient_id for r in records]}
        columns["set"] = [name] * len(records)
        for i, column in enumerate(learner.columns):
            columns |= {f"truth_{column}": truth[:, i], f"mask_{column}": known[:, i], f"p_{column}": scores[:, i]}
        tables.append(pa.table(columns))
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.concat_tables(tables), temporary)
    temporary.replace(path)


def claim(experiment: Experiment, cohorts: Cohorts, runs: list[Run]) -> None:
    """Make the experiment's folder, or check that it is of this experiment: more arms, fractions and seeds may have come.

    Raises `ConfigError` naming what differs.
    """
    out = experiment.train.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / "experiment.json"
    if path.exists():
        old, new = (
            _decisive(facts, cohorts.learner.outcome.items)
            for facts in (json.loads(path.read_text()), _facts(experiment, cohorts))
        )
        late = f"synthetic {cohorts.learner.outcome.items}"
        old.setdefault(late, new.get(late))  # they may come when the real arms are done
        differing = [
            f"  {key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in {**old, **new} if old.get(key) != new.get(key)
        ]
        if differing:
            raise ConfigError(
                f"{out} holds runs of another experiment:\n"
                + "\n".join(differing)
                + "\nChoose another train.out, or take these back"
            )
    save_config(experiment, out / "config.yaml")
    summarise(experiment, cohorts, runs)


def _facts(experiment: Experiment, cohorts: Cohorts) -> dict[str, Any]:
    named = {
        "real": (experiment.real, cohorts.real),
        "synthetic": (experiment.synthetic, cohorts.synthetic),
        "external": (experiment.external, cohorts.external),
    }
    manifests = {
        key: {
            "path": str(path.resolve()),
            "name": manifest.name,
            "sha256": manifest.sha256,
            cohorts.learner.outcome.items: len(manifest),
        }
        for key, (path, manifest) in named.items()
        if path is not None and manifest is not None
    }
    return {"findings": list(cohorts.learner.columns), "manifests": manifests, "config": experiment.model_dump(mode="json")}


def _decisive(facts: dict[str, Any], items: str) -> dict[str, Any]:
    """What of experiment.json decides the weights of a run, by name."""
    config = {key: value for key, value in facts["config"].items() if key not in (*_FREE, "train")}
    training = {f"train.{key}": value for key, value in facts["config"]["train"].items() if key not in _TELLING}
    return config | training | {f"{name} {items}": manifest["sha256"] for name, manifest in facts["manifests"].items()}


def summarise(experiment: Experiment, cohorts: Cohorts, runs: list[Run]) -> int:
    """Write OUT/experiment.json from the runs that are complete; returns how many are."""
    out = experiment.train.out
    done = [json.loads(path.read_text()) for run in runs if (path := out / run.folder / "run.json").exists()]
    facts = {**_facts(experiment, cohorts), "planned": len(runs), "complete": len(done) == len(runs), "runs": done}
    _write_json(out / "experiment.json", {**facts, "notes": list(_notes(experiment, cohorts))})
    return len(done)


def _notes(experiment: Experiment, cohorts: Cohorts) -> Iterator[str]:
    """What a reader must know to judge the figures."""
    items, network = cohorts.learner.outcome.items, cohorts.learner.outcome.network
    yield f"every run takes {experiment.train.steps} optimiser steps of {experiment.train.batch_size} {items}, whatever its arm"
    yield f"the checkpoint is the candidate with the smallest loss on real validation {items}: " + (
        "the run's fraction of their patients" if experiment.validate_on_fraction else "all of them, in every arm and fraction"
    )
    if isinstance(experiment, FilmExperiment) and experiment.rare is not None:
        yield (
            f"{experiment.rare.finding} was thinned to {experiment.rare.prevalence:.2%} of the real training films; validation, test "
            "and external films keep their prevalence"
        )
    if cohorts.synthetic is not None:
        yield (
            f"fractions say how many real {items} the {network} sees; the generator of the synthetic {items} may have learned from "
            "more of them (its model card says from whom)"
        )


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.replace(path)
