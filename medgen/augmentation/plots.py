"""The augmentation report's plots, as SVG whose lettering takes the page's own font. (Not `evaluation.plots`: that imports torch.)"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medgen.augmentation.gaps import Gaps
from medgen.augmentation.measures import Measured, Spread, calibration
from medgen.augmentation.outcomes import EJECTION_FRACTION, Measure, Outcome

INK, QUIET, REAL = "#1c2733", "#8a96a3", "#1c2733"
COLOURS = (
    "#1f6feb",
    "#d9730d",
    "#1a7f4b",
    "#9a3fb5",
    "#b8860b",
    "#0f8b8d",
    "#c0362c",
    "#6b7280",
)  # apart for most colour-blind eyes
MARKS = "osD^vPX*"


def svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element with a text alternative, reproducible (no date, fixed ids)."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return f'<svg role="img" aria-label="{label}"{text.getvalue().partition("<svg")[2]}'


def style(arm: str, arms: Sequence[str]) -> tuple[str, str]:
    """Colour and mark of an arm, the same in every plot; real is ink."""
    others = [a for a in arms if a != "real"]
    return (REAL, "o") if arm == "real" else (COLOURS[others.index(arm) % len(COLOURS)], MARKS[others.index(arm) % len(MARKS)])


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.grid(axis="y", color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)


def curves(measured: Measured, measure: Measure, shares_told: Mapping[float, str]) -> str:
    """`measure` over the fraction of the real patients, one line and band per arm, one panel per set; the words of each fraction."""
    experiment, items = measured.experiment, measured.experiment.outcome.items
    figure = Figure(figsize=(5.0 * len(experiment.sets), 3.7), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(experiment.sets), sharey=True))
    fractions = sorted(shares_told)
    for axes, name in zip(panels, experiment.sets, strict=True):
        _plain(axes)
        for number, arm in enumerate(experiment.arms):
            shares = experiment.fractions(arm)
            found = [measured.estimate(arm, share, name, measure.key) for share in shares]
            _line(
                axes, [fractions.index(s) for s in shares], found, style(arm, experiment.arms), arm, number, len(experiment.arms)
            )
        axes.set_xticks(range(len(fractions)), [shares_told[f] for f in fractions])
        axes.set_xlim(-0.35, len(fractions) - 0.65)
        axes.set_title(f"{name} {items} ({measured.patients[name]} patients)", fontsize=10, color=INK, loc="left")
        axes.set_xlabel(f"real patients to train on (and real {items})", fontsize=9, color=INK)
    panels[0].set_ylabel(measure.name, fontsize=9, color=INK)
    panels[-1].legend(frameon=False, fontsize=8.5, loc="best")
    return svg(figure, f"{measure.name} over the fraction of real patients, one line per arm")


def _line(axes: Axes, places: list[int], found: list[Spread], look: tuple[str, str], arm: str, number: int, arms: int) -> None:
    colour, mark = look
    x = np.array(places) + 0.05 * (number - (arms - 1) / 2)  # side by side, so that intervals can be told apart
    value, low, high = (np.array([getattr(one, key) for one in found]) for key in ("value", "low", "high"))
    axes.plot(x, value, color=colour, linewidth=2 if arm == "real" else 1.6, marker=mark, markersize=5.5, label=arm, zorder=3)
    axes.fill_between(x, low, high, color=colour, alpha=0.1, linewidth=0)
    axes.vlines(x, low, high, color=colour, linewidth=1.4, alpha=0.6)
    for place, one in zip(x, found, strict=True):
        axes.scatter([place] * len(one.by_seed), one.by_seed, s=7, color=colour, alpha=0.55, linewidths=0, zorder=2)


def differences(rows: Sequence[tuple[str, Spread, str]], label: str, scale: float = 100, margin: float | None = None) -> str:
    """One line per comparison, in points (`scale` make one), with its interval; 0 dashed, ± `margin` points grey."""
    figure = Figure(figsize=(8.6, 0.3 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6eaee", linewidth=0.8)
    if margin is not None:
        axes.axvspan(-margin, margin, color="#eef3f0", linewidth=0, zorder=0)
    axes.axvline(0, color=QUIET, linewidth=0.9, linestyle=(0, (3, 3)))
    for place, (_, one, colour) in enumerate(reversed(rows)):
        if np.isfinite(one.low):
            axes.plot(
                [scale * one.low, scale * one.high], [place] * 2, color=colour, linewidth=2.2, alpha=0.6, solid_capstyle="round"
            )
        if np.isfinite(one.value):
            axes.plot(scale * one.value, place, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(label, fontsize=9, color=INK)
    return svg(figure, label)


def reliability(measured: Measured, fraction: float) -> str:
    """Observed share against predicted probability of every arm at `fraction`, findings pooled, mean over seeds; one panel per set."""
    experiment = measured.experiment
    arms = [arm for arm in experiment.arms if experiment.of(arm, fraction)]
    figure = Figure(figsize=(4.3 * len(experiment.sets), 3.9), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(experiment.sets))), experiment.sets, strict=True):
        _plain(axes)
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.9, linestyle=(0, (3, 3)))
        films = experiment.films[name]
        for arm in arms:
            found = [
                calibration(films.truth[films.known], run.scores[name][films.known], np.ones((1, int(films.known.sum()))))
                for run in experiment.of(arm, fraction).values()
            ]
            enough = np.mean([total[0] for total, *_ in found], axis=0) >= 20
            with np.errstate(invalid="ignore"):
                x, y = (np.nanmean([one[k][0] for one in found], axis=0)[enough] for k in (1, 2))
            error = np.mean([np.nansum(t[0] * np.abs(p[0] - o[0])) / t[0].sum() for t, p, o in found])
            colour, mark = style(arm, experiment.arms)
            axes.plot(x, y, color=colour, marker=mark, markersize=5, linewidth=1.5, label=f"{arm} (error {error:.3f})")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_title(f"{name} films", fontsize=10, color=INK, loc="left")
        axes.set_xlabel("predicted probability", fontsize=9, color=INK)
        axes.set_ylabel("share that has the finding", fontsize=9, color=INK)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return svg(figure, f"Calibration of every arm at {100 * fraction:g} % of the real patients")


def agreement(measured: Measured, fraction: float) -> str:
    """Read minus true against true of every arm at `fraction` (Bland & Altman), all seeds; bias solid, limits of agreement dashed."""
    experiment = measured.experiment
    arms = [arm for arm in experiment.arms if experiment.of(arm, fraction)]
    figure = Figure(figsize=(2.9 * len(arms) + 0.6, 3.2 * len(experiment.sets)), layout="constrained")
    panels = figure.subplots(len(experiment.sets), len(arms), sharex=True, sharey=True, squeeze=False)
    for row, name in zip(panels, experiment.sets, strict=True):
        truth = experiment.films[name].truth[:, 0]
        for axes, arm in zip(row, arms, strict=True):
            _plain(axes)
            colour, _ = style(arm, experiment.arms)
            for run in experiment.of(arm, fraction).values():
                axes.scatter(truth, run.scores[name][:, 0] - truth, s=6, color=colour, alpha=0.35, linewidths=0)
            for key, dash in (("bias", "-"), ("lower", "--"), ("upper", "--")):
                value = measured.estimate(arm, fraction, name, key).value
                axes.axhline(value, color=INK, linewidth=1.1, linestyle=dash)
                axes.annotate(f"{value:+.1f}", (1, value), xycoords=("axes fraction", "data"), fontsize=8, color=INK, va="bottom",
                              ha="right")  # fmt: skip
            axes.set_title(f"{arm}, {name}", fontsize=10, color=INK, loc="left")
        row[0].set_ylabel("read − true, points", fontsize=9, color=INK)
    for axes in panels[-1]:
        axes.set_xlabel("true ejection fraction, %", fontsize=9, color=INK)
    return svg(figure, f"Read minus true ejection fraction of every arm at {100 * fraction:g} % of the real patients")


def missed(found: Gaps, arms: Sequence[str], shown: Sequence[str], outcome: Outcome) -> str:
    """False-negative rate (or error) of every group, one mark per arm of `shown`, with intervals."""
    rows, scale = [*found.groups], outcome.scale
    asked, label = ("findings", "findings missed, % (at the validation threshold)")
    if outcome is EJECTION_FRACTION:
        asked, label = outcome.items, "mean absolute error, points of ejection fraction"
    figure = Figure(figsize=(8.6, 0.36 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6eaee", linewidth=0.8)
    for number, arm in enumerate(shown):
        colour, mark = style(arm, arms)
        for place, group in enumerate(reversed(rows)):
            one, y = group.rates[arm], place - 0.2 * (number - (len(shown) - 1) / 2)
            if np.isfinite(one.low):
                axes.plot(
                    [scale * one.low, scale * one.high], [y, y], color=colour, linewidth=1.8, alpha=0.55, solid_capstyle="round"
                )
            axes.plot(scale * one.value, y, mark, color=colour, markersize=5, label=arm if place == 0 else None)
    axes.set_yticks(range(len(rows)), [f"{g.name}  ({g.patients} patients, {g.asked} {asked})" for g in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(0, None)
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8.5, loc="best")
    return svg(figure, f"{label}, by group, {found.set} {outcome.items}")
