"""`medgen augment report`: what synthetic films or clips did for a network, from the predictions of its runs, as one page and one JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medgen import __version__
from medgen.augmentation import plots
from medgen.augmentation.claims import (
    ALPHA,
    Comparison,
    p_words,
    percent,
    points,
    primary,
    primary_arm,
    secondary,
    signed,
)
from medgen.augmentation.gaps import Gaps, gaps
from medgen.augmentation.measures import BINS, Measured, Spread, measure
from medgen.augmentation.outcomes import FINDINGS, Outcome
from medgen.augmentation.predictions import Experiment, read_experiment
from medgen.config import ConfigError

RARE = 0.05  # a finding on fewer of the real training films than this is shown in the panel of rare findings


@dataclass(frozen=True)
class Rare:
    """One rare finding at one fraction on one set: each arm's AUROC, recall and specificity, and what it adds to real films."""

    finding: str
    set: str
    fraction: float
    positives: int
    trained_on: dict[str, float]
    auroc: dict[str, Spread]
    recall: dict[str, Spread]
    specificity: dict[str, Spread]
    auroc_change: dict[str, Spread]
    recall_change: dict[str, Spread]


def report(runs: Path, out: Path, fraction: float = 0.1, arm: str | None = None, resamples: int = 1000, seed: int = 0) -> Path:
    """Compare the arms of an augmentation experiment; return the path of OUT/index.html, beside which OUT/report.json holds every number.

    Args:
        runs: folder that `medgen augment train` wrote.
        out: folder for the report.
        fraction: share of the real patients at which real and synthetic data are compared with real data alone (the primary
            comparisons, chosen before looking); the smallest there is if no run has it.
        arm: the arm that the primary comparison is about; default: real data with the fewest synthetic ones (mixed-1x). All
            other arms are shown too, uncorrected.
        resamples: how often patients are drawn anew for the intervals.
        seed: of those draws.
    """
    if resamples < 100:
        raise ConfigError(f"resamples: {resamples} are too few for an interval; give at least 100")
    experiment = read_experiment(runs)
    fraction, notes = _primary_fraction(experiment, fraction)
    if arm is not None and not experiment.of(arm, fraction):
        raise ConfigError(
            f"arm: no run of {arm!r} at {percent(fraction)} of the real patients; there are {', '.join(experiment.arms)}"
        )
    arm = arm or primary_arm(experiment, fraction)
    measured = measure(experiment, resamples, seed)
    family = primary(measured, arm, fraction)
    others = secondary(measured, family)
    missed = [one for name in experiment.sets if (one := gaps(measured, fraction, name, resamples, seed)) is not None]
    rare = rare_findings(measured) if experiment.outcome is FINDINGS else []
    warnings = [*experiment.warnings, *notes, *_cautions(experiment, family)]
    out.mkdir(parents=True, exist_ok=True)
    facts = _facts(experiment, fraction, resamples, seed)
    content = {
        "facts": facts, "warnings": warnings, "notes": experiment.facts["notes"], "targets": targets(family, rare, arm, experiment.outcome),
        "primary": [_comparison(one, len(family)) for one in family], "secondary": [_comparison(one, 0) for one in others],
        "counts": counts(experiment), "measures": table(measured), "rare": [asdict(one) for one in rare],
        "missed": [asdict(one) for one in missed],
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(_finite(content), indent=1))
    page = out / "index.html"
    page.write_text(render(measured, content, family, others, rare, missed, fraction), encoding="utf-8")
    return page


def _primary_fraction(experiment: Experiment, wanted: float) -> tuple[float, list[str]]:
    """The fraction of the primary comparisons: the one wanted, or the smallest that real and another arm share."""
    shared = [f for f in experiment.fractions("real") if any(experiment.of(arm, f) for arm in experiment.arms[1:])]
    own = shared or sorted({run.fraction for run in experiment.runs})
    if found := [f for f in own if np.isclose(f, wanted)]:
        return found[0], []
    return own[0], [
        f"No two arms meet at {percent(wanted)} of the real patients; they are compared at {percent(own[0])} instead."
    ]


