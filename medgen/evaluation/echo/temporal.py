"""Steadiness in time: flicker, seams between joined windows, drift from window to window; and how much clips of one case differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.spatial.distance import pdist

from medgen.evaluation.echo.video_fidelity import describe
from medgen.evaluation.echo.videos import Clip
from medgen.evaluation.statistics import Estimate, Floats, Indices, group_bootstrap


@dataclass(frozen=True)
class Flicker:
    """Mean absolute second difference of grey values in time (grey levels of 1, per frame²), generated beside real, and their ratio.

    Second differences take uniform motion off; real clips have some, because speckle changes as tissue moves.
    """

    generated: Estimate
    real: Estimate
    ratio: float


def flicker(generated: Sequence[Clip], real: Sequence[Clip], seed: int = 0) -> Flicker | None:
    """None with fewer than two clips on a side."""
    if len(generated) < 2 or len(real) < 2:
        return None
    estimates = []
    for clips in (generated, real):
        values = np.array([float(np.nanmean(clip.reading.bend)) for clip in clips])
        estimates += group_bootstrap(_mean_of(values), [clip.group for clip in clips], seed, 300)
    return Flicker(estimates[0], estimates[1], estimates[0].value / max(estimates[1].value, 1e-9))


@dataclass(frozen=True)
class Seams:
    """Flicker at the frames on both sides of a seam ÷ flicker elsewhere in the same clip, pooled; likewise of the volume curve.

    `control`: the same of places half-way between the seams, where nothing was joined: about 1, unless beats happen to fall there.
    """

    image: Estimate
    volume: Estimate
    control: Estimate
    clips: int
    seams: int


def seams(clips: Sequence[Clip], seams_of: Callable[[Clip], Sequence[int]], seed: int = 0) -> Seams | None:
    """`seams_of`: numbers of the frames at which windows meet (several in a row where they fade over). None without a joined clip."""
    joined = [(clip, [s for s in seams_of(clip) if 2 <= s < len(clip.reading.times) - 1]) for clip in clips]
    joined = [(clip, places) for clip, places in joined if places]
    if not joined:
        return None
    groups = [clip.group for clip, _ in joined]
    curves = [clip.reading.bend for clip, _ in joined]
    volumes = [_bend(clip.reading.volume) for clip, _ in joined]
    at = [places for _, places in joined]
    between = [[(a + b) // 2 for a, b in zip([0, *places], places, strict=False) if b - a > 4] for places in at]
    (image,) = group_bootstrap(_ratio(curves, at), groups, seed, 300)
    (volume,) = group_bootstrap(_ratio(volumes, at), groups, seed, 300)
    (control,) = group_bootstrap(_ratio(curves, between), groups, seed, 300)
    meetings = sum(b - a > 1 for places in at for a, b in zip([-9, *places], places, strict=False))
    return Seams(image, volume, control, len(joined), meetings)


def _bend(values: Floats) -> Floats:
    result = np.full(len(values), np.nan)
    result[1:-1] = np.abs(values[2:] - 2 * values[1:-1] + values[:-2]) / np.nanmean(values)
    return result


def _ratio(curves: Sequence[Floats], places: Sequence[Sequence[int]]) -> Callable[[Indices], Floats]:
    """Mean of the curves at the two frames of every seam ÷ their mean elsewhere."""

    def statistic(rows: Indices) -> Floats:
        at, elsewhere = [], []
        for i in rows:
            chosen = np.zeros(len(curves[i]), dtype=bool)
            for place in places[i]:
                chosen[place - 1 : place + 1] = True
            at.append(curves[i][chosen])
            elsewhere.append(curves[i][~chosen])
        return np.array([np.nanmean(np.concatenate(at)) / np.nanmean(np.concatenate(elsewhere))])

    return statistic


@dataclass(frozen=True)
class Drift:
    """Mean absolute change from the first to the last quarter of long clips, percent: brightness, largest volume; and EF in points.

    Each beside real long clips where there are any (a rhythm that changes its volumes is no drift).
    """

    brightness: Estimate
    volume: Estimate
    clips: int


def drift(clips: Sequence[Clip], shortest: int, seed: int = 0) -> Drift | None:
    """Of the clips of at least `shortest` frames; None without two of them."""
    long = [clip for clip in clips if len(clip.reading.times) >= shortest]
    if len(long) < 2:
        return None
    groups = [clip.group for clip in long]
    changes: list[Floats] = []
    for values_of in (lambda c: c.reading.grey, lambda c: c.reading.volume):
        values = [values_of(clip) for clip in long]
        quarter = [max(len(v) // 4, 1) for v in values]
        level = np.nanmean if not changes else np.nanmax
        ends = [(level(v[:q]), level(v[-q:])) for v, q in zip(values, quarter, strict=True)]
        changes.append(np.array([100 * abs(last / first - 1) for first, last in ends]))
    brightness, volume = (group_bootstrap(_mean_of(change), groups, seed, 300)[0] for change in changes)
    return Drift(brightness, volume, len(long))


@dataclass(frozen=True)
class Spread:
    """How far clips of one case (same ECG and EF, other seeds) lie apart, as a share of how far real patients do, in judge features.

    0: the same heart again and again; 1: as different as patients are.
    """

    share: Estimate
    cases: int
    clips: int


def diversity(generated: Sequence[Clip], real: Sequence[Clip], seed: int = 0) -> Spread | None:
    """None where no case has two clips."""
    cases: dict[str, list[Clip]] = defaultdict(list)
    for clip in generated:
        cases[str(clip.line.get("case_id", clip.name))].append(clip)
    several = {name: clips for name, clips in cases.items() if len(clips) > 1}
    if not several or len(real) < 3:
        return None
    frames = min(len(clip.reading.times) for clip in [*real, *(c for clips in several.values() for c in clips)])
    vectors = np.stack([describe(clip.reading.features[:frames]) for clip in real]).astype(np.float64)
    scale = np.maximum(vectors.std(0), 1e-6)
    apart = float(pdist(vectors / scale).mean())
    names, distances = [], []
    for name, clips in several.items():
        described = [describe(clip.reading.features[:frames]) / scale for clip in clips]
        for a, b in combinations(described, 2):
            names.append(name)
            distances.append(float(np.linalg.norm(a - b)) / apart)
    (share,) = group_bootstrap(_mean_of(np.array(distances)), names, seed, 300)
    return Spread(share, len(several), sum(map(len, several.values())))


def _mean_of(values: Floats) -> Callable[[Indices], Floats]:
    return lambda rows: np.array([values[rows].mean()])
