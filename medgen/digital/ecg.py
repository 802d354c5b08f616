"""The 12-lead electrocardiogram of a digital patient: a moving dipole (McSharry 2003; Clifford & Sameni 2005) seen by nine electrodes.

Noise arises at the electrodes and leads are differences between electrodes, as in a recorder: III = II − I and Goldberger's
relations hold exactly, with noise too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.spatial.transform import Rotation

from medgen.config import Config
from medgen.data.ecg import ECG, LEADS
from medgen.digital.rhythm import Rhythm, RhythmError
from medgen.digital.vcg import COMPONENTS, Conduction, Heart, Wave, draw_heart, draw_lead_field, shape, waves
from medgen.seeds import stable_seed

ELECTRODES = ("RA", "LA", "LL", "V1", "V2", "V3", "V4", "V5", "V6")


class Noise(Config):
    """What a recording adds, mV at each electrode (root mean square); a record draws its own, from a fifth to twice these."""

    baseline: float = Field(0.06, ge=0, description="breathing and electrode drift, below 0.7 Hz")
    muscle: float = Field(0.012, ge=0, description="electromyogram, 15-120 Hz, in bursts")
    mains: float = Field(0.006, ge=0, description="50 or 60 Hz")
    motion: float = Field(0.015, ge=0, description="electrode movement, 0.7-8 Hz, in bursts")


QUIET = Noise(baseline=0, muscle=0, mains=0, motion=0)


@dataclass(frozen=True)
class ECGTruth:
    """What the simulator knows: `r_peaks` [K] and `t_ends` [K] in seconds of the rhythm's clock, and each beat's kind."""

    r_peaks: NDArray[np.float64]
    t_ends: NDArray[np.float64]
    kinds: tuple[str, ...]
    conduction: Conduction


def simulate_ecg(
    rhythm: Rhythm,
    seed: int,
    *,
    start: float,
    end: float,
    rate: float = 500.0,
    twa_mv: float = 0.0,
    noise: Noise = Noise(),  # noqa: B008 (frozen)
    conduction: Conduction | None = None,
) -> tuple[ECG, ECGTruth]:
    """The 12 leads (in LEADS' order, mV) of patient `seed` with this rhythm over [start, end) seconds, and the truth of its beats.

    `twa_mv` makes the T vector of every other beat larger and of the others smaller by half of it (T-wave alternans). The same
    seed is the same patient whatever the rhythm. Raises `RhythmError` if the rhythm does not cover the interval.
    """
    if not rhythm.beats or rhythm.beats[0].r > start or rhythm.beats[-1].r < end or end <= start:
        raise RhythmError(f"the rhythm's beats do not cover [{start:g}, {end:g}] s: draw it for that interval")
    heart = draw_heart(seed, conduction)
    times = start + np.arange(round((end - start) * rate)) / rate
    source = np.zeros((COMPONENTS, len(times)))
    for index, beat in enumerate(rhythm.beats):
        for wave in waves(heart, beat, twa_mv * (0.5 if index % 2 else -0.5)):
            _add(source, wave, start, rate)
        if beat.kind == "paced":
            first = min(w.centre - 2 * w.before for w in heart.paced_qrs)
            _add(source, Wave(beat.r + first, 0.6 / rate, 0.6 / rate, heart.spike), start, rate)
    if rhythm.kind == "af":
        source += _fibrillation(heart, times, seed)
    electrodes = _electrodes(_breathing(source, rhythm, times, seed), draw_lead_field(seed))
    electrodes += _electrode_noise(noise, rhythm, times, rate, seed)
    beats = [beat for beat in rhythm.beats if start <= beat.r < end]
    truth = ECGTruth(
        np.array([b.r for b in beats]), np.array([b.t_end for b in beats]), tuple(b.kind for b in beats), heart.conduction
    )
    return ECG(_leads(electrodes).astype(np.float32), LEADS, rate, start), truth


def _add(source: NDArray[np.float64], wave: Wave, start: float, rate: float) -> None:
    """Add one wave where it is not negligible."""
    first = max(0, int((wave.centre - 5 * wave.before - start) * rate))
    last = min(source.shape[1], int((wave.centre + 5 * wave.after - start) * rate) + 2)
    if last > first:
        times = start + np.arange(first, last) / rate
        source[:, first:last] += np.outer(wave.vector, shape(wave, times))


def _fibrillation(heart: Heart, times: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Fibrillatory waves [5,S]: saw teeth of 5-8 Hz whose rate and size wander (Stridh & Sörnmo 2001), not alike in x, y and z."""
    rng = np.random.default_rng(stable_seed("fibrillatory waves", seed))
    rate, slow = rng.uniform(5, 8), rng.uniform(0.1, 0.3)
    out = np.zeros((COMPONENTS, len(times)))
    step = np.sqrt(2.0 * (times[1] - times[0]))
    wander = np.cumsum(rng.standard_normal(len(times))) * step  # phase noise: no clock drives the atria
    for axis in range(3):
        phase = 2 * np.pi * rate * times + 2.5 * np.sin(2 * np.pi * slow * times) + wander + rng.uniform(0, 0.8)
        size = 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.3, 1.2) * times + rng.uniform(0, 6.3))
        out[axis] = heart.fibrillation[axis] * size * sum(np.sin(k * phase) / k for k in (1, 2, 3))
    return out


