"""Masked tokens: hide some codes, predict them all at once, keep the surest, hide the rest again. After MaskGIT (Chang 2022).

Codes are [B,T,*S] int64, the number `mask_code` (one past the codebook) is a hidden one; levels [B,T] are the share that is hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from medgen.diffusion.sampling import Generators

Predict = Callable[[Tensor, Tensor], Tensor]
"""(codes [B,T,*S] with hidden ones, levels [B,T]) → logits [B,T,*S,K]; guidance happens inside."""


def mask_share(progress: Tensor | float) -> Tensor:
    """Share of hidden codes at `progress` in [0,1] through decoding: cos(pi/2 * progress), the schedule that MaskGIT found best."""
    return torch.cos(torch.as_tensor(progress) * math.pi / 2)


def hide(codes: Tensor, known: Tensor, mask_code: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Training input: (codes with some hidden, levels [B,T], hidden [B,T,*S] bool).

    One share per sequence, drawn by the cosine of a uniform number; known frames [B,T] bool are never hidden and have level 0.
    At least one code of each sequence with an unknown frame is hidden.
    """
    batch, device = len(codes), codes.device
    share = mask_share(torch.rand(batch, generator=generator, device=device))
    scores = torch.rand(codes.shape, generator=generator, device=device).flatten(2)
    free = ~known[:, :, None].expand_as(scores)
    scores = scores.masked_fill(~free, math.inf).flatten(1)
    count = (share * free.flatten(1).sum(1)).ceil().clamp(min=1)
    ranks = scores.argsort(1).argsort(1)
    hidden = ((ranks < count[:, None]) & free.flatten(1)).view_as(codes)
    levels = share[:, None].expand(known.shape).masked_fill(known, 0.0)
    return codes.masked_fill(hidden, mask_code), levels, hidden


def masked_loss(logits: Tensor, codes: Tensor, hidden: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of logits [B,T,*S,K] against `codes`, over the hidden ones only (0 where nothing is hidden)."""
    loss = functional.cross_entropy(
        logits.float().flatten(0, -2), codes.flatten(), reduction="none", label_smoothing=label_smoothing
    )
    counted = hidden.flatten().float()
    return (loss * counted).sum() / counted.sum().clamp(min=1)


@dataclass(frozen=True)
class MaskedDecoding:
    """`steps` rounds; codes are drawn at `temperature`; Gumbel noise of `choice_temperature` is added to how sure a code is.

    That noise falls to 0 over the rounds: early ones explore, the last keeps what is surest.
    """

    steps: int = 16
    temperature: float = 1.0
    choice_temperature: float = 4.5

    def __post_init__(self) -> None:
        if self.steps < 1 or self.temperature < 0 or self.choice_temperature < 0:
            raise ValueError(f"masked decoding needs at least 1 step and no negative temperature: {self}")


@torch.no_grad()
def decode_masked(
    predict: Predict,
    codes: Tensor,
    known: Tensor,
    mask_code: int,
    decoding: MaskedDecoding,
    generator: Generators = None,
    after_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Codes [B,T,*S]: those of unknown frames generated, those of `known` frames [B,T] as they were. Calls `predict` `steps` times.

    Each round predicts every hidden code, then hides the least sure of them again, as many as the schedule says; what has been kept
    stays. One generator per sequence makes each independent of its batch. `after_step(index, codes)` sees the codes of each round.
    """
    sides, free = codes.shape[2:], ~known
    hidden = free.reshape(*known.shape, *(1,) * len(sides)).expand_as(codes)
    current = codes.masked_fill(hidden, mask_code)
    total = hidden.flatten(1).sum(1)
    for step in range(decoding.steps):
        share = float(mask_share(step / decoding.steps))
        levels = torch.full(known.shape, share, device=codes.device).masked_fill(known, 0.0)
        logits = predict(current, levels).float()
        sampled = _drawn(logits, decoding.temperature, generator)
        current = torch.where(hidden, sampled, current)
        left = float(mask_share((step + 1) / decoding.steps)) if step + 1 < decoding.steps else 0.0
        annealed = decoding.choice_temperature * (1 - (step + 1) / decoding.steps)
        sure = logits.gather(-1, sampled[..., None])[..., 0] - logits.logsumexp(-1)
        sure = sure - annealed * torch.log(-torch.log(_uniform(codes.shape, generator, codes.device)))  # plus Gumbel noise
        keep_hidden = (total * left).floor().long()
        ranks = sure.masked_fill(~hidden, math.inf).flatten(1).argsort(1).argsort(1)
        hidden = (ranks < keep_hidden[:, None]).view_as(codes) & hidden
        current = current.masked_fill(hidden, mask_code)
        if after_step is not None:
            after_step(step, current)
    return current


def _drawn(logits: Tensor, temperature: float, generator: Generators) -> Tensor:
    """A code for each place, drawn from softmax(logits / temperature) by one uniform number; at temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    reached = (logits / temperature).softmax(-1).cumsum(-1)
    wanted = _uniform(logits.shape[:-1], generator, logits.device)[..., None] * reached[..., -1:]
    return (reached < wanted).sum(-1).clamp(max=logits.shape[-1] - 1)


def _uniform(shape: Sequence[int], generator: Generators, device: torch.device) -> Tensor:
    """Numbers between 0 and 1, neither included; sequence i's from generator i where there is one for each."""
    if isinstance(generator, Sequence):
        drawn = torch.stack([torch.rand(tuple(shape[1:]), generator=g, device=g.device).to(device) for g in generator])
    else:
        drawn = torch.rand(tuple(shape), generator=generator, device=device if generator is None else generator.device).to(device)
    return drawn.clamp(1e-20, 1 - 1e-7)
