"""The digital heart: one physiological state that beats to a rhythm. LV volume, length and walls as functions of time.

The volume follows the electrical events: it is greatest at the R peak, constant while all valves are shut, least at the end of
the T wave (aortic closure), then rises by early, slow and atrial filling. After the Wiggers diagram; numbers in the text books' ranges.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medgen.digital.rhythm import Beat, Rhythm, RhythmKind
from medgen.seeds import stable_seed

RHYTHMS: tuple[tuple[RhythmKind, float], ...] = (("sinus", 0.66), ("af", 0.14), ("pvc", 0.12), ("paced", 0.08))
_LONGITUDINAL = 0.26  # share of the emptied volume that the mitral ring's descent takes: 16 % shortening at an EF of 60 %


@dataclass(frozen=True)
class Heart:
    """A patient's left ventricle and how it is driven. Volumes in mL, lengths in mm, times in s, angles in degrees."""

    patient_id: str
    seed: int
    rhythm: RhythmKind
    heart_rate: float  # beats per minute
    variability: float  # standard deviation of RR relative to its mean (sinus)
    ejection_fraction: float  # percent, of a beat of average filling
    edv_ml: float
    sphericity: float  # long axis over the cube root of the volume
    wall_mm: float  # end-diastolic
    atrial_share: float  # of the stroke volume, filled by the atrial kick
    contraction_delay: float  # R peak to the start of ejection
    relaxation: float  # aortic closure to mitral opening
    septal_delay: float  # the septum's contraction lags (paced and ventricular beats)
    atrium_mm: float  # length of the left atrium
    right_mm: float  # width of the right ventricle
    age: float
    sex: Literal["F", "M"]

    @property
    def length_mm(self) -> float:
        """End-diastolic long axis, apex to mitral plane."""
        return self.sphericity * (1000 * self.edv_ml) ** (1 / 3)

    @property
    def half_width_mm(self) -> float:
        """End-diastolic greatest half width of the cavity."""
        return float(_half_width(np.asarray(self.edv_ml), np.asarray(self.length_mm)))


def draw_heart(seed: int, index: int, rhythm: RhythmKind | None = None) -> Heart:
    """Heart number `index` of the population `seed`. Rate, ejection fraction and size are independent: none tells another."""
    key = stable_seed("digital heart", seed, index)
    rng = np.random.default_rng(key)
    kinds, shares = zip(*RHYTHMS, strict=True)
    drawn: RhythmKind = rng.choice(kinds, p=shares)
    rhythm = rhythm or drawn
    low, high = {"sinus": (40, 140), "af": (55, 140), "pvc": (50, 105), "paced": (50, 95)}[rhythm]
    sex: Literal["F", "M"] = "F" if rng.random() < 0.5 else "M"
    return Heart(
        patient_id=f"H{seed:04d}-{index:06d}",
        seed=key,
        rhythm=rhythm,
        heart_rate=float(rng.uniform(low, high)),
        variability=float(rng.uniform(0.005, 0.04)),
        ejection_fraction=float(rng.uniform(18, 76)),
        edv_ml=float(np.clip(rng.lognormal(np.log(112 if sex == "F" else 128), 0.24), 62, 230)),
        sphericity=float(rng.uniform(1.58, 1.82)),
        wall_mm=float(np.clip(rng.normal(10, 1.6), 7, 15)),
        atrial_share=float(rng.uniform(0.18, 0.36)),
        contraction_delay=float(rng.uniform(0.035, 0.06)),
        relaxation=float(rng.uniform(0.055, 0.085)),
        septal_delay=float(rng.uniform(0.05, 0.09)) if rhythm == "paced" else 0.0,
        atrium_mm=float(rng.uniform(36, 54)),
        right_mm=float(rng.uniform(28, 42)),
        age=float(np.clip(rng.normal(60, 16), 18, 95).round()),
        sex=sex,
    )


@dataclass(frozen=True)
class BeatVolumes:
    """One beat's end-diastolic and end-systolic volume, mL."""

    beat: Beat
    edv_ml: float
    esv_ml: float

    @property
    def ejection_fraction(self) -> float:
        """Percent."""
        return 100 * (1 - self.esv_ml / self.edv_ml)


def beat_volumes(heart: Heart, rhythm: Rhythm) -> list[BeatVolumes]:
    """Filling depends on the time there was for it, ejection on the filling and on how the beat was conducted."""
    ef = heart.ejection_fraction / 100
    mean_rr = 60 / heart.heart_rate
    usual = _filled(0.6 * mean_rr)
    largest = heart.edv_ml * (1 - ef) + heart.edv_ml * ef / usual  # what endless filling would reach
    volumes: list[BeatVolumes] = []
    edv = heart.edv_ml
    for beat in rhythm.beats:
        preload = float(np.clip(1 + 0.3 * (beat.previous_rr / mean_rr - 1), 0.6, 1.15))
        ejected = ef * preload * (0.55 if beat.kind == "pvc" else 1.0)
        esv = edv * (1 - min(ejected, 0.82))
        volumes.append(BeatVolumes(beat, edv, esv))
        diastole = max(beat.r + beat.rr - beat.t_end - heart.relaxation, 0.02)
        edv = max(esv + (largest - esv) * _filled(diastole), esv * 1.05)
    return volumes


def volume_curve(heart: Heart, beats: list[BeatVolumes], times: np.ndarray) -> np.ndarray:
    """LV volume [T] in mL at `times` [T] s, which the beats must cover."""
    curve = np.full(times.shape, np.nan)
    for now, after in itertools.pairwise(beats):
        inside = (times >= now.beat.r) & (times < after.beat.r)
        curve[inside] = _one_beat(heart, now, after, times[inside])
    if np.isnan(curve).any():
        raise ValueError(f"the rhythm's beats do not cover {times.min():.2f} to {times.max():.2f} s; draw it with a wider margin")
    return curve


