"""Linear latents of an ECG: Einthoven's law for free, a guess from any leads, and nothing of what was hidden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from medgen.data.ecg import LEADS
from medgen.models.signal_autoencoder import SignalAutoencoder, SignalError, components_of, fit_signal_autoencoder


def dipoles(batch: int, samples: int = 64, seed: int = 0) -> Tensor:
    """12 leads [B,12,S] of a random dipole seen through one fixed lead field, with a little noise of each chest lead's own."""
    draws = torch.Generator().manual_seed(seed)
    field = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    source = torch.randn(batch, 3, samples, generator=draws).cumsum(2)
    independent = (
        field @ source + 0.3 * torch.randn(batch, 8, samples, generator=draws) * torch.tensor([0, 0, *[1.0] * 6])[:, None]
    )
    _, mixing = components_of(LEADS)
    return torch.tensor(mixing).float() @ independent


@pytest.fixture(scope="module")
def codec() -> SignalAutoencoder:
    signals = dipoles(64)
    given = torch.zeros(64, 12, dtype=torch.bool)
    given[:, [0, 1, 7]] = True
    return fit_signal_autoencoder(LEADS, signals, given, frame_samples=8, latent_channels=48)


def shown(*names: str) -> Tensor:
    return torch.tensor([[name in names for name in LEADS]])


def test_the_guess_is_the_linear_regression(codec: SignalAutoencoder) -> None:
    training, fresh, given = dipoles(64), dipoles(4, seed=9), shown("I", "II", "V2")
    design = training[:, given[0]].transpose(1, 2).flatten(0, 1)
    target = training[:, LEADS.index("V5")].flatten()
    weights = torch.linalg.lstsq(design, target[:, None]).solution
    expected = (fresh[:, given[0]].transpose(1, 2) @ weights)[..., 0]
    guessed = codec.guess(fresh, given.expand(4, -1))[:, codec.components.index("V5")]
    torch.testing.assert_close(guessed, expected, atol=0.05, rtol=0.01)


def test_two_limb_leads_determine_the_others_exactly(codec: SignalAutoencoder) -> None:
    signals, given = dipoles(2, seed=3), shown("I", "aVF").expand(2, -1)
    assert (codec.doubt(given)[0] == 0).tolist() == [True, True, *[False] * 6]
    noise = torch.randn(2, 8, 48, 1)
    restored = codec.decode(noise, codec.guess(signals, given), signals, given)
    torch.testing.assert_close(restored[:, :6], signals[:, :6], atol=0.02, rtol=0.02)
    assert torch.equal(restored[given], signals[given])


def test_what_is_hidden_is_not_looked_at(codec: SignalAutoencoder) -> None:
    signals, given = dipoles(2), shown("II").expand(2, -1)
    hidden = torch.where(given[..., None], signals, torch.nan)
    assert torch.equal(codec.guess(hidden, given), codec.guess(signals, given))
    assert torch.equal(codec.features(codec.guess(hidden, given), given), codec.features(codec.guess(signals, given), given))


def test_latents_keep_what_the_guess_leaves(codec: SignalAutoencoder) -> None:
    signals, given = dipoles(4, seed=5), shown("I", "II", "V2").expand(4, -1)
    guess = codec.guess(signals, given)
    latents = codec.encode(signals, guess, given)
    assert latents.shape == (4, 8, 48, 1)
    single = shown("II").expand(4, -1)
    for one in (latents, codec.encode(signals, codec.guess(signals, single), single)):  # three leads or one
        assert 0.4 < one.std() < 2.5
    restored = codec.decode(latents, guess, signals, given)
    empty = codec.decode(0 * latents, guess, signals, given)
    assert (restored - signals).square().mean() < 0.1 * (empty - signals).square().mean()  # 48 directions of 64 hold all of it


def test_saved_it_is_the_same(codec: SignalAutoencoder, tmp_path: Path) -> None:
    codec.save_pretrained(tmp_path)
    loaded = SignalAutoencoder.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(codec.parameters(), loaded.parameters(), strict=True))
    assert loaded.names == LEADS


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("I", "VI"), "expected each at most once"),
        (("II", "II"), "expected each at most once"),
        (("II", "aVF"), "modelled through I and II"),
        (("PPG",), "nothing to generate"),
    ],
)
def test_signals_that_cannot_be_modelled(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(SignalError, match=message):
        SignalAutoencoder(names)
    with pytest.raises(SignalError, match="flat"):
        fit_signal_autoencoder(("I", "II"), torch.zeros(2, 2, 16), torch.tensor([[True, False]] * 2), 8, 4)


def test_wrong_names_are_told(codec: SignalAutoencoder) -> None:
    with pytest.raises(SignalError, match=r"unknown signals V7; this model knows I, II"):
        codec.given(["II", "V7"])
    with pytest.raises(SignalError, match="no signal is given"):
        codec.given([])
