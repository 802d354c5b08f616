"""`ECGTranslationPipeline`: the leads that were not recorded, from those that were, or from a pulse wave at the finger.

`pipeline(ecg, given=("I", "II", "V2"), num_trajectories=8).ecgs[0]` is a 12-lead ECG: what was given, and the mean of what was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from torch import Tensor, nn

from medgen.config import Config
from medgen.data.ecg import ECG, ECGPreparation, lead_name
from medgen.data.ecg_dataset import prepare_signals
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.guidance import Guidance
from medgen.diffusion.sampling import Generators, sample_frames
from medgen.models.denoiser import SequenceTransformer
from medgen.models.signal_autoencoder import SignalAutoencoder, SignalError
from medgen.pipelines.card import write_card

_SEQUENCES_AT_ONCE = 128

_CARD = """
# {title}

A rectified flow that generates the **synthetic** part of an ECG from the part that was measured, made with medgen {version}.

```python
from medgen.data.ecg import read_ecg
from medgen.pipelines.ecg_translation import ECGTranslationPipeline

pipeline = ECGTranslationPipeline.from_pretrained("{title}")
pipeline(read_ecg("recording"), given={given}, num_trajectories=8).ecgs[0]
```

| part | class | parameters |
|---|---|---|
{parts}

Signals: {signals}. {rate:g} Hz, {low:g}-{high:g} Hz, mV. Made for: given {given}. Defaults: {steps} steps.

## Limits

For research. Not a medical device: a generated lead shows what is likely given the leads that were measured, in the population of the
training data; a sign of disease that only a missing lead would have shown is not in it. No diagnosis may rest on it.

## Recipe

