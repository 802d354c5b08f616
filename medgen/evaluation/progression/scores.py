"""Tables of a forecast's errors beside every baseline's: pictures, change, biomarkers, strata. Intervals are bootstrapped over patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medgen.evaluation.echo.agreement import Agreement, agreement
from medgen.evaluation.progression.points import METHODS, Points
from medgen.evaluation.progression.trends import annualised_rate
from medgen.evaluation.statistics import Estimate, Floats, Indices, group_bootstrap

Table = dict[str, dict[str, Estimate]]  # by method, by measure
RESAMPLES = 300
LONG = 90.0  # days below which a rate per year means nothing


@dataclass(frozen=True)
class Biomarkers:
    """Errors against the judge's reading of the true visit, by biomarker and method; `known`: the same against the known truth.

    normalised: of each patient's primary biomarker, in spreads. below: by what share the forecast's normalised error lies below each
    other method's. judge: the judge's own mean |error| on the true visits by biomarker, normalised under "primary". agreed: Bland-Altman.
    rate: mean |error| of the primary biomarker's change per year by method, in spreads, of patients followed for `LONG` days or more.
    """

    mae: Table
    known: Table
    normalised: dict[str, Estimate]
    normalised_known: dict[str, Estimate]
    below: dict[str, Estimate]
    judge: dict[str, Estimate]
    agreed: dict[str, Agreement | None]
    rate: dict[str, Estimate]
    spread: dict[str, float]


@dataclass(frozen=True)
class Stratum:
    """Normalised error of the primary biomarker by method among some of the later visits."""

    kind: str
    name: str
    visits: int
    errors: dict[str, Estimate]


def means(columns: Mapping[str, Floats], groups: Sequence[str], seed: int = 0) -> dict[str, Estimate]:
    """Mean of every column [P] (NaN left out) with its interval over resampled groups; columns without a number are left out."""
    kept = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    if not kept:
        return {}
    stacked = np.column_stack(list(kept.values()))

    def statistic(rows: Indices) -> Floats:
        part = stacked[rows]
        known = np.isfinite(part)
        count = known.sum(0)
        return np.where(count > 0, np.where(known, part, 0).sum(0) / np.maximum(count, 1), np.nan)

    estimates = group_bootstrap(statistic, groups, seed, RESAMPLES)
    counts = np.isfinite(stacked).sum(0)
    return {name: Estimate(e.value, e.low, e.high, int(n)) for name, e, n in zip(kept, estimates, counts, strict=True)}


def below(ours: Floats, others: Mapping[str, Floats], groups: Sequence[str], seed: int = 0) -> dict[str, Estimate]:
    """1 − mean(ours) / mean(other) for every other error [P], over the rows that both know."""
    result = {}
    for name, other in others.items():
        known = np.flatnonzero(np.isfinite(ours) & np.isfinite(other))
        if not len(known) or other[known].mean() <= 0:
            continue
        a, b = ours[known], other[known]

        def statistic(rows: Indices, a: Floats = a, b: Floats = b) -> Floats:
            return np.array([1 - a[rows].mean() / max(b[rows].mean(), 1e-12)])

        result[name] = group_bootstrap(statistic, [groups[int(i)] for i in known], seed, RESAMPLES)[0]
    return result


def pictures(points: Points, rows: NDArray[np.bool_], seed: int = 0) -> Table:
    """Every picture measure of every method over the chosen rows [P]."""
    chosen = np.flatnonzero(rows)
    groups = [points.groups[int(i)] for i in chosen]
    return (
        {m: means({k: v[chosen] for k, v in points.pictures[m].items()}, groups, seed) for m in points.methods}
        if len(chosen)
        else {}
    )


def primary_errors(points: Points, against: Mapping[str, Floats]) -> dict[str, Floats]:
    """|error| of the primary biomarker [P] by method, in spreads."""
    wanted = points.of_primary(against)
    return {m: np.abs(points.of_primary(points.read[m]) - wanted) for m in points.methods}


def biomarkers(points: Points, seed: int = 0) -> Biomarkers:
    """All of `Biomarkers`."""

    def table(against: Mapping[str, Floats]) -> Table:
        by_name = {
            name: means({m: np.abs(points.read[m][name] - against[name]) for m in points.methods}, points.groups, seed)
            for name in points.spread
        }
        return {m: {name: row[m] for name, row in by_name.items() if m in row} for m in points.methods}

    errors, known = primary_errors(points, points.real), primary_errors(points, points.truth)
    judged = {name: np.abs(points.real[name] - points.truth[name]) for name in points.spread}
    judged["primary"] = np.abs(points.of_primary(points.real) - points.of_primary(points.truth))
    others = {name: values for name, values in errors.items() if name not in ("forecast", "single")}
    return Biomarkers(
        mae=table(points.real),
        known=table(points.truth),
        normalised=means(errors, points.groups, seed),
        normalised_known=means(known, points.groups, seed),
        below=below(errors["forecast"], others, points.groups, seed),
        judge=means(judged, points.groups, seed),
        rate=_rates(points, seed),
        agreed={n: agreement(list(points.real[n]), list(points.read["forecast"][n]), points.groups, seed) for n in points.spread},
        spread=dict(points.spread),
    )


def _rates(points: Points, seed: int) -> dict[str, Estimate]:
    """Errors of the yearly rate from the last known visit through all later ones, patient by patient."""
    if points.time_unit != "days":
        return {}
    start, came = points.of_primary(points.read["copy_last"]), points.of_primary(points.real)
    said = {m: points.of_primary(points.read[m]) for m in points.methods}
    groups, errors = np.array(points.groups), dict[str, list[float]]()
    followed = [rows for name in dict.fromkeys(points.groups) if points.gap[rows := np.flatnonzero(groups == name)].max() >= LONG]
    for rows in followed:
        days, first = np.concatenate([[0.0], points.gap[rows]]), start[rows[:1]]
        true = annualised_rate(days, np.concatenate([first, came[rows]])[None])[0]
        for m, values in said.items():
            rate = annualised_rate(days, np.concatenate([first, values[rows]])[None])[0]
            errors.setdefault(m, []).append(float(abs(rate - true)))
    return means({m: np.array(v) for m, v in errors.items()}, [points.groups[rows[0]] for rows in followed], seed)


def strata(points: Points, seed: int = 0) -> tuple[Stratum, ...]:
    """By gap (thirds), by whether anything changed, by how many visits were known."""
    errors = primary_errors(points, points.real)
    low, high = (float(np.quantile(points.gap, q)) for q in (1 / 3, 2 / 3))
    parts: list[tuple[str, str, NDArray[np.bool_]]] = [
        ("gap", f"up to {low:.0f}", points.gap <= low),
        ("gap", f"{low:.0f} to {high:.0f}", (points.gap > low) & (points.gap <= high)),
        ("gap", f"over {high:.0f}", points.gap > high),
        ("change", "changed", points.changed),
        ("change", "unchanged", ~points.changed),
        ("visits known", "1", points.history == 1),
        ("visits known", "2 or 3", (points.history >= 2) & (points.history <= 3)),
        ("visits known", "4 or more", points.history >= 4),
    ]
    found = []
    for kind, name, rows in parts:
        if rows.any():
            groups = [points.groups[int(i)] for i in np.flatnonzero(rows)]
            found.append(Stratum(kind, name, int(rows.sum()), means({m: e[rows] for m, e in errors.items()}, groups, seed)))
    return tuple(found)


def best_baseline(table: Mapping[str, Estimate], larger: bool = False) -> tuple[str, float] | None:
    """The baseline with the smallest (or largest) value: its name in words, and that value."""
    values = {m: table[m].value for m in ("copy_last", "linear", "regressor") if m in table}
    if not values:
        return None
    name = (max if larger else min)(values, key=lambda m: values[m])
    return METHODS[name], values[name]
