"""`EchoConditioner`: what an echo clip is conditioned on (ECG, ejection fraction, view, frame rate) as timed tokens and frame features.

The ECG is never pooled in time: every tenth of a second is a token at its real second. After PatchTST (Nie 2023) for the patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError
from medgen.models.attention import Attention, time_angles
from medgen.models.folders import component

C = TypeVar("C", bound=nn.Module)
CONDITIONS = ("ecg", "ejection_fraction", "view", "fps")
"""What `EchoConditions.drop` knows; a clip's first frame is a known frame of its `FrameBatch`, not a token."""
LEADS = 12
VIEWS = 4
_PERIODS = (0.2, 10.0)  # seconds, of the rotary positions among ECG tokens


@dataclass(frozen=True)
class EchoConditions:
    """Conditions of B clips of T frames; each may be missing, for the batch (None) or for a clip (masked, NaN, -1).

    times [B,T] s of the frames; ecg [B,12,S] mV with lead_mask [B,12] bool, sample_mask [B,S] bool (False: not recorded) and
    ecg_start [B] s, the second of sample 0 on the frames' clock; phase [B,T,4] as of `medgen.data.ecg.frame_phase` (NaN: unknown);
    ejection_fraction [B] percent (NaN: unknown); view [B] long, an index of `ECHO_VIEWS` (-1: unknown); fps [B] Hz (NaN: unknown);
    encoded [B,M,E] of a published ECG encoder at encoded_times [B,M] s (NaN: no token).
    """

    times: Tensor
    ecg: Tensor | None = None
    lead_mask: Tensor | None = None
    sample_mask: Tensor | None = None
    ecg_start: Tensor | None = None
    phase: Tensor | None = None
    ejection_fraction: Tensor | None = None
    view: Tensor | None = None
    fps: Tensor | None = None
    encoded: Tensor | None = None
    encoded_times: Tensor | None = None

    def __post_init__(self) -> None:
        beside = (self.lead_mask, self.sample_mask, self.ecg_start)
        if self.ecg is not None and any(value is None for value in beside):
            raise ValueError("an ecg needs lead_mask, sample_mask and ecg_start: what is not recorded must not pass for data")
        if (self.encoded is None) != (self.encoded_times is None):
            raise ValueError("encoded tokens need their encoded_times")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != len(self.times):
                raise ValueError(f"{field.name} is of {len(value)} clips, times of {len(self.times)}")

    def drop(self, names: Iterable[str] | Mapping[str, Tensor]) -> EchoConditions:
        """Without the conditions `names` (of CONDITIONS); a mapping gives the clips [B] bool that lose each.

        The phase is read off the ECG and goes with it.
        """
        everyone = torch.ones(len(self.times), dtype=torch.bool, device=self.times.device)
        lost = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, everyone)
        changed: dict[str, Tensor] = {}
        for name, rows in lost.items():
            if name not in CONDITIONS:
                raise ValueError(f"no condition {name!r}; there are {', '.join(CONDITIONS)}")
            if name == "ecg":
                if self.lead_mask is not None:
                    changed["lead_mask"] = self.lead_mask & ~rows[:, None]
                if self.phase is not None:
                    changed["phase"] = self.phase.masked_fill(rows[:, None, None], torch.nan)
                if self.encoded_times is not None:
                    changed["encoded_times"] = self.encoded_times.masked_fill(rows[:, None], torch.nan)
            elif (value := getattr(self, name)) is not None:
                changed[name] = value.masked_fill(rows, -1 if name == "view" else torch.nan)
        return replace(self, **changed)

    def some_leads(self, rows: Tensor, generator: torch.Generator) -> EchoConditions:
        """With a random part of the leads, at least one of those there, for the clips `rows` [B] bool."""
        if self.lead_mask is None:
            return self
        draws = torch.rand(self.lead_mask.shape, generator=generator, device=rows.device).masked_fill(~self.lead_mask, 2.0)
        share = torch.rand(len(rows), 1, generator=generator, device=rows.device)
        kept = (draws <= share) | (draws == draws.min(1, keepdim=True).values)
        return replace(self, lead_mask=self.lead_mask & (kept | ~rows[:, None]))

    def to(self, device: torch.device | str) -> EchoConditions:
        """The same on `device`."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value if value is None else value.to(device) for name, value in given.items()}
        return EchoConditions(**moved)


class EchoConditionerConfig(Config):
    """The shape of an `EchoConditioner`; the ECG's rate comes from its preparation."""

    width: int = Field(128, ge=8)
    depth: int = Field(2, ge=0, description="transformer layers over the ECG's tokens")
    heads: int = Field(4, ge=1)
    patch_seconds: float = Field(0.1, gt=0, description="ECG in one token")


