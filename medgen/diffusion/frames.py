"""`FrameBatch`: latent frames at real times, some known, some to be generated, with timed context tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class FrameBatch:
    """B sequences of T frames of C x S latents, conditioned on N tokens of width D.

    latents [B,T,C,*S]; times [B,T] (unit in the task's configuration); known [B,T] bool: given, not generated; present [B,T] bool:
    False is padding; context [B,N,D], context_times [B,N], context_mask [B,N] bool (False is padding), or None without context;
    features [B,T,F]: what is known of each frame (the cardiac phase), feature_mask [B,T] bool (False: unknown there), or None.
    """

    latents: Tensor
    times: Tensor
    known: Tensor
    present: Tensor
    context: Tensor | None = None
    context_times: Tensor | None = None
    context_mask: Tensor | None = None
    features: Tensor | None = None
    feature_mask: Tensor | None = None

    def __post_init__(self) -> None:
        frames = self.latents.shape[:2]
        for name in ("times", "known", "present"):
            if getattr(self, name).shape != frames:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; latents say [B,T] = {tuple(frames)}")
        if self.features is None and self.feature_mask is not None:
            raise ValueError("feature_mask needs features")
        for name in ("features", "feature_mask"):
            value = getattr(self, name)
            if value is not None and value.shape[:2] != frames:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; latents say [B,T] = {tuple(frames)}")
        if self.context is None:
            if self.context_times is not None or self.context_mask is not None:
                raise ValueError("context_times and context_mask need a context")
            return
        tokens = self.context.shape[:2]
        for name in ("context_times", "context_mask"):
            value = getattr(self, name)
            if value is not None and value.shape != tokens:
                raise ValueError(f"{name} has shape {tuple(value.shape)}; context says [B,N] = {tuple(tokens)}")

    @classmethod
    def single(cls, latents: Tensor, context: Tensor | None = None, context_mask: Tensor | None = None) -> FrameBatch:
        """Sequences of one frame at time 0, to be generated: `latents` [B,C,*S] with untimed tokens [B,N,D]."""
        frame = latents.new_zeros(len(latents), 1)
        return cls(
            latents=latents[:, None],
            times=frame,
            known=torch.zeros_like(frame, dtype=torch.bool),
            present=torch.ones_like(frame, dtype=torch.bool),
            context=context,
            context_times=None,
            context_mask=context_mask,
        )

    def conditions(self, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """What a denoiser is called with besides latents, levels and times; context and features in `dtype` if given."""
        values: dict[str, Any] = {
            "present": self.present if self.times.shape[1] > 1 else None,
            "context": self.context if self.context is None else self.context.to(dtype),
            "context_times": self.context_times,
            "context_mask": self.context_mask,
        }
        if self.features is not None:  # networks that know no features are called without the word
            values |= {"features": self.features.to(dtype), "feature_mask": self.feature_mask}
        return values

    def to(self, device: torch.device | str) -> FrameBatch:
        """The same batch on `device`."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value if value is None else value.to(device) for name, value in given.items()}
        return FrameBatch(**moved)
