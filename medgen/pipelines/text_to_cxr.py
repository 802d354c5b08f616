"""`TextToCXRPipeline`: a chest X-ray from a report. Saved, shared and loaded like any diffusers pipeline.

`TextToCXRPipeline.from_pretrained(folder)("Small left pleural effusion.").images[0]`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.guidance import Guidance
from medgen.diffusion.sampling import Generators, sample_frames
from medgen.models.autoencoder import PatchAutoencoderKL, decode, downsampling
from medgen.models.conditioners import TextConditioner
from medgen.models.denoiser import SequenceTransformer

StepCallback = Callable[["TextToCXRPipeline", int, Any, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class ChestXrayOutput(BaseOutput):
    """`images`: PIL greyscale images, or an array [B,H,W,1] or tensor [B,1,H,W] in [0,1], or latents [B,C,h,w]."""

    images: Any


class TextToCXRPipeline(DiffusionPipeline):
    """Text → latents (any diffusers scheduler that fits the objective, classifier-free guidance) → image.

    `preprocessing` is the `ImagePreprocessing` of the training images; its size is the size of what is generated.
    `num_inference_steps` and `guidance_scale` are the defaults of a call.
    """

    model_cpu_offload_seq = "text_encoder->denoiser->vae"

    def __init__(
        self,
        vae: PatchAutoencoderKL,
        denoiser: SequenceTransformer,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        preprocessing: dict[str, Any] | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, denoiser=denoiser, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(
            preprocessing=dict(preprocessing or {"size": int(vae.config.sample_size)}),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> TextToCXRPipeline:
        """As in diffusers, from safetensors only; float32 unless `dtype` says otherwise (folders are shipped in half)."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(str(pretrained_model_name_or_path), **{"use_safetensors": True, **kwargs})

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_levels: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        unconditional: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ChestXrayOutput | tuple[Any]:
        """Generate `num_images_per_prompt` images of each prompt.

        prompt: one report or several; a report longer than the text encoder reads is cut at a sentence, with a `PromptTooLong` warning.
        negative_prompt: what guidance leads away from (one, or one per prompt; "" is none); by default the learned empty condition.
        generator: one, or one per image: with its own generator an image does not depend on its batch.
        latents: starting noise [B,C,h,w] instead of a drawn one. unconditional: sample without any prompt (`prompt` must be None).
        output_type: "pil" (greyscale), "np" [B,H,W,1] or "pt" [B,1,H,W] in [0,1], or "latent".
        callback_on_step_end: called as in diffusers with {"latents": [B,1,C,h,w]}; may return changed latents.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of 'pil', 'np', 'pt', 'latent'")
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, not {steps}")
        prompts = [text for text in self._prompts(prompt, unconditional) for _ in range(num_images_per_prompt)]
        if isinstance(generator, Sequence) and len(generator) != len(prompts):
            raise ValueError(f"{len(generator)} generators for {len(prompts)} images; give one, or one per image")
        frames = self._frames(prompts)
        without = None
        if scale != 1.0 and not unconditional:
            without = self._frames(self._negative(negative_prompt, len(prompts), num_images_per_prompt))
        elif unconditional:
            scale = 1.0
        guidance = Guidance(scale, guidance_levels, guidance_rescale)
        noise = None if latents is None else latents[:, None]
        with self.progress_bar(total=steps) as bar:

            def after_step(index: int, timestep: Any, current: Tensor) -> Tensor:
                bar.update(index < steps)
                if callback_on_step_end is None:
                    return current
                returned = callback_on_step_end(self, index, timestep, {"latents": current})
                return returned.get("latents", current) if returned else current

            sampled = sample_frames(self.denoiser, self.scheduler, frames, steps, guidance, generator, without, noise, after_step)
        images = sampled[:, 0] if output_type == "latent" else self._finish(sampled[:, 0], output_type)
        self.maybe_free_model_hooks()
        return ChestXrayOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B,N,D] and mask [B,N]; an empty prompt has no token (the denoiser then sees its learned empty condition)."""
        conditioner = TextConditioner(self.tokenizer, self.text_encoder, int(self.tokenizer.model_max_length))
        ids, mask = (t.to(self._execution_device) for t in conditioner.tokenize(prompts))
        said = torch.tensor([bool(text.strip()) for text in prompts], device=mask.device)
        return conditioner.embed(ids, mask), mask & said[:, None]

    def _frames(self, prompts: list[str]) -> FrameBatch:
        side = int(self.config.preprocessing["size"]) // downsampling(self.vae)
        shape = (len(prompts), int(self.denoiser.config.latent_channels), side, side)
        blank = torch.zeros(shape, device=self._execution_device)
        return FrameBatch.single(blank, *self.encode_prompt(prompts))

    def _prompts(self, prompt: str | Sequence[str] | None, unconditional: bool) -> list[str]:
        if unconditional:
            if prompt:
                raise ValueError("unconditional=True samples without a prompt: leave `prompt` out")
            return [""]
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        if not prompts or not all(isinstance(text, str) and text.strip() for text in prompts):
            raise ValueError("the prompt is empty: describe the film, or pass unconditional=True to sample without a prompt")
        return prompts

    @staticmethod
    def _negative(negative: str | Sequence[str] | None, count: int, repeats: int) -> list[str]:
        if negative is None or isinstance(negative, str):
            return [negative or ""] * count
        if len(negative) * repeats != count:
            raise ValueError(f"{len(negative)} negative prompts for {count // repeats} prompts; give one, or one per prompt")
        return [text or "" for text in negative for _ in range(repeats)]

    def _finish(self, latents: Tensor, output_type: str) -> Any:
        # Decoded one by one: rounding then does not depend on the batch, and memory does not grow with it.
        images = torch.cat([decode(self.vae, one[None].to(self.vae.dtype)) for one in latents]).float()
        images = (images + 1) / 2
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return array
        return [Image.fromarray((255 * image[..., 0]).round().astype("uint8")) for image in array]
