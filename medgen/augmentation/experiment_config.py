"""The configuration of an augmentation experiment, on films or on echo clips: what both have, and what is the task's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator

from medgen.config import Config, load_config
from medgen.data.clips import VideoPreprocessing
from medgen.data.images import ImagePreprocessing
from medgen.data.records import Finding
from medgen.tasks.base import TrainConfig
from medgen.tasks.classifier import JudgeAugmentation
from medgen.tasks.ejection_fraction import ClipAugmentation, EjectionFractionModel
from medgen.tasks.image_classifier import ImageClassifierModel, Thinning

_ARM = re.compile(r"real|pretrained|synthetic|(synthetic|mixed)-([1-9]x|all)")


class ExperimentConfig(Config):
    """`medgen augment train --config ...`: what an experiment on films and one on clips have in common ("items" are either)."""

    real: Path = Field(..., description="manifest of real items with splits train, val and test")
    synthetic: Path | None = Field(None, description="manifest of synthetic items, as `medgen augment generate` writes it")
    external: Path | None = Field(None, description="manifest of real items of another site; all of them are tested on")
    arms: dict[str, tuple[float, ...]] = Field(
        ...,
        min_length=1,
        description="fractions of the real patients, by arm: real, synthetic (as many items as real; synthetic-3x: three times as "
        "many; synthetic-all), mixed-1x to mixed-9x (real and so many times as many synthetic), mixed-all, pretrained (all "
        "synthetic items, then real)",
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="of patients drawn, weights, and order")
    validate_on_fraction: bool = Field(
        False,
        description="cut the real validation patients down to the same fraction. By default all of them choose checkpoint and "
        "threshold, for every arm: what is compared is what training items are worth, not luck in choosing",
    )
    pretraining: float = Field(0.5, gt=0, lt=1, description="share of the steps that arm `pretrained` spends on synthetic items")
    cache: Path | None = Field(None, description="folder for preprocessed items")
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
        return self


class FilmExperiment(ExperimentConfig):
    """Classifiers of findings on films."""

    task: Literal["image-classifier"] = "image-classifier"
    findings: tuple[Finding, ...] = Field(get_args(Finding), min_length=1)
    rare: Thinning | None = Field(None, description="make a finding rare among the real training films; val and test stay")
    preprocessing: ImagePreprocessing = ImagePreprocessing(size=224)
    in_memory: bool = Field(False, description="keep decoded films in memory, in 256 grey values")
    model: ImageClassifierModel = ImageClassifierModel()
    augmentation: JudgeAugmentation = JudgeAugmentation()

    @model_validator(mode="after")
    def _rare(self) -> FilmExperiment:
        if self.rare is not None and self.rare.finding not in self.findings:
            raise ValueError(f"rare.finding {self.rare.finding!r} is not among `findings`")
        return self


class ClipExperiment(ExperimentConfig):
    """R(2+1)D networks that read the ejection fraction off echo clips; those that nobody measured are left out."""

    task: Literal["ejection-fraction"]
    preprocessing: VideoPreprocessing = VideoPreprocessing(fps=25.0)
    model: EjectionFractionModel = EjectionFractionModel()
    augmentation: ClipAugmentation = ClipAugmentation()
    windows: int = Field(4, ge=1, description="windows of a longer clip whose estimates are averaged")


class _Task(Config):
    model_config = ConfigDict(extra="ignore")
    task: Literal["image-classifier", "ejection-fraction"] = "image-classifier"


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> FilmExperiment | ClipExperiment:
    """The experiment that the file's `task` says; without one, of films. Raises `ConfigError`."""
    films = load_config(_Task, path, overrides).task == "image-classifier"
    return load_config(FilmExperiment, path, overrides) if films else load_config(ClipExperiment, path, overrides)
