"""`medgen augment train`: the same classifier on real, synthetic and mixed films, at shares of the real data and over seeds.

Every run takes equally many optimiser steps, so that more films are not more training, and starts from the same weights and real
patients as the other arms of its seed. RUNS/<arm>/<percent>/<seed>/ is skipped where it is complete; the same command continues.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from pydantic import Field, field_validator, model_validator

from medgen.augmentation.cohorts import Cohorts, open_cohorts, refuse_one_class, sources
from medgen.config import Config, ConfigError, load_config, save_config
from medgen.data.images import ImagePreprocessing
from medgen.data.records import Finding
from medgen.models.image_classifier import ImageClassifier
from medgen.tasks.base import TrainConfig
from medgen.tasks.classifier import JudgeAugmentation
from medgen.tasks.image_classifier import (
    Films,
    FilmSource,
    FindingFilms,
    ImageClassifierModel,
    ImageClassifierRecipe,
    ImageClassifierTask,
    Thinning,
    build,
    drawn,
    masked_loss,
    predict,
)
from medgen.training.checkpoint import checkpoints, read_tensors
from medgen.training.guards import EXIT_STOPPED
from medgen.training.loop import train as train_task

_ARM = re.compile(r"real|pretrained|synthetic|(synthetic|mixed)-([1-9]x|all)")
# A later call may ask for more arms and seeds; what the manifests hold is compared, not where they lie.
_FREE = ("arms", "seeds", "real", "synthetic", "external", "cache")
_TELLING = ("out", "workers", "preflight", "log_every", "tensorboard", "wandb_project", "cpu")  # of `train`: change no weight


class ExperimentConfig(Config):
    """`medgen augment train --config ...`."""

    real: Path = Field(..., description="manifest of real films with splits train, val and test")
    synthetic: Path | None = Field(None, description="manifest of synthetic films, as `medgen augment generate` writes it")
    external: Path | None = Field(None, description="manifest of real films of another site; all of them are tested on")
    arms: dict[str, tuple[float, ...]] = Field(
        ...,
        min_length=1,
        description="fractions of the real patients, by arm: real, synthetic (as many films as real; synthetic-3x: three times as "
        "many; synthetic-all), mixed-1x to mixed-9x (real and so many times as many synthetic), mixed-all, pretrained (all "
        "synthetic films, then real)",
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of patients drawn, weights, and order")
    findings: tuple[Finding, ...] = Field(get_args(Finding), min_length=1)
    rare: Thinning | None = Field(None, description="make a finding rare among the real training films; val and test stay")
    validate_on_fraction: bool = Field(
        False,
        description="cut the real validation patients down to the same fraction. By default all of them choose checkpoint and "
        "threshold, for every arm: what is compared is what training films are worth, not luck in choosing",
    )
    pretraining: float = Field(0.5, gt=0, lt=1, description="share of the steps that arm `pretrained` spends on synthetic films")
    preprocessing: ImagePreprocessing = ImagePreprocessing(size=224)
    cache: Path | None = Field(None, description="folder for preprocessed films")
    in_memory: bool = Field(False, description="keep decoded films in memory, in 256 grey values")
    model: ImageClassifierModel = ImageClassifierModel()
    augmentation: JudgeAugmentation = JudgeAugmentation()
    train: TrainConfig = Field(
        ..., description="of every run; `out` is the folder of all, `seeds` stand in for `seed`, the `keep` newest of its "
        "checkpoints are candidates"
    )  # fmt: skip

    @field_validator("arms")
    @classmethod
    def _arms(cls, arms: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        for arm, fractions in arms.items():
            if not _ARM.fullmatch(arm):
                raise ValueError(
                    f"{arm!r} is no arm; there are real, synthetic, synthetic-2x to -9x or -all, mixed-1x to -9x or -all, pretrained"
                )
            if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
                raise ValueError(f"{arm}: fractions of the real patients are above 0 and at most 1")
        return arms

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        if self.synthetic is None and set(self.arms) != {"real"}:
            raise ValueError(f"arms {', '.join(set(self.arms) - {'real'})} need `synthetic`, a manifest")
        if self.train.seed != 0:
            raise ValueError("train.seed has no place here; give `seeds`")
        if self.rare is not None and self.rare.finding not in self.findings:
            raise ValueError(f"rare.finding {self.rare.finding!r} is not among `findings`")
        return self


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
    """Train every run of an augmentation experiment that is not complete yet, and predict its validation, test and external films.

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
    experiment = load_config(ExperimentConfig, config, overrides)
    films = Films(experiment.preprocessing, experiment.cache, experiment.in_memory)
    cohorts = open_cohorts(experiment.real, experiment.synthetic, experiment.external, experiment.findings, films)
    runs = plan_runs(experiment, cohorts)
    claim(experiment, cohorts, runs)
    for number, run in enumerate(runs):
        if number % shards == shard and not (experiment.train.out / run.folder / "run.json").exists():
            print(f"run {number + 1} of {len(runs)}: {run.folder}", flush=True)
            take(run, experiment, cohorts)
            summarise(experiment, cohorts, runs)
    done = summarise(experiment, cohorts, runs)
    print(f"{done} of {len(runs)} runs are complete: {experiment.train.out / 'experiment.json'}")


