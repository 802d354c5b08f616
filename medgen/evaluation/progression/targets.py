"""What a forecast must show in numbers: each target with what was measured, and whether it is met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medgen.evaluation.echo.targets import Target
from medgen.evaluation.progression.bands import Calibration
from medgen.evaluation.progression.controls import Directions, Identity, Missing, ZeroGap
from medgen.evaluation.progression.points import BASELINES, METHODS
from medgen.evaluation.progression.scores import Biomarkers, Table, best_baseline
from medgen.evaluation.progression.sequences import Between, Rollout

STEADY = 0.05  # relative drift of brightness and anatomy that a roll-out may have


def targets(parts: Mapping[str, Any]) -> tuple[Target, ...]:
    """The targets on the parts of an `Evaluation` (fields by name)."""
    return (
        *_change(parts["changed_pictures"]),
        *_biomarkers(parts["biomarkers"]),
        *_calibration(parts["calibration"]),
        _zero_gap(parts["zero_gap"]),
        _direction("A longer gap moves the biomarker as the simulated futures do", parts["longer_gap"]),
        _direction("A treatment on against off moves the biomarker as it must", parts["treatment"]),
        _identity(parts["identity"]),
        _missing(parts["missing"]),
        _rollout(parts["rollout"]),
        *_between(parts["between"]),
    )


def _unmeasured(name: str, wanted: str) -> Target:
    return Target(name, "not measured", wanted, None)


def _change(table: Table) -> tuple[Target, ...]:
    """Change fidelity on visits where something changed: three measures, each against the best baseline."""
    rows = []
    for measure, name, wanted, larger in (
        ("delta_ssim", "Change since the last visit, changed patients: ΔSSIM", "above every baseline", True),
        ("relative_error", "Change since the last visit, changed patients: relative error", "below every baseline", False),
        ("auroc", "Brighter or darker where it changed, changed patients: AUROC (copying: 0.5)", "≥ 0.85", True),
    ):
        ours = table.get("forecast", {}).get(measure)
        if ours is None:
            rows.append(_unmeasured(name, wanted))
            continue
        others = {m: table[m][measure] for m in BASELINES if measure in table.get(m, {})}
        best = best_baseline(others, larger)
        said = f"{ours.value:.3f} ({ours.low:.3f} to {ours.high:.3f})"
        said += f"; best baseline {best[1]:.3f} ({best[0]})" if best else ""
        said += f"; ceiling {table['ceiling'][measure].value:.3f}" if measure in table.get("ceiling", {}) else ""
        if measure == "auroc":
            met: bool | None = ours.value >= 0.85
        else:
            met = None if best is None else (ours.value > best[1] if larger else ours.value < best[1])
        rows.append(Target(name, said, wanted, met))
    return tuple(rows)


def _biomarkers(found: Biomarkers | None) -> tuple[Target, ...]:
    name = "Biomarker at the asked date: error below "
    rows = []
    for method, share in (("copy_last", 0.3), ("regressor", 0.1)):
        wanted = f"≥ {100 * share:.0f} % below"
        less = found.below.get(method) if found else None
        if found is None or less is None:
            rows.append(_unmeasured(name + METHODS[method], wanted))
            continue
        ours, other = found.normalised["forecast"].value, found.normalised[method].value
        said = f"{100 * less.value:.0f} % ({100 * less.low:.0f} to {100 * less.high:.0f}): {ours:.3f} against {other:.3f} spreads"
        said += f"; the judge alone {found.judge['primary'].value:.3f}" if "primary" in found.judge else ""
        rows.append(Target(name + METHODS[method], said, wanted, less.value >= share))
    return tuple(rows)


def _calibration(found: Calibration | None) -> tuple[Target, ...]:
    names = ("80 % band of the futures covers the simulated futures", "CRPS against the simulated futures, in spreads")
    wanted = ("75 to 85 %, 16 or more futures", "below every baseline")
    if found is None or found.seen is None:
        return tuple(_unmeasured(name, want) for name, want in zip(names, wanted, strict=True))
    inside, came, raw = (b.coverage["0.8"] for b in (found.seen, found.realised, found.futures or found.seen))
    said = f"{100 * inside.value:.0f} % ({100 * inside.low:.0f} to {100 * inside.high:.0f}) seen through the judge's error, "
    said += f"{100 * raw.value:.0f} % as they are; of what came {100 * came.value:.0f} %; {found.draws} futures"
    best, ours = best_baseline(found.seen.crps), found.seen.crps["forecast"].value
    score = f"{ours:.3f}" + (f"; best baseline {best[1]:.3f} ({best[0]})" if best else "")
    score += f"; the simulator's own futures {found.seen.crps['ideal'].value:.3f}" if "ideal" in found.seen.crps else ""
    return (
        Target(names[0], said, wanted[0], 0.75 <= inside.value <= 0.85 and found.draws >= 16),
        Target(names[1], score, wanted[1], None if best is None else ours < best[1]),
    )


def _zero_gap(found: ZeroGap | None) -> Target:
    name, wanted = "A gap of zero gives the present back: SSIM to the last visit", "≥ autoencoder ceiling − 0.02"
    if found is None:
        return _unmeasured(name, wanted)
    said = f"{found.ssim.value:.4f}" + (f"; ceiling {found.ceiling.value:.4f}" if found.ceiling else "; ceiling not measured")
    return Target(name, said, wanted, None if found.short is None else found.short.value <= 0.02)


def _direction(name: str, found: Directions | None) -> Target:
    wanted = "≥ 95 % the right way"
    if found is None:
        return _unmeasured(name, wanted)
    right = found.right
    said = f"{100 * right.value:.0f} % ({100 * right.low:.0f} to {100 * right.high:.0f}) of {right.n} patients"
    return Target(name, said, wanted, right.value >= 0.95)


def _identity(found: Identity | None) -> Target:
    name, wanted = "Still the same patient: own baseline nearest", "≥ 95 %, and ≤ real pairs + 2 points"
    if found is None:
        return _unmeasured(name, wanted)
    said = f"{100 * found.generated.value:.0f} % ({100 * found.generated.low:.0f} to {100 * found.generated.high:.0f}) among "
    said += f"{found.gallery}; real pairs {100 * found.real.value:.0f} %"
    return Target(name, said, wanted, 0.95 <= found.generated.value <= found.real.value + 0.02)


def _missing(found: Missing | None) -> Target:
    name, wanted = "A third of the past visits removed: biomarker error grows by", "≤ 15 %"
    if found is None:
        return _unmeasured(name, wanted)
    said = f"{100 * found.growth.value:+.0f} % ({100 * found.growth.low:+.0f} to {100 * found.growth.high:+.0f}), {found.patients} patients"
    said += f"; where the last visit was kept {100 * found.last_kept.value:+.0f} %" if found.last_kept else ""
    said += f"; copying the last visit left {100 * found.copy_last.value:+.0f} %" if found.copy_last else ""
    return Target(name, said, wanted, found.growth.value <= 0.15)


def _rollout(found: Rollout | None) -> Target:
    name = "12 steps, each from the last: drift beyond that of the joint draw"
    wanted = f"brightness, lung and heart area within {100 * STEADY:.0f} %"
    if found is None:
        return _unmeasured(name, wanted)
    both = [(m, found.drift["autoregressive"][m].value, found.drift["joint"][m].value) for m in found.drift["joint"]]
    said = "; ".join(f"{m} {100 * step:+.1f} % (joint {100 * joint:+.1f})" for m, step, joint in both)
    held = [abs(step - joint) <= STEADY and abs(step) <= 2 * STEADY for m, step, joint in both if m != "sharpness"]
    return Target(name, said, wanted, all(held))


def _between(found: Between | None) -> tuple[Target, ...]:
    names = ("Between two known visits: monotone in time", "Between two known visits: both ends reproduced, SSIM")
    wanted = ("≥ 95 % of cases", "≥ autoencoder ceiling − 0.02")
    if found is None:
        return tuple(_unmeasured(name, want) for name, want in zip(names, wanted, strict=True))
    said = f"{100 * found.monotone.value:.0f} % of {found.monotone.n} beyond the judge's noise; "
    said += f"{100 * found.strictly.value:.0f} % without any step back"
    ends = f"{found.ends.value:.4f}" + (f"; ceiling {found.ceiling.value:.4f}" if found.ceiling else "; ceiling not measured")
    return (
        Target(names[0], said, wanted[0], found.monotone.value >= 0.95),
        Target(names[1], ends, wanted[1], None if found.short is None else found.short.value <= 0.02),
    )