def _cautions(experiment: Experiment, family: Sequence[Comparison]) -> list[str]:
    said = []
    seeds = min(len(experiment.of(run.arm, run.fraction)) for run in experiment.runs)
    if seeds < 3:
        said.append(
            f"Some arms have {seeds} seed{'s' if seeds > 1 else ''}. Training luck is hard to judge with fewer than three."
        )
    items = experiment.outcome.items
    if "external" not in experiment.films:
        said.append(f"No external {items} were predicted: nothing here says how the arms do at another site.")
    if not family:
        said.append(f"No arm can be compared with real {items} alone: no claim is made.")
    for name in experiment.sets if experiment.outcome is FINDINGS else ():
        films = experiment.films[name]
        lacking = [f for i, f in enumerate(experiment.findings) if len(set(films.truth[films.known[:, i], i].tolist())) < 2]
        if lacking:
            said.append(f"{name} films: only one class of {', '.join(lacking)}; left out of the means.")
        few = [
            f"{f} ({n})" for i, f in enumerate(experiment.findings)
            if 0 < (n := len(set(films.patients[films.truth[:, i] & films.known[:, i]]))) < 20
        ]  # fmt: skip
        if few:
            said.append(f"{name} films: fewer than 20 patients have {', '.join(few)}; what is said of them rests on few people.")
    return said


def _facts(experiment: Experiment, fraction: float, resamples: int, seed: int) -> dict[str, Any]:
    return {
        "medgen": __version__, "arms": experiment.arms, "primary fraction": fraction, "runs": len(experiment.runs),
        "planned": experiment.facts["planned"], "complete": experiment.facts["complete"], "resamples": resamples, "seed": seed,
        "manifests": {k: {n: m[n] for n in ("name", "sha256")} for k, m in experiment.facts["manifests"].items()},
        "sets": {n: {experiment.outcome.items: len(f.record_ids), "patients": len(set(f.patients))} for n, f in experiment.films.items()},
    }  # fmt: skip


def counts(experiment: Experiment) -> dict[str, Any]:
    """Films or clips to train on by arm and fraction, and findings by set."""
    trained, items = [], experiment.outcome.items
    for arm in experiment.arms:
        for fraction in experiment.fractions(arm):
            runs = [run.facts for run in experiment.of(arm, fraction).values()]
            row = {"arm": arm, "fraction": fraction, "seeds": sorted(run["seed"] for run in runs)}
            row |= {key: sorted({run[key] for run in runs}) for key in (f"real_{items}", "real_patients", f"synthetic_{items}")}
            if experiment.outcome is FINDINGS:
                row["positives"] = {f: [run["positives"].get(f) for run in runs] for f in experiment.findings}
            else:
                row["ejection_fraction"] = [run["ejection_fraction"] for run in runs]
            trained.append(row)
    if experiment.outcome is not FINDINGS:
        return {"trained": trained, "tested": {}}
    tested = {
        name: {
            finding: {
                "present": int((films.truth & films.known)[:, i].sum()), "absent": int((~films.truth & films.known)[:, i].sum()),
                "uncertain": int((~films.known[:, i]).sum()),
            }
            for i, finding in enumerate(experiment.findings)
        }
        for name, films in experiment.films.items()
    }  # fmt: skip
    return {"trained": trained, "tested": tested}


def table(measured: Measured) -> list[dict[str, Any]]:
    """Every measure of every arm, fraction and set: macro and by finding."""
    experiment, rows = measured.experiment, []
    kinds = [one.key for one in experiment.outcome.measures]
    own = [*kinds, "recall", "specificity"] if experiment.outcome is FINDINGS else kinds
    for name in experiment.sets:
        for arm in experiment.arms:
            for fraction in experiment.fractions(arm):
                cell: dict[str, Any] = {"set": name, "arm": arm, "fraction": fraction, "macro": {}, "findings": {}}
                cell["macro"] = {m: asdict(measured.estimate(arm, fraction, name, m)) for m in kinds}
                for i, finding in enumerate(experiment.findings):
                    cell["findings"][finding] = {m: asdict(measured.estimate(arm, fraction, name, m, i)) for m in own}
                rows.append(cell)
    return rows


