"""The study report's plots, as SVG whose lettering takes the page's own font. (Not `evaluation.plots`: that imports torch.)"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medgen.evaluation.statistics import Estimate
from medgen.study.measures import Detecting, Rating, Scoring, Trend

INK, QUIET, SIGNAL, NOISE, BAND = "#1c2733", "#8a96a3", "#1f6feb", "#9aa5b1", "#e9f3ec"


def svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element with a text alternative, reproducible (no date, fixed ids)."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "medgen"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    body = text.getvalue().partition("<svg")[2]
    return f'<svg role="img" aria-label="{label}"{body}'


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.set_axisbelow(True)
    return figure, axes


def _intervals(axes: Axes, rows: Sequence[tuple[str, Estimate, str]]) -> None:
    """One line per row, the first on top; a row without an interval is a point."""
    for place, (_, one, colour) in enumerate(reversed(rows)):
        if not np.isfinite(one.value):
            continue
        ends = [one.low, one.high] if np.isfinite(one.low) else [one.value] * 2
        axes.plot(ends, [place] * 2, color=colour, linewidth=2, alpha=0.55, solid_capstyle="round", clip_on=True)
        axes.plot(one.value, place, "o", color=colour, markersize=6)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", color="#e6eaee", linewidth=0.8)


def accuracy_plot(found: Detecting, margin: float) -> str:
    """Share of right answers: every reader (Wilson), then the mean over readers, and over readers and cases."""
    rows = [(row.reader, row.accuracy.estimate, NOISE) for row in found.readers]
    rows.append(("mean, other readers", found.accuracy.interval(), SIGNAL))
    if found.accuracy_mrmc is not None:
        rows.append(("mean, other readers and cases", found.accuracy_mrmc.interval(), SIGNAL))
    figure, axes = _axes(6.4, 0.26 * len(rows) + 0.8)
    axes.axvspan(found.chance - margin, found.chance + margin, color=BAND, linewidth=0)
    axes.axvline(found.chance, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
    _intervals(axes, rows)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of right answers (green: chance ± margin)", fontsize=9, color=INK)
    return svg(figure, "Share of right answers per reader with 95 % intervals")


def roc_plot(found: Detecting) -> str:
    """Empirical ROC of every reader."""
    figure, axes = _axes(3.5, 3.5)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
    for alarms, hits in found.curves.values():
        axes.plot(alarms, hits, color=SIGNAL, linewidth=1.2, alpha=max(0.25, 1 / max(len(found.curves), 1) ** 0.5))
    axes.set_aspect("equal")
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_xlabel(f"not “{found.signal}”, but said so", fontsize=9, color=INK)
    axes.set_ylabel(f"“{found.signal}”, and said so", fontsize=9, color=INK)
    mean = found.auc.interval()
    if np.isfinite(mean.value):
        axes.set_title(f"ROC of each reader; mean AUC {mean.value:.2f}", fontsize=9, color=INK, loc="left")
    return svg(figure, "ROC curves of the readers")


def sensitivity_plot(found: Detecting) -> str:
    """d′ against criterion, each reader with both intervals."""
    figure, axes = _axes(3.5, 3.5)
    axes.axhline(0, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.axvline(0, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
    for row in found.readers:
        d, c = row.detection.d_prime, row.detection.criterion
        if np.isfinite(d.value):
            axes.plot([c.low, c.high], [d.value] * 2, color=SIGNAL, alpha=0.3, linewidth=1.2)
            axes.plot([c.value] * 2, [d.low, d.high], color=SIGNAL, alpha=0.3, linewidth=1.2)
            axes.plot(c.value, d.value, "o", color=SIGNAL, markersize=5)
    axes.set_xlabel(f"criterion c  (right: says “{found.signal}” rarely)", fontsize=9, color=INK)
    axes.set_ylabel("sensitivity d′  (0: cannot tell)", fontsize=9, color=INK)
    axes.set_title("Sensitivity and bias of each reader", fontsize=9, color=INK, loc="left")
    return svg(figure, "Sensitivity and criterion of each reader")


def confidence_plot(found: Detecting) -> str:
    """How sure readers were, for signal cases and the others."""
    figure, axes = _axes(3.9, 3.5)
    for name, colour, label in (("signal", SIGNAL, f"truly “{found.signal}”"), ("noise", NOISE, "the others")):
        counts, edges = found.confidences[name]
        levels = (edges[1:] + edges[:-1]) / 2
        used = (levels != 0) | (counts > 0)  # nobody is sure at level 0 on a scale that begins at 1
        places, shares = np.arange(used.sum()), counts[used] / max(counts.sum(), 1)
        axes.bar(places, shares, width=0.9, color=colour, alpha=0.35, label=label)
        axes.set_xticks(places, [f"{abs(level):g}" for level in levels[used]])
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlabel(f"← sure not        sure “{found.signal}” →", fontsize=9, color=INK)
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=8.5, loc="upper center", ncols=2)
    axes.set_title("Confidence, all readers", fontsize=9, color=INK, loc="left")
    return svg(figure, "Histogram of confidence for both kinds of case")


def interval_plot(values: Mapping[str, Estimate], label: str, width: float = 6.4, reference: float | None = None) -> str:
    """Named values with intervals."""
    rows = [(name, value, SIGNAL) for name, value in values.items() if np.isfinite(value.value)]
    figure, axes = _axes(width, 0.28 * max(len(rows), 1) + 0.8)
    if reference is not None:
        axes.axvline(reference, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
    _intervals(axes, rows)
    axes.set_xlabel(label, fontsize=9, color=INK)
    return svg(figure, label)


def trend_plot(trend: Trend, label: str) -> str:
    """Fifths of the reading, mean over readers."""
    figure, axes = _axes(3.5, 2.5)
    x = np.arange(1, 6)
    values = np.array([(one.value, one.low, one.high) for one in trend.fifths])
    axes.errorbar(
        x,
        values[:, 0],
        np.nan_to_num(np.abs(values[:, 1:] - values[:, :1])).T,
        fmt="o-",
        color=SIGNAL,
        elinewidth=1.2,
        linewidth=1.2,
    )
    axes.set_xticks(x, ["first\nfifth", "2", "3", "4", "last\nfifth"])
    axes.grid(axis="y", color="#e6eaee", linewidth=0.8)
    axes.set_title(f"{label} over the reading", fontsize=9, color=INK, loc="left")
    return svg(figure, f"{label} by fifths of the reading order")


def time_plot(seconds: Mapping[str, float]) -> str:
    """Median seconds a case of every reader."""
    figure, axes = _axes(3.5, 0.2 * len(seconds) + 0.9)
    names = list(seconds)
    axes.barh(range(len(names)), [seconds[name] for name in reversed(names)], color=NOISE, height=0.6)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("seconds a case (median)", fontsize=9, color=INK)
    return svg(figure, "Median seconds a case of every reader")


def rating_plot(found: Rating) -> str:
    """Shares of each rating by arm, as stacked bars."""
    scale = np.arange(found.low, found.high + 1)
    colours = matplotlib.colormaps["BrBG"](np.linspace(0.12, 0.88, len(scale)))
    figure, axes = _axes(6.4, 0.42 * len(found.counts) + 1.0)
    for place, counts in enumerate(reversed(list(found.counts.values()))):
        left = 0.0
        for step, count, colour in zip(scale, counts, colours, strict=True):
            width = count / max(sum(counts), 1)
            axes.barh(place, width, left=left, color=colour, height=0.62)
            if width > 0.06:
                dark = found.low < step < found.high  # the outermost steps are the darkest colours
                axes.text(
                    left + width / 2,
                    place,
                    f"{100 * width:.0f} %",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=INK if dark else "white",
                )
            left += width
    axes.set_yticks(range(len(found.counts)), list(reversed(list(found.counts))))
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    handles = [matplotlib.patches.Patch(color=colour) for colour in colours]
    axes.legend(
        handles,
        [f"{step:g}" for step in scale],
        ncols=len(scale),
        frameon=False,
        fontsize=8.5,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
    )
    return svg(figure, "Ratings by arm")


def scoring_plot(found: Scoring) -> str:
    """Means by arm, over readers."""
    return interval_plot(
        {arm: mean.interval() for arm, mean in found.arms.items()}, f"{found.unit}, mean over readers", width=4.6
    )
