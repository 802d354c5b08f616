"""Masked tokens: what training hides, what the loss counts, and a decoder that keeps what it has decided."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from medgen.diffusion.masked_tokens import MaskedDecoding, decode_masked, hide, mask_share, masked_loss

MASK = 10


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_schedule_goes_from_everything_to_nothing() -> None:
    shares = mask_share(torch.linspace(0, 1, 11))
    assert float(shares[0]) == 1 and float(shares[-1]) == pytest.approx(0, abs=1e-6)
    assert (shares.diff() < 0).all()
    assert float(mask_share(0.5)) == pytest.approx(math.sqrt(0.5))


def test_training_hides_the_share_it_says_and_never_what_is_known() -> None:
    codes = torch.randint(MASK, (64, 5, 4, 4), generator=rng())
    known = torch.zeros(64, 5, dtype=torch.bool)
    known[:, 0] = True
    inputs, levels, hidden = hide(codes, known, MASK, rng())
    assert torch.equal(inputs == MASK, hidden) and torch.equal(inputs[~hidden], codes[~hidden])
    assert not hidden[:, 0].any() and (levels[:, 0] == 0).all()
    counts = hidden.flatten(1).sum(1)
    assert torch.equal(counts, (levels[:, 1] * 64).ceil().long()) and counts.min() >= 1
    assert 0.5 < float(levels[:, 1].mean()) < 0.75  # the mean of cos(pi/2 u) is 2/pi = 0.64


def test_the_loss_counts_hidden_codes_only() -> None:
    codes = torch.tensor([[[0, 1, 2]]])
    logits = torch.full((1, 1, 3, 4), -20.0).scatter(-1, torch.tensor([[[[0], [3], [2]]]]), 20.0)  # wrong about the second
    hidden = torch.tensor([[[True, False, True]]])
    assert float(masked_loss(logits, codes, hidden)) < 1e-6
    assert float(masked_loss(logits, codes, ~hidden)) == pytest.approx(40.0, abs=0.1)
    assert float(masked_loss(logits, codes, torch.zeros_like(hidden))) == 0


def stripes(codes: Tensor, levels: Tensor) -> Tensor:
    """Logits of a model that knows that place i of every frame shows code i, and is surer of the earlier frames."""
    batch, frames, places = codes.shape
    right = torch.nn.functional.one_hot(torch.arange(places) % MASK, MASK).float()
    sureness = torch.linspace(12, 8, frames)[:, None, None]
    return (right * sureness).expand(batch, frames, places, MASK)


def decode(decoding: MaskedDecoding, seeds: tuple[int, ...] = (0, 1), known_frames: int = 1) -> tuple[Tensor, list[Tensor]]:
    codes = torch.full((len(seeds), 4, 8), 9)
    known = torch.zeros(len(seeds), 4, dtype=torch.bool)
    known[:, :known_frames] = True
    rounds: list[Tensor] = []
    out = decode_masked(
        stripes, codes, known, MASK, decoding, [rng(seed) for seed in seeds], lambda _, current: rounds.append(current)
    )
    return out, rounds


def test_decoding_finds_what_the_model_knows_and_leaves_the_prefix() -> None:
    out, _ = decode(MaskedDecoding(steps=6, temperature=0.0))
    assert (out[:, 0] == 9).all()
    assert torch.equal(out[:, 1:], torch.arange(8).expand(2, 3, 8))


def test_what_is_kept_stays_and_ever_less_is_hidden() -> None:
    out, rounds = decode(MaskedDecoding(steps=8))
    left = [int((current[0] == MASK).sum()) for current in rounds]
    expected = [int(24 * float(mask_share((i + 1) / 8))) for i in range(7)] + [0]
    assert left == expected and sorted(left, reverse=True) == left
    for before, after in itertools.pairwise(rounds):
        kept = before != MASK
        assert torch.equal(before[kept], after[kept])
    assert torch.equal(rounds[-1], out)


def test_the_surest_are_kept_first() -> None:
    _, rounds = decode(MaskedDecoding(steps=8, temperature=0.0, choice_temperature=0.0))
    shown = (rounds[4] != MASK).float().mean((0, 2))
    assert shown[1] > shown[3]


def test_a_sequence_depends_on_its_own_generator_only() -> None:
    """Flat logits: everything that comes out is drawn."""

    def flat(codes: Tensor, levels: Tensor) -> Tensor:
        return torch.zeros(*codes.shape, MASK)

    def draw(seeds: list[int]) -> Tensor:
        shape = (len(seeds), 2, 6)
        known = torch.zeros(shape[:2], dtype=torch.bool)
        return decode_masked(flat, torch.zeros(shape, dtype=torch.long), known, MASK, MaskedDecoding(3), [rng(s) for s in seeds])

    both = draw([5, 6])
    assert torch.equal(both[1:], draw([6])) and torch.equal(both[:1], draw([5]))
    assert not torch.equal(both[0], both[1])


def test_one_step_shows_everything_at_once() -> None:
    out, rounds = decode(MaskedDecoding(steps=1))
    assert len(rounds) == 1 and not (out == MASK).any()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        MaskedDecoding(steps=0)


def test_codes_are_drawn_as_often_as_the_model_says() -> None:
    share = torch.tensor([0.7, 0.2, 0.1])

    def says(codes: Tensor, levels: Tensor) -> Tensor:
        return share.log().expand(*codes.shape, 3)

    def drawn(temperature: float) -> Tensor:
        known = torch.zeros(1, 1, dtype=torch.bool)
        decoding = MaskedDecoding(1, temperature=temperature)
        codes = decode_masked(says, torch.zeros(1, 1, 20000, dtype=torch.long), known, 3, decoding, rng())
        return torch.bincount(codes.flatten(), minlength=3) / 20000

    torch.testing.assert_close(drawn(1.0), share, atol=0.015, rtol=0)
    torch.testing.assert_close(drawn(2.0), share.sqrt() / share.sqrt().sum(), atol=0.015, rtol=0)
    assert drawn(0.0).tolist() == [1.0, 0.0, 0.0]