class EchoConditioner(ModelMixin, ConfigMixin):
    """Conditions → context tokens of width D with times, and features of each frame."""

    feature_dim: ClassVar[int] = 7
    """Of each frame: sin φ, cos φ, seconds since R, RR, whether these are known; ejection fraction, whether it is known."""

    @register_to_config
    def __init__(
        self,
        rate: float = 250.0,
        width: int = 128,
        depth: int = 2,
        heads: int = 4,
        patch_seconds: float = 0.1,
        encoder_dim: int = 0,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % 4:
            raise ValueError(f"width {width} / heads {heads} must be a whole multiple of 4")
        self.patch = max(1, round(rate * patch_seconds))
        # Filters of their own for each lead: what a lead shows depends on where it looks from.
        self.filters = nn.Parameter(torch.randn(LEADS, self.patch, width) * (self.patch**-0.5))
        self.lead = nn.Parameter(torch.randn(LEADS, width) * 0.02)
        self.mix = nn.Sequential(nn.GELU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.embed_ejection_fraction, self.embed_fps = (
            nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.embed_view = nn.Embedding(VIEWS, width)
        self.embed_encoded = nn.Sequential(nn.LayerNorm(encoder_dim), nn.Linear(encoder_dim, width)) if encoder_dim else None

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.width)

    def forward(self, conditions: EchoConditions) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """context [B,N,D], context_times [B,N] s (NaN: of no moment), context_mask [B,N], features [B,T,7], feature_mask [B,T].

        A clip's tokens do not depend on the other clips of its batch. The tokens are, if the ECG is given, one for each
        `patch_seconds` of it and those of a published encoder, and in any case those of ejection fraction, view and frame rate.
        """
        parts = [*self._ecg_tokens(conditions), *self._encoded_tokens(conditions), self._scalar_tokens(conditions)]
        context, times, mask = (torch.cat([part[i] for part in parts], dim=1) for i in range(3))
        return context, times, mask, *self._features(conditions)

    def _ecg_tokens(self, conditions: EchoConditions) -> list[tuple[Tensor, Tensor, Tensor]]:
        ecg, leads, samples, start = conditions.ecg, conditions.lead_mask, conditions.sample_mask, conditions.ecg_start
        if ecg is None or leads is None or samples is None or start is None:
            return []
        missing = -ecg.shape[-1] % self.patch
        samples = nn.functional.pad(samples, (0, missing)).unflatten(-1, (-1, self.patch))  # [B,N,p]
        seen = leads[:, :, None, None] & samples[:, None]  # [B,L,N,p]
        patches = nn.functional.pad(ecg, (0, missing)).unflatten(-1, (-1, self.patch)).masked_fill(~seen, 0.0)
        there = leads.to(self.filters.dtype)
        mean = 1 / there.sum(1).clamp(min=1)
        x = torch.einsum("blnp,lpd->bnd", patches.to(self.filters.dtype), self.filters) + (there @ self.lead)[:, None]
        x = self.mix(x * mean[:, None, None])
        mask = samples.any(-1) & leads.any(1, keepdim=True)  # [B,N]
        middle = (torch.arange(x.shape[1], device=x.device) + 0.5) * self.patch / self.config.rate
        times = start[:, None] + middle
        angles = time_angles(times - start[:, None], self.width // self.config.heads, *_PERIODS)
        # Attention needs a key everywhere: a clip without an ECG attends to everything, and its tokens are masked afterwards.
        keys = mask | ~mask.any(1, keepdim=True)
        for layer in self.layers:
            x = layer(x, angles, keys)
        return [(self.norm(x), times, mask)]

    def _encoded_tokens(self, conditions: EchoConditions) -> list[tuple[Tensor, Tensor, Tensor]]:
        if conditions.encoded is None or conditions.encoded_times is None:
            return []
        if self.embed_encoded is None:
            raise ValueError("this conditioner was built without a published ECG encoder (encoder_dim=0)")
        times = conditions.encoded_times
        return [(self.embed_encoded(conditions.encoded.to(self.filters.dtype)), times, ~times.isnan())]

    def _scalar_tokens(self, conditions: EchoConditions) -> tuple[Tensor, Tensor, Tensor]:
        dtype = self.filters.dtype
        fraction, fraction_known = _known(conditions.ejection_fraction, conditions.times)
        fps, fps_known = _known(conditions.fps, conditions.times)
        view = torch.full_like(fps_known, -1, dtype=torch.long) if conditions.view is None else conditions.view
        tokens = [
            self.embed_ejection_fraction(_scaled_fraction(fraction)[:, None].to(dtype)),
            self.embed_view(view.clamp(min=0)),
            self.embed_fps((fps.clamp(min=1.0) / 25).log2()[:, None].to(dtype)),
        ]
        mask = torch.stack([fraction_known, view >= 0, fps_known], dim=1)
        times = conditions.times.new_full(mask.shape, torch.nan)
        return torch.stack(tokens, dim=1), times, mask

    def _features(self, conditions: EchoConditions) -> tuple[Tensor, Tensor]:
        times, phase = conditions.times, conditions.phase
        phase = times.new_full((*times.shape, 4), torch.nan) if phase is None else phase.to(times.dtype)
        timed = ~phase.isnan().any(-1, keepdim=True)  # [B,T,1]
        fraction, known = _known(conditions.ejection_fraction, times)
        scaled = torch.where(known, _scaled_fraction(fraction), 0.0)
        rest = torch.stack([scaled, known.to(times.dtype)], dim=-1)[:, None].expand(-1, times.shape[1], -1)
        features = torch.cat([torch.where(timed, phase, 0.0), timed.to(times.dtype), rest], dim=-1)
        return features.to(self.filters.dtype), timed[..., 0] | known[:, None]


def build_conditioner(
    config: EchoConditionerConfig, rate: float, init_from: str | None = None, encoder_dim: int = 0
) -> EchoConditioner:
    """A new conditioner for ECGs of `rate` Hz, or the trained one of the pipeline folder `init_from` (whose shape then counts)."""
    if init_from is None:
        try:
            return EchoConditioner(rate, encoder_dim=encoder_dim, **config.model_dump())
        except ValueError as error:
            raise ConfigError(f"conditioner: {error}") from None
    model = EchoConditioner.from_pretrained(component(init_from, "conditioner"), dtype=torch.float32)
    if model.config.rate != rate:
        raise ConfigError(
            f"data.ecg.rate: {rate:g} Hz, but the conditioner of {init_from} was trained with {model.config.rate:g} Hz"
        )
    if model.config.encoder_dim != encoder_dim:
        raise ConfigError(
            f"ecg_encoder: tokens of width {encoder_dim}, but {init_from} was trained with {model.config.encoder_dim}"
        )
    return model


class ConditionedDenoiser(nn.Module, Generic[C]):
    """A denoiser and the conditioner that is trained with it: one set of weights for optimiser and average."""

    conditioner: C

    def __init__(self, denoiser: nn.Module, conditioner: C) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    def enable_gradient_checkpointing(self) -> None:
        """For the denoiser; the conditioner is small."""
        self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """The denoiser: what is called is not this module but its parts."""
        self.denoiser.compile(*args, **kwargs)


class _Layer(nn.Module):
    """Pre-norm attention in time and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_a, self.norm_m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, angles: Tensor, keys: Tensor) -> Tensor:
        """x [B,N,D], angles [B,N,1,·], keys [B,N] bool → [B,N,D]"""
        x = x + self.attention(self.norm_a(x), mask=keys, rotary=angles)
        return x + self.mlp(self.norm_m(x))


def _known(values: Tensor | None, times: Tensor) -> tuple[Tensor, Tensor]:
    """[B] values, 1 where unknown, and whether they are known."""
    if values is None:
        return torch.ones_like(times[:, 0]), torch.zeros(len(times), dtype=torch.bool, device=times.device)
    known = ~values.isnan()
    return torch.where(known, values, 1.0).to(times.dtype), known


def _scaled_fraction(percent: Tensor) -> Tensor:
    """Percent to about [-2, 2]."""
    return (percent - 50) / 20