def _breathing(source: NDArray[np.float64], rhythm: Rhythm, times: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """The lungs turn the heart by a few degrees and insulate it: the electrocardiogram's own trace of respiration."""
    rng = np.random.default_rng(stable_seed("breathing", seed))
    breath = rhythm.respiration(times)
    angles = np.outer(breath, rng.normal(0, (0.06, 0.03, 0.03)))
    turned = Rotation.from_euler("zyx", angles).apply(source[:3].T).T
    return np.concatenate([turned, source[3:]]) * (1 - rng.uniform(0.02, 0.07) * breath)


def _electrodes(source: NDArray[np.float64], field: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Potentials [9,S] at ELECTRODES, the right arm's taken as 0 (only differences are ever measured)."""
    left, foot = field["I"] @ source, field["II"] @ source
    terminal = (left + foot) / 3  # Wilson's
    chest = np.stack([field[name] @ source for name in ELECTRODES[3:]])
    return np.concatenate([[np.zeros_like(left), left, foot], chest + terminal])


def _leads(electrodes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 12 leads in LEADS' order from the nine electrodes: Einthoven, Goldberger, Wilson."""
    right, left, foot, *chest = electrodes
    terminal = (right + left + foot) / 3
    limb = [left - right, foot - right, foot - left]
    augmented = [right - (left + foot) / 2, left - (right + foot) / 2, foot - (right + left) / 2]
    return np.stack([*limb, *augmented, *(electrode - terminal for electrode in chest)])


def _electrode_noise(noise: Noise, rhythm: Rhythm, times: NDArray[np.float64], rate: float, seed: int) -> NDArray[np.float64]:
    """Noise [9,S] in mV at each electrode."""
    rng = np.random.default_rng(stable_seed("electrode noise", seed))
    size, share = (len(ELECTRODES), len(times)), np.exp(rng.uniform(np.log(0.2), np.log(2), 4))
    each = np.exp(rng.normal(0, 0.5, (4, len(ELECTRODES), 1)))  # some electrodes stick better than others
    wander = 0.7 * _band(rng, size, rate, 0.02, 0.5) + 0.7 * rng.normal(0, 1, (9, 1)) * rhythm.respiration(times)
    mains = np.sin(2 * np.pi * rng.choice([50, 60]) * times + rng.normal(0, 0.4, (9, 1))) * np.sqrt(2)
    muscle = _band(rng, size, rate, 15, 120) * _bursts(rng, size, rate)
    motion = _band(rng, size, rate, 0.7, 8) * _bursts(rng, size, rate)
    levels = np.array([noise.baseline, noise.muscle, noise.mains, noise.motion]) * share
    return sum((level * e * part for level, e, part in zip(levels, each, (wander, muscle, mains, motion))), np.zeros(size))


def _band(rng: np.random.Generator, size: tuple[int, int], rate: float, low: float, high: float) -> NDArray[np.float64]:
    """Gaussian noise of unit power between `low` and `high` Hz (or what of it the rate allows)."""
    frequencies = np.fft.rfftfreq(size[1], 1 / rate)
    spectrum = rng.standard_normal((size[0], len(frequencies), 2)) @ np.array([1, 1j])
    spectrum *= (frequencies >= max(low, frequencies[1] if len(frequencies) > 1 else 0)) & (frequencies <= high)
    signal = np.fft.irfft(spectrum, size[1])
    return signal / max(float(signal.std()), 1e-12)


def _bursts(rng: np.random.Generator, size: tuple[int, int], rate: float) -> NDArray[np.float64]:
    """A gain that comes and goes over a second or two, unit power."""
    gain = np.exp(0.6 * _band(rng, size, rate, 0.02, 0.6))
    return gain / np.sqrt((gain**2).mean())
