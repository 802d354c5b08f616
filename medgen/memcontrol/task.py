"""A text-to-CXR task of which only what a mask leaves open is trained: what trials, stage 2 and private training hand to their loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from medgen.config import Config, ConfigError
from medgen.data.latent_cache import cache_key
from medgen.evaluation.privacy.predictor import NoisePredictor, load_predictor
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.masks import Adaptation, adapt, difference, merge_lora, network_of, trained_values
from medgen.models.adopted import AdoptedDenoiser
from medgen.models.conditioners import TextEncoderConfig
from medgen.models.denoiser import DenoiserConfig, SequenceTransformer
from medgen.sampling.source import find_pipeline
from medgen.tasks.base import TrainConfig
from medgen.tasks.published import PublishedConfig, PublishedRecipe, PublishedTextToCXR
from medgen.tasks.text_to_cxr import FrozenAutoencoder, SamplingDefaults, TextToCXR, TextToCXRRecipe

DIFFERENCE = "difference.safetensors"


class FineTuning(Config):
    """One fine-tuning as its run folder records it."""

    memcontrol: MemControlConfig
    adaptation: Adaptation
    random_words: int = 0
    train: TrainConfig


@dataclass(frozen=True)
class Start:
    """The pipeline that every fine-tuning starts from."""

    config: MemControlConfig
    folder: Path
    sha256: str
    predictor: NoisePredictor

    @classmethod
    def of(cls, config: MemControlConfig) -> Start:
        """Load it. Raises `PipelineError` where there is none, `ConfigError` where the recipe's films would not fit it."""
        source = find_pipeline(config.pipeline)
        device = "cuda" if torch.cuda.is_available() and not config.train.cpu else "cpu"
        predictor = load_predictor(source.folder, device)
        ours, its = config.data.preprocessing, predictor.preprocessing
        if isinstance(predictor.denoiser, SequenceTransformer) and ours != its:
            raise ConfigError(
                f"data.preprocessing: {config.pipeline} was trained on films prepared as {its}, this recipe says {ours}"
            )
        return cls(config, source.folder, source.sha256, predictor)

    @property
    def network(self) -> nn.Module:
        """Its network, untouched: trials load their own."""
        return network_of(self.predictor.denoiser)

    def task(self, train: TrainConfig, caption_dropout: float, random_words: int = 0) -> TextToCXR | PublishedTextToCXR:
        """A new task that fine-tunes it, on everything."""
        data, folder = self.config.data, str(self.folder)
        prompts = data.prompts.model_copy(update={"random_words": random_words, "max_tokens": self.predictor.limit})
        data = data.model_copy(update={"prompts": prompts})
        if not isinstance(self.predictor.denoiser, SequenceTransformer):
            published = PublishedConfig(path=folder, method="full")
            return PublishedTextToCXR(
                PublishedRecipe(
                    data=data, published=published, caption_dropout=caption_dropout, cache=self.config.cache, train=train
                )
            )
        settings = self.predictor.pipeline.config
        return TextToCXR(
            TextToCXRRecipe(
                data=data,
                autoencoder=FrozenAutoencoder(path=folder),
                text_encoder=TextEncoderConfig(path=folder, max_tokens=self.predictor.limit),
                denoiser=DenoiserConfig(init_from=folder),
                objective=self.predictor.objective.config,
                caption_dropout=caption_dropout,
                cache=self.config.cache,
                sampling=SamplingDefaults(
                    num_inference_steps=settings["num_inference_steps"], guidance_scale=settings["guidance_scale"]
                ),
                train=train,
            )
        )


class Rows(Dataset[dict[str, Any]]):
    """Some items of a data set, repeated as often as their rows are."""

    def __init__(self, films: Any, rows: Sequence[int]) -> None:
        self.films, self.rows = films, list(rows)
        self.fingerprint = cache_key(getattr(films, "fingerprint", ""), *self.rows)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's captions the next items get, where they have several."""
        if hasattr(self.films, "set_epoch"):
            self.films.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = self.films[self.rows[index]]
        return item


class MaskedTextToCXR:
    """`base` with only `adaptation` trained. With `rows` it is a trial, which trains on those and exports what changed; without, stage
    2, which trains on every training film, validates, and exports a pipeline with any LoRA merged in.
    """

    name = "memcontrol"

    def __init__(self, base: TextToCXR | PublishedTextToCXR, adaptation: Adaptation, rows: Sequence[int] | None = None) -> None:
        self.base, self.adaptation, self.rows = base, adaptation, rows
        self.model: nn.Module | None = None

    @property
    def network(self) -> nn.Module:
        """The network in training; after `modules`."""
        assert self.model is not None
        return network_of(self.model)

    def modules(self) -> dict[str, nn.Module]:
        """The denoiser, closed but for what the mask leaves open."""
        modules = self.base.modules()
        self.model = modules["model"]
        adapt(self.network, self.adaptation)
        self._start = trained_values(self.network)
        return modules

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """The base task's; of a trial its rows, and no validation (its scores are taken afterwards)."""
        if self.rows is None:
            return self.base.dataset(split)
        return Rows(self.base.dataset("train"), self.rows) if split == "train" else []

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """As the base task."""
        return self.base.collate(items)

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """As the base task."""
        return self.base.loss(modules, batch, which, generator)

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """As the base task."""
        return self.base.preview(modules, seed)

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """What changed (a trial), or the whole pipeline with any LoRA merged in."""
        if self.rows is not None:
            save_file(self.change(), folder / DIFFERENCE)
            return
        base = self.base
        if isinstance(base, TextToCXR):
            merged = merge_lora(copy.deepcopy(network_of(modules["model"])))
            base.export({"model": merged}, folder)
        else:
            own = base.network
            setattr(base.pipeline, base.part, merge_lora(copy.deepcopy(own)))
            base.export(modules, folder)
            setattr(base.pipeline, base.part, own)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """As the base task."""
        self.base.to(device, dtype)

    def change(self) -> dict[str, Tensor]:
        """What training changed, for `apply_difference`."""
        return {name: value.contiguous() for name, value in difference(self.network, self._start).items()}


def predictor_with(start: Start, model: nn.Module) -> NoisePredictor:
    """The start's predictor with the network of a fine-tuned `model` in it, in evaluation mode (weights shared, not copied)."""
    pipeline = copy.copy(start.predictor.pipeline)
    network = network_of(model).eval()
    name = next(name for name in ("denoiser", "unet", "transformer") if hasattr(pipeline, name))
    setattr(pipeline, name, network)
    denoiser: nn.Module = network
    if not isinstance(network, SequenceTransformer):
        objective = start.predictor.objective.config
        denoiser = AdoptedDenoiser(network, objective.num_train_timesteps, objective.kind == "flow")
    return NoisePredictor(pipeline, denoiser.eval(), start.predictor.objective, start.predictor.preprocessing, "")