def mitral_opening(heart: Heart, beats: list[BeatVolumes], times: np.ndarray) -> np.ndarray:
    """How far the mitral leaflets are apart [T], 0 shut to 1 wide: the filling rate, with the leaflets' inertia."""
    step = 0.008
    grid = np.arange(times.min() - 0.05, times.max() + 0.05, step)
    rate = np.gradient(volume_curve(heart, beats, grid), step)
    reference = 3.2 * heart.edv_ml * heart.ejection_fraction / 100  # mL/s, a brisk early wave
    diastole = np.zeros(grid.shape, dtype=bool)
    for now, after in itertools.pairwise(beats):
        diastole |= (grid > now.beat.t_end + heart.relaxation) & (grid < after.beat.r - 0.01)
    wanted = np.where(diastole, 0.18 + np.clip(rate / reference, 0, 0.82), 0.0)
    kernel = np.hanning(7) / np.hanning(7).sum()
    return np.interp(times, grid, np.convolve(wanted, kernel, mode="same"))


@dataclass(frozen=True)
class Motion:
    """The ventricle's shape over T frames; arrays [T] in mm: long axis, half width left (septal) and right, wall, ring opening 0-1.

    `volume_ml` is the area-length volume of exactly this shape (ASE 2015: V = 8 A^2 / (3 pi L)).
    """

    length: np.ndarray
    septal: np.ndarray
    lateral: np.ndarray
    wall: np.ndarray
    opening: np.ndarray
    volume_ml: np.ndarray

    def __getitem__(self, frames: slice) -> Motion:
        """Some of the frames."""
        return Motion(**{name: values[frames] for name, values in vars(self).items()})


def profile(s: np.ndarray) -> np.ndarray:
    """Half width of the cavity from apex (s = 0) to mitral plane (s = 1), as a share of its greatest."""
    s = np.clip(s, 0, 1)
    return np.sqrt(1 - (1 - s) ** 2.5) * (1 - 0.12 * s**2)


PROFILE_AREA = float(profile((np.arange(4000) + 0.5) / 4000).mean())


def move(heart: Heart, rhythm: Rhythm, times: np.ndarray) -> Motion:
    """The motion at `times` [T] s, from volumes to shape: the ring descends, the rest of the volume narrows the cavity."""
    beats = beat_volumes(heart, rhythm)
    volume = volume_curve(heart, beats, times)
    length = heart.length_mm * (1 - _LONGITUDINAL * (1 - volume / heart.edv_ml))
    both = _half_width(volume, length)
    lag = heart.septal_delay
    septal = both if lag == 0 else _half_width(volume_curve(heart, beats, times - lag), length)
    actual = 8 * ((septal + both) * length * PROFILE_AREA) ** 2 / (3 * np.pi * length) / 1000
    # the muscle keeps its volume: a shell of constant cross-section times length
    muscle = ((heart.half_width_mm + heart.wall_mm) ** 2 - heart.half_width_mm**2) * heart.length_mm
    mean = (septal + both) / 2
    wall = np.sqrt(mean**2 + muscle / length) - mean
    return Motion(length, septal, both, wall, mitral_opening(heart, beats, times), actual)


def _half_width(volume_ml: np.ndarray, length: np.ndarray) -> np.ndarray:
    """From V = 8 A^2 / (3 pi L) with A = 2 W L PROFILE_AREA."""
    return np.sqrt(3 * np.pi * 1000 * volume_ml / (32 * length)) / PROFILE_AREA


def _filled(seconds: float) -> float:
    """Share of the possible filling that takes place in this time."""
    return 1 - float(np.exp(-seconds / 0.16))


def _one_beat(heart: Heart, now: BeatVolumes, after: BeatVolumes, times: np.ndarray) -> np.ndarray:
    beat, stroke = now.beat, now.edv_ml - now.esv_ml
    ejection = min(beat.r + heart.contraction_delay, beat.r + 0.3 * (beat.t_end - beat.r))
    next_r = after.beat.r
    opening = min(beat.t_end + heart.relaxation, beat.t_end + 0.25 * (next_r - beat.t_end))
    low, high = now.esv_ml + 0.015 * stroke, after.edv_ml
    filling = next_r - opening
    kick = 0.0 if after.beat.p is None else heart.atrial_share
    atrial = next_r - min(0.15, 0.45 * filling)
    early_end = opening + min(0.24, 0.6 * filling)
    shut = now.edv_ml - 0.012 * stroke * _ramp(times, beat.r, ejection)
    eject = now.edv_ml - 0.012 * stroke - 0.988 * stroke * np.sin(np.pi / 2 * _ramp(times, ejection, beat.t_end) ** 1.1) ** 1.3
    relax = now.esv_ml + 0.015 * stroke * _ramp(times, beat.t_end, opening)
    slow = 0.1 * (1 - kick)
    fill = low + (high - low) * (
        (1 - kick - slow) * _smooth(_ramp(times, opening, early_end))
        + slow * _ramp(times, opening, next_r)
        + kick * np.sin(np.pi / 2 * _ramp(times, atrial, next_r)) ** 1.6
    )
    return np.select([times < ejection, times < beat.t_end, times < opening], [shut, eject, relax], fill)


def _ramp(times: np.ndarray, start: float, end: float) -> np.ndarray:
    return np.clip((times - start) / max(end - start, 1e-6), 0, 1)


def _smooth(u: np.ndarray) -> np.ndarray:
    return u * u * (3 - 2 * u)
