"""`ProgressionConditioner`: what a course depends on besides its images: gaps, treatments, covariates, reports; each may be missing.

Treatments and sentences of reports are tokens at their own dates, covariates tokens without one. Every frame's features say how far
it lies from the known visits around it, and which treatments came since.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError
from medgen.diffusion.anchors import neighbours
from medgen.models.folders import component

CONDITIONS = ("events", "covariates", "reports")
"""What `ProgressionConditions.drop` knows; the past visits themselves are known frames of the `FrameBatch`."""
_OCTAVES = 4  # of log-gaps, from the time scale to 10,000 times it
_DECAYS = (0.25, 1.0, 6.0)  # in time scales: how long after a treatment a frame still sees it


@dataclass(frozen=True)
class ProgressionConditions:
    """Conditions of B series of T frames, in the series' time unit.

    times [B,T] and known [B,T] bool of the frames; event_kind [B,N] long (-1: none), event_times [B,N], event_values [B,N] (NaN: not
    said); events_known [B] bool: whether anyone wrote treatments down; numbers [B,K] (NaN: unknown) and words [B,L] long (-1: unknown)
    of the covariates; sentences [B,R,E] of reports, at sentence_times [B,R] (NaN: no sentence).
    """

    times: Tensor
    known: Tensor
    event_kind: Tensor
    event_times: Tensor
    event_values: Tensor
    events_known: Tensor
    numbers: Tensor
    words: Tensor
    sentences: Tensor | None = None
    sentence_times: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.sentences is None) != (self.sentence_times is None):
            raise ValueError("sentences need their sentence_times")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != len(self.times):
                raise ValueError(f"{field.name} is of {len(value)} series, times of {len(self.times)}")

    def drop(self, names: Iterable[str] | Mapping[str, Tensor]) -> ProgressionConditions:
        """Without the conditions `names` (of CONDITIONS); a mapping gives the series [B] bool that lose each."""
        everyone = torch.ones(len(self.times), dtype=torch.bool, device=self.times.device)
        lost = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, everyone)
        changed: dict[str, Tensor] = {}
        for name, rows in lost.items():
            if name not in CONDITIONS:
                raise ValueError(f"no condition {name!r}; there are {', '.join(CONDITIONS)}")
            if name == "events":
                changed["event_kind"] = self.event_kind.masked_fill(rows[:, None], -1)
                changed["events_known"] = self.events_known & ~rows
            elif name == "covariates":
                changed["numbers"] = self.numbers.masked_fill(rows[:, None], torch.nan)
                changed["words"] = self.words.masked_fill(rows[:, None], -1)
            elif self.sentence_times is not None:
                changed["sentence_times"] = self.sentence_times.masked_fill(rows[:, None], torch.nan)
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> ProgressionConditions:
        """The same on `device`."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: value if value is None else value.to(device) for name, value in given.items()}
        return ProgressionConditions(**moved)


class ProgressionConditionerConfig(Config):
    """Which conditions are known of, by name, and the width of their tokens."""

    width: int = Field(128, ge=8)
    time_scale: float = Field(30.0, gt=0, description="a short gap, in the series' time unit: 30 for days, 0.1 for phases")
    events: tuple[str, ...] = Field((), description="names of treatments; others in the data are ignored, and said so")
    numbers: dict[str, tuple[float, float]] = Field({}, description="covariate: its usual mean and standard deviation")
    words: dict[str, tuple[str, ...]] = Field({}, description="covariate: its values; others count as unknown")


