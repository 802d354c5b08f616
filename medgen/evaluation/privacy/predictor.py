"""A text-to-image pipeline as a predictor of noise: what the attacks on its training data ask it, whatever it was trained to predict."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgen.config import load_config
from medgen.data.images import ImagePreprocessing
from medgen.diffusion.objectives import Objective
from medgen.evaluation.images import EvaluationError
from medgen.models.adopted import ADOPTED, AdoptedDenoiser
from medgen.models.autoencoder import downsampling, encode_moments
from medgen.models.denoiser import SequenceTransformer
from medgen.sampling.source import find_pipeline, load_pipeline
from medgen.tasks.published import _objective_of as objective_of


@dataclass(frozen=True)
class NoisePredictor:
    """ε(x_t, t, c) of a pipeline, for x_t [B,C,h,w] at one level t in (0,1) and tokens c of captions.

    A flow predicts the velocity v = ε − x_0 at x_t = (1 − t) x_0 + t ε, so ε = x_t + (1 − t) v; a v-model predicts
    v = α ε − σ x_0 at x_t = α x_0 + σ ε, so ε = σ x_t + α v. Two predictions at one x_t therefore differ in ε by (1 − t) or α times
    what they differ in v: at t = 1 a flow's ε says nothing.
    """

    pipeline: Any
    denoiser: nn.Module
    objective: Objective
    preprocessing: ImagePreprocessing
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where its network is."""
        return next(self.denoiser.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C,h,w] of one film."""
        vae = self.pipeline.vae
        side = self.preprocessing.size // downsampling(vae)
        return int(vae.config.latent_channels), side, side

    @torch.no_grad()
    def captions(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B,N,D] and mask [B,N]; "" is the empty condition that guidance leads away from."""
        if isinstance(self.denoiser, SequenceTransformer):
            tokens, mask = self.pipeline.encode_prompt(list(prompts))
            return tokens, mask
        encode, called = self.pipeline.encode_prompt, inspect.signature(self.pipeline.__call__).parameters
        accepted = inspect.signature(encode).parameters
        shared = ("clean_caption", "complex_human_instruction", "max_sequence_length")
        settings = {name: called[name].default for name in shared if name in called and name in accepted}
        found = encode(
            prompt=list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False, **settings
        )
        tokens = found[0]
        return tokens, found[1].bool() if len(found) == 4 else torch.ones(
            tokens.shape[:2], dtype=torch.bool, device=tokens.device
        )

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Posterior means [B,C,h,w] of films [B,1,H,W] in [-1,1]."""
        vae = self.pipeline.vae
        return encode_moments(vae, images.to(self.device, next(vae.parameters()).dtype))[0].float()

    @torch.no_grad()
    def predict(self, noisy: Tensor, level: float, captions: tuple[Tensor, Tensor]) -> Tensor:
        """What the network itself returns (flow, noise or v) for x_t [B,C,h,w]."""
        levels, (context, mask) = torch.full((len(noisy), 1), level, device=noisy.device), captions
        dtype = next(self.denoiser.parameters()).dtype
        found: Tensor = self.denoiser(
            noisy[:, None].to(dtype), levels, torch.zeros_like(levels), context=context.to(dtype), context_mask=mask
        )
        return found[:, 0].float()

    def noised(self, clean: Tensor, noise: Tensor, level: float) -> Tensor:
        """x_t of x_0 and ε, both [B,C,h,w] (or one ε for all)."""
        signal, sigma = self.coefficients(level)
        return signal * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, level: float) -> Tensor:
        """What a perfect network returns for `noised(clean, noise, level)`."""
        noise = noise.expand_as(clean)
        return self.objective.target(clean[:, None], noise[:, None], torch.full((len(clean), 1), level, device=clean.device))[
            :, 0
        ]

    def noise_per_output(self, level: float) -> float:
        """How much ε changes when the network's output changes by 1, at one x_t."""
        return 1.0 if self.objective.config.kind == "epsilon" else self.coefficients(level)[0]

    def coefficients(self, level: float) -> tuple[float, float]:
        """Signal and noise coefficients of x_t."""
        one, none, at = torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.full((1, 1), level)
        return float(self.objective.add_noise(one, none, at)), float(self.objective.add_noise(none, one, at))

    @cached_property
    def limit(self) -> int:
        """Tokens of the longest caption that it reads."""
        return int(self.pipeline.tokenizer.model_max_length)

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, marks included."""
        return len(self.pipeline.tokenizer(text, truncation=False, verbose=False).input_ids)


def load_predictor(pipeline: str | Path, device: torch.device | str = "cpu") -> NoisePredictor:
    """The text-to-image pipeline of a shipped name or folder: medgen's own, a Stable Diffusion, PixArt or Sana pipeline.

    Raises `PipelineError` if it cannot be loaded and `EvaluationError` if it is of another kind.
    """
    source = find_pipeline(pipeline)
    loaded = load_pipeline(source, torch.float32, torch.device(device))
    return predictor_of(loaded, source.sha256, source.folder)


def predictor_of(pipeline: Any, fingerprint: str = "", folder: Path | None = None) -> NoisePredictor:
    """The same for a pipeline in memory (its weights are shared, not copied). Raises `EvaluationError` for another kind of pipeline."""
    network = next((getattr(pipeline, name) for name in ("denoiser", "unet", "transformer") if hasattr(pipeline, name)), None)
    own = isinstance(network, SequenceTransformer)
    if not isinstance(network, (SequenceTransformer, *ADOPTED)) or not hasattr(pipeline, "encode_prompt"):
        raise EvaluationError(
            f"{type(pipeline).__name__} cannot be audited: this measures text-to-image pipelines with a SequenceTransformer or one of "
            f"{', '.join(kind.__name__ for kind in ADOPTED)}"
        )
    objective = Objective(objective_of(pipeline.scheduler, None))
    denoiser: Any = network
    if not own:
        steps = objective.config.num_train_timesteps
        denoiser = AdoptedDenoiser(denoiser, steps, objective.config.kind == "flow")
    return NoisePredictor(pipeline, denoiser.eval(), objective, _preprocessing(pipeline, denoiser, folder), fingerprint)


def _preprocessing(pipeline: Any, denoiser: nn.Module, folder: Path | None) -> ImagePreprocessing:
    """What made its training images: in its configuration, beside it (of fine-tuned published ones), or their size only."""
    settings = pipeline.config.get("preprocessing")
    if settings is not None:
        return ImagePreprocessing.model_validate(dict(settings))
    if folder is not None and (folder / "preprocessing.yaml").is_file():
        return load_config(ImagePreprocessing, folder / "preprocessing.yaml")
    network: Any = getattr(denoiser, "network", denoiser)
    return ImagePreprocessing(size=int(network.config.sample_size) * downsampling(pipeline.vae))
