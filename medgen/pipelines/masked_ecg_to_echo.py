"""`MaskedECGToEchoPipeline`: an echo clip that follows an ECG, by masked-token decoding (ECHOPulse's way). Called as `ECGToEchoPipeline`.

`MaskedECGToEchoPipeline.from_pretrained(folder)(read_ecg("record"), ejection_fraction=45).frames[0]`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medgen.data.ecg import ECGPreparation
from medgen.diffusion.guidance import Guidance, guided
from medgen.diffusion.masked_tokens import MaskedDecoding, Predict, decode_masked
from medgen.diffusion.sampling import Generators
from medgen.models.echo_conditioner import EchoConditioner, EchoConditions
from medgen.models.token_transformer import TokenTransformer
from medgen.models.video_tokenizer import VideoTokenizer
from medgen.pipelines.echo_inputs import guided_conditions, part_of, windows
from medgen.pipelines.echo_pipeline import EchoPipeline


class MaskedECGToEchoPipeline(EchoPipeline):
    """ECG, ejection fraction, view and first frame (each optional) → codes of token frames → video.

    `temperature` is of the choice among codes, `choice_temperature` of what is kept in early rounds; `window` is how many frames it
    was trained on (None: those of `preprocessing`). A longer clip goes on from the last token frames of the window before; the
    tokenizer decodes all its codes in one go, so that windows have no seams.
    """

    model_cpu_offload_seq = "conditioner->denoiser->tokenizer"

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        denoiser: TokenTransformer,
        conditioner: EchoConditioner,
        preprocessing: dict[str, Any] | None = None,
        ecg_preparation: dict[str, Any] | None = None,
        overlap: int = 8,
        num_inference_steps: int = 16,
        guidance_scale: float | dict[str, float] = 1.0,
        temperature: float = 1.0,
        choice_temperature: float = 4.5,
        window: int | None = None,
    ) -> None:
        super().__init__()
        for name in ("codebook_size", "codes_per_place"):
            if tokenizer.config[name] != denoiser.config[name]:
                raise ValueError(f"the tokenizer has {name} {tokenizer.config[name]}, the denoiser {denoiser.config[name]}")
        self.register_modules(tokenizer=tokenizer, denoiser=denoiser, conditioner=conditioner)
        self.register_to_config(
            preprocessing=dict(preprocessing or {"size": 112, "frames": 32, "fps": 20.0}),
            ecg_preparation=ECGPreparation.model_validate(ecg_preparation or {}).model_dump(mode="json"),
            overlap=overlap,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            temperature=temperature,
            choice_temperature=choice_temperature,
            window=window,
        )

    @torch.no_grad()
    def encode_still(self, images: Tensor) -> Tensor:
        """Codes [B,h,w,G] of images [B,1,H,W] in [-1,1], one by one: the same in every batch."""
        images = images.to(self._execution_device, self.tokenizer.dtype)
        return torch.cat([self.tokenizer.encode(one[None, None])[:, 0] for one in images])

    @torch.no_grad()
    def sample(
        self,
        conditions: EchoConditions,
        steps: int,
        guidance_scale: float | Mapping[str, float] = 1.0,
        generator: Generators = None,
        first: Tensor | None = None,
    ) -> Tensor:
        """Codes [B,T',h,w,G] of the token frames of `conditions`; `first` [B,h,w,G] is known.

        Each clip for itself: a logit that differs in its last bit because of a neighbour could make another video.
        """
        conditions = of_token_frames(conditions, int(self.tokenizer.config.frames_per_token))
        clips, total = conditions.times.shape
        size, spans = self._windows(total)
        side = self.size // int(self.tokenizer.config.patch_size)
        shape = (clips, total, side, side, int(self.denoiser.config.codes_per_place))
        codes = torch.zeros(shape, dtype=torch.long, device=self._execution_device)
        if first is not None:
            codes[:, 0] = first
        each = list(generator) if isinstance(generator, Sequence) else [generator] * clips
        decoding = MaskedDecoding(steps, float(self.config.temperature), float(self.config.choice_temperature))
        with self.progress_bar(total=clips * len(spans)) as bar:
            for clip, draws in enumerate(each):
                alone = _clip(conditions, clip)
                for start, known in spans:
                    part = part_of(alone, start, size, float(self.conditioner.config.rate))
                    there = (slice(clip, clip + 1), slice(start, start + size))
                    flags = torch.zeros(part.times.shape, dtype=torch.bool, device=codes.device)
                    flags[:, : max(known, int(first is not None and start == 0))] = True
                    predict = self._predict(part, guidance_scale)
                    codes[there] = decode_masked(predict, codes[there], flags, self.denoiser.mask_code, decoding, draws)
                    bar.update()
        return codes

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B,T,H,W] in [0,1] of codes [B,T',h,w,G], clip by clip; T is that of whole token frames."""
        videos = torch.cat([self.tokenizer.decode(clip[None]) for clip in latents])
        return ((videos[:, :, 0].float() + 1) / 2).clamp(0, 1)

    def seams(self, num_frames: int) -> list[int]:
        """As in `EchoPipeline`: first frames of the first token frames that a later window made."""
        _, spans = self._windows(self.tokenizer.token_frames(num_frames))
        return [self.tokenizer.frames(start + known) for start, known in spans if start]

    def _windows(self, total: int) -> tuple[int, list[tuple[int, int]]]:
        """Token frames in a window, and (first, known) of the windows that cover `total` token frames."""
        size = self.tokenizer.token_frames(int(self.config.window or self.config.preprocessing["frames"]))
        overlap = min(max(1, -(-int(self.config.overlap) // int(self.tokenizer.config.frames_per_token))), size - 1)
        return size, list(windows(total, size, overlap) if size > 1 else ((i, 0) for i in range(total)))

    def _predict(self, part: EchoConditions, scale: float | Mapping[str, float]) -> Predict:
        """Guided logits under the conditions of one window; what lacks a condition is computed in the same batch."""
        scales, lacking = guided_conditions(scale)
        guidance = Guidance(scales)
        needed = [names for weight, names in zip(scales, lacking) if weight != 1.0]
        given = [self.conditioner(kept) for kept in (part, *(part.drop(names) for names in needed))]
        context, context_times, context_mask, features, feature_mask = (torch.cat(values) for values in zip(*given))
        times, count = part.times.expand(len(given), -1), len(given)

        def predict(codes: Tensor, levels: Tensor) -> Tensor:
            logits: Tensor = self.denoiser(
                codes.expand(count, *codes.shape[1:]),
                levels.expand(count, -1),
                times,
                context=context,
                context_times=context_times,
                context_mask=context_mask,
                features=features,
                feature_mask=feature_mask,
            )
            conditional, *rest = logits.float().split(1)
            without = iter(rest)
            return guided(conditional, [next(without) if weight != 1.0 else conditional for weight in scales], guidance)

        return predict


def of_token_frames(conditions: EchoConditions, span: int) -> EchoConditions:
    """The conditions of token frames, the first of one frame and the others of `span`: each has the time and phase of its last frame.

    A last token frame that is not full has those of the clip's last frame.
    """
    frames = conditions.times.shape[1]
    count = 1 + -(-(frames - 1) // span)
    last = (torch.arange(count, device=conditions.times.device) * span).clamp(max=frames - 1)
    phase = None if conditions.phase is None else conditions.phase[:, last]
    return replace(conditions, times=conditions.times[:, last], phase=phase)


def _clip(conditions: EchoConditions, index: int) -> EchoConditions:
    given = {name: value for name, value in vars(conditions).items() if value is not None}
    return replace(conditions, **{name: value[index : index + 1] for name, value in given.items()})
