"""`SeverityEditingPipeline`: a film edited towards a severity in rounds. It simulates severity: there is no time in it, and no forecast.

Progressive image editing (PIE, Liang et al. 2023, arXiv 2309.11745), around any text-to-image pipeline of latents. Kept: rounds of
partial noising, source blended back outside the ROI at every step, beta-blend with the source at the end. Repaired: true inversion (the
paper has it, its release draws noise), rounds hand on latents (no decode and encode between them), the blend also acts without
a mask, a prompt per round, and what is outside the ROI is the source film itself, pixel for pixel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional

from medgen.diffusion.inversion import DeterministicPath, Predict, denoise, invert
from medgen.diffusion.sampling import Generators
from medgen.models.adopted import AdoptedDenoiser
from medgen.models.autoencoder import decode, downsampling, encode_moments

Inversion = Literal["flow", "ddim", "noise"]
Tokens = tuple[Tensor, Tensor]  # [B,N,D], mask [B,N]
ROUNDS = 6


@dataclass
class SeverityEditingOutput(BaseOutput):
    """`frames` [B,R+1,H,W] in [0,1]: the source, then one frame a round. `autoencoder` [B,H,W]: the source's reconstruction."""

    frames: Tensor
    autoencoder: Tensor


class SeverityEditingPipeline:
    """Edits films with a `TextToCXRPipeline`, or with a diffusers pipeline (Stable Diffusion, Sana, PixArt).

    The defaults are tuned for the shipped flow `digital_chest`; PIE's own (noise, 10 rounds, 50 steps, guidance 7.5) are arguments.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.vae = pipeline, pipeline.vae
        self._encode: Callable[[list[str]], Tokens] = pipeline.encode_prompt
        if hasattr(pipeline, "denoiser"):
            self.denoiser = pipeline.denoiser
        elif network := getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None):
            flow = self.path(2).kind == "flow"
            self.denoiser = AdoptedDenoiser(network, pipeline.scheduler.config.num_train_timesteps, flow)
            self._encode = self._encode_adopted
        else:
            raise ValueError(f"{type(pipeline).__name__} has no denoiser, unet or transformer to edit with")

    @property
    def kind(self) -> Inversion:
        """The true inversion that fits the pipeline's scheduler."""
        return "flow" if self.path(2).kind == "flow" else "ddim"

    def path(self, num_steps: int) -> DeterministicPath:
        """The deterministic steps of the pipeline's schedule."""
        return DeterministicPath.of(self.pipeline.scheduler, num_steps)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        stages: Sequence[Sequence[str]],
        source: Sequence[str],
        roi: Tensor | None = None,
        strength: float = 0.5,
        outside: float = 0.01,
        inside: float = 0.75,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 25,
        inversion: Inversion | None = None,
        refinements: int = 3,
        away_from_source: bool = True,
        paste_back: bool = True,
        generator: Generators = None,
    ) -> SeverityEditingOutput:
        """Edit each film through its stages; a stage is a round.

        images: [B,1,H,W] in [0,1] at the pipeline's size. stages: a prompt per round for each film. source: what each film shows now.
        roi: [B,1,H,W], > 0 where editing is allowed; None edits everywhere. strength: share of the steps that a round noises (PIE's gamma).
        outside, inside: shares of the change that are kept outside and inside the ROI, counted from the source (PIE's betas).
        inversion: "flow" or "ddim" walks the model's own path back from the film; "noise" adds noise (PIE's release), one of `generator`
        per film; by default the one that fits. refinements: fixed-point evaluations of each inverted step.
        away_from_source: guidance leads away from the prompt of the stage before; else from the empty prompt, as in PIE.
        paste_back: the source film plus the decoded change inside the ROI; else what the autoencoder decodes, as in PIE.
        """
        self._check(images, stages, source, roi, inversion)
        path = self.path(num_inference_steps)
        start, dtype = path.start(strength), next(self.denoiser.parameters()).dtype
        device = next(self.denoiser.parameters()).device
        images = images.to(device, torch.float32)
        region = torch.ones_like(images) if roi is None else (roi.to(device) > 0).float()
        clean = encode_moments(self.vae, (2 * images - 1).to(self.vae.dtype))[0].float()
        mask = functional.max_pool2d(region, downsampling(self.vae))
        share = outside * (1 - mask) + inside * mask
        noises = None
        if inversion == "noise":
            listed = list(generator) if isinstance(generator, Sequence) else generator
            noises = [randn_tensor(clean.shape, generator=listed, device=clean.device, dtype=torch.float32) for _ in range(2)]
        prompts = [list(source), *(list(stage) for stage in zip(*stages))]
        tokens = [self._encode(texts) for texts in prompts]
        empty = None if away_from_source else self._encode([""] * len(images))
        anchors = None if noises else invert(self._predict(tokens[0], dtype), path, clean, start, refinements)
        latents, edited = clean, []
        for before, wanted in pairwise(tokens):
            guided = self._predict(wanted, dtype, empty or before, guidance_scale)
            if noises:
                state = path.add_noise(latents, noises[0], start)
            elif latents is clean:
                state = anchors[0]  # type: ignore[index]
            else:
                state = invert(self._predict(before, dtype), path, latents, start, refinements)[0]

            def keep_source(index: int, state: Tensor) -> Tensor:
                known = anchors[index - start] if anchors else path.add_noise(clean, noises[1], index)  # type: ignore[index]
                return known * (1 - mask) + state * mask

            changed = denoise(guided, path, state, start, keep_source)
            latents = clean + share * (changed - clean)
            edited.append(latents)
        return self._output(images, clean, edited, region, paste_back)

    def _predict(self, tokens: Tokens, dtype: torch.dtype, without: Tokens | None = None, scale: float = 1.0) -> Predict:
        """The denoiser under a prompt; with `without`, guided away from that one."""

        def one(latents: Tensor, level: float, condition: Tokens) -> Tensor:
            levels = torch.full((len(latents), 1), level, device=latents.device)
            context, mask = condition
            prediction: Tensor = self.denoiser(
                latents[:, None].to(dtype), levels, torch.zeros_like(levels), context=context.to(dtype), context_mask=mask
            )
            return prediction[:, 0].float()

        def predict(latents: Tensor, level: float) -> Tensor:
            asked = one(latents, level, tokens)
            if without is None or scale == 1.0:
                return asked
            other = one(latents, level, without)
            return other + scale * (asked - other)

        return predict

    def _output(
        self, images: Tensor, clean: Tensor, edited: list[Tensor], region: Tensor, paste_back: bool
    ) -> SeverityEditingOutput:
        def shown(latents: Tensor) -> Tensor:
            # Decoded one by one: rounding then does not depend on the batch.
            return torch.cat([(decode(self.vae, one[None].to(self.vae.dtype)).float() + 1) / 2 for one in latents])

        reconstruction = shown(clean)
        soft = feathered(region)
        frames = [images]
        for latents in edited:
            decoded = shown(latents)
            # What the autoencoder loses of the source is lost in both, so the difference is free of it.
            frames.append((images + soft * (decoded - reconstruction)).clamp(0, 1) if paste_back else decoded)
        return SeverityEditingOutput(frames=torch.cat(frames, 1), autoencoder=reconstruction[:, 0])

    def _encode_adopted(self, prompts: list[str]) -> Tokens:
        """Tokens [B,N,D] and mask [B,N], from the pipeline's own encoder with the settings that its own call uses."""
        encode = self.pipeline.encode_prompt
        called = inspect.signature(self.pipeline.__call__).parameters
        accepted = inspect.signature(encode).parameters
        shared = ("clean_caption", "complex_human_instruction", "max_sequence_length")
        settings = {name: called[name].default for name in shared if name in called and name in accepted}
        device = next(self.pipeline.text_encoder.parameters()).device
        result = encode(prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, **settings)
        tokens = result[0].float()
        mask = result[1].bool() if len(result) == 4 else torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return tokens, mask

    def _check(
        self, images: Tensor, stages: Sequence[Sequence[str]], source: Sequence[str], roi: Tensor | None, inversion: str | None
    ) -> None:
        side = downsampling(self.vae)
        if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(f"images must be [B,1,H,W] with sides that are multiples of {side}, not {tuple(images.shape)}")
        if len(stages) != len(images) or len(source) != len(images):
            raise ValueError(
                f"{len(images)} films, {len(stages)} lists of stages and {len(source)} source prompts: one of each per film"
            )
        if len({len(one) for one in stages}) != 1 or not stages[0]:
            raise ValueError(f"films of one call need the same number of stages, at least 1, not {[len(one) for one in stages]}")
        if roi is not None and roi.shape != images.shape:
            raise ValueError(f"roi is {tuple(roi.shape)}, the films are {tuple(images.shape)}")
        if roi is not None and not bool((roi > 0).flatten(1).any(1).all()):
            raise ValueError("an empty roi: nothing could change; leave it out to edit everywhere")
        if inversion not in (None, *get_args(Inversion)) or inversion not in (None, "noise", self.kind):
            raise ValueError(f"inversion {inversion!r}: this pipeline's schedule takes {self.kind!r} or 'noise'")


def feathered(region: Tensor) -> Tensor:
    """[B,1,H,W] of 0 and 1 → a soft mask that is 0 outside, rises inside from the edge and is 1 a few pixels in.

    A region that is everything, or touches the film's edge, has no seam there.
    """
    sigma = region.shape[-1] / 64
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=region.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = weights / weights.sum()
    padded = functional.pad(region, [radius] * 4, mode="replicate")
    blurred = functional.conv2d(functional.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1))
    return (2 * blurred - 1).clamp(0, 1) * region
