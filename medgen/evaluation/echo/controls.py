"""Does the video follow this ECG? The controls: another patient's ECG, the same one shifted, none; and one condition changed at a time.

Fields of a case that this reads: `purpose` (population, shift, shuffle, absent, one, ...), `pair_id`, `variant`, `shift_s`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from medgen.evaluation.echo.agreement import Agreement, agreement
from medgen.evaluation.echo.heart_rate import interval_pairs, mean_rate
from medgen.evaluation.echo.phase import EJECTION_MARGIN, MARGIN, Timed, Timing, timing, timing_errors
from medgen.evaluation.echo.videos import Clip
from medgen.evaluation.statistics import Estimate, Floats, Indices, group_bootstrap

VARIANTS = ("heart_rate", "ejection_fraction", "ecg_shift", "seed")


@dataclass(frozen=True)
class Phase:
    """ED against R peaks and ES against T ends of one set of clips; None where it has no such beats."""

    ed: Timing | None
    es: Timing | None


def phase(clips: Sequence[Clip], own: bool = False, seed: int = 0) -> Phase:
    """Timing against the ECG that was given, or with `own` against that of the record (which shuffled clips were not given)."""
    timed = []
    for kind in ("ed", "es"):
        rows = []
        for clip in clips:
            references = (clip.own_r if kind == "ed" else clip.own_t) if own else (clip.r_peaks if kind == "ed" else clip.t_ends)
            if len(references):
                events = clip.reading.beats.ed if kind == "ed" else clip.reading.beats.es
                rows.append(Timed(events, references, clip.reading.duration, clip.reading.frame, clip.group, kind))
        timed.append(timing(rows, seed))
    return Phase(*timed)


@dataclass(frozen=True)
class Shift:
    """The ECG shifted by Δ under the same noise: did end-systole move by Δ?

    `moved`: share of beats that moved by Δ within one frame. `unmoved`: the share that would pass if the shift were ignored. `slope` of
    the movement on Δ (1: followed, 0: ignored). `points`: (Δ, movement) in s of every beat that was found in both clips.
    """

    moved: Estimate
    unmoved: float
    slope: float
    median_error_ms: float
    pairs: int
    points: tuple[tuple[float, float], ...]


def shift_test(clips: Sequence[Clip], seed: int = 0) -> Shift | None:
    """Pairs (`pair_id`) of a clip and those with `shift_s`, the seconds by which its ECG's events come later in the video."""
    bases = {str(c.line["pair_id"]): c for c in clips if c.line.get("pair_id") and not c.line.get("shift_s") and _first(c)}
    found: list[tuple[str, Floats, Floats, float]] = []  # pair, movement and error per beat, Δ
    for clip in clips:
        base = bases.get(str(clip.line.get("pair_id")))
        if base is None or not clip.line.get("shift_s"):
            continue
        delta = float(clip.line["shift_s"])
        movement = _movements(base, clip, delta)
        if len(movement):
            found.append((str(clip.line["pair_id"]), movement, movement - delta, delta))
    if not found:
        return None
    frame = clips[0].reading.frame

    def statistic(rows: Indices) -> Floats:
        errors = np.concatenate([found[i][2] for i in rows])
        return np.array([float((np.abs(errors) <= frame + 1e-9).sum() / len(errors))])

    (moved,) = group_bootstrap(statistic, [pair for pair, *_ in found], seed)
    points = [(delta, float(m)) for _, movement, _, delta in found for m in movement if np.isfinite(m)]
    x, y = (np.array(column) for column in zip(*points, strict=True)) if points else (np.zeros(1), np.zeros(1))
    slope = float((x * y).sum() / max((x * x).sum(), 1e-12))
    unmoved = float(np.mean([abs(delta) <= frame for *_, delta in found]))
    median = float(1000 * np.median(np.abs(y - x)))
    return Shift(moved, unmoved, slope, median, len(found), tuple(points))


def _movements(base: Clip, moved: Clip, delta: float) -> Floats:
    """How far each ES of `base` has moved in `moved`, s; NaN where none is found there although the clip should show it."""
    result = []
    for es in base.reading.beats.es:
        expected = es + delta
        if not EJECTION_MARGIN <= expected <= moved.reading.duration - MARGIN:
            continue
        others = moved.reading.beats.es
        near = others[np.abs(others - expected).argmin()] if len(others) else np.nan
        result.append(near - es if abs(near - expected) < 0.5 else np.nan)
    return np.array(result)


def _first(clip: Clip) -> bool:
    return not clip.line.get("trajectory")


@dataclass(frozen=True)
class Intervals:
    """Beat-to-beat intervals of the video against the ECG's RR, in s. `within`: correlation after each clip's own mean is taken off,
    so that patients' different rates cannot make it."""

    agreement: Agreement | None
    within: float
    beats: int
    clips: int
    found: float  # share of the ECG's intervals inside the clips that the video shows
    points: tuple[tuple[float, float], ...]


