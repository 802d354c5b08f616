"""Stateless randomness: every draw comes from a generator seeded by what it is for, never by what ran before it.

That is why a resumed run, another shard count or another batch size gives the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts, equal on every machine and Python (unlike `hash`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A `torch.Generator` seeded by `stable_seed(*parts)`."""
    import torch

    return torch.Generator(device=device).manual_seed(stable_seed(*parts))
