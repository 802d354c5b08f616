"""The progression report's plots, as SVG in the style of the other reports: fans over time, calibration, directions, drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medgen.data.visit_records import BIOMARKERS
from medgen.evaluation.plots import GENERATED, INK, QUIET, REAL, svg, words
from medgen.evaluation.progression.bands import Bands
from medgen.evaluation.progression.calibration import band
from medgen.evaluation.progression.collect import Real, Sampled
from medgen.evaluation.statistics import Floats

ACCENT = "#d1660f"


def named(biomarker: str) -> str:
    """ "pleural_effusion_ml" as a reader says it: "pleural effusion (mL)"."""
    unit = BIOMARKERS.get(biomarker, "")
    stem = biomarker.removesuffix("_ml").removesuffix("_mm3")
    return words(stem) + (f" ({unit})" if unit else "")


def fan_plot(case: Sampled, real: Real, name: str) -> str:
    """One patient's biomarker over time: past and true visits, median and 50/80 % bands of the futures, treatments."""
    figure = Figure(figsize=(7.0, 2.3), layout="constrained")
    axes = figure.subplots()
    known, times = real.known, np.array(real.times)
    start, values = times[known - 1], real.readings[name]
    x = np.array([start, *case.times])
    draws = case.readings[name].T  # [T,n]
    for level, alpha in ((0.8, 0.18), (0.5, 0.3)):
        low, high = band(draws, level)
        below, above = (np.concatenate([values[known - 1 : known], edge]) for edge in (low, high))
        axes.fill_between(x, below, above, color=GENERATED, alpha=alpha, linewidth=0, label=f"{100 * level:.0f} % of the futures")
    axes.plot(x, np.concatenate([values[known - 1 : known], case.middle(name)]), color=GENERATED, linewidth=1.4, label="median")
    _simulated(axes, real, name)
    axes.plot(times[:known], values[:known], "o-", color=INK, markersize=4, linewidth=0.9, label="past, read by the judge")
    axes.plot(times[known:], values[known:], "o", color=ACCENT, markersize=5, label="what came, read by the judge")
    if np.isfinite(real.truth(name)).any():
        axes.plot(times, real.truth(name), "_", color=INK, markersize=9, markeredgewidth=1.2, label="truth")
    axes.set_xlim(max(times[0], start - 3 * (x[-1] - start)) - 0.02 * (x[-1] - start), x[-1] + 0.03 * (x[-1] - start))
    axes.axvline(start, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
    _treatments(axes, real, *axes.get_xlim())
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if "ratio" not in name else None)
    axes.set_title(named(name), fontsize=9, color=INK, loc="left")
    axes.set_xlabel({"days": "days", "order": "visit", "phase": "phase"}[real.patient.series.time_unit], fontsize=8, color=INK)
    _style(axes)
    return svg(figure)


def _simulated(axes: Axes, real: Real, name: str) -> None:
    """The 80 % band of the simulated futures, as whiskers at each later visit."""
    futures = real.patient.futures
    if futures is None or name not in futures.values:
        return
    low, high = np.quantile(futures.values[name], [0.1, 0.9], axis=0)
    axes.vlines(futures.times, low, high, color=REAL, linewidth=3, alpha=0.8, label="80 % of simulated futures", zorder=0)


def _treatments(axes: Axes, real: Real, first: float, last: float) -> None:
    """A line at every treatment; names of those that lie too close to be read apart stand together."""
    named: list[tuple[float, list[str]]] = []
    for event in real.patient.series.events:
        if not first <= event.time <= last:
            continue
        axes.axvline(event.time, color=ACCENT, linewidth=0.9, alpha=0.8)
        if named and event.time - named[-1][0] < 0.02 * (last - first):
            named[-1][1].append(event.name)
        else:
            named.append((event.time, [event.name]))
    for time, names in named:
        style: dict[str, Any] = {"fontsize": 7, "color": ACCENT, "rotation": 90, "va": "top"}
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (2, -2), "textcoords": "offset points"}
        axes.annotate(", ".join(dict.fromkeys(names)), (time, 1), **place, **style)