def rare_findings(measured: Measured) -> list[Rare]:
    """The finding that the experiment made rare, or those rare among the real training films; at every fraction that is compared."""
    experiment, found = measured.experiment, []
    for finding in _rare_names(experiment):
        i = experiment.findings.index(finding)
        for name in experiment.sets:
            films = experiment.films[name]
            positives = len(set(films.patients[films.truth[:, i] & films.known[:, i]]))
            for fraction in experiment.fractions("real"):
                arms = [arm for arm in experiment.arms if experiment.of(arm, fraction)]
                if len(arms) > 1:
                    found.append(_rare(measured, finding, i, name, fraction, arms, positives))
    return found


def _rare_names(experiment: Experiment) -> list[str]:
    thinned = (experiment.facts["config"].get("rare") or {}).get("finding")
    if thinned:
        return [thinned]
    largest = experiment.fractions("real")[-1:]
    runs = [run.facts for fraction in largest for run in experiment.of("real", fraction).values()]
    return [
        f for f in experiment.findings if runs and np.mean([r["positives"][f] / max(r["real_films"], 1) for r in runs]) < RARE
    ]


def _rare(measured: Measured, finding: str, i: int, name: str, fraction: float, arms: Sequence[str], positives: int) -> Rare:
    own = {m: {arm: measured.estimate(arm, fraction, name, m, i) for arm in arms} for m in ("auroc", "recall", "specificity")}
    change: dict[str, dict[str, Spread]] = {"auroc": {}, "recall": {}}
    for m, into in change.items():
        for arm in arms[1:]:
            one = measured.difference(arm, "real", fraction, name, m, i)
            if one is not None:
                into[arm] = one
    trained_on = {
        a: float(np.mean([r.facts["positives"][finding] for r in measured.experiment.of(a, fraction).values()])) for a in arms
    }
    return Rare(
        finding,
        name,
        fraction,
        positives,
        trained_on,
        own["auroc"],
        own["recall"],
        own["specificity"],
        change["auroc"],
        change["recall"],
    )


def targets(family: Sequence[Comparison], rare: Sequence[Rare], arm: str | None, outcome: Outcome) -> list[dict[str, Any]]:
    """What was asked for, what was measured, and whether it is shown."""
    rows: list[dict[str, Any]] = []
    for one in family:
        if one.kind == "gain":
            met = one.verdict == "better" and outcome.better(one.difference.value) >= outcome.gain and one.difference.seeds >= 3
            asked = f"{'≥' if outcome.sign > 0 else '≤'} {signed(outcome.sign * outcome.gain, outcome)} points, " * (
                outcome.gain > 0
            )
            what = f"{one.arm} − real at {percent(one.fraction)}, {one.set}"
            wanted = f"{asked}interval {'above' if outcome.sign > 0 else 'below'} 0, ≥ 3 seeds"
        else:
            met = one.verdict == "within the margin"
            what = f"{one.arm} − real of the same size ({percent(one.fraction)}), {one.set}"
            wanted = f"within {outcome.scale * outcome.margin:g} points, interval inside"
        rows.append({"what": what, "wanted": wanted, "met": met, "measured": points(one.difference, outcome)})
    largest = max((panel.fraction for panel in rare if arm in panel.auroc_change), default=0.0)
    for panel in rare:
        if arm is None or panel.fraction != largest:
            continue
        auroc, recall = panel.auroc_change[arm], panel.recall_change[arm]
        gained = any(d.seeds >= 2 and d.value > 0 and 2 * d.p() < ALPHA for d in (auroc, recall))
        what = f"rare: {panel.finding.replace('_', ' ')}, {arm} − real at {percent(panel.fraction)}, {panel.set}"
        told = f"AUROC {points(auroc)}; recall {points(recall)}"
        rows.append({"what": what, "wanted": "gain of AUROC or recall, p × 2 < .05", "met": gained, "measured": told})
    return rows


