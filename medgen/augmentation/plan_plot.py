"""A plan as a picture: what the real films show, what the synthetic ones shall show, and both together."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medgen.augmentation.target import Counts
from medgen.data.records import FINDINGS
from medgen.evaluation.plots import GENERATED, INK, QUIET, REAL, words


def draw_plan(real: Counts, planned: Counts, shares: Mapping[str, float]) -> bytes:
    """PNG of bars: share of films by finding, side, sex and age band, and view."""
    parts = {
        "finding": ([*FINDINGS, "normal", "in doubt"], _findings(real), _findings(planned)),
        "side, of the films with that finding": _shared(real.sides, planned.sides, real, planned),
        "sex and age": _shared(real.groups, planned.groups, real, planned, of_finding=False),
        "view": _shared(real.views, planned.views, real, planned, of_finding=False),
    }
    heights = [max(len(names), 2) for names, *_ in parts.values()]
    figure = Figure(figsize=(8.5, 0.34 * sum(heights) + 0.8 * len(parts)), layout="constrained")
    axes = figure.subplots(len(parts), 1, height_ratios=heights)
    for one, (title, (names, before, after)) in zip(np.atleast_1d(axes), parts.items(), strict=True):
        _bars(one, title, names, before, after, shares if title == "finding" else {})
    figure.suptitle(f"{real.films} real films, {planned.films} planned synthetic ones", fontsize=11, color=INK)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return _png(figure)


def draw_clip_plan(bands: Sequence[str], real: Sequence[int], planned: Sequence[int]) -> bytes:
    """PNG of bars: share of echo clips by ejection fraction."""
    figure = Figure(figsize=(8.5, 0.34 * len(bands) + 1.2), layout="constrained")
    axes = figure.subplots()
    before, after = ([count / sum(counts) for count in counts] for counts in (real, planned))
    _bars(axes, "ejection fraction, %", list(bands), before, after, {})
    figure.suptitle(f"{sum(real)} real clips, {sum(planned)} planned synthetic ones", fontsize=11, color=INK)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    with io.BytesIO() as stream:
        figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
        return stream.getvalue()


def _findings(counts: Counts) -> list[float]:
    return [*(counts.share(name) for name in FINDINGS), counts.normal / counts.films, counts.in_doubt / counts.films]


def _shared(
    before: Mapping[str, int], after: Mapping[str, int], real: Counts, planned: Counts, of_finding: bool = True
) -> tuple[list[str], list[float], list[float]]:
    names = sorted({*before, *after})

    def part(counts: Mapping[str, int], whole: Counts, name: str) -> float:
        total = whole.findings.get(name.partition(",")[0], 0) if of_finding else whole.films
        return counts.get(name, 0) / total if total else 0.0

    return names, [part(before, real, name) for name in names], [part(after, planned, name) for name in names]


def _bars(axes: Axes, title: str, names: list[str], before: list[float], after: list[float], target: Mapping[str, float]) -> None:
    rows = np.arange(len(names))[::-1]
    axes.barh(rows + 0.2, before, 0.36, color=REAL, label="real")
    axes.barh(rows - 0.2, after, 0.36, color=GENERATED, label="synthetic, planned")
    for row, name in zip(rows, names, strict=True):
        if name in target:
            axes.plot([target[name]] * 2, [row - 0.42, row + 0.02], color=INK, linewidth=1.5)
    if target:
        axes.plot([], [], color=INK, linewidth=1.5, label="target")
    axes.set_yticks(rows, [words(name) for name in names])
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=8)