def fan_legend() -> str:
    """What the colours of a fan plot mean, once for all of them."""
    figure = Figure(figsize=(9.4, 0.4), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    handles = [
        axes.plot([], [], "o-", color=INK, markersize=4, linewidth=0.9)[0],
        axes.plot([], [], "o", color=ACCENT, markersize=5)[0],
        axes.plot([], [], "_", color=INK, markersize=9, markeredgewidth=1.2)[0],
        axes.plot([], [], color=GENERATED, linewidth=1.4)[0],
        axes.plot([], [], color=GENERATED, alpha=0.45, linewidth=8)[0],
        axes.plot([], [], color=GENERATED, alpha=0.18, linewidth=8)[0],
        axes.plot([], [], color=REAL, linewidth=3)[0],
        axes.plot([], [], color=ACCENT, linewidth=0.9)[0],
    ]
    labels = [
        "past (judge)",
        "what came (judge)",
        "truth",
        "median",
        "50 %",
        "80 % of the futures",
        "80 % simulated",
        "treatment",
    ]
    axes.legend(handles, labels, ncol=8, frameon=False, fontsize=8, loc="center", handlelength=1.6, columnspacing=1.2)
    return svg(figure)


def coverage_plot(bands: Mapping[str, Bands]) -> str:
    """Share covered against nominal level, one line per thing that is covered."""
    figure = Figure(figsize=(4.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=QUIET, linewidth=0.8)
    for (label, one), colour, style in zip(bands.items(), (GENERATED, ACCENT, REAL), ("o-", "s-", "^-")):
        level, share = (100 * np.array(column) for column in zip(*one.curve, strict=True))
        axes.plot(level, share, style, color=colour, markersize=4, linewidth=1.2, label=label)
    axes.set_xlabel("band of the futures (%)", fontsize=9, color=INK)
    axes.set_ylabel("share inside (%)", fontsize=9, color=INK)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    _style(axes)
    return svg(figure)


def rank_plot(counts: Sequence[int]) -> str:
    """How many of the draws lie below what came: flat if the futures are as wide as they should be."""
    figure = Figure(figsize=(4.2, 3.3), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(counts)), counts, color=GENERATED, alpha=0.7, width=0.85)
    axes.axhline(sum(counts) / len(counts), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xlabel("draws below what came", fontsize=9, color=INK)
    axes.set_ylabel("visits", fontsize=9, color=INK)
    _style(axes)
    return svg(figure)


def scatter_plot(wanted: Floats, measured: Floats, labels: tuple[str, str], colours: Sequence[str] | None = None) -> str:
    """Measured against wanted with the diagonal."""
    figure = Figure(figsize=(4.2, 3.3), layout="constrained")
    axes = figure.subplots()
    ends = [min(wanted.min(), measured.min()), max(wanted.max(), measured.max())]
    axes.plot(ends, ends, color=QUIET, linewidth=0.8)
    axes.axhline(0, color=QUIET, linewidth=0.6)
    axes.axvline(0, color=QUIET, linewidth=0.6)
    axes.scatter(wanted, measured, s=16, c=colours or GENERATED, alpha=0.65, linewidths=0)
    axes.set_xlabel(labels[0], fontsize=9, color=INK)
    axes.set_ylabel(labels[1], fontsize=9, color=INK)
    _style(axes)
    return svg(figure)


def drift_plot(steps: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Change (%) since the last real image over the steps of a roll-out: one panel per measure, one line per mode."""
    measures = list(next(iter(steps.values())))
    figure = Figure(figsize=(2.35 * len(measures), 2.4), layout="constrained")
    for axes, measure in zip(np.atleast_1d(figure.subplots(1, len(measures))), measures, strict=True):
        for (mode, curves), colour in zip(steps.items(), (GENERATED, ACCENT)):
            axes.plot(
                range(1, len(curves[measure]) + 1), 100 * np.array(curves[measure]), color=colour, linewidth=1.4, label=mode
            )
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.set_title(measure, fontsize=9, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=8, color=INK)
        _style(axes)
    figure.axes[0].set_ylabel("change (%)", fontsize=8, color=INK)
    figure.axes[0].legend(frameon=False, fontsize=8)
    return svg(figure)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=8)
