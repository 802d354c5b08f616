"""Multi-head attention with QK-norm and rotary positions, run by the best backend that this machine really has.

Backends are diffusers' (`dispatch_attention_fn`): PyTorch's own SDPA everywhere, xformers where its CUDA operators load.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

logger = logging.getLogger(__name__)

POSITION_CHANNELS = 32
"""Channels per axis of `grid_positions`."""


@lru_cache(maxsize=8)
def working_backends(device_type: str) -> tuple[str, ...]:
    """Names of the backends that compute masked attention on `device_type` here, the preferred one first (tried, not guessed)."""
    candidates = ("xformers", "native") if device_type == "cuda" else ("native",)
    working = []
    for name in candidates:
        x = torch.ones(1, 8, 1, 32, device=device_type, dtype=torch.float16 if device_type == "cuda" else torch.float32)
        try:
            dispatch_attention_fn(x, x, x, attn_mask=x.new_ones(1, 1, 8, 8, dtype=torch.bool), backend=AttentionBackendName(name))
        except Exception as error:
            logger.info("attention backend %s does not work on %s: %s", name, device_type, error)
        else:
            working.append(name)
    return tuple(working)


class Attention(nn.Module):
    """Attention of `width`-wide queries on keys of `key_width` (their own where None). `backend` None: chosen by capability."""

    def __init__(self, width: int, heads: int, key_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.backend: str | None = None
        self.to_q = nn.Linear(width, width, bias=False) if key_width else None
        self.to_kv = nn.Linear(key_width or width, 2 * width if key_width else 3 * width, bias=False)
        # QK-norm (Dehghani 2023); LayerNorm is one fused kernel everywhere, RMSNorm is not on a CPU (half the time there)
        self.norm_q, self.norm_k = (nn.LayerNorm(width // heads, eps=1e-6, bias=False) for _ in range(2))
        self.to_out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
        key_rotary: Tensor | None = None,
    ) -> Tensor:
        """x [B,L,W], context [B,N,K] → [B,L,W]; rotary angles [B or 1, L, 1, R/2], R ≤ head width.

        mask [B,N], or [B or 1, L, N] where it differs by query, bool (True: attend).
        """
        if self.to_q is None:
            q, k, v = self.to_kv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
            key_rotary = rotary
        else:
            q = self.to_q(x).unflatten(-1, (self.heads, -1))
            k, v = self.to_kv(context).unflatten(-1, (2, self.heads, -1)).unbind(2)
        q, k = rotate(self.norm_q(q), rotary).to(v.dtype), rotate(self.norm_k(k), key_rotary).to(v.dtype)
        backend = self.backend or working_backends(x.device.type)[0]
        attn_mask = None
        if mask is not None:
            attn_mask = (mask[:, None, None] if mask.ndim == 2 else mask[:, None]).expand(len(q), 1, q.shape[1], -1)
        out = dispatch_attention_fn(q, k, v, attn_mask=attn_mask, backend=AttentionBackendName(backend))
        return self.to_out(out.flatten(2))


def rotate(x: Tensor, angles: Tensor | None) -> Tensor:
    """Rotary embedding (Su 2021) of the first 2 * angles.shape[-1] channels of x [B,L,H,D]; the others stay."""
    if angles is None:
        return x
    half = angles.shape[-1]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    # split, not slices: the backward pass of three slices fills three tensors with zeros and adds them, that of split is one copy
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def grid_angles(sides: tuple[int, ...], head_width: int, device: torch.device) -> Tensor:
    """[1, S, 1, R/2] rotary angles of a grid of `sides` positions, its axes sharing the channels evenly."""
    per_axis = head_width // (2 * len(sides))
    frequency = 1 / 100 ** (torch.arange(per_axis, device=device) / per_axis)
    axes = [torch.arange(side, device=device)[:, None] * frequency for side in sides]
    shape = (*sides, per_axis)
    spread = [a.reshape((1,) * i + (side,) + (1,) * (len(sides) - 1 - i) + (per_axis,)).expand(shape)
              for i, (a, side) in enumerate(zip(axes, sides))]  # fmt: skip
    return torch.cat(spread, dim=-1).reshape(1, -1, 1, per_axis * len(sides))


def grid_positions(sides: tuple[int, ...], like: Tensor) -> Tensor:
    """[S, 32 * dims] sines and cosines of absolute position in [0, 1] (left is not right); the same at every resolution."""
    frequency = math.pi * 2 ** (torch.arange(POSITION_CHANNELS // 2, device=like.device) / 3)
    axes = [((torch.arange(n, device=like.device) + 0.5) / n)[:, None] * frequency for n in sides]
    grids = torch.meshgrid(*(torch.arange(n, device=like.device) for n in sides), indexing="ij")
    angles = torch.stack([axis[grid.flatten()] for axis, grid in zip(axes, grids)], dim=1).flatten(1)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(like.dtype)


def time_angles(times: Tensor, channels: int, shortest: float, longest: float) -> Tensor:
    """[B, L, 1, channels/2] rotary angles of real `times` [B,L], with periods from `shortest` to `longest` in the same unit."""
    steps = torch.linspace(math.log(shortest), math.log(longest), channels // 2, device=times.device)
    return (times.float()[..., None] * (2 * math.pi / steps.exp()))[:, :, None]
