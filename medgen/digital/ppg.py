"""The pulse at a fingertip (photoplethysmogram) that belongs to a `Rhythm`: one wave per heart beat, late by the transit time.

Each wave is a systolic and a reflected Gaussian over a decay (after Tang et al. 2020, two-Gaussian PPG). A beat after a short
interval finds a poorly filled ventricle: its wave is small and late. Stiff arteries shorten both delays, as they do in people.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from medgen.digital.rhythm import Beat, Rhythm
from medgen.seeds import stable_seed

_FILLING_SECONDS = 0.22  # time constant of diastolic filling
_SYSTOLE = 0.16  # no filling during the ejection before


@dataclass(frozen=True)
class Vessels:
    """What lies between one heart and its finger. Times in seconds, amplitudes relative to the systolic wave.

    `transit` from aortic valve to finger; `pre_ejection` from R peak to valve opening; `reflection_delay` from the systolic to the
    reflected wave (the dicrotic notch lies between them), which shortens with the transit time in stiff arteries (Millasseau 2002).
    """

    pre_ejection: float
    transit: float
    rise: float
    reflection_delay: float
    reflection: float
    decay: float


def draw_vessels(seed: int) -> Vessels:
    """The vessels of one digital patient: pulse transit times (R peak to foot) mostly from 0.17 to 0.30 s."""
    rng = np.random.default_rng(stable_seed("vessels", seed))
    stiffness = float(np.exp(rng.normal(0, 0.18)))
    return Vessels(
        pre_ejection=float(np.clip(rng.normal(0.085, 0.010), 0.06, 0.12)),
        transit=0.145 / stiffness * float(np.exp(rng.normal(0, 0.05))),
        rise=float(np.clip(rng.normal(0.065, 0.008), 0.045, 0.09)),
        reflection_delay=0.23 / stiffness * float(np.exp(rng.normal(0, 0.06))),
        reflection=float(np.clip(0.38 * stiffness + rng.normal(0, 0.08), 0.12, 0.75)),
        decay=float(rng.uniform(0.22, 0.4)),
    )


def simulate_ppg(
    rhythm: Rhythm, seed: int, rate: float = 125.0, start: float = 0.0, end: float = 10.0, motion: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    """PPG of `rhythm` from `start` to `end` (seconds) at `rate` Hz: signal [S] float32, and the feet [K] (s) of the waves therein.

    The unit is the mean systolic wave. `motion` is how often a finger moves, as the share of recordings with an artefact of 0.5-2 s.
    Raises ValueError for an empty interval or a rate below 20 Hz.
    """
    if rate < 20 or not end > start:
        raise ValueError(f"a PPG needs start < end and at least 20 Hz, got {start} to {end} s at {rate} Hz")
    times = start + np.arange(round((end - start) * rate)) / rate
    vessels, rng = draw_vessels(seed), np.random.default_rng(stable_seed("ppg", seed))
    signal = np.zeros(len(times))
    feet = np.array([_foot(beat, rhythm, vessels) for beat in rhythm.beats])
    for beat, foot in zip(rhythm.beats, feet):
        signal += _amplitude(beat, rhythm) * _wave(times - foot, vessels)
    breath = rhythm.respiration(times)
    signal *= 1 - float(rng.uniform(0.02, 0.1)) * breath  # inspiration lowers the left ventricle's stroke
    signal += float(rng.uniform(0.02, 0.12)) * breath + _wander(times, rng)
    signal += float(rng.uniform(0.004, 0.02)) * rng.standard_normal(len(times))
    if rng.random() < motion:
        signal += _artefact(times, rng)
    return signal.astype(np.float32), feet[(feet >= start) & (feet < end)]


def _filling(beat: Beat, rhythm: Rhythm) -> float:
    """How full the ventricle is, relative to the rhythm's mean interval."""

    def filled(rr: float) -> float:
        return 1 - float(np.exp(-max(rr - _SYSTOLE, 0.02) / _FILLING_SECONDS))

    return filled(beat.previous_rr) / filled(60 / rhythm.heart_rate)


def _amplitude(beat: Beat, rhythm: Rhythm) -> float:
    """Height of the wave. A ventricular ectopic beat contracts out of step and ejects less, whatever it found."""
    return _filling(beat, rhythm) ** 1.5 * (0.6 if beat.kind == "pvc" else 1.0)


def _foot(beat: Beat, rhythm: Rhythm, vessels: Vessels) -> float:
    """When the wave of `beat` arrives: R peak + pre-ejection period (longer where filling is poor) + transit (breathes by 4 ms)."""
    pre_ejection = vessels.pre_ejection + 0.05 * max(1 - _filling(beat, rhythm), 0.0)
    return beat.r + pre_ejection + vessels.transit + 0.004 * float(rhythm.respiration(np.asarray(beat.r)))


def _wave(since: np.ndarray, vessels: Vessels) -> np.ndarray:
    """One wave at seconds `since` its foot: about 0 before, a maximum near 1."""
    peak = 2.2 * vessels.rise
    systolic = np.exp(-0.5 * ((since - peak) / np.where(since < peak, vessels.rise, 1.35 * vessels.rise)) ** 2)
    reflected = vessels.reflection * np.exp(-0.5 * ((since - peak - vessels.reflection_delay) / 0.085) ** 2)
    run_off = 0.3 * np.exp(-np.maximum(since - peak, 0) / vessels.decay) * expit((since - peak) / 0.03)
    return np.asarray(0.85 * systolic + reflected + run_off)


def _wander(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Slow drift of the vessels' tone: three sines below 0.15 Hz."""
    drift = np.zeros(len(times))
    for frequency in rng.uniform(0.02, 0.15, 3):
        drift += rng.uniform(0.01, 0.08) * np.sin(2 * np.pi * frequency * times + rng.uniform(0, 2 * np.pi))
    return drift


def _artefact(times: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A movement: 1-4 Hz swings under a window of 0.5-2 s."""
    middle, width = rng.uniform(times[0], times[-1]), rng.uniform(0.5, 2.0)
    window = np.exp(-0.5 * ((times - middle) / (width / 4)) ** 2)
    swings = sum(np.sin(2 * np.pi * f * times + rng.uniform(0, 2 * np.pi)) for f in rng.uniform(1, 4, 3))
    return np.asarray(rng.uniform(0.3, 1.0) * window * swings)