```yaml
{recipe}```
"""


@dataclass
class ECGTranslationOutput(BaseOutput):
    """`ecgs`: per recording the mean of its trajectories; `trajectories` [B,K,N,S] in mV; `leads` [N]; `given` [B,N] bool."""

    ecgs: list[ECG]
    trajectories: NDArray[np.float32]
    leads: tuple[str, ...]
    given: NDArray[np.bool_]


class ECGTranslationPipeline(DiffusionPipeline):
    """Given signals → linear guess → what it leaves, by rectified flow → all signals.

    `preparation` is the `ECGPreparation` of the training signals, `window_frames` how many frames were trained together; longer
    recordings are generated in overlapping windows that share one trajectory (Bar-Tal 2023, MultiDiffusion). `default_given` is
    what it was made for, such as "I,II,V2".
    """

    def __init__(
        self,
        autoencoder: SignalAutoencoder,
        denoiser: SequenceTransformer,
        scheduler: SchedulerMixin,
        preparation: dict[str, Any] | None = None,
        window_frames: int = 20,
        num_inference_steps: int = 8,
        default_given: str = "",
    ) -> None:
        super().__init__()
        self.register_modules(autoencoder=autoencoder, denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(
            preparation=dict(preparation or {}),
            window_frames=window_frames,
            num_inference_steps=num_inference_steps,
            default_given=default_given,
        )

    @property
    def preparation(self) -> ECGPreparation:
        """How recordings are prepared: as the training signals were."""
        return ECGPreparation.model_validate(dict(self.config.preparation))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> ECGTranslationPipeline:
        """As in diffusers, from safetensors only; float32 unless `dtype` says otherwise (folders are shipped in half)."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", torch.float32)
        return super().from_pretrained(str(pretrained_model_name_or_path), **{"use_safetensors": True, **kwargs})

    @torch.no_grad()
    def __call__(
        self,
        recording: ECG | Sequence[ECG],
        given: Sequence[str] | None = None,
        num_trajectories: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
    ) -> ECGTranslationOutput:
        """All leads of each recording, `num_trajectories` times.

        recording: mV at any rate, with any of the pipeline's signals as leads (a pulse wave is the lead "PPG"); all of one length.
        given: the signals to use; None: every good one. The others, and leads that are flat or saturated, are never looked at.
        num_inference_steps: 1 gives the expected ECG itself (smooth); more give a possible one. Raises `SignalError`, `ECGError`.
        generator: one, or one per trajectory (recordings x trajectories, in that order).
        """
        recordings = [recording] if isinstance(recording, ECG) else list(recording)
        prepared = [self._prepare(one, given) for one in recordings]
        lengths = {values.shape[1] for values, _ in prepared}
        if len(lengths) != 1:
            raise SignalError(f"recordings of {len(lengths)} lengths in one call: give one length at a time")
        values, shown = (torch.from_numpy(np.stack(column)) for column in zip(*prepared, strict=True))
        drawn = self.translate(values, shown, num_trajectories, num_inference_steps, generator).numpy()
        keep = [i for i, name in enumerate(self.autoencoder.names) if name != "PPG"]
        leads, trajectories = tuple(self.autoencoder.names[i] for i in keep), drawn[:, :, keep]
        ecgs = [ECG(mean, leads, self.preparation.rate, r.start) for mean, r in zip(trajectories.mean(1), recordings)]
        return ECGTranslationOutput(ecgs, trajectories, leads, shown.numpy()[:, keep])

    @torch.no_grad()
    def translate(
        self,
        values: Tensor,
        given: Tensor,
        num_trajectories: int = 1,
        num_inference_steps: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Prepared signals [B,N,S] (any values where not given), `given` [B,N] bool → complete signals [B,K,N,S]."""
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1 or num_trajectories < 1:
            raise SignalError(f"num_inference_steps {steps} and num_trajectories {num_trajectories} must be at least 1")
        if not given.any(1).all():
            raise SignalError(f"no usable signal is given; this model knows {', '.join(self.autoencoder.names)}")
        if not torch.where(given[..., None], values, 0.0).isfinite().all():
            raise SignalError("a given signal is not finite everywhere: cut the recording, or do not give that signal")
        batch, _, length = values.shape
        count = batch * num_trajectories
        if isinstance(generator, Sequence) and len(generator) != count:
            raise SignalError(f"{len(generator)} generators for {count} trajectories; give one, or one per trajectory")
        codec, device = self.autoencoder, self._execution_device
        samples = int(codec.config.frame_samples)
        shown = torch.where(given[..., None], values, 0.0).float()
        padded = nn.functional.pad(shown, (0, -length % samples), mode="replicate").to(device)
        given = given.to(device)
        guess = codec.guess(padded, given)
        frames = signal_frames(codec, guess, given, self.preparation.rate)
        walk = OverlappingWindows(self.denoiser, int(self.config.window_frames))
        drawn = []
        for start in range(0, count, _SEQUENCES_AT_ONCE):
            rows = torch.arange(start, min(start + _SEQUENCES_AT_ONCE, count), device=device) // num_trajectories
            own = generator[start : start + len(rows)] if isinstance(generator, Sequence) else generator
            latents = sample_frames(walk, self.scheduler, _rows(frames, rows), steps, Guidance(), own)
            drawn.append(codec.decode(latents, guess[rows], padded[rows], given[rows])[..., :length].cpu())
        return torch.cat(drawn).unflatten(0, (batch, num_trajectories))

    def _prepare(self, recording: ECG, given: Sequence[str] | None) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Rows [N,S] and which of them are given; what is not given is dropped before anything looks at it."""
        named = {name: "PPG" if name.upper() == "PPG" else lead_name(name) or name for name in recording.leads}
        wanted = (
            [n for n in named.values() if n in self.autoencoder.names] if given is None else [lead_name(n) or n for n in given]
        )
        shown = self.autoencoder.given(wanted)
        if absent := [name for name in wanted if name not in named.values()]:
            raise SignalError(f"{', '.join(absent)} given, but the recording has only {', '.join(recording.leads)}")
        rows = [i for i, name in enumerate(recording.leads) if named[name] in wanted]
        part = ECG(recording.signal[rows], tuple(named[recording.leads[i]] for i in rows), recording.rate, recording.start)
        values, usable = prepare_signals([part], self.autoencoder.names, self.preparation)
        return values, usable & shown.numpy()


class OverlappingWindows(nn.Module):
    """A denoiser of `window` frames applied to more: predictions of windows that overlap by half, averaged with triangular weights."""

    def __init__(self, denoiser: nn.Module, window: int) -> None:
        super().__init__()
        self.denoiser, self.window = denoiser, window

    def forward(self, latents: Tensor, levels: Tensor, times: Tensor, features: Tensor, **conditions: Any) -> Tensor:
        """latents [B,T,C,p], levels and times [B,T], features [B,T,F] → [B,T,C,p]."""
        count, width = latents.shape[1], self.window
        if count <= width:
            return self.denoiser(latents, levels, times, features=features)
        total, weights = torch.zeros_like(latents), latents.new_zeros(count)
        triangle = 1 - (torch.arange(width, device=latents.device) - (width - 1) / 2).abs() / (width / 2 + 1)
        for start in sorted({*range(0, count - width, width // 2), count - width}):
            part = slice(start, start + width)
            out = self.denoiser(latents[:, part], levels[:, part], times[:, part] - times[:, :1], features=features[:, part])
            total[:, part] += triangle[:, None, None] * out
            weights[part] += triangle
        return total / weights[:, None, None]


def write_translation_card(folder: Path, name: str, pipeline: ECGTranslationPipeline, recipe: Config) -> None:
    """Write `folder/README.md`."""
    tags = ["diffusers", "medical", "ecg", "synthetic"]
    low, high = pipeline.preparation.band
    write_card(
        folder,
        {"library_name": "medgen", "pipeline_tag": "other", "tags": tags},
        _CARD,
        name,
        pipeline,
        recipe,
        given=tuple(pipeline.config.default_given.split(",")),
        signals=", ".join(pipeline.autoencoder.names),
        rate=pipeline.preparation.rate,
        low=low,
        high=high,
        steps=pipeline.config.num_inference_steps,
    )


def signal_frames(codec: SignalAutoencoder, guess: Tensor, given: Tensor, rate: float) -> FrameBatch:
    """Empty latent frames [B,T,L,1] at their real seconds, each with the guess [B,K,S] over its own time and what is given."""
    features = codec.features(guess, given)
    batch, count, _ = features.shape
    times = (torch.arange(count, device=guess.device) * (int(codec.config.frame_samples) / rate)).expand(batch, -1)
    blank = guess.new_zeros(batch, count, int(codec.config.latent_channels), 1)
    known = torch.zeros(batch, count, dtype=torch.bool, device=guess.device)
    return FrameBatch(latents=blank, times=times, known=known, present=~known, features=features)


def _rows(frames: FrameBatch, rows: Tensor) -> FrameBatch:
    assert frames.features is not None
    return FrameBatch(
        frames.latents[rows], frames.times[rows], frames.known[rows], frames.present[rows], features=frames.features[rows]
    )
