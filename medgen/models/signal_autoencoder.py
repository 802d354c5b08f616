"""Simultaneous signals of one heart (12 leads, PPG) as short latent frames, and the best linear guess of all from any of them.

Of six limb leads two are independent, so 12 leads are 8 components; III, aVR, aVL and aVF follow by Einthoven's and Goldberger's
laws. Latents are what the linear guess leaves over (as CorrDiff does: Mardani et al. 2023), in the principal components of its
frames: a generator starts where linear regression ends. The guess is made from the given signals alone: no other ever enters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from numpy.typing import NDArray
from torch import Tensor, nn

from medgen.data.ecg import LEADS

SIGNALS = (*LEADS, "PPG")
_DERIVED = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}  # a·I + b·II
_RIDGE = 1e-4  # share of a signal's variance that counts as unexplainable


class SignalError(ValueError):
    """Signals that cannot be translated; the message says which, why, and what would do."""


class SignalAutoencoder(ModelMixin, ConfigMixin):
    """A linear autoencoder: signals [B,N,S] in the order of `names` ↔ latent frames [B,T,L,1] of `frame_samples` each.

    Its weights are statistics, computed once from training signals by `fit_signal_autoencoder`, never by gradients: `covariance`
    [K,K] of the components (target leads first, the PPG last), `basis` [L, targets x frame_samples] (orthonormal), and `scale`, which
    makes the variance of a latent 1 on average.
    """

    @register_to_config
    def __init__(self, names: Sequence[str], frame_samples: int = 16, latent_channels: int = 32) -> None:
        super().__init__()
        self.names = check_names(names)
        self.components, mixing = components_of(self.names)
        self.targets = tuple(name for name in self.components if name != "PPG")
        width = len(self.targets) * frame_samples
        if not 1 <= latent_channels <= width:
            raise SignalError(f"latent_channels {latent_channels}: a frame of {len(self.targets)} leads has 1 to {width}")
        self.mixing = torch.tensor(mixing)
        self.covariance = _fixed(torch.eye(len(self.components)))
        self.basis = _fixed(torch.eye(latent_channels, width))
        self.scale = _fixed(torch.ones(()))

    @property
    def feature_width(self) -> int:
        """F: what `features` tells of every frame."""
        return len(self.components) * int(self.config.frame_samples) + len(self.names)

    def given(self, names: Sequence[str]) -> Tensor:
        """[N] bool: which signals `names` are. Raises `SignalError` for an unknown name or none at all."""
        unknown = [name for name in names if name not in self.names]
        if unknown or not names:
            problem = f"unknown signals {', '.join(unknown)}" if unknown else "no signal is given"
            raise SignalError(f"{problem}; this model knows {', '.join(self.names)}")
        return torch.tensor([name in names for name in self.names])

    def guess(self, values: Tensor, given: Tensor) -> Tensor:
        """Components [B,K,S] expected from the `given` [B,N] rows of `values` [B,N,S] under a Gaussian (ridge regression).

        What is not given is not looked at: it may be anything, NaN too.
        """
        return self._gain(given).to(values.dtype) @ torch.where(given[..., None], values, 0.0)

    def doubt(self, given: Tensor) -> Tensor:
        """[B, targets] mV: the standard deviation that the `given` [B,N] signals leave of each target component.

        0 for what is given, or follows from what is given by Einthoven's law.
        """
        covariance = self.covariance.double()
        explained = self._gain(given) @ (self.mixing.to(given.device) @ covariance)
        prior, count = covariance.diagonal(), len(self.targets)
        left = 1 - explained.diagonal(dim1=1, dim2=2) / prior
        return (left.where(left > 10 * _RIDGE, 0.0) * prior).sqrt()[:, :count].float()

    def _gain(self, given: Tensor) -> Tensor:
        """[B,K,N] float64, 0 for what is not given."""
        mixing, covariance = self.mixing.to(given.device), self.covariance.double()
        kept = given.double()
        cross = covariance @ mixing.T  # [K,N]
        total = mixing @ cross  # [N,N]
        total = total + _RIDGE * torch.diag(total.diagonal())
        seen = kept[:, :, None] * total * kept[:, None, :] + torch.diag_embed(1 - kept)
        return torch.linalg.solve(seen, kept[:, :, None] * cross.T).transpose(1, 2)

    def features(self, guess: Tensor, given: Tensor) -> Tensor:
        """[B,T,F]: the guess over each frame in units of each component's spread, and which signals are given."""
        own = self._framed(guess / self.covariance.diagonal().sqrt()[:, None])
        return torch.cat([own, given.to(guess.dtype)[:, None].expand(-1, own.shape[1], -1)], 2)

    def encode(self, values: Tensor, guess: Tensor, given: Tensor) -> Tensor:
        """Latents [B,T,L,1] of what the guess leaves of complete signals [B,N,S]; S a multiple of `frame_samples`.

        In units of the doubt, so that they are about as large whether one lead is given or ten.
        """
        rows = [self.names.index(name) for name in self.targets]
        residual = values[:, rows] - guess[:, : len(rows)]
        return (self._framed(residual) @ self.basis.T / self._scale(given))[..., None]

    def _scale(self, given: Tensor) -> Tensor:
        """[B,1,1] mV per unit of a latent."""
        return (self.scale * self.doubt(given).square().mean(1).sqrt().clamp(min=1e-3))[:, None, None]

    def decode(self, latents: Tensor, guess: Tensor, values: Tensor, given: Tensor) -> Tensor:
        """Signals [B,N,S] of latents; the given ones exactly as they were given, a PPG that was not given NaN."""
        count, samples = len(self.targets), int(self.config.frame_samples)
        frames = (latents[..., 0] * self._scale(given)) @ self.basis
        residual = frames.unflatten(2, (count, samples)).transpose(1, 2).flatten(2)
        residual = residual * (self.doubt(given) > 0)[:, :, None]
        components = torch.cat([guess[:, :count] + residual, guess[:, count:]], 1)
        signals = self.mixing.to(guess) @ components
        if "PPG" in self.names:
            signals[:, self.names.index("PPG")] = torch.nan
        return torch.where(given[..., None], values, signals)

    def _framed(self, components: Tensor) -> Tensor:
        """[B,C,S] → [B,T,C x p]"""
        samples = int(self.config.frame_samples)
        if components.shape[2] % samples:
            raise SignalError(f"{components.shape[2]} samples are no whole number of frames of {samples}")
        return components.unflatten(2, (-1, samples)).transpose(1, 2).flatten(2)


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """`names` if they are signals that can be modelled together, else a `SignalError`."""
    unknown = [name for name in names if name not in SIGNALS]
    if unknown or len(set(names)) != len(names):
        raise SignalError(f"signals {', '.join(names)}: expected each at most once, of {', '.join(SIGNALS)}")
    if any(name in _DERIVED for name in names) and not {"I", "II"} <= set(names):
        raise SignalError(
            f"signals {', '.join(names)}: III, aVR, aVL and aVF are modelled through I and II, which must be among them"
        )
    if not any(name in LEADS for name in names):
        raise SignalError("no ECG lead among the signals: there is nothing to generate")
    return tuple(names)


