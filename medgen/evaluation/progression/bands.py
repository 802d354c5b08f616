"""Are the futures as wide as they should be? Bands and CRPS of the draws against what came, and against how else it could have come.

Simulated futures are true values, and draws are what the judge reads from generated images. To compare like with like, the futures are
also "seen through the judge": each gets the error that the judge makes on a real image of about that value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medgen.evaluation.progression.baselines import JudgeError
from medgen.evaluation.progression.calibration import (
    SpreadError,
    covered,
    crps,
    crps_of_futures,
    futures_covered,
    rank_histogram,
    spread_error,
)
from medgen.evaluation.progression.points import BASELINES, Points
from medgen.evaluation.progression.scores import means
from medgen.evaluation.statistics import Estimate, Floats
from medgen.seeds import stable_seed

LEVELS = (0.5, 0.8, 0.9)
CURVE = tuple(round(0.1 * k, 1) for k in range(1, 10))
IN_PLAY = (
    0.1  # spreads: the futures of a biomarker differ by at least this much (standard deviation), or it has nothing to calibrate
)


@dataclass(frozen=True)
class Bands:
    """Calibration against one thing. coverage by level ("0.8"); crps by method, in spreads; curve: (level, share covered).

    "ideal" among the methods: as many of the simulated futures themselves, in the place of the draws.
    """

    coverage: dict[str, Estimate]
    crps: dict[str, Estimate]
    curve: tuple[tuple[float, float], ...]
    visits: int


@dataclass(frozen=True)
class Calibration:
    """draws: trajectories per patient. realised: the visit that came, read by the judge; futures: simulated continuations as they are;
    seen: through the judge's error. All of the primary biomarker; by_biomarker: `seen` where a biomarker's futures differ."""

    draws: int
    realised: Bands
    futures: Bands | None
    seen: Bands | None
    by_biomarker: dict[str, Bands]
    ranks: tuple[int, ...]
    spread_error: SpreadError


def calibration(points: Points, errors: Mapping[str, JudgeError | None], seed: int = 0) -> Calibration:
    """All of `Calibration`; `errors`: the judge's by biomarker."""
    draws, real = points.of_primary(points.draws), points.of_primary(points.real)
    single = {m: points.of_primary(points.read[m]) for m in BASELINES if m in points.read}
    futures = [
        None if (f := points.futures[name][i]) is None else f / points.spread[name] for i, name in enumerate(points.primary)
    ]
    seen = [_seen(points, errors, name, i, seed) for i, name in enumerate(points.primary)]
    return Calibration(
        draws=draws.shape[1],
        realised=_realised(draws, real, single, points.groups, seed),
        futures=_against(draws, futures, single, points.groups, seed),
        seen=_against(draws, seen, single, points.groups, seed),
        by_biomarker=_by_biomarker(points, errors, seed),
        ranks=tuple(int(n) for n in rank_histogram(draws, real, seed)),
        spread_error=spread_error(draws, real),
    )


def judge_errors(truth: Mapping[str, Floats], reading: Mapping[str, Floats]) -> dict[str, JudgeError | None]:
    """The judge's error by biomarker, from real visits [N]."""
    return {name: JudgeError.of(truth[name], reading[name]) for name in truth}


def _seen(points: Points, errors: Mapping[str, JudgeError | None], name: str, row: int, seed: int) -> Floats | None:
    values, error = points.futures[name][row], errors.get(name)
    if values is None or error is None:
        return None
    return error.seen(values, np.random.default_rng(stable_seed("judge error", seed, name, row))) / points.spread[name]


def _realised(draws: Floats, came: Floats, single: Mapping[str, Floats], groups: Sequence[str], seed: int) -> Bands:
    scores = {"forecast": crps(draws, came), **{m: np.abs(values - came) for m, values in single.items()}}
    shares = means({str(level): covered(draws, came, level).astype(float) for level in LEVELS}, groups, seed)
    curve = tuple((level, float(np.mean(covered(draws, came, level)))) for level in CURVE)
    return Bands(shares, means(scores, groups, seed), curve, len(came))


def _against(
    draws: Floats, futures: Sequence[Floats | None], single: Mapping[str, Floats], groups: Sequence[str], seed: int
) -> Bands | None:
    """Coverage and mean CRPS over the simulated futures of every row that has some."""
    rows = [i for i, values in enumerate(futures) if values is not None]
    if not rows:
        return None
    known = [f for f in futures if f is not None]
    inside, chosen = draws[rows], [groups[i] for i in rows]
    ideal, held = _ideal(known, draws.shape[1], seed)
    scores = {
        "forecast": crps_of_futures(inside, known),
        **{
            m: np.array([float(np.abs(f - values[i]).mean()) for i, f in zip(rows, known, strict=True)])
            for m, values in single.items()
        },
        "ideal": crps_of_futures(ideal, held),
    }
    shares = means({str(level): futures_covered(inside, known, level) for level in LEVELS}, chosen, seed)
    curve = tuple((level, float(np.mean(futures_covered(inside, known, level)))) for level in CURVE)
    return Bands(shares, means(scores, chosen, seed), curve, len(rows))


def _ideal(futures: Sequence[Floats], count: int, seed: int) -> tuple[Floats, list[Floats]]:
    """`count` of the futures in the place of draws, and those that are left, row by row."""
    rng = np.random.default_rng(stable_seed("ideal draws", seed))
    orders = [rng.permutation(len(f)) for f in futures]
    count = min(count, min(len(f) for f in futures) // 2)
    return (
        np.stack([f[order[:count]] for f, order in zip(futures, orders, strict=True)]),
        [f[order[count:]] for f, order in zip(futures, orders, strict=True)],
    )


def _by_biomarker(points: Points, errors: Mapping[str, JudgeError | None], seed: int) -> dict[str, Bands]:
    found = {}
    for name, unit in points.spread.items():
        rows = [i for i, f in enumerate(points.futures[name]) if f is not None and float(np.std(f)) >= IN_PLAY * unit]
        seen = [_seen(points, errors, name, i, seed) for i in rows]
        single = {m: points.read[m][name][rows] / unit for m in BASELINES if m in points.read}
        bands = _against(points.draws[name][rows] / unit, seen, single, [points.groups[i] for i in rows], seed) if rows else None
        if bands is not None:
            found[name] = bands
    return found
