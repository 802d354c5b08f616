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
AwayFrom = Literal["source", "empty"]
Tokens = tuple[Tensor, Tensor]  # [B,N,D], mask [B,N]
ROUNDS = 6


@dataclass
class SeverityEditingOutput(BaseOutput):
    """`frames` [B,R+1,H,W] in [0,1]: the source, then one frame a round. `autoencoder` [B,H,W]: the source's reconstruction."""

    frames: Tensor
    autoencoder: Tensor


@dataclass(frozen=True)
class EditSettings:
    """How films are edited. The defaults are tuned for the shipped flow `digital_chest`; `PIE` below are the release's own.

    strength: share of the steps that a round goes back (PIE's gamma). outside, inside: shares of the change that are kept outside and
    inside the ROI, counted from the source (PIE's betas). guidance_scale: 1 is none. inversion: "flow" or "ddim" walks the model's own
    path back from the film, "noise" draws noise (PIE's release); None: the one that fits. refinements: fixed-point evaluations of each
    inverted step. away_from: guidance leads away from the prompt of the "source", or from the "empty" one. chained: a round starts
    from the one before; else each starts from the source, and no error adds up. paste_back: the source film plus the decoded change
    inside the ROI; else what the autoencoder decodes.
    """

    strength: float = 0.75
    outside: float = 0.01
    inside: float = 1.0
    guidance_scale: float = 3.0
    num_inference_steps: int = 25
    inversion: Inversion | None = None
    refinements: int = 3
    away_from: AwayFrom = "empty"
    chained: bool = False
    paste_back: bool = True


PIE = EditSettings(0.5, 0.01, 0.75, 7.5, 50, "noise", 1, "empty", chained=True, paste_back=False)


class SeverityEditingPipeline:
    """Edits films with a `TextToCXRPipeline`, or with a diffusers pipeline (Stable Diffusion, Sana, PixArt)."""

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
        settings: EditSettings | None = None,
        generator: Generators = None,
    ) -> SeverityEditingOutput:
        """Edit each film through its stages; a stage is a round. Films are edited one by one: none depends on its neighbours.

        images: [B,1,H,W] in [0,1] at the pipeline's size. stages: a prompt per round for each film. source: what each film shows now.
        roi: [B,1,H,W], > 0 where editing is allowed; None edits everywhere. generator: for `inversion="noise"`; one, or one per film.
        """
        settings = settings or EditSettings()
        self._check(images, stages, source, roi, settings.inversion)
        device = next(self.denoiser.parameters()).device
        images = images.to(device, torch.float32)
        regions = torch.ones_like(images) if roi is None else (roi.to(device) > 0).float()
        frames, reconstructions = [], []
        for i, (film, region) in enumerate(zip(images.split(1), regions.split(1))):
            clean = encode_moments(self.vae, (2 * film - 1).to(self.vae.dtype))[0].float()
            mask = functional.max_pool2d(region, downsampling(self.vae))
            noises = None
            if settings.inversion == "noise":
                own = generator[i] if isinstance(generator, Sequence) else generator
                noises = [randn_tensor(clean.shape, generator=own, device=device, dtype=torch.float32) for _ in range(2)]
            edited = self._edit(clean, mask, [source[i], *stages[i]], settings, noises)
            reconstruction, soft = self._decode(clean), feathered(region)
            shown = [self._decode(latents) for latents in edited]
            if settings.paste_back:
                # What the autoencoder loses of the source is lost in both, so the difference is free of it.
                shown = [(film + soft * (one - reconstruction)).clamp(0, 1) for one in shown]
            frames.append(torch.cat([film, *shown], 1))
            reconstructions.append(reconstruction[:, 0])
        return SeverityEditingOutput(frames=torch.cat(frames), autoencoder=torch.cat(reconstructions))

    def _edit(
        self, clean: Tensor, mask: Tensor, prompts: Sequence[str], settings: EditSettings, noises: list[Tensor] | None
    ) -> list[Tensor]:
        """Latents [1,C,h,w] after each round of one film; `mask` is the ROI at their size, `noises` two or None for true inversion."""
        path = self.path(settings.num_inference_steps)
        start, scale = path.start(settings.strength), settings.guidance_scale
        share = settings.outside * (1 - mask) + settings.inside * mask
        said = [self._encode([text]) for text in prompts]
        base = self._encode([""]) if settings.away_from == "empty" else said[0]
        anchors = None if noises else invert(self._predict([(1.0, said[0])]), path, clean, start, settings.refinements)

        def keep_source(index: int, state: Tensor) -> Tensor:
            known = anchors[index - start] if anchors else path.add_noise(clean, noises[1], index)  # type: ignore[index]
            return known * (1 - mask) + state * mask

        latents, edited, before = clean, [], [(1.0, said[0])]
        for number in range(1, len(said)):
            wanted = [(weight, said[index]) for weight, index in on_the_way(prompts, number)]
            if noises:
                state = path.add_noise(latents if settings.chained else clean, noises[0], start)
            elif settings.chained and number > 1:
                state = invert(self._predict(before), path, latents, start, settings.refinements)[0]
            else:
                state = anchors[0]  # type: ignore[index]
            guided = self._predict([term for weight, tokens in wanted for term in _guided(weight, tokens, base, said[0], scale)])
            changed = denoise(guided, path, state, start, keep_source)
            latents, before = clean + share * (changed - clean), wanted
            edited.append(latents)
        return edited

    def _predict(self, terms: Sequence[tuple[float, Tokens]]) -> Predict:
        """The weighted sum of what the denoiser predicts under several prompts; equal ones are asked once, weights of 0 not at all."""
        weights: dict[int, float] = {}
        for weight, tokens in terms:
            weights[id(tokens)] = weights.get(id(tokens), 0.0) + weight
        conditions = {id(tokens): tokens for _, tokens in terms}
        asked = [(weight, conditions[key]) for key, weight in weights.items() if abs(weight) > 1e-9]
        dtype = next(self.denoiser.parameters()).dtype

        def predict(latents: Tensor, level: float) -> Tensor:
            levels, total = torch.full((len(latents), 1), level, device=latents.device), torch.zeros_like(latents)
            for weight, (context, mask) in asked:
                prediction = self.denoiser(
                    latents[:, None].to(dtype), levels, torch.zeros_like(levels), context=context.to(dtype), context_mask=mask
                )
                total = total + weight * prediction[:, 0].float()
            return total

        return predict

    def _decode(self, latents: Tensor) -> Tensor:
        """[1,C,h,w] → [1,1,H,W] in [0,1]."""
        return (decode(self.vae, latents.to(self.vae.dtype)).float() + 1) / 2

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


def on_the_way(prompts: Sequence[str], number: int) -> list[tuple[float, int]]:
    """What round `number` is asked for: (weight, index of a prompt). Of m rounds with one prompt, number k goes k/m of the way to it."""
    first = last = number
    while first > 1 and prompts[first - 1] == prompts[number]:
        first -= 1
    while last + 1 < len(prompts) and prompts[last + 1] == prompts[number]:
        last += 1
    share = (number - first + 1) / (last - first + 1)
    return [(share, last), (1 - share, first - 1)]


def _guided(weight: float, tokens: Tokens, base: Tokens, source: Tokens, scale: float) -> list[tuple[float, Tokens]]:
    """`weight` times the guided prediction (Ho & Salimans 2022); the source was inverted without guidance, so it is left without."""
    if tokens is source:
        return [(weight, source)]
    return [(weight * (1 - scale), base), (weight * scale, tokens)]


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
