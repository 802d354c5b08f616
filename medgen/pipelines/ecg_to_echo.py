"""`ECGToEchoPipeline`: an echo clip that follows an ECG, by rectified flow in latents. Saved and loaded like any diffusers pipeline.

`ECGToEchoPipeline.from_pretrained(folder)(read_ecg("record"), ejection_fraction=45).frames[0]`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from medgen.data.ecg import ECGPreparation
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.guidance import Guidance
from medgen.diffusion.sampling import Generators, sample_frames
from medgen.models.autoencoder import PatchAutoencoderKL, decode, downsampling, encode_moments
from medgen.models.denoiser import SequenceTransformer
from medgen.models.ecg_encoders import PublishedECGEncoder
from medgen.models.echo_conditioner import EchoConditioner, EchoConditions
from medgen.pipelines.echo_inputs import guided_conditions, part_of, windows
from medgen.pipelines.echo_pipeline import EchoPipeline

_CHUNK = 8  # frames decoded at a time, always so many: rounding depends on how many rows a matrix product has


class ECGToEchoPipeline(EchoPipeline):
    """ECG, ejection fraction, view and first frame (each optional) → latent frames → video.

    `preprocessing` holds size, frames (of the windows it was trained on) and fps; `ecg_preparation` is that of the training ECGs.
    Longer clips are windows joined over `overlap` or more frames that both have. `ecg_encoder`: a published one, where the
    conditioner was trained with its tokens. The rest are defaults of a call.
    """

    model_cpu_offload_seq = "conditioner->denoiser->vae"
    _optional_components: ClassVar[list[str]] = ["ecg_encoder"]

    def __init__(
        self,
        vae: PatchAutoencoderKL,
        denoiser: SequenceTransformer,
        conditioner: EchoConditioner,
        scheduler: SchedulerMixin,
        ecg_encoder: PublishedECGEncoder | None = None,
        preprocessing: dict[str, Any] | None = None,
        ecg_preparation: dict[str, Any] | None = None,
        overlap: int = 8,
        num_inference_steps: int = 12,
        guidance_scale: float | dict[str, float] = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, denoiser=denoiser, conditioner=conditioner, scheduler=scheduler, ecg_encoder=ecg_encoder)
        preparation = ECGPreparation.model_validate(ecg_preparation or {})
        if preparation.rate != conditioner.config.rate:
            raise ValueError(
                f"the conditioner reads ECGs of {conditioner.config.rate:g} Hz, they are prepared at {preparation.rate:g}"
            )
        self.register_to_config(
            preprocessing=dict(preprocessing or {"size": int(vae.config.sample_size), "frames": 32, "fps": 20.0}),
            ecg_preparation=preparation.model_dump(mode="json"),
            overlap=overlap,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    def encode_still(self, images: Tensor) -> Tensor:
        """Latents [B,C,h,w] of images [B,1,H,W] in [-1,1], one by one: the same in every batch."""
        images = images.to(self._execution_device, self.vae.dtype)
        return torch.cat([encode_moments(self.vae, one[None])[0] for one in images]).float()

    @torch.no_grad()
    def sample(
        self,
        conditions: EchoConditions,
        steps: int,
        guidance_scale: float | Mapping[str, float] = 1.0,
        generator: Generators = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """Latents [B,T,C,h,w] of the frames of `conditions`; `first` [B,C,h,w] is known. Noise is drawn for the whole clip at once.

        A later window is given frames of the one before, makes the last few of them anew from the same noise and fades over: what
        its first own frame does otherwise than the frame before would show as a flicker.
        """
        clips, total = conditions.times.shape
        size, overlap = int(self.config.preprocessing["frames"]), int(self.config.overlap)
        side = self.size // downsampling(self.vae)
        shape = (total, int(self.denoiser.config.latent_channels), side, side)
        noise = self._noise(clips, shape, generator)
        latents = torch.zeros_like(noise)
        if first is not None:
            latents[:, 0] = first
        spans = list(windows(total, size, min(overlap, size - 1)))
        with self.progress_bar(total=steps * len(spans)) as bar:
            for start, known in spans:
                part = part_of(conditions, start, size, float(self.conditioner.config.rate))
                there = slice(start, start + part.times.shape[1])
                fading = self._fading(known)
                given = known - fading if start else int(first is not None)
                made = self._window(part, latents[:, there], given, noise[:, there], steps, guidance_scale)
                latents[:, there] = _faded(latents[:, there], made, given, fading)
                bar.update(steps)
        return latents

    def seams(self, num_frames: int) -> list[int]:
        """Numbers of the frames over which a later window takes over; empty for a clip of one window."""
        size, overlap = int(self.config.preprocessing["frames"]), int(self.config.overlap)
        spans = [
            (start + known, self._fading(known)) for start, known in windows(num_frames, size, min(overlap, size - 1)) if start
        ]
        return [frame for end, fading in spans for frame in range(end - fading, end + 1)]

    def _fading(self, known: int) -> int:
        """How many of the `known` frames of a later window are made again."""
        return min(known, int(self.config.overlap)) // 2

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B,T,H,W] in [0,1] of latents [B,T,C,h,w], in chunks of a fixed size: a frame does not depend on how many there are."""
        clips = []
        for clip in latents.to(self.vae.dtype):
            missing = -len(clip) % _CHUNK
            padded = torch.cat([clip, clip[-1:].expand(missing, *clip.shape[1:])])
            clips.append(torch.cat([decode(self.vae, chunk) for chunk in padded.split(_CHUNK)])[: len(clip), 0])
        return (torch.stack(clips).float() + 1) / 2

    def frames(self, conditions: EchoConditions, latents: Tensor, known: int) -> FrameBatch:
        """One window for the sampler: its first `known` frames are given."""
        dtype = self.conditioner.dtype
        context, context_times, context_mask, features, feature_mask = self.conditioner(conditions)
        flags = torch.zeros(conditions.times.shape, dtype=torch.bool, device=latents.device)
        flags[:, :known] = True
        present = torch.ones_like(flags)
        return FrameBatch(
            latents, conditions.times, flags, present, context.to(dtype), context_times, context_mask, features, feature_mask
        )

    def _window(
        self, part: EchoConditions, latents: Tensor, known: int, noise: Tensor, steps: int, scale: float | Mapping[str, float]
    ) -> Tensor:
        scales, lacking = guided_conditions(scale)
        frames = self.frames(part, latents, known)
        without = [
            self.frames(part.drop(names), latents, known) if weight != 1.0 else frames for weight, names in zip(scales, lacking)
        ]
        return sample_frames(self.denoiser, self.scheduler, frames, steps, Guidance(scales), None, without, noise)

    def _noise(self, clips: int, shape: tuple[int, ...], generator: Generators) -> Tensor:
        device = self._execution_device
        each = list(generator) if isinstance(generator, Sequence) else [generator] * clips
        # Drawn where the generator lives: with CPU generators every device starts from the same noise.
        drawn = [torch.randn(shape, generator=g, device=g.device if g is not None else device) for g in each]
        return torch.stack([noise.to(device) for noise in drawn])


def _faded(before: Tensor, made: Tensor, given: int, fading: int) -> Tensor:
    """A window's frames [B,T,...]: `made`, but frames `given` to `given + fading` pass from `before` to it in even steps."""
    if fading == 0:
        return made
    weight = torch.arange(1, fading + 1, device=made.device, dtype=made.dtype) / (fading + 1)
    there = slice(given, given + fading)
    mixed = torch.lerp(before[:, there], made[:, there], weight.reshape(-1, *(1,) * (made.ndim - 2)))
    return torch.cat([made[:, :given], mixed, made[:, given + fading :]], dim=1)