class ProgressionConditioner(ModelMixin, ConfigMixin):
    """Conditions → context tokens of width D with times, and features of each frame."""

    @register_to_config
    def __init__(
        self,
        width: int = 128,
        time_scale: float = 30.0,
        events: Sequence[str] = (),
        numbers: Mapping[str, Sequence[float]] | None = None,
        words: Mapping[str, Sequence[str]] | None = None,
        sentence_dim: int = 0,
    ) -> None:
        super().__init__()
        numbers, words = dict(numbers or {}), dict(words or {})
        self.register_to_config(events=list(events), numbers={k: list(v) for k, v in numbers.items()},
                                words={k: list(v) for k, v in words.items()})  # fmt: skip
        self.embed_event = nn.Embedding(len(events) + 1, width)
        self.embed_value = nn.Linear(1, width, bias=False)
        self.embed_numbers = nn.ModuleList(
            nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width)) for _ in numbers
        )
        self.embed_words = nn.ModuleList(nn.Embedding(len(values), width) for values in words.values())
        self.embed_sentence = nn.Sequential(nn.LayerNorm(sentence_dim), nn.Linear(sentence_dim, width)) if sentence_dim else None

    @property
    def width(self) -> int:
        """D."""
        return int(self.config.width)

    @property
    def feature_dim(self) -> int:
        """Of each frame: gaps to the known visits before and after it, whether they exist and it is one; treatments since."""
        return 2 * (2 * _OCTAVES + 2) + 2 + len(self.config.events) * len(_DECAYS)

    def covariates(self, given: Mapping[str, float | str]) -> tuple[list[float], list[int]]:
        """Numbers (NaN: unknown) and indices of words (-1: unknown) of one patient; names that the model does not know are left out."""
        numbers = [float(given[name]) if isinstance(given.get(name), int | float) else math.nan for name in self.config.numbers]
        words = [
            list(values).index(str(given[name])) if str(given.get(name)) in values else -1
            for name, values in self.config.words.items()
        ]
        return numbers, words

    def forward(self, conditions: ProgressionConditions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """context [B,N,D], context_times [B,N] (NaN: of no moment), context_mask [B,N], features [B,T,feature_dim]."""
        parts = [self._event_tokens(conditions), self._covariate_tokens(conditions), *self._sentence_tokens(conditions)]
        context, times, mask = (torch.cat([part[i] for part in parts], dim=1) for i in range(3))
        return context, times, mask, self._features(conditions)

    def _event_tokens(self, c: ProgressionConditions) -> tuple[Tensor, Tensor, Tensor]:
        mask = c.event_kind >= 0
        said = ~c.event_values.isnan()
        value = torch.where(said, c.event_values, 0.0)[..., None].to(self.dtype)
        tokens = self.embed_event(c.event_kind.clamp(min=0)) + self.embed_value(value)
        # one more token says that treatments are recorded here: "none was given" is knowledge, too
        recorded = self.embed_event.weight[-1].expand(len(tokens), 1, -1)
        times = torch.cat([c.event_times, torch.full_like(c.times[:, :1], torch.nan)], 1)
        return torch.cat([tokens, recorded], 1), times, torch.cat([mask, c.events_known[:, None]], 1)

    def _covariate_tokens(self, c: ProgressionConditions) -> tuple[Tensor, Tensor, Tensor]:
        tokens, masks = [], []
        for i, (embed, (mean, std)) in enumerate(zip(self.embed_numbers, self.config.numbers.values(), strict=True)):
            known = ~c.numbers[:, i].isnan()
            value = torch.where(known, (c.numbers[:, i] - mean) / std, 0.0)
            tokens.append(embed(value[:, None].to(self.dtype)))
            masks.append(known)
        for i, table in enumerate(self.embed_words):
            tokens.append(table(c.words[:, i].clamp(min=0)))
            masks.append(c.words[:, i] >= 0)
        if not tokens:
            empty = c.times.new_zeros(len(c.times), 0)
            return empty.new_zeros(len(empty), 0, self.width, dtype=self.dtype), empty, empty.bool()
        mask = torch.stack(masks, 1)
        return torch.stack(tokens, 1), c.times.new_full(mask.shape, torch.nan), mask

    def _sentence_tokens(self, c: ProgressionConditions) -> list[tuple[Tensor, Tensor, Tensor]]:
        if c.sentences is None or c.sentence_times is None:
            return []
        if self.embed_sentence is None:
            raise ValueError("this conditioner was built without a text encoder (sentence_dim=0)")
        mask = ~c.sentence_times.isnan()
        return [(self.embed_sentence(c.sentences.to(self.dtype)), c.sentence_times, mask)]

    def _features(self, c: ProgressionConditions) -> Tensor:
        before, after = neighbours(c.known)
        parts = []
        for index in (before, after):
            there = index >= 0
            gap = (c.times - c.times.gather(1, index.clamp(min=0))).abs() / self.config.time_scale
            parts += [_wave(gap) * there[..., None], there[..., None].float()]
        parts += [c.known[..., None].float(), c.events_known[:, None, None].expand(*c.times.shape, 1).float()]
        parts += [self._treated(c, before, kind) for kind in range(len(self.config.events))]
        return torch.cat(parts, dim=-1).to(self.dtype)

    def _treated(self, c: ProgressionConditions, before: Tensor, kind: int) -> Tensor:
        """[B,T,len(_DECAYS)]: 0 if the frame saw no treatment of `kind` since the known visit before it, else fading with time."""
        given = (c.event_kind == kind)[:, None]  # [B,1,N]
        start = torch.where(before >= 0, c.times.gather(1, before.clamp(min=0)), -torch.inf)[..., None]
        when = c.event_times[:, None]
        since = torch.where(given & (when >= start) & (when <= c.times[..., None]), c.times[..., None] - when, torch.inf)
        newest = since.amin(-1) if since.shape[-1] else torch.full_like(c.times, torch.inf)
        return torch.stack([torch.exp(-newest / (decay * self.config.time_scale)) for decay in _DECAYS], dim=-1)


def _wave(gap: Tensor) -> Tensor:
    """[..., 2 * _OCTAVES + 1]: log(1 + gap) as it is and as sines and cosines; `gap` in time scales."""
    log = torch.log1p(gap)[..., None]
    phase = log * (math.pi / 8 * 2.0 ** torch.arange(_OCTAVES, device=gap.device))
    return torch.cat([log / 3, phase.sin(), phase.cos()], dim=-1)


def build_progression_conditioner(
    config: ProgressionConditionerConfig, sentence_dim: int, init_from: str | None = None
) -> ProgressionConditioner:
    """A new conditioner, or the trained one of the pipeline folder `init_from` (whose shape then counts)."""
    if init_from is None:
        return ProgressionConditioner(sentence_dim=sentence_dim, **config.model_dump())
    model = ProgressionConditioner.from_pretrained(component(init_from, "conditioner"), dtype=torch.float32)
    if model.config.sentence_dim != sentence_dim:
        raise ConfigError(
            f"reports: sentences of width {sentence_dim}, but {init_from} was trained with {model.config.sentence_dim}"
        )
    return model
