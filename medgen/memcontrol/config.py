"""configs/memcontrol/*.yaml: which pipeline is fine-tuned on what, how a trial is trained and scored, and what is searched."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from medgen.config import Config
from medgen.memcontrol.masks import Method
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CXRData

Baseline = Literal["full", "lora", "attention", "bias", "norm", "random_words", "deduplicated"]


class InnerConfig(Config):
    """A trial: a short fine-tuning that is made to memorise some patients, so that masks differ in how much they let through."""

    steps: int = Field(60, ge=1)
    batch_size: int = Field(8, ge=1)
    warmup_steps: int = Field(5, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    memorised_patients: int = Field(12, ge=1, description="whose films are repeated, and on whose films memorisation is measured")
    repeats: int = Field(4, ge=1, description="copies of each of their films in the trial's training set")
    other_fraction: float = Field(1.0, ge=0, le=1, description="share of the other training patients, each of their films once")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="while training only: scores always hear the caption")
    random_words: int = Field(4, ge=1, description="of the baseline `random_words`: words put into every training caption")
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoint_every: int = Field(1000, ge=1, description="steps; a killed trial goes on from there, or starts again")


class MemorisationConfig(Config):
    """What memorisation is: at fixed noise levels, with fixed noise.

    text_noise: ‖ε(x_t, t, c) − ε(x_t, t, ∅)‖ at the memorised patients' films (Wen et al. 2024). No film of anyone else says what it
    would be without memory: it falls too where a training without dropped captions makes ∅ alike.
    loss_gap: how much more the logarithm of the denoising loss fell at the memorised patients' films than at those of patients of the
    same hospital whom nothing was trained on. 0 is none.
    """

    measure: Literal["text_noise", "loss_gap"] = "text_noise"
    levels: tuple[float, ...] = Field((0.3, 0.5, 0.7, 0.9), min_length=1, description="noise levels in (0, 1)")
    draws: int = Field(2, ge=1, description="fixed noises per film and level")
    largest: bool = Field(False, description="the mean over patients of the largest norm among a patient's films, not of all")


class QualityConfig(Config):
    """What must not be lost: Fréchet distance of generated to real films, or the denoising loss; both of VALIDATION patients."""

    measure: Literal["frechet", "validation_loss"] = "frechet"
    manifest: Path | None = Field(None, description="films whose split is val; the training manifest's own if not given")
    encoder: str = Field(
        "digital-chest", description="as `medgen evaluate --encoder` takes it: digital-chest, rad-dino, xrv:FILE, ..."
    )
    films: int = Field(96, ge=40, description="prompts sampled, films compared with; half of the patients search, half confirm")
    steps: int | None = Field(None, ge=1, description="sampling steps; the pipeline's own if not given")
    guidance: float | None = Field(None, ge=0, description="guidance scale; the pipeline's own if not given")
    batch_size: int = Field(16, ge=1)


class SearchConfig(Config):
    """NSGA-II (Deb 2002, in optuna) over one bit for each attention layer and the learning rate; both objectives are minimised."""

    method: Method = Field("lora", description="how the open layers are adapted")
    trials: int = Field(60, ge=0, description="trained masks; raise it to search on")
    population: int = Field(12, ge=2)
    learning_rate: tuple[float, float] = Field((1e-5, 1e-3), description="ends of the log-uniform range")


class BaselineConfig(Config):
    """The usual ways to fine-tune, without a mask, each at every one of these rates: the same steps and scores as a trial."""

    methods: tuple[Baseline, ...] = ("full", "lora", "attention", "bias", "norm", "random_words", "deduplicated")
    learning_rates: tuple[float, ...] = Field((1e-4, 1e-3), min_length=1)


class ConfirmationConfig(Config):
    """What is chosen is trained anew, with other patients memorised, and scored on patients and noises that chose nothing."""

    repeats: int = Field(3, ge=0, description="trainings of each: who is memorised, the order of films and every noise differ")
    baselines: tuple[Baseline, ...] = Field(("full", "lora"), description="what the masks are compared with, at its best rate")


class MemControlConfig(Config):
    """configs/memcontrol/leaky.yaml, stable_diffusion.yaml"""

    pipeline: str = Field(..., description="what is fine-tuned: a shipped name, or the folder or hub id of a pipeline")
    data: CXRData
    cache: Path = Field(..., description="folder of cached latents and tokens")
    out: Path = Field(..., description="folder of the search; the same command again continues it")
    seed: int = 0
    rank: int = Field(8, ge=1, description="of LoRA")
    inner: InnerConfig = InnerConfig()
    memorisation: MemorisationConfig = MemorisationConfig()
    quality: QualityConfig = QualityConfig()
    search: SearchConfig = SearchConfig()
    baselines: BaselineConfig = BaselineConfig()
    confirmation: ConfirmationConfig = ConfirmationConfig()
    train: TrainConfig = Field(
        ..., description="stage 2: the chosen mask on all training films; learning_rate is the trial's own"
    )

    @property
    def validation(self) -> Path:
        """The manifest whose val split quality is measured on."""
        return self.quality.manifest or self.data.manifest

    @property
    def of_a_trial(self) -> MemControlConfig:
        """Without what may be added to a search that has begun: a training that was interrupted goes on under any of it."""
        search = self.search.model_copy(update={"trials": SearchConfig().trials})
        return self.model_copy(update={"search": search, "baselines": BaselineConfig(), "confirmation": ConfirmationConfig()})

    def inner_train(self, out: Path, learning_rate: float, repeat: int = 0) -> TrainConfig:
        """How a trial is trained; `repeat` is one of its confirmation."""
        inner = self.inner
        return TrainConfig(
            out=out, seed=self.seed + repeat, steps=inner.steps, batch_size=inner.batch_size, learning_rate=learning_rate,
            schedule="constant_with_warmup", warmup_steps=inner.warmup_steps, weight_decay=inner.weight_decay, ema=None,
            mixed_precision=inner.mixed_precision, cpu=self.train.cpu, workers=0, preflight=False, log_every=10, keep=1,
            checkpoint_every=inner.checkpoint_every, validate_every=0, preview_every=0, tensorboard=False,
        )  # fmt: skip