def plan_runs(experiment: ExperimentConfig, cohorts: Cohorts) -> list[Run]:
    """Every run, whole seeds first so that an interrupted experiment can be read. Raises `ConfigError` if one cannot be done."""
    runs = [
        Run(arm, fraction, seed)
        for seed in experiment.seeds
        for arm, fractions in experiment.arms.items()
        for fraction in fractions
    ]
    for run in runs:
        if run.fraction == max(experiment.arms[run.arm]):  # a small share of the patients may well lack a finding: run.json tells
            taken = _sources(experiment, run, cohorts.films)
            records = [record for source in taken for record in drawn(source, cohorts.films, run.seed).records]
            where = f"training films of arm {run.arm!r}, seed {run.seed}, at {run.fraction:g} of the real patients"
            refuse_one_class(records, experiment.findings, where)
    return runs


def _sources(experiment: ExperimentConfig, run: Run, films: Films) -> tuple[FilmSource, ...]:
    return sources(run.arm, run.fraction, run.seed, experiment.real, experiment.synthetic, experiment.rare, films)


def recipe_of(
    experiment: ExperimentConfig, seed: int, taken: tuple[FilmSource, ...], out: Path, steps: int, init_from: Path | None = None
) -> ImageClassifierRecipe:
    """The recipe of one training, complete in itself: `medgen train image-classifier` takes it too."""
    e = experiment
    watched = e.real if e.train.validate_every else None  # the checkpoint is chosen afterwards
    data = {"sources": taken, "validation": watched, "findings": e.findings, "seed": seed, "preprocessing": e.preprocessing}
    model = e.model if init_from is None else e.model.model_copy(update={"weights": None, "init_from": init_from})
    config = e.train.model_copy(update={"out": out, "seed": seed, "steps": steps})
    return ImageClassifierRecipe.model_validate(
        {
            "data": {**data, "cache": e.cache, "in_memory": e.in_memory},
            "model": model,
            "augmentation": e.augmentation,
            "train": config,
        }
    )