def intervals(clips: Sequence[Clip], seed: int = 0) -> Intervals | None:
    """Of irregular rhythms (atrial fibrillation, premature beats); None without a pair of intervals."""
    shown = [_shown(clip) for clip in clips]
    pairs = [interval_pairs(clip.reading.beats, r_peaks) for clip, r_peaks in zip(clips, shown, strict=True)]
    flat = [(rr, seen, clip.group) for clip, found in zip(clips, pairs, strict=True) for rr, seen in found]
    if len(flat) < 3:
        return None
    rr, seen, groups = zip(*flat, strict=True)
    centred = [np.array(found) - np.mean(found, axis=0) for found in pairs if len(found) > 1]
    stacked = np.concatenate(centred) if centred else np.zeros((0, 2))
    within = float(np.corrcoef(stacked.T)[0, 1]) if len(stacked) > 2 and (stacked.std(0) > 1e-9).all() else float("nan")
    asked = sum(max(len(r_peaks) - 1, 0) for r_peaks in shown)
    return Intervals(
        agreement(rr, seen, groups, seed),
        within,
        len(flat),
        sum(map(bool, pairs)),
        len(flat) / max(asked, 1),
        tuple(zip(rr, seen, strict=True)),
    )


def _shown(clip: Clip) -> Floats:
    """R peaks whose ejection the clip shows."""
    return clip.r_peaks[(clip.r_peaks >= 0) & (clip.r_peaks <= clip.reading.duration - EJECTION_MARGIN)]


@dataclass(frozen=True)
class Effect:
    """What changing `variant` alone did to `measure`: mean absolute change beside the change that was asked for, and its tolerance.

    `asked` is 0 for measures that must not move. `error`: mean absolute difference between the change and what was asked.
    """

    variant: str
    measure: str
    change: Estimate
    asked: float
    error: float
    tolerance: float


def one_at_a_time(clips: Sequence[Clip], seed: int = 0) -> tuple[Effect, ...]:
    """Effects within pairs (`purpose` "one") of the variants "base", heart_rate, ejection_fraction, ecg_shift and seed.

    Measures: heart rate bpm; EF points; ES lag ms behind the T ends of the ECG given (for `ecg_shift`: of the base's); EDV and
    brightness percent.
    """
    groups: dict[str, dict[str, Clip]] = defaultdict(dict)
    for clip in clips:
        if clip.purpose == "one" and _first(clip):
            groups[str(clip.line.get("pair_id"))][str(clip.line.get("variant"))] = clip
    whole = {name: variants for name, variants in groups.items() if "base" in variants}
    frame = clips[0].reading.frame if clips else 0.05
    effects = []
    for variant in VARIANTS:
        pairs = [(variants["base"], variants[variant], name) for name, variants in whole.items() if variant in variants]
        for measure, (change_of, tolerance) in _measures(frame).items():
            rows = [(change_of(base, other, variant), _asked(base, other, variant, measure), name) for base, other, name in pairs]
            known = [(change, asked, name) for change, asked, name in rows if np.isfinite(change) and np.isfinite(asked)]
            if len(known) < 2:
                continue
            change, asked = (np.array([row[i] for row in known]) for i in (0, 1))
            (mean,) = group_bootstrap(_mean_of(np.abs(change)), [name for *_, name in known], seed, 300)
            error = float(np.abs(change - asked).mean())
            effects.append(Effect(variant, measure, mean, float(np.abs(asked).mean()), error, tolerance))
    return tuple(effects)


def _mean_of(values: Floats) -> Callable[[Indices], Floats]:
    return lambda rows: np.array([values[rows].mean()])


def _measures(frame: float) -> dict[str, tuple[Callable[[Clip, Clip, str], float], float]]:
    """Change of each measure from the first clip to the second, and by how much it may move when it must not."""
    return {
        "heart rate (bpm)": (lambda a, b, _: b.reading.rate - a.reading.rate, 3.0),
        "ejection fraction (points)": (lambda a, b, _: b.reading.ejection_fraction - a.reading.ejection_fraction, 4.0),
        "ES lag (ms)": (_lag_change, 1000 * frame),
        "EDV (%)": (lambda a, b, _: 100 * (b.reading.edv / a.reading.edv - 1), 8.0),
        "brightness (%)": (lambda a, b, _: 100 * float(b.reading.grey.mean() / a.reading.grey.mean() - 1), 8.0),
    }


def _asked(base: Clip, other: Clip, variant: str, measure: str) -> float:
    if (variant, measure) == ("heart_rate", "heart rate (bpm)"):
        return mean_rate(other.r_peaks, other.reading.duration) - mean_rate(base.r_peaks, base.reading.duration)
    if (variant, measure) == ("ejection_fraction", "ejection fraction (points)"):
        return other.asked_ef - base.asked_ef
    if (variant, measure) == ("ecg_shift", "ES lag (ms)"):
        return 1000 * float(other.line.get("shift_s", 0))
    return 0.0


def _lag_change(base: Clip, other: Clip, variant: str) -> float:
    """Change of the median ES lag in ms; under `ecg_shift` each ES counts from where the base shows it."""
    if variant == "ecg_shift":
        moved = _movements(base, other, float(other.line.get("shift_s", 0)))
        return float(1000 * np.nanmedian(moved)) if np.isfinite(moved).any() else float("nan")
    lags = [timing_errors(c.reading.beats.es, c.t_ends, c.reading.duration, "es") for c in (base, other)]
    if not all(np.isfinite(lag).any() for lag in lags):
        return float("nan")
    return float(1000 * (np.nanmedian(lags[1]) - np.nanmedian(lags[0])))
