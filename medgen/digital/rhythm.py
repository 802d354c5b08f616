"""When the digital heart beats: sinus rhythm, atrial fibrillation, premature ventricular beats and pacing, in seconds.

One `Rhythm` drives both the electrocardiogram and the echocardiogram of a digital patient, so that they agree by construction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from medgen.seeds import stable_seed

RhythmKind = Literal["sinus", "af", "pvc", "paced"]
KINDS: tuple[RhythmKind, ...] = get_args(RhythmKind)
MARGIN = 2.0  # beats reach this many seconds beyond both ends
_SHORTEST_RR = 0.3  # the AV node and the ventricle are refractory until then


class RhythmError(ValueError):
    """A rhythm that no heart has; the message says which value and what is possible."""


@dataclass(frozen=True)
class Beat:
    """One ventricular beat; all times in seconds. `r` is when the QRS vector is largest, `t_end` where the T wave ends.

    `rr` runs to the next beat, `previous_rr` from the last. `p` is the peak of the P wave that led to it (None: no atrial systole).
    """

    r: float
    t_end: float
    rr: float
    previous_rr: float
    kind: RhythmKind
    p: float | None = None


@dataclass(frozen=True)
class Rhythm:
    """Beats in order and the breath that modulates them: sin(2π·`respiration_rate`·t + `respiration_phase`), Hz and radians."""

    kind: RhythmKind
    heart_rate: float
    beats: tuple[Beat, ...]
    respiration_rate: float = 0.25
    respiration_phase: float = 0.0

    def respiration(self, times: np.ndarray) -> np.ndarray:
        """Breathing at `times` (seconds): 1 at full inspiration, -1 at full expiration."""
        return np.sin(2 * np.pi * self.respiration_rate * times + self.respiration_phase)


def draw_rhythm(seed: int, kind: RhythmKind, heart_rate: float, start: float, end: float, variability: float = 0.04) -> Rhythm:
    """A rhythm of `heart_rate` beats per minute whose beats cover [start - 2 s, end + 2 s].

    `variability` is the coefficient of variation of sinus RR intervals (respiratory, 0.1 Hz and random parts in the proportions of
    McSharry 2003); atrial fibrillation has its own, pacing none. A "pvc" rhythm has a premature beat inside [start, end] whenever a
    beat falls there. Raises `RhythmError` for a rate outside 30-200 bpm, an unknown kind or an empty interval.
    """
    if kind not in KINDS:
        raise RhythmError(f"rhythm {kind!r} is not one of {', '.join(KINDS)}")
    if not 30 <= heart_rate <= 200:
        raise RhythmError(f"heart rate {heart_rate} bpm: expected 30 to 200")
    if not (np.isfinite([start, end]).all() and end > start):
        raise RhythmError(f"a rhythm needs start < end in seconds, got {start} and {end}")
    if not 0 <= variability <= 0.2:
        raise RhythmError(f"variability {variability}: expected 0 to 0.2 of the RR interval")
    rng = np.random.default_rng(stable_seed("rhythm", seed, kind))
    breath = Rhythm(kind, heart_rate, (), float(rng.uniform(0.18, 0.32)), float(rng.uniform(0, 2 * np.pi)))
    mean = 60 / heart_rate
    first = start - MARGIN - mean * float(rng.uniform(2, 3))
    atrial = kind in ("sinus", "pvc") or (kind == "paced" and rng.random() < 0.5)  # half the pacemakers follow the sinus node
    intervals = _intervals(kind, mean, first, breath, variability if atrial else 0.0, rng)
    times = [first]
    while times[-1] < end + MARGIN + 2 * mean:
        times.append(times[-1] + next(intervals))
    premature = _premature(times, start, end, rng) if kind == "pvc" else frozenset[int]()
    return replace(breath, beats=_beats(kind, times, premature, atrial, mean, start, end, rng))


def _intervals(
    kind: RhythmKind, mean: float, first: float, breath: Rhythm, variability: float, rng: np.random.Generator
) -> Iterator[float]:
    """RR intervals without end, in seconds."""
    slow_phase = rng.uniform(0, 2 * np.pi)
    spread = variability * np.sqrt(2) * min(1.0, mean / 0.6)  # fast hearts vary less
    time = first
    while True:
        if kind == "af":
            # Irregularly irregular: independent intervals, skewed to the right, none shorter than the AV node lets through.
            floor = max(0.55, _SHORTEST_RR / mean)
            rr = mean * (floor + (1 - floor) * min(rng.gamma(4.0) / 4.0, 3.0))
        else:
            slow = np.sin(2 * np.pi * 0.1 * time + slow_phase)
            fast = -float(breath.respiration(np.asarray(time)))  # breathing in quickens the heart
            rr = mean * (1 + spread * (0.75 * fast + 0.55 * slow + 0.25 * rng.standard_normal()))
            rr += 0.001 * rng.standard_normal()
        time += max(rr, _SHORTEST_RR)
        yield max(rr, _SHORTEST_RR)


def _premature(times: list[float], start: float, end: float, rng: np.random.Generator) -> frozenset[int]:
    """Which beats come early: every 2nd to 5th, one of them in [start, end] if a beat can be."""
    every = int(rng.choice([2, 3, 4, 5], p=[0.25, 0.3, 0.25, 0.2]))
    for offset in rng.permutation(every):
        chosen = range(int(offset) + 1, len(times) - 1, every)
        if any(start + 0.1 <= times[i] <= end for i in chosen):
            break
    return frozenset(chosen)


def _beats(
    kind: RhythmKind,
    times: list[float],
    premature: frozenset[int],
    atrial: bool,
    mean: float,
    start: float,
    end: float,
    rng: np.random.Generator,
) -> tuple[Beat, ...]:
    """Beats at `times`, premature ones moved forward (the sinus node is not reset: the pause compensates fully)."""
    coupling, qtc, pr = rng.uniform(0.55, 0.7), rng.uniform(0.38, 0.44), rng.uniform(0.1, 0.15)
    r = list(times)
    for i in premature:
        rr = times[i] - times[i - 1]
        r[i] = times[i - 1] + max(_SHORTEST_RR, rr * (coupling + rng.normal(0, 0.01)))
    beats: list[Beat] = []
    for i in range(1, len(r) - 1):
        previous_rr, rr = r[i] - r[i - 1], r[i + 1] - r[i]
        beat_kind: RhythmKind = "pvc" if i in premature else "sinus" if kind == "pvc" else kind
        # Bazett's dependence, softened (Fridericia is 1/3), on the interval before and, by memory, on the mean one.
        qt = qtc * (0.5 * previous_rr + 0.5 * mean) ** 0.42
        wide = beat_kind in ("pvc", "paced")
        t_end = min(r[i] + (qt if wide else qt - 0.04), r[i] + (0.85 if rr > 0.45 else 0.75) * rr)
        p = r[i] - pr * min(1.0, mean**0.3) - 0.03 if atrial and beat_kind != "pvc" else None
        if p is not None and beats and p < beats[-1].r + 0.1:
            p = None  # buried in the beat before
        beats.append(Beat(r[i], t_end, rr, previous_rr, beat_kind, p))
    first = max(i for i, beat in enumerate(beats) if beat.r <= start - MARGIN)
    last = min(i for i, beat in enumerate(beats) if beat.r >= end + MARGIN)
    return tuple(beats[first : last + 1])
