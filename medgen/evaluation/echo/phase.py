"""When the heart of a video beats, and whether it beats when the ECG says: ED at the R peak, ES at the end of the T wave.

Times are seconds from frame 0. Events come from the smoothed volume curve alone; the ECG is only compared with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.signal import find_peaks, savgol_filter

from medgen.evaluation.statistics import Estimate, Floats, Indices, group_bootstrap
from medgen.seeds import stable_seed

SMOOTHING = 0.25  # s: window of the Savitzky-Golay filter; 5 frames at 20 fps
PROMINENCE = 0.15  # of the curve's range: what an ejection must move to be a beat
ONSET = 0.1  # share of the stroke volume that is out when ejection counts as begun
PRE_EJECTION = 0.2  # s before the onset within which end-diastole lies, so that a long flat diastole does not blur it
MARGIN = 0.1  # s: events nearer to a clip's ends cannot be seen from both sides
EJECTION_MARGIN = 0.2  # s: on the side of the ejection, of which enough must be seen
PERMUTATIONS = 200


@dataclass(frozen=True)
class Beats:
    """What a volume curve shows: times s of end-diastole [K], end-systole [L] and ejection onset [M], and the volumes at ED and ES.

    Onset (a tenth of the stroke volume is out) is sharper than the flat top of the curve, so beat-to-beat intervals use it.
    """

    ed: Floats
    es: Floats
    onset: Floats
    edv: Floats
    esv: Floats


def smooth_volume(volume: Floats, times: Floats) -> Floats:
    """`volume` [T] after a Savitzky-Golay filter (1964) of 0.25 s and order 2; single NaN frames are interpolated."""
    known = np.isfinite(volume)
    if known.sum() < 3:
        return np.full(len(volume), np.nan)
    filled = np.interp(times, times[known], volume[known])
    width = max(2 * round(SMOOTHING / (times[1] - times[0]) / 2 - 0.01) + 1, 5)
    return np.asarray(savgol_filter(filled, width, 2) if len(filled) >= width else filled, dtype=np.float64)


def find_beats(volume: Floats, times: Floats) -> Beats:
    """ED (maxima), ES (minima) and ejection onsets of `volume` [T] at `times` [T] s (evenly spaced), between frames by parabola.

    A clip too short, or without any movement, has no beats: empty arrays.
    """
    empty = np.empty(0)
    if len(volume) < 5 or np.isfinite(volume).sum() < 5:
        return Beats(empty, empty, empty, empty, empty)
    curve = smooth_volume(volume, times)
    if np.ptp(curve) <= 1e-9:
        return Beats(empty, empty, empty, empty, empty)
    bottoms = _peaks(-curve, ejection="before")
    tops, onsets = [], []
    for top in _peaks(curve, ejection="after"):
        onset = _onset(curve, times, top, bottoms)
        before = np.flatnonzero((times >= onset - PRE_EJECTION) & (times <= onset) & (np.arange(len(times)) > 0))
        tops.append(int(before[curve[before].argmax()]) if len(before) else int(top))
        onsets.append(onset)
    ed, edv = _vertices(curve, volume, times, np.array(tops, dtype=np.intp))
    es, esv = _vertices(-curve, -volume, times, bottoms)
    return Beats(ed, es, np.array(onsets), edv, -esv)


def _peaks(curve: Floats, ejection: Literal["before", "after"]) -> Indices:
    """Maxima that stand out by `PROMINENCE` of the range on the side of the ejection, which the clip must show.

    On the other side the clip's end counts as a valley, so a beat beside it is not lost.
    """
    ends = (curve.min(), np.inf) if ejection == "after" else (np.inf, curve.min())
    padded = np.concatenate([ends[:1], curve, ends[1:]])
    found, _ = find_peaks(padded, prominence=PROMINENCE * np.ptp(curve))
    found = found - 1
    return np.asarray(found[(found > 0) & (found < len(curve) - 1)], dtype=np.intp)


def _vertices(curve: Floats, volume: Floats, times: Floats, at: Indices) -> tuple[Floats, Floats]:
    """Times and heights of the maxima near each index of `at`, by the parabola through it and its two neighbours.

    The filter cuts sharp tops and swings through flat ones, single frames are noisy: the height is the mean of the parabola's and of
    the two largest of the three frames themselves.
    """
    if not len(at):
        return np.empty(0), np.empty(0)
    at = at.clip(1, len(curve) - 2)
    before, here, after = curve[at - 1], curve[at], curve[at + 1]
    bend = before - 2 * here + after
    offset = np.divide(before - after, 2 * bend, out=np.zeros_like(bend), where=np.abs(bend) > 1e-12).clip(-0.5, 0.5)
    raw = np.stack([volume[at - 1], volume[at], volume[at + 1]])
    raw = np.sort(np.where(np.isfinite(raw), raw, here), axis=0)[1:].mean(0)
    return times[at] + offset * (times[1] - times[0]), (here - 0.25 * (before - after) * offset + raw) / 2


def _onset(curve: Floats, times: Floats, top: int, bottoms: Indices) -> float:
    """When the curve has fallen by `ONSET` of the way from `top` to the next minimum (or the clip's end)."""
    later = bottoms[bottoms > top]
    end = int(later[0]) if len(later) else len(curve) - 1
    level = curve[top] - ONSET * (curve[top] - curve[top : end + 1].min())
    below = top + int(np.argmax(curve[top : end + 1] < level))
    share = (curve[below - 1] - level) / (curve[below - 1] - curve[below])
    return float(times[below - 1] + share * (times[below] - times[below - 1]))


def timing_errors(events: Floats, references: Floats, duration: float, kind: Literal["ed", "es"]) -> Floats:
    """Signed distance in s from every reference inside the clip to the nearest event (positive: the event comes late).

    A reference whose nearest event is further away than half the shortest interval between references is NaN: a missed beat. Those
    too near to the clip's ends (0 and `duration` s) for their ejection to be seen are left out.
    """
    known = np.sort(references[np.isfinite(references)])
    gap = float(np.min(np.diff(known))) if len(known) > 1 else 1.0
    before, after = (MARGIN, EJECTION_MARGIN) if kind == "ed" else (EJECTION_MARGIN, MARGIN)
    inside = known[(known >= before) & (known <= duration - after)]
    if not len(events):
        return np.full(len(inside), np.nan)
    distance = events[None] - inside[:, None]
    nearest = distance[np.arange(len(inside)), np.abs(distance).argmin(1)]
    return np.where(np.abs(nearest) <= gap / 2, nearest, np.nan)


@dataclass(frozen=True)
class Timing:
    """Errors of one kind of event, pooled over beats. ms; positive: the video lags the ECG. Intervals: bootstrap over clips.

    `hits`: share of the ECG's beats with an event within one frame (a missed beat is no hit). `chance_hits` and `chance_median_ms` are
    what the same videos reach against the ECGs of other clips (mean of permutations, with their 95 % range).
    """

    median_ms: Estimate  # of the absolute error
    bias_ms: Estimate  # median signed error
    hits: Estimate
    frame_ms: float
    missed: float  # share of beats without an event
    clips: int
    chance_hits: Estimate | None
    chance_median_ms: Estimate | None


@dataclass(frozen=True)
class Timed:
    """The events of one clip, the references they are compared with (s), its duration s, frame s, and the group it belongs to."""

    events: Floats
    references: Floats
    duration: float
    frame: float
    group: str
    kind: Literal["ed", "es"]


def timing(clips: Sequence[Timed], seed: int = 0, chance: bool = True) -> Timing | None:
    """`Timing` of all beats of `clips`; None without a beat to compare."""
    errors = [timing_errors(c.events, c.references, c.duration, c.kind) for c in clips]
    if not sum(map(len, errors)):
        return None
    frames = np.array([c.frame for c in clips])

    def statistic(rows: Indices) -> Floats:
        return np.array(_summary([errors[i] for i in rows], frames[rows]))

    median, bias, hits = group_bootstrap(statistic, [c.group for c in clips], seed, 300)
    pooled = np.concatenate(errors)
    by_chance = _chance(clips, seed) if chance and len(clips) > 2 else (None, None)
    missed = float(np.isnan(pooled).mean())
    return Timing(median, bias, hits, 1000 * float(np.median(frames)), missed, len(clips), *by_chance)


def _summary(errors: Sequence[Floats], frames: Floats) -> tuple[float, float, float]:
    """Median absolute and median signed error in ms, and the share within one frame."""
    pooled = np.concatenate(errors) if errors else np.empty(0)
    if not len(pooled):
        return float("nan"), float("nan"), float("nan")
    limits = np.repeat(frames, [len(e) for e in errors])
    found = np.isfinite(pooled)
    hits = float((np.abs(pooled[found]) <= limits[found] + 1e-9).sum() / len(pooled))
    if not found.any():
        return float("nan"), float("nan"), hits
    return float(1000 * np.median(np.abs(pooled[found]))), float(1000 * np.median(pooled[found])), hits


def _chance(clips: Sequence[Timed], seed: int) -> tuple[Estimate, Estimate]:
    """Hits and median error when every clip is compared with the ECG of another one."""
    rng = np.random.default_rng(stable_seed("phase permutations", seed))
    frames, rows = np.array([c.frame for c in clips]), []
    for _ in range(PERMUTATIONS):
        order = rng.permutation(len(clips))
        other = np.empty(len(clips), dtype=np.intp)
        other[order] = np.roll(order, 1)  # one cycle: nobody keeps the own ECG
        pairs = zip(clips, other, strict=True)
        rows.append(_summary([timing_errors(c.events, clips[int(o)].references, c.duration, c.kind) for c, o in pairs], frames))
    median, _, hits = np.array(rows).T
    return _spread(hits), _spread(median)


def _spread(values: Floats) -> Estimate:
    known = values[np.isfinite(values)]
    if not len(known):
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(float(known.mean()), float(low), float(high), len(known))


def cycle_phase(r_peaks: Floats, times: Floats) -> Floats:
    """Beats since the first R peak at `times`, fractional; linear between R peaks and beyond the outer ones at the nearest RR."""
    if len(r_peaks) < 2:
        return np.full(len(times), np.nan)
    count = np.arange(len(r_peaks), dtype=np.float64)
    phase = np.interp(times, r_peaks, count)
    before, after = times < r_peaks[0], times > r_peaks[-1]
    phase[before] = (times[before] - r_peaks[0]) / (r_peaks[1] - r_peaks[0])
    phase[after] = count[-1] + (times[after] - r_peaks[-1]) / (r_peaks[-1] - r_peaks[-2])
    return phase
