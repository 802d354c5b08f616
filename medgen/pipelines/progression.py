"""`ProgressionPipeline`: from any past visits to the visits at any dates, many joint futures each. A diffusers pipeline.

`ProgressionPipeline.from_pretrained(folder)(History(images, times=[0, 40]), times=[70, 100], num_trajectories=8).frames`
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medgen.data.report_text import split_sentences
from medgen.data.visit_images import VisitPreprocessing
from medgen.data.visit_records import Event
from medgen.diffusion.anchors import anchors
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.guidance import Guidance
from medgen.diffusion.sampling import Generators, sample_frames
from medgen.models.autoencoder import decode, encode_moments
from medgen.models.conditioners import TextConditioner
from medgen.models.denoiser import SequenceTransformer
from medgen.models.progression_conditioner import CONDITIONS, ProgressionConditioner, ProgressionConditions

Mode = Literal["joint", "autoregressive"]


@dataclass(frozen=True)
class History:
    """What is known of one patient. Times are in the pipeline's `time_unit`, from any origin.

    images [K,1,*S] in [0,1], one per time, K >= 1; times increase, and may lie after the wanted ones (in-betweening).
    events: treatments, past and planned; covariates: what is unknown is absent; reports: one per image ("" where there is none), or none.
    """

    images: Tensor
    times: Sequence[float]
    events: Sequence[Event] = ()
    covariates: Mapping[str, float | str] | None = None
    reports: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not len(self.times) or len(self.images) != len(self.times):
            raise ValueError(f"{len(self.images)} images at {len(self.times)} times: give one time for each image, at least one")
        if any(b <= a for a, b in pairwise(self.times)):
            raise ValueError(f"the visits' times must increase, not {', '.join(f'{t:g}' for t in self.times)}")
        if self.reports and len(self.reports) != len(self.times):
            raise ValueError(f'{len(self.reports)} reports of {len(self.times)} visits: give "" where there is none')

    def nearest(self, count: int | None, to: float) -> History:
        """With the `count` visits nearest to the time `to` only."""
        if count is None or len(self.times) <= count:
            return self
        kept = sorted(sorted(range(len(self.times)), key=lambda i: abs(self.times[i] - to))[:count])
        reports = [self.reports[i] for i in kept] if self.reports else ()
        return replace(self, images=self.images[kept], times=[self.times[i] for i in kept], reports=reports)


@dataclass
class ProgressionOutput(BaseOutput):
    """frames [B,T,*S] in [0,1] (or latents [B,T,C,*s]) at times [B,T]; B counts trajectories, those of one history side by side."""

    frames: Any
    times: Any


class ProgressionPipeline(DiffusionPipeline):
    """Past images, dates, treatments, covariates and reports → latent frames at the wanted dates → images.

    The denoiser predicts what the known visits, carried on, do not show: residuals in units of `residual_std` [C]. `preprocessing` is
    a `VisitPreprocessing`; `max_history`: visits looked at (the nearest), as many as in training; `deterministic`: a regressor, which
    gives its one best guess; the rest are defaults of a call.
    """

    model_cpu_offload_seq = "text_encoder->conditioner->denoiser->vae"
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012  (diffusers reads it so)

    def __init__(
        self,
        vae: Any,
        denoiser: SequenceTransformer,
        conditioner: ProgressionConditioner,
        scheduler: SchedulerMixin,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        preprocessing: dict[str, Any] | None = None,
        time_unit: str = "days",
        residual_std: list[float] | tuple[float, ...] = (1.0,),
        max_history: int | None = None,
        deterministic: bool = False,
        context_noise: float = 0.0,
        num_inference_steps: int = 12,
        guidance_scale: float | dict[str, float] = 1.0,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            denoiser=denoiser,
            conditioner=conditioner,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(
            preprocessing=dict(preprocessing or {}),
            time_unit=time_unit,
            residual_std=list(residual_std),
            max_history=max_history,
            deterministic=deterministic,
            context_noise=context_noise,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """As in diffusers, from safetensors only; float32 unless `dtype` says otherwise (folders are shipped in half)."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        loaded: Self = super().from_pretrained(str(pretrained_model_name_or_path), **{"use_safetensors": True, **kwargs})
        return loaded

    @property
    def preprocessing(self) -> VisitPreprocessing:
        """How an image of a visit becomes the tensor that a `History` holds (there in [0,1])."""
        return VisitPreprocessing.model_validate(self.config.preprocessing)

    @torch.no_grad()
    def __call__(
        self,
        history: History | Sequence[History],
        times: Sequence[float] | Sequence[Sequence[float]],
        num_trajectories: int = 1,
        mode: Mode = "joint",
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        context_noise: float | None = None,
        generator: Generators = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> ProgressionOutput | tuple[Any, ...]:
        """`num_trajectories` futures of every history at `times` (the same for all, or a list for each; equally many).

        A trajectory's frames are one draw: they belong together. A wanted time may be a known visit's own (the present comes back) or
        lie between two. mode: "joint" draws all frames at once; "autoregressive" one after the other, each known to the next, with
        `context_noise` (standard deviation, in units of the latents) on what was generated, against drift. guidance_scale: one number for
        treatments, covariates and reports together, or one by condition; 1 costs nothing. generator: one, or one per trajectory
        (history-major): a trajectory then does not depend on its batch. output_type: "np" or "pt" [B,T,*S] in [0,1], or "latent".
        """
        histories = [history] if isinstance(history, History) else list(history)
        wanted = _wanted(times, len(histories))
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        noise = self.config.context_noise if context_noise is None else context_noise
        rows = len(histories) * num_trajectories
        if steps < 1 or num_trajectories < 1:
            raise ValueError(f"num_inference_steps and num_trajectories must be at least 1, not {steps} and {num_trajectories}")
        if output_type not in ("np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r} is none of 'np', 'pt', 'latent'")
        if mode not in ("joint", "autoregressive"):
            raise ValueError(f"mode {mode!r} is neither 'joint' nor 'autoregressive'")
        if isinstance(generator, Sequence) and len(generator) != rows:
            raise ValueError(f"{len(generator)} generators for {rows} trajectories; give one, or one per trajectory")
        latents, conditions, generated = self._batch([h for h in histories for _ in range(num_trajectories)],
                                                     [w for w in wanted for _ in range(num_trajectories)])  # fmt: skip
        drawn = self._noise(latents.shape, generator)
        if mode == "joint":
            latents = self.sample(latents, conditions, steps, scale, drawn)
        else:
            latents = self._roll_out(latents, conditions, generated, steps, scale, drawn, noise)
        chosen = torch.stack([row[index] for row, index in zip(latents, generated)])
        frames: Any = chosen if output_type == "latent" else self._images(chosen)
        at: Any = torch.tensor([w for w in wanted for _ in range(num_trajectories)])
        if output_type == "np":
            frames, at = frames.cpu().numpy(), at.numpy()
        self.maybe_free_model_hooks()
        return ProgressionOutput(frames=frames, times=at) if return_dict else (frames, at)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images [N,1,*S] in [0,1] through the autoencoder and back: no forecast can be sharper."""
        return self._images(self.encode(images)[:, None])[:, 0][:, None]

    def encode(self, images: Tensor) -> Tensor:
        """Latents [N,C,*s] (the posterior's mean) of images [N,1,*S] in [0,1]; one by one: rounding then does not depend on the batch."""
        given = (2 * images - 1).to(self._execution_device, self.vae.dtype)
        return torch.cat([encode_moments(self.vae, one[None])[0].float() for one in given])

    def sample(
        self,
        latents: Tensor,
        conditions: ProgressionConditions,
        steps: int,
        scale: float | Mapping[str, float],
        noise: Tensor,
        present: Tensor | None = None,
    ) -> Tensor:
        """Latents [B,T,C,*s], those not `conditions.known` generated around their anchors from `noise` of the same shape."""
        known = conditions.known
        present = torch.ones_like(known) if present is None else present
        anchor = anchors(latents, conditions.times, known)
        unit = torch.tensor(self.config.residual_std, device=latents.device).reshape(1, 1, -1, *(1,) * (latents.ndim - 3))
        frames = self.frames(conditions, latents, present)
        if self.config.deterministic:
            levels = (~known).float()
            blank = torch.where(_over(known, latents), latents, 0.0).to(self.denoiser.dtype)
            residual = self.denoiser(blank, levels, frames.times, **frames.conditions(self.denoiser.dtype)).float()
        else:
            scales, lacking = _guided(scale)
            without = [
                self.frames(conditions.drop(names), latents, present) if weight != 1.0 else frames
                for weight, names in zip(scales, lacking)
            ]
            residual = sample_frames(self.denoiser, self.scheduler, frames, steps, Guidance(scales), None, without, noise)
        return torch.where(_over(known, latents), latents, anchor + unit * residual)

    def frames(self, conditions: ProgressionConditions, latents: Tensor, present: Tensor) -> FrameBatch:
        """What the denoiser is given: known frames as they are, the others to be generated."""
        context, context_times, context_mask, features = self.conditioner(conditions)
        return FrameBatch(latents, conditions.times, conditions.known, present, context, context_times, context_mask, features)

    def _roll_out(
        self,
        latents: Tensor,
        conditions: ProgressionConditions,
        generated: Tensor,
        steps: int,
        scale: float | Mapping[str, float],
        noise: Tensor,
        context_noise: float,
    ) -> Tensor:
        """One wanted frame after the other; what was generated is known to the next, as it is or with `context_noise`."""
        seen, made = latents.clone(), latents.clone()
        known, present = conditions.known.clone(), conditions.known.clone()
        rows = torch.arange(len(latents), device=latents.device)
        for index in generated.unbind(1):
            present[rows, index] = True  # what comes later is not there yet
            drawn = self.sample(seen, replace(conditions, known=known.clone()), steps, scale, noise, present.clone())[rows, index]
            made[rows, index] = drawn
            # the noise is the frame's own start, turned around: no second draw, so that a trajectory stays one seed's
            seen[rows, index] = drawn - context_noise * noise[rows, index]
            known[rows, index] = True
        return made

    def _batch(
        self, histories: Sequence[History], wanted: Sequence[Sequence[float]]
    ) -> tuple[Tensor, ProgressionConditions, Tensor]:
        """Latents [B,T,C,*s] with zeros where wanted, conditions of all T frames, and the wanted frames' places [B,W] among them."""
        encoded: dict[tuple[int, ...], Tensor] = {}
        rows: list[dict[str, Tensor]] = []
        for history, at in zip(histories, wanted):
            part = history.nearest(self.config.max_history, float(at[0]))
            key = (
                id(history.images),
                *(history.times.index(t) for t in part.times),
            )  # trajectories of a history share its latents
            if key not in encoded:
                encoded[key] = self.encode(part.images)
            rows.append(self._row(part, at, encoded[key]))
        if len({len(row["times"]) for row in rows}) > 1:
            raise ValueError("histories of one call must have equally many visits; call once for each number")
        stacked = {name: torch.stack([row[name] for row in rows]).to(self._execution_device)
                   for name in ("latents", "times", "known", "generated", "numbers", "words")}  # fmt: skip
        padded = {
            name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=filling).to(self._execution_device)
            for name, filling in (("event_kind", -1.0), ("event_times", 0.0), ("event_values", torch.nan),
                                  ("sentences", 0.0), ("sentence_times", torch.nan))
            if name in rows[0]
        }  # fmt: skip
        recorded = torch.full((len(rows),), bool(self.conditioner.config.events), device=self._execution_device)
        latents, generated = stacked.pop("latents"), stacked.pop("generated")
        return latents, ProgressionConditions(**stacked, **padded, events_known=recorded), generated

    def _row(self, history: History, wanted: Sequence[float], encoded: Tensor) -> dict[str, Tensor]:
        # a wanted time that equals a known one comes after it
        order = sorted([(t, 0, i) for i, t in enumerate(history.times)] + [(float(t), 1, i) for i, t in enumerate(wanted)])
        latents = torch.stack([torch.zeros_like(encoded[0]) if new else encoded[i] for _, new, i in order])
        place = {i: position for position, (_, new, i) in enumerate(order) if new}
        numbers, words = self.conditioner.covariates(history.covariates or {})
        kinds = list(self.conditioner.config.events)
        if unknown := sorted({event.name for event in history.events} - set(kinds)):
            warnings.warn(
                f"treatments that this pipeline was not trained with count for nothing: {', '.join(unknown)}", stacklevel=4
            )
        events = [event for event in history.events if event.name in kinds]
        row = {
            "latents": latents,
            "times": torch.tensor([t for t, _, _ in order]),
            "known": torch.tensor([not new for _, new, _ in order]),
            "generated": torch.tensor([place[i] for i in range(len(wanted))]),
            "numbers": torch.tensor(numbers),
            "words": torch.tensor(words, dtype=torch.long),
            "event_kind": torch.tensor([kinds.index(event.name) for event in events], dtype=torch.long),
            "event_times": torch.tensor([float(event.time) for event in events]),
            "event_values": torch.tensor([torch.nan if e.value is None else float(e.value) for e in events]),
        }
        if self.text_encoder is not None and self.conditioner.config.sentence_dim:
            spoken = [
                (t, self.encode_report(text)) for t, text in zip(history.times, history.reports or [""] * len(history.times))
            ]
            row["sentences"] = torch.cat([tokens for _, tokens in spoken])
            row["sentence_times"] = torch.tensor([t for t, tokens in spoken for _ in range(len(tokens))])
        return row

    def encode_report(self, report: str) -> Tensor:
        """One token for each sentence [R,E]: the mean of its words' (no sentence: R is 0)."""
        conditioner = TextConditioner(self.tokenizer, self.text_encoder, int(self.tokenizer.model_max_length))
        return encode_sentences(conditioner, report)

    def _images(self, latents: Tensor) -> Tensor:
        """[B,T,C,*s] → [B,T,*S] in [0,1], decoded one by one."""
        flat = latents.flatten(0, 1).to(self.vae.dtype)
        images = torch.cat([decode(self.vae, one[None])[:, 0] for one in flat]).float()
        return ((images + 1) / 2).unflatten(0, latents.shape[:2])

    def _noise(self, shape: torch.Size, generator: Generators) -> Tensor:
        device = self._execution_device
        each = list(generator) if isinstance(generator, Sequence) else [generator] * shape[0]
        # Drawn where the generator lives: with CPU generators every device starts from the same noise.
        drawn = [torch.randn(shape[1:], generator=g, device=g.device if g is not None else device) for g in each]
        return torch.stack([noise.to(device) for noise in drawn])


def encode_sentences(conditioner: TextConditioner, report: str) -> Tensor:
    """One token for each sentence of `report` [R,E], on the CPU: the mean of its words' tokens."""
    sentences = [text for text in split_sentences(report) if text.strip()]
    if not sentences:
        return torch.zeros(0, conditioner.width)
    with torch.no_grad():
        tokens, mask = conditioner.encode(sentences)
    weight = mask[..., None].to(tokens.dtype)
    return ((tokens * weight).sum(1) / weight.sum(1)).float().cpu()


def _over(per_frame: Tensor, latents: Tensor) -> Tensor:
    return per_frame.reshape(per_frame.shape + (1,) * (latents.ndim - 2))


def _guided(scale: float | Mapping[str, float]) -> tuple[tuple[float, ...], list[tuple[str, ...]]]:
    """Scales, and which conditions the prediction of each lacks."""
    if not isinstance(scale, Mapping):
        return (float(scale),), [CONDITIONS]
    if unknown := sorted(set(scale) - set(CONDITIONS)):
        raise ValueError(f"guidance of {', '.join(unknown)}: the conditions are {', '.join(CONDITIONS)}")
    return tuple(map(float, scale.values())), [(name,) for name in scale]


def _wanted(times: Any, histories: int) -> list[list[float]]:
    """A list of times for every history, in order, equally many."""
    each = (
        [list(map(float, t)) for t in times]
        if len(times) and isinstance(times[0], Sequence)
        else [list(map(float, times))] * histories
    )
    if len(each) != histories:
        raise ValueError(f"times for {len(each)} histories, but there are {histories}")
    if not each[0] or any(len(t) != len(each[0]) for t in each):
        raise ValueError("give at least one wanted time, and equally many for every history of a call")
    if any(b <= a for t in each for a, b in pairwise(t)):
        raise ValueError("the wanted times must increase")
    return each