def _comparison(one: Comparison, family: int) -> dict[str, Any]:
    told = {"verdict": one.verdict, "sentence": one.sentence(family)} if family else {}
    return {**{key: value for key, value in asdict(one).items() if key != "outcome"}, "margin": one.outcome.margin, **told}


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(
    measured: Measured, content: dict[str, Any], family: Sequence[Comparison], others: Sequence[Comparison], rare: Sequence[Rare],
    missed: Sequence[Gaps], fraction: float,
) -> str:  # fmt: skip
    """The page."""
    environment = Environment(
        loader=PackageLoader("medgen.augmentation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    experiment, outcome = measured.experiment, measured.experiment.outcome
    environment.filters |= {
        "estimate": lambda value, digits=3 if outcome is FINDINGS else 2: estimate(value, digits),
        "points": partial(points, outcome=outcome),
        "signed": partial(signed, outcome=outcome),
        "p": p_words,
        "percent": percent,
        "words": lambda name: name.replace("_", " "),
    }
    words = {f: _fraction_words(experiment, f) for f in sorted({run.fraction for run in experiment.runs})}
    shown = [arm for arm in experiment.arms if experiment.of(arm, fraction)]
    drawn = {m.key: Markup(plots.curves(measured, m, words)) for m in outcome.measures}
    rows = [
        (f"{c.arm} − real, {percent(c.fraction)}, {c.set}", c.difference, plots.style(c.arm, experiment.arms)[0])
        for c in (*family, *others)
    ]
    return environment.get_template("report.html.j2").render(
        **content, family=family, others=others, rare_panels=rare, missed_sets=missed, curves=drawn, fraction=fraction, shown=shown,
        outcome=outcome, classes=outcome is FINDINGS, findings=experiment.findings, bins=BINS, sets=experiment.sets,
        reliability=Markup((plots.reliability if outcome is FINDINGS else plots.agreement)(measured, fraction)),
        forest=Markup(plots.differences(rows, f"points of {outcome.what}, arm minus real (95 % interval)", outcome.scale,
                                        outcome.scale * outcome.margin)) if rows else "",
        missed_plots=[Markup(plots.missed(one, experiment.arms, _few(shown, family), outcome)) for one in missed if one.groups],
        cell={(r["set"], r["arm"], r["fraction"]): r for r in content["measures"]}, full=max(words),
    )  # fmt: skip


def _few(shown: Sequence[str], family: Sequence[Comparison]) -> list[str]:
    """Real and the primary arm: more arms in one plot cannot be read."""
    return [arm for arm in shown if arm == "real" or any(c.arm == arm and c.kind == "gain" for c in family)]


def _fraction_words(experiment: Experiment, fraction: float) -> str:
    key = f"real_{experiment.outcome.items}"
    counts = [run.facts[key] for run in experiment.runs if np.isclose(run.fraction, fraction) and run.facts[key]]
    return f"{percent(fraction)}\n({round(np.mean(counts))} {experiment.outcome.items})" if counts else percent(fraction)


def estimate(value: Spread | dict[str, Any], digits: int = 3) -> str:
    """ "0.912 (0.890–0.934)"; a dash where nothing was measured."""
    middle, low, high = (value[k] if isinstance(value, dict) else getattr(value, k) for k in ("value", "low", "high"))
    if not math.isfinite(middle):
        return "–"
    between = "–" if low >= 0 else " to "
    told = f"{middle:.{digits}f}" + (f" ({low:.{digits}f}{between}{high:.{digits}f})" if math.isfinite(low) else "")
    return told.replace("-", "−")