def components_of(names: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The independent ones among `names`, PPG last, and the matrix [N,K] that mixes all `names` from them."""
    independent = [name for name in names if name not in _DERIVED and name != "PPG"]
    components = (*independent, *(("PPG",) if "PPG" in names else ()))
    mixing = np.zeros((len(names), len(components)))
    for row, name in enumerate(names):
        if name in _DERIVED:
            mixing[row, [components.index("I"), components.index("II")]] = _DERIVED[name]
        else:
            mixing[row, components.index(name)] = 1.0
    return components, mixing


@torch.no_grad()
def fit_signal_autoencoder(
    names: Sequence[str], signals: Tensor, given: Tensor, frame_samples: int, latent_channels: int
) -> SignalAutoencoder:
    """The autoencoder of training signals [B,N,S] (complete), its basis that of what guesses from `given` [B,N] leave."""
    model = SignalAutoencoder(list(names), frame_samples, latent_channels)
    rows = signals[:, [model.names.index(name) for name in model.components]].double()
    flat = rows.transpose(0, 1).flatten(1)
    covariance = flat @ flat.T / flat.shape[1]  # band-passed signals have no mean
    if not (covariance.isfinite().all() and (covariance.diagonal() > 0).all()):
        raise SignalError("a training signal is flat everywhere, or not finite: nothing can be learned of it")
    model.covariance.copy_(covariance)
    left = rows[:, : len(model.targets)] - model.guess(signals, given)[:, : len(model.targets)].double()
    frames = model._framed(left / model._scale(given)).flatten(0, 1)
    variances, directions = torch.linalg.eigh(frames.T @ frames / len(frames))
    chosen = directions[:, -latent_channels:].flip(1).T
    signs = chosen.gather(1, chosen.abs().argmax(1, keepdim=True)).sign()  # an eigenvector's sign is arbitrary: not here
    model.basis.copy_(chosen * signs)
    model.scale.copy_(variances[-latent_channels:].clamp(min=0).mean().sqrt().clamp(min=1e-6))
    return model
