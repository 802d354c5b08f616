"""What "the video follows the ECG" must mean in numbers: each target with what was measured, and whether it is met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medgen.evaluation.echo.agreement import Agreement
from medgen.evaluation.echo.controls import Effect, Intervals, Shift
from medgen.evaluation.echo.phase import Timing
from medgen.evaluation.echo.temporal import Seams
from medgen.evaluation.fidelity import Fidelity


@dataclass(frozen=True)
class Target:
    """One line of the table; `met` is None where nothing was measured."""

    name: str
    measured: str
    wanted: str
    met: bool | None


def targets(parts: Mapping[str, Any]) -> tuple[Target, ...]:
    """The targets on the parts of an `Evaluation` (fields by name)."""
    generated, real = parts["generated"], parts["real"]
    return (
        _rate(generated.heart_rate),
        _timing("End-diastole against the R peak", generated.phase.ed, real.phase.ed),
        _timing("End-systole against the end of T", generated.phase.es, real.phase.es),
        _shift(parts["shift"]),
        _chance("Another patient's ECG given: end-systole against the own ECG", parts["shuffled_own"].es),
        _chance("No ECG given: end-systole against the own ECG", parts["absent"].es),
        _intervals(generated.intervals),
        _fraction(generated.ejection_fraction, real.ejection_fraction),
        _effects(parts["effects"]),
        _distance(parts["videos"]),
        _seams(parts["seams"]),
    )


def _unmeasured(name: str, wanted: str) -> Target:
    return Target(name, "not measured", wanted, None)


def _rate(rate: Agreement | None) -> Target:
    name, wanted = "Heart rate of the video against the ECG", "MAE ≤ 2 bpm, r ≥ 0.98"
    if rate is None:
        return _unmeasured(name, wanted)
    total = rate.mae.n + rate.unmeasured
    said = f"MAE {rate.mae.value:.2f} bpm, r {rate.r.value:.3f} ({rate.mae.n} of {total} clips show a whole interval)"
    return Target(name, said, wanted, rate.mae.value <= 2 and rate.r.value >= 0.98)


def _timing(name: str, timing: Timing | None, real: Timing | None) -> Target:
    wanted = "median ≤ 1 frame"
    if timing is None:
        return _unmeasured(name, wanted)
    said = f"median {timing.median_ms.value:.0f} ms = {timing.median_ms.value / timing.frame_ms:.2f} frames; "
    said += f"{100 * timing.hits.value:.0f} % within one frame"
    said += f" (real clips: {real.median_ms.value:.0f} ms, {100 * real.hits.value:.0f} %)" if real else ""
    return Target(name, said, wanted, timing.median_ms.value <= timing.frame_ms)


def _shift(shift: Shift | None) -> Target:
    name, wanted = "ECG shifted by Δ moves end-systole by Δ", "≥ 90 % of beats within one frame"
    if shift is None:
        return _unmeasured(name, wanted)
    said = f"{100 * shift.moved.value:.0f} % of beats, slope {shift.slope:.2f} ({shift.pairs} pairs)"
    return Target(name, said, wanted, shift.moved.value >= 0.9)


def _chance(name: str, timing: Timing | None) -> Target:
    wanted = "as by chance"
    if timing is None or timing.chance_hits is None:
        return _unmeasured(name, wanted)
    chance = timing.chance_hits
    said = f"{100 * timing.hits.value:.0f} % within one frame; by chance {100 * chance.value:.0f} % "
    said += f"({100 * chance.low:.0f}–{100 * chance.high:.0f})"
    return Target(name, said, wanted, timing.hits.low <= chance.high)


def _intervals(beats: Intervals | None) -> Target:
    name, wanted = "Irregular rhythm: beat intervals of the video against the ECG", "r ≥ 0.9"
    if beats is None or beats.agreement is None:
        return _unmeasured(name, wanted)
    r = beats.agreement.r.value
    said = f"r {r:.3f}, within clips {beats.within:.3f} ({beats.beats} intervals of {beats.clips} clips)"
    return Target(name, said, wanted, r >= 0.9)


def _fraction(fraction: Agreement | None, real: Agreement | None) -> Target:
    name, wanted = "Ejection fraction asked against measured", "R² ≥ 0.85, MAE ≤ 3 points"
    if fraction is None:
        return _unmeasured(name, wanted)
    said = f"R² {fraction.r2.value:.3f}, MAE {fraction.mae.value:.2f}, bias {fraction.bias.value:+.2f}"
    said += f" (the judge on real clips: R² {real.r2.value:.3f}, MAE {real.mae.value:.2f})" if real else ""
    return Target(name, said, wanted, fraction.r2.value >= 0.85 and fraction.mae.value <= 3)


def _effects(effects: Sequence[Effect]) -> Target:
    """Asked changes happen within the tolerance on average, and everything else stays within it."""
    name, wanted = "First frame held, one condition changed: only that measure moves", "all within tolerance"
    if not effects:
        return _unmeasured(name, wanted)
    told = []
    for effect in effects:
        value = effect.error if effect.asked else effect.change.value
        if effect.variant != "seed" and math.isfinite(value) and value > effect.tolerance:
            off = "off by" if effect.asked else "moves"
            told.append(
                f"{effect.measure} under another {effect.variant.replace('_', ' ')} {off} {value:.1f} > {effect.tolerance:.0f}"
            )
    return Target(name, "; ".join(told) or "all within tolerance", wanted, not told)


def _distance(videos: Fidelity | None) -> Target:
    name, wanted = "Fréchet video distance ÷ real-vs-real floor", "≤ 3"
    ratio = videos.metrics["frechet"].ratio if videos else None
    if videos is None or ratio is None:
        return _unmeasured(name, wanted)
    said = f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f}); {videos.encoder}, {videos.n} clips a side"
    return Target(name, said, wanted, ratio.value <= 3)


def _seams(seams: Seams | None) -> Target:
    name, wanted = "Flicker at the seams of joined windows ÷ elsewhere", "≤ 1.1"
    if seams is None:
        return _unmeasured(name, wanted)
    said = f"{seams.image.value:.3f} ({seams.image.low:.3f}–{seams.image.high:.3f}) at {seams.seams} seams"
    return Target(name, said, wanted, seams.image.value <= 1.1)
