"""The echo report's plots, as SVG in the style of the other reports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medgen.evaluation.echo.agreement import Agreement
from medgen.evaluation.echo.phase import smooth_volume, timing_errors
from medgen.evaluation.echo.videos import Clip
from medgen.evaluation.plots import GENERATED, INK, QUIET, REAL, svg
from medgen.evaluation.statistics import Floats

ACCENT = "#d1660f"


def volume_plot(clips: Sequence[Clip], columns: int = 3) -> str:
    """Volume curve of each clip (percent of its largest), ED and ES found by the judge, R peaks and T ends of the ECG given."""
    rows = -(-len(clips) // columns)
    figure = Figure(figsize=(9.6, 1.75 * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, clip in zip(grid.flat, clips, strict=False):
        reading = clip.reading
        scale = 100 / np.nanmax(reading.volume)
        axes.plot(reading.times, reading.volume * scale, ".", color=GENERATED, markersize=3, alpha=0.6)
        axes.plot(reading.times, smooth_volume(reading.volume, reading.times) * scale, color=GENERATED, linewidth=1.3)
        axes.plot(reading.beats.ed, reading.beats.edv * scale, "^", color=INK, markersize=5)
        axes.plot(reading.beats.es, reading.beats.esv * scale, "v", color=INK, markersize=5)
        for events, colour, style in ((clip.r_peaks, ACCENT, "-"), (clip.t_ends, ACCENT, (0, (2, 2)))):
            for t in events[(events >= 0) & (events <= reading.duration)]:
                axes.axvline(t, color=colour, linewidth=1, linestyle=style, zorder=0)
        axes.set_title(clip.name, fontsize=8, color=INK, loc="left")
        _style(axes)
    for axes in grid.flat[len(clips) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("s", fontsize=8, color=INK)
    return svg(figure)


def agreement_plot(wanted: Floats, measured: Floats, result: Agreement, unit: str, labels: tuple[str, str]) -> str:
    """Scatter of measured against wanted, and Bland-Altman: their difference against their mean, with bias and limits."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    known = np.isfinite(wanted) & np.isfinite(measured)
    x, y = wanted[known], measured[known]
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    left.plot(ends, ends, color=QUIET, linewidth=0.8)
    left.plot(x, y, "o", color=GENERATED, markersize=3.5, alpha=0.6, markeredgewidth=0)
    left.set_xlabel(f"{labels[0]} ({unit})", fontsize=9, color=INK)
    left.set_ylabel(f"{labels[1]} ({unit})", fontsize=9, color=INK)
    right.plot((x + y) / 2, y - x, "o", color=GENERATED, markersize=3.5, alpha=0.6, markeredgewidth=0)
    for level, style in ((result.bias.value, "-"), (result.low_limit, (0, (4, 3))), (result.high_limit, (0, (4, 3)))):
        right.axhline(level, color=INK, linewidth=0.9, linestyle=style)
    right.set_xlabel(f"mean of both ({unit})", fontsize=9, color=INK)
    right.set_ylabel(f"difference ({unit})", fontsize=9, color=INK)
    for axes in (left, right):
        _style(axes)
    return svg(figure)


def error_plot(generated: Sequence[Clip], real: Sequence[Clip]) -> str:
    """Histograms of ED and ES errors in ms, generated over real."""
    figure = Figure(figsize=(8.4, 2.3), layout="constrained")
    bins = np.linspace(-200, 200, 41)
    for axes, kind in zip(figure.subplots(1, 2), ("ed", "es"), strict=True):
        for clips, colour, label in ((real, REAL, "real"), (generated, GENERATED, "generated")):
            errors = [_errors(clip, kind) for clip in clips]
            pooled = 1000 * np.concatenate(errors) if errors else np.empty(0)
            pooled = pooled[np.isfinite(pooled)]
            if len(pooled):
                weights = np.full(len(pooled), 100 / len(pooled))
                axes.hist(pooled.clip(-199, 199), bins, weights=weights, color=colour, alpha=0.6, label=label)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(f"{kind.upper()} after {'R peak' if kind == 'ed' else 'T end'} (ms)", fontsize=9, color=INK)
        axes.set_ylabel("% of beats", fontsize=9, color=INK)
        _style(axes)
        axes.legend(frameon=False, fontsize=8)
    return svg(figure)


def _errors(clip: Clip, kind: str) -> Floats:
    if kind == "ed":
        return timing_errors(clip.reading.beats.ed, clip.r_peaks, clip.reading.duration, "ed")
    return timing_errors(clip.reading.beats.es, clip.t_ends, clip.reading.duration, "es")


def points_plot(points: Sequence[tuple[float, float]], labels: tuple[str, str]) -> str:
    """Scatter of pairs in seconds, as ms, with the diagonal of perfect agreement."""
    x, y = (1000 * np.array(column) for column in zip(*points, strict=True))
    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    axes = figure.subplots()
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    axes.plot(ends, ends, color=QUIET, linewidth=0.8)
    axes.plot(x, y, "o", color=GENERATED, markersize=3.5, alpha=0.55, markeredgewidth=0)
    axes.set_xlabel(f"{labels[0]} (ms)", fontsize=9, color=INK)
    axes.set_ylabel(f"{labels[1]} (ms)", fontsize=9, color=INK)
    _style(axes)
    return svg(figure)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=8)