def take(run: Run, experiment: ExperimentConfig, cohorts: Cohorts) -> None:
    """Train, choose the checkpoint, predict, and leave `run.json` as the sign that the run is complete."""
    started, folder, steps = time.process_time(), experiment.train.out / run.folder, experiment.train.steps
    init_from = None
    if run.arm == "pretrained":
        first = round(experiment.pretraining * steps)
        init_from, steps = pretrained(experiment, run.seed, first, cohorts.films), steps - first
    taken = _sources(experiment, run, cohorts.films)
    recipe = recipe_of(experiment, run.seed, taken, folder / "training", steps, init_from)
    task = _train(recipe, cohorts.films)
    sets = cohorts.sets(run.fraction if experiment.validate_on_fraction else 1.0, run.seed)
    model, chosen = choose(recipe, sets["val"])
    write_predictions(folder / "predictions.parquet", model, sets, experiment)
    model.save_pretrained(folder / "model")
    trained: FindingFilms = task.dataset("train")
    shown = (trained.targets * trained.mask).sum(0).int().tolist()
    from_real = [record for manifest, record in trained.records if manifest.sha256 == cohorts.real.sha256]
    facts = {
        "arm": run.arm, "fraction": run.fraction, "seed": run.seed, "folder": run.folder,
        "real_films": len(from_real), "real_patients": len({record.patient_id for record in from_real}),
        "synthetic_films": len(trained) - len(from_real), "positives": dict(zip(experiment.findings, shown, strict=True)), **chosen,
        "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip
    if run.arm == "pretrained" and cohorts.synthetic is not None:
        facts["synthetic_films"] = len(cohorts.synthetic)
    _write_json(folder / "run.json", facts)
    for name in ("checkpoints", "export"):  # the chosen weights are in model/
        shutil.rmtree(folder / "training" / name)


def pretrained(experiment: ExperimentConfig, seed: int, steps: int, films: Films) -> Path:
    """The folder of the classifier that has seen all synthetic films, and no real one, for `steps`; all fractions share it."""
    assert experiment.synthetic is not None
    out = experiment.train.out / "pretrained" / "synthetic" / str(seed)
    export = out / "export"
    if not export.exists():
        _train(recipe_of(experiment, seed, (FilmSource(manifest=experiment.synthetic),), out, steps), films)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return export


def _train(recipe: ImageClassifierRecipe, films: Films) -> ImageClassifierTask:
    task = ImageClassifierTask(recipe, films)
    if train_task(task, recipe.train, recipe).stopped:
        raise SystemExit(EXIT_STOPPED)
    return task


def choose(recipe: ImageClassifierRecipe, val: FindingFilms) -> tuple[ImageClassifier, dict[str, Any]]:
    """The candidate with the smallest loss on the real films of `val`, and which it was."""
    device = torch.device("cuda" if torch.cuda.is_available() and not recipe.train.cpu else "cpu")
    model = build(recipe.model, recipe.data).to(device, memory_format=torch.channels_last).eval()
    best: tuple[float, int, dict[str, torch.Tensor]] | None = None
    losses = {}
    for folder in checkpoints(recipe.train.out / "checkpoints"):
        weights, step = _weights(folder), int(folder.name.split("-")[1])
        model.load_state_dict(weights)
        loss = float(masked_loss(predict(model, val, recipe.train.batch_size), val.targets, val.mask))
        losses[str(step)] = round(loss, 6)
        if best is None or loss < best[0]:
            best = (loss, step, weights)
    if best is None:
        raise ConfigError(f"{recipe.train.out} holds no checkpoint; remove the folder to train this run again")
    model.load_state_dict(best[2])
    return model, {"selected_step": best[1], "val_loss": round(best[0], 6), "candidates": losses}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint where it has an average, its own otherwise."""
    weights, average = read_tensors(folder / "model" / "model.safetensors"), folder / "ema" / "model.safetensors"
    return weights | (read_tensors(average) if average.exists() else {})


def write_predictions(path: Path, model: ImageClassifier, sets: dict[str, FindingFilms], experiment: ExperimentConfig) -> None:
    """record_id, patient_id, set, and for each finding truth_ (0, 1), mask_ (false: uncertain) and p_, of the films of all `sets`."""
    tables = []
    for name, films in sets.items():
        scores = predict(model, films, experiment.train.batch_size).sigmoid().numpy()
        records = [record for _, record in films.records]
        columns: dict[str, Any] = {"record_id": [r.record_id for r in records], "patient_id": [r.patient_id for r in records]}
        columns["set"] = [name] * len(records)
        for i, finding in enumerate(experiment.findings):
            columns[f"truth_{finding}"] = films.targets[:, i].numpy().astype("int8")
            columns[f"mask_{finding}"] = films.mask[:, i].bool().numpy()
            columns[f"p_{finding}"] = scores[:, i]
        tables.append(pa.table(columns))
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.concat_tables(tables), temporary)
    temporary.replace(path)


def claim(experiment: ExperimentConfig, cohorts: Cohorts, runs: list[Run]) -> None:
    """Make the experiment's folder, or check that it is of this experiment: more arms, fractions and seeds may have come.

    Raises `ConfigError` naming what differs.
    """
    out = experiment.train.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / "experiment.json"
    if path.exists():
        old, new = (_decisive(facts) for facts in (json.loads(path.read_text()), _facts(experiment, cohorts)))
        old.setdefault("synthetic films", new.get("synthetic films"))  # they may come when the real arms are done
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


def _facts(experiment: ExperimentConfig, cohorts: Cohorts) -> dict[str, Any]:
    named = {
        "real": (experiment.real, cohorts.real),
        "synthetic": (experiment.synthetic, cohorts.synthetic),
        "external": (experiment.external, cohorts.external),
    }
    manifests = {
        key: {"path": str(path.resolve()), "name": manifest.name, "sha256": manifest.sha256, "films": len(manifest)}
        for key, (path, manifest) in named.items()
        if path is not None and manifest is not None
    }
    return {"findings": list(experiment.findings), "manifests": manifests, "config": experiment.model_dump(mode="json")}


def _decisive(facts: dict[str, Any]) -> dict[str, Any]:
    """What of experiment.json decides the weights of a run, by name."""
    config = {key: value for key, value in facts["config"].items() if key not in (*_FREE, "train")}
    training = {f"train.{key}": value for key, value in facts["config"]["train"].items() if key not in _TELLING}
    return config | training | {f"{name} films": manifest["sha256"] for name, manifest in facts["manifests"].items()}


def summarise(experiment: ExperimentConfig, cohorts: Cohorts, runs: list[Run]) -> int:
    """Write OUT/experiment.json from the runs that are complete; returns how many are."""
    out = experiment.train.out
    done = [json.loads(path.read_text()) for run in runs if (path := out / run.folder / "run.json").exists()]
    facts = {**_facts(experiment, cohorts), "planned": len(runs), "complete": len(done) == len(runs), "runs": done}
    _write_json(out / "experiment.json", {**facts, "notes": list(_notes(experiment, cohorts))})
    return len(done)


def _notes(experiment: ExperimentConfig, cohorts: Cohorts) -> Iterator[str]:
    """What a reader must know to judge the figures."""
    yield f"every run takes {experiment.train.steps} optimiser steps of {experiment.train.batch_size} films, whatever its arm"
    yield (
        "the checkpoint is the candidate with the smallest loss on real validation films: "
        + (
            "the run's fraction of their patients"
            if experiment.validate_on_fraction
            else "all of them, in every arm and fraction"
        )
    )
    if experiment.rare is not None:
        yield (
            f"{experiment.rare.finding} was thinned to {experiment.rare.prevalence:.2%} of the real training films; validation, test "
            "and external films keep their prevalence"
        )
    if cohorts.synthetic is not None:
        yield (
            "fractions say how many real films the classifier sees; the generator of the synthetic films may have learned from more "
            "of them (its model card says from whom)"
        )


def _write_json(path: Path, facts: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.replace(path)
