"""`SequenceTransformer`: the one denoiser, for an image (a sequence of one frame), visits of a patient, or a video.

Factorised attention in space and in real time, one noise level per frame (known frames sit at level 0), cross-attention to timed
tokens. After DiT (Peebles & Xie 2023), PixArt-alpha (Chen 2024: adaLN-single) and Diffusion Forcing (Chen 2024: per-frame levels).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import Field
from torch import Tensor, nn

from medgen.config import Config, ConfigError
from medgen.models.attention import POSITION_CHANNELS, Attention, grid_angles, grid_positions, time_angles
from medgen.models.folders import component

_LEVEL_CHANNELS = 256


class DenoiserConfig(Config):
    """The shape of a `SequenceTransformer`; latent channels and context width come from the models beside it."""

    init_from: str | None = Field(None, description="folder of a trained denoiser or its pipeline to start from")
    patch_size: int = Field(2, ge=1)
    width: int = Field(384, ge=8)
    depth: int = Field(12, ge=1)
    heads: int = Field(6, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    temporal_every: int = Field(0, ge=0, description="every k-th block also attends in time; 0: none (single images)")
    cross_every: int = Field(1, ge=1, description="every k-th block, from the first, attends to the context")
    modulation: Literal["single", "per_block"] = "single"
    time_periods: tuple[float, float] = Field(
        (1.0, 1000.0), description="shortest and longest rotary period, in the unit of times"
    )


class SequenceTransformer(ModelMixin, ConfigMixin):
    """Predicts flow, noise or v for latent frames [B,T,C,*S], S of `spatial_dims` sides that are multiples of `patch_size`."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        context_dim: int = 192,
        spatial_dims: int = 2,
        patch_size: int = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        temporal_every: int = 0,
        modulation: str = "single",
        time_periods: tuple[float, float] = (1.0, 1000.0),
        feature_dim: int = 0,
        cross_every: int = 1,
    ) -> None:
        super().__init__()
        if width % heads or (width // heads) % (2 * spatial_dims):
            raise ValueError(f"width {width} / heads {heads} must be a whole multiple of {2 * spatial_dims} (2 per spatial axis)")
        if modulation not in ("single", "per_block"):
            raise ValueError(f"modulation {modulation!r} is neither 'single' nor 'per_block'")
        if not 0 < time_periods[0] < time_periods[1]:
            raise ValueError(f"time_periods {tuple(time_periods)} must be positive and increasing")
        self.gradient_checkpointing = False
        token = latent_channels * patch_size**spatial_dims
        self.embed = nn.Linear(token, width)
        self.embed_position = nn.Linear(POSITION_CHANNELS * spatial_dims, width, bias=False)
        self.embed_level = nn.Sequential(nn.Linear(_LEVEL_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_context = nn.Sequential(nn.LayerNorm(context_dim), nn.Linear(context_dim, width))
        self.embed_pooled = nn.Linear(width, width)
        # Always attended, so that an empty or dropped condition is something that can be learned (and softmax has a key).
        self.null_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.modulate = nn.Linear(width, 6 * width) if modulation == "single" else None
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                mlp_ratio,
                temporal=bool(temporal_every) and (i + 1) % temporal_every == 0,
                crossed=i % cross_every == 0,
                own_modulation=modulation == "per_block",
            )
            for i in range(depth)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulate_out = nn.Linear(width, 2 * width)
        self.project_out = nn.Linear(width, token)
        self.embed_features = self.no_features = None
        if feature_dim:
            self.embed_features = nn.Sequential(nn.Linear(feature_dim, width), nn.SiLU(), nn.Linear(width, width))
            self.no_features = nn.Parameter(torch.zeros(width))  # where a frame's features are unknown
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # adaLN-zero: every block starts as the identity and the output as 0
        for layer in (self.modulate, self.modulate_out, self.project_out):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.start_as_identity()

    def set_attention_backend(self, backend: str | None) -> None:
        """Use one of diffusers' attention backends by name ("native", "xformers", "flash", ...); None: by capability."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def forward(
        self,
        latents: Tensor,
        levels: Tensor,
        times: Tensor,
        present: Tensor | None = None,
        context: Tensor | None = None,
        context_times: Tensor | None = None,
        context_mask: Tensor | None = None,
        features: Tensor | None = None,
        feature_mask: Tensor | None = None,
    ) -> Tensor:
        """latents [B,T,C,*S], levels and times [B,T], present [B,T] bool, context [B,N,D], context_times [B,N], context_mask [B,N] bool,
        features [B,T,feature_dim], feature_mask [B,T] bool.

        Returns [B,T,C,*S]. `present=None`: all frames; `context_mask=None`: all tokens; `context_times=None`: tokens without
        times (among others with times: NaN); `features=None`: unknown for every frame.
        """
        batch, frames = latents.shape[:2]
        tokens, sides = self._patchify(latents)
        x = self.embed(tokens) + self.embed_position(grid_positions(sides, tokens))  # [B,T,S,W]
        words, mask = self._words(context, context_mask, batch)
        pooled = _masked_mean(words, mask)
        condition = self.embed_level(_sinusoid(levels, x.dtype)) + self.embed_pooled(pooled)[:, None]  # [B,T,W]
        condition = nn.functional.silu(self._with_features(condition, features, feature_mask))
        shared = None if self.modulate is None else self.modulate(condition)
        head = self.config.width // self.config.heads
        shortest, longest = self.config.time_periods
        rotaries = Rotaries(
            space=grid_angles(sides, head, x.device),
            time=time_angles(times, head // 4 * 2, shortest, longest) if frames > 1 or context_times is not None else None,
            words=None,
        )
        if context_times is not None:
            start = times[:, :1].to(context_times.dtype)  # where tokens without a time stand: shifting all times changes nothing
            placed = torch.where(context_times.isnan(), start, context_times)
            rotaries.words = time_angles(torch.cat([start, placed], 1), head // 4 * 2, shortest, longest)
        for block in self.blocks:
            arguments = (x, shared, condition, words, mask, present, rotaries)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)
        shift, scale = self.modulate_out(condition).unsqueeze(2).chunk(2, dim=-1)
        return self._unpatchify(self.project_out(self.norm_out(x) * (1 + scale) + shift), latents.shape)

    def _with_features(self, condition: Tensor, features: Tensor | None, mask: Tensor | None) -> Tensor:
        """The frames' conditions [B,T,W] with what is known of each frame."""
        if self.embed_features is None or self.no_features is None:
            if features is not None:
                raise ValueError("this denoiser was built without features (feature_dim=0)")
            return condition
        if features is None:
            return condition + self.no_features
        if mask is None:
            return condition + self.embed_features(features)
        mask = mask[..., None]
        # what is unknown may be NaN, and NaN times 0 is NaN in the backward pass: zeroed before, replaced after
        return condition + torch.where(mask, self.embed_features(features.masked_fill(~mask, 0.0)), self.no_features)

    def _words(self, context: Tensor | None, mask: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
        null = self.null_token.expand(batch, -1, -1)
        if context is None:
            return null, None
        words = torch.cat([null, self.embed_context(context)], dim=1)
        return words, None if mask is None else nn.functional.pad(mask.bool(), (1, 0), value=True)

    def _patchify(self, latents: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """[B,T,C,*S] → [B,T,tokens,C*p^d] and the grid of tokens."""
        patch, dims = self.config.patch_size, self.config.spatial_dims
        *lead, channels = latents.shape[:3]
        if latents.ndim != 3 + dims or channels != self.config.latent_channels or any(s % patch for s in latents.shape[3:]):
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}: expected [B, T, {self.config.latent_channels}, *S] with {dims} sides "
                f"that are multiples of {patch}"
            )
        sides = tuple(side // patch for side in latents.shape[3:])
        split = latents.reshape(*lead, channels, *(n for side in sides for n in (side, patch)))
        order = (0, 1, *(3 + 2 * i for i in range(dims)), 2, *(4 + 2 * i for i in range(dims)))
        return split.permute(order).reshape(*lead, math.prod(sides), channels * patch**dims), sides

    def _unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        patch, dims = self.config.patch_size, self.config.spatial_dims
        sides = tuple(side // patch for side in shape[3:])
        split = tokens.reshape(*shape[:2], *sides, shape[2], *(patch,) * dims)
        order = (0, 1, 2 + dims, *(n for i in range(dims) for n in (2 + i, 3 + dims + i)))
        return split.permute(order).reshape(shape)


def build_denoiser(
    config: DenoiserConfig, latent_channels: int, context_dim: int, spatial_dims: int = 2, feature_dim: int = 0
) -> SequenceTransformer:
    """A new denoiser, or the trained one at `config.init_from` (whose shape then counts; it must fit latents, context and features)."""
    if config.init_from is None:
        shape = config.model_dump(exclude={"init_from"})
        try:
            return SequenceTransformer(latent_channels, context_dim, spatial_dims, feature_dim=feature_dim, **shape)
        except ValueError as error:
            raise ConfigError(f"denoiser: {error}") from None
    model = SequenceTransformer.from_pretrained(
        component(config.init_from, "denoiser"), dtype=torch.float32, use_safetensors=True
    )
    expected = {
        "latent_channels": latent_channels,
        "context_dim": context_dim,
        "spatial_dims": spatial_dims,
        "feature_dim": feature_dim,
    }
    for name, needed in expected.items():
        if model.config[name] != needed:
            raise ConfigError(
                f"denoiser.init_from: {config.init_from} was trained with {name}={model.config[name]}, this recipe has {needed}"
            )
    return model


class Rotaries:
    """Rotary angles of one forward pass: of places [1,S,1,·], of frames [B,T,1,·] and of context tokens [B,1+N,1,·]."""

    def __init__(self, space: Tensor, time: Tensor | None, words: Tensor | None) -> None:
        self.space, self.time, self.words = space, time, words


class Block(nn.Module):
    """Space attention, time attention (where `temporal`), cross-attention (where `crossed`), MLP; the first and last by the level."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, temporal: bool, crossed: bool, own_modulation: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.table = nn.Parameter(torch.zeros(6, width))
        self.modulate = nn.Linear(width, 6 * width) if own_modulation else None
        self.space = Attention(width, heads)
        self.time = Attention(width, heads) if temporal else None
        self.cross = Attention(width, heads, key_width=width) if crossed else None
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def start_as_identity(self) -> None:
        """Zero what is added to the residual stream outside the gates (the gates start at 0 with `table`)."""
        for layer in (self.cross.to_out if self.cross else None, self.time.to_out if self.time else None, self.modulate):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(
        self,
        x: Tensor,
        shared: Tensor | None,
        condition: Tensor,
        words: Tensor,
        mask: Tensor | None,
        present: Tensor | None,
        rotaries: Rotaries,
    ) -> Tensor:
        """x [B,T,S,W], shared [B,T,6W] or None, condition [B,T,W], words [B,1+N,W], mask [B,1+N] → [B,T,S,W]."""
        batch, frames, places, width = x.shape
        modulation = self.modulate(condition) if self.modulate is not None else shared
        assert modulation is not None
        parts = (modulation.unflatten(-1, (6, width)) + self.table).unsqueeze(2).unbind(3)  # each [B,T,1,W]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        inner = self.norm(x) * (1 + scale_a) + shift_a
        attended = self.space(inner.flatten(0, 1), rotary=rotaries.space).view_as(x)
        x = x + gate_a * attended
        if self.time is not None:
            series = self.norm(x).transpose(1, 2).flatten(0, 1)  # [B*S,T,W]
            angles = None if rotaries.time is None else rotaries.time.repeat_interleave(places, 0)
            seen = None if present is None else present.repeat_interleave(places, 0)
            attended = self.time(series, rotary=angles, mask=seen)
            x = x + attended.view(batch, places, frames, width).transpose(1, 2)
        if self.cross is not None:
            angles = None
            if rotaries.words is not None and rotaries.time is not None:
                angles = rotaries.time.repeat_interleave(places, 1)
            attended = self.cross(self.norm(x).flatten(1, 2), words, mask, rotary=angles, key_rotary=rotaries.words)
            x = x + attended.view_as(x)
        return x + gate_m * self.mlp(self.norm(x) * (1 + scale_m) + shift_m)


def _sinusoid(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """[B,T] levels in [0,1] → [B,T,256] sines and cosines of periods from 2 pi / 1000 to 20 pi."""
    half = _LEVEL_CHANNELS // 2
    frequency = 1000 * torch.exp(-math.log(10000) * torch.arange(half, device=levels.device) / half)
    angles = levels.float()[..., None] * frequency
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def _masked_mean(words: Tensor, mask: Tensor | None) -> Tensor:
    """Mean [B,W] over the tokens that are there."""
    if mask is None:
        return words.mean(1)
    weights = mask.to(words.dtype)[..., None]
    return (words * weights).sum(1) / weights.sum(1)
