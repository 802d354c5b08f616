"""`EchoPipeline`: one call for every generator of echo clips. A subclass says how it encodes a still, samples and decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from medgen.data.ecg import ECG, ECGPreparation
from medgen.diffusion.sampling import Generators
from medgen.models.echo_conditioner import EchoConditioner, EchoConditions
from medgen.pipelines.echo_inputs import EchoOutput, clip_count, echo_conditions, still_frames, windows


class EchoPipeline(DiffusionPipeline):
    """ECG, ejection fraction, view and first frame (each optional) → video. Its configuration has the keys below.

    `preprocessing` holds size, frames (of the windows it was trained on) and fps; `ecg_preparation` is that of the training ECGs;
    `overlap`: frames that the windows of a longer clip share at least; `num_inference_steps` and `guidance_scale`: of a call.
    """

    conditioner: EchoConditioner

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """As in diffusers, from safetensors only; float32 unless `dtype` says otherwise (folders are shipped in half)."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        loaded: Self = super().from_pretrained(str(pretrained_model_name_or_path), **{"use_safetensors": True, **kwargs})
        return loaded

    @torch.no_grad()
    def __call__(
        self,
        ecg: ECG | Sequence[ECG | None] | None = None,
        ejection_fraction: float | Sequence[float | None] | None = None,
        view: str | Sequence[str | None] | None = None,
        first_frame: Tensor | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        start_seconds: float | Sequence[float] = 0.0,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        generator: Generators = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> EchoOutput | tuple[Any, ...]:
        """One clip for each value of the lists given (a single value counts for all of them).

        ecg: of any leads and rate, on its own clock, where frame 0 is at `start_seconds`; None: the heart beats as the model likes.
        ejection_fraction: percent. view: "A4C", "A2C", "PLAX" or "PSAX". first_frame: [B,1,H,W] in [0,1], comes back as encoded.
        num_frames: any; beyond the trained window several are joined. fps: Hz. guidance_scale: one number for all conditions
        together, or one by condition ("ecg", "ejection_fraction", "view", "fps"); 1 costs nothing, each other one an evaluation
        more (see `medgen.diffusion.guidance.guided`). generator: one, or one per clip: a clip then does not depend on its batch.
        output_type: "np" or "pt" [B,T,H,W] in [0,1], or "latent".

        Raises `ECGError` (a ValueError) for an ECG that cannot be used or does not show the clip's time; smaller faults are put
        right or masked, and named in the output's `flags`.
        """
        count = self._number("num_frames", num_frames, int(self.config.preprocessing["frames"]))
        steps = self._number("num_inference_steps", num_inference_steps, int(self.config.num_inference_steps))
        rate = float(self.config.preprocessing["fps"] if fps is None else fps)
        if not 1 <= rate <= 1000:
            raise ValueError(f"fps {rate:g}: expected from 1 to 1000 Hz")
        if output_type not in ("np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of 'np', 'pt', 'latent'")
        clips = clip_count(ecg, ejection_fraction, view, start_seconds, first_frame, generators=generator)
        if isinstance(generator, Sequence) and len(generator) != clips:
            raise ValueError(f"{len(generator)} generators for {clips} clips; give one, or one per clip")
        conditions, flags = echo_conditions(
            ecg,
            ejection_fraction,
            view,
            clips=clips,
            num_frames=count,
            fps=rate,
            start_seconds=start_seconds,
            preparation=ECGPreparation.model_validate(self.config.ecg_preparation),
            encoder=getattr(self, "ecg_encoder", None),
        )
        first = None if first_frame is None else self.encode_still(still_frames(first_frame, clips, self.size))
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        latents = self.sample(conditions.to(self._execution_device), steps, scale, generator, first)
        frames: Any = latents if output_type == "latent" else self.decode(latents)[:, :count]
        times: Any = conditions.times
        if output_type == "np":
            frames, times = frames.cpu().numpy(), times.numpy()
        self.maybe_free_model_hooks()
        return EchoOutput(frames=frames, times=times, flags=flags) if return_dict else (frames, times, flags)

    @property
    def size(self) -> int:
        """Height and width of a frame in pixels."""
        return int(self.config.preprocessing["size"])

    def seams(self, num_frames: int) -> list[int]:
        """Numbers of the frames with which a later window goes on where the one before ended; empty for a clip of one window."""
        size = int(self.config.preprocessing["frames"])
        return [start + known for start, known in windows(num_frames, size, min(int(self.config.overlap), size - 1)) if start]

    def encode_still(self, images: Tensor) -> Tensor:
        """What `sample` takes as `first`, of images [B,1,H,W] in [-1,1]."""
        raise NotImplementedError

    def sample(
        self,
        conditions: EchoConditions,
        steps: int,
        guidance_scale: float | Mapping[str, float] = 1.0,
        generator: Generators = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """What `decode` takes: latents or codes [B,T',...] of the frames of `conditions`; `first` [B,...] is known."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B,T,H,W] in [0,1], as many as were asked for or a few more."""
        raise NotImplementedError

    @staticmethod
    def _number(name: str, given: int | None, default: int) -> int:
        value = default if given is None else given
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
        return value
