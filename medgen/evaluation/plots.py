"""The report's plots, as SVG text whose lettering takes the page's own font."""

from __future__ import annotations

import io

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medgen.evaluation.alignment import FindingAUROC
from medgen.evaluation.features import Features
from medgen.evaluation.fidelity import Fidelity
from medgen.evaluation.statistics import Estimate, Gaussian
from medgen.models.classifier import SIDED_FINDINGS

INK, QUIET, GENERATED, REAL = "#1c2733", "#8a96a3", "#1f6feb", "#9aa5b1"


def words(name: str) -> str:
    """ "pleural_effusion_left" as a reader says it: "pleural effusion, left"."""
    finding, _, side = name.rpartition("_")
    return (
        f"{finding.replace('_', ' ')}, {side}"
        if finding in SIDED_FINDINGS and side in ("left", "right")
        else name.replace("_", " ")
    )


def svg(figure: Figure) -> str:
    """The figure as an <svg> element, reproducible (no date, fixed ids)."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "medgen"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    return figure, axes


def _bars(axes: Axes, position: float, estimate: Estimate, colour: str, size: float = 7) -> None:
    ends = [estimate.low, estimate.high] if np.isfinite(estimate.low) else [estimate.value] * 2
    axes.plot(ends, [position] * 2, color=colour, linewidth=2, solid_capstyle="round", alpha=0.55)
    axes.plot(estimate.value, position, "o", color=colour, markersize=size)


def auroc_plot(findings: FindingAUROC, ceiling: FindingAUROC | None) -> str:
    """AUROC of every output of the judge on generated images, above what the same judge reaches on real ones."""
    shown = [output for output in findings.outputs if output.auroc is not None]
    figure, axes = _axes(7.4, 0.34 * len(shown) + 0.8)
    real = {output.name: output.auroc for output in ceiling.outputs} if ceiling else {}
    lowest = 0.5
    for row, output in enumerate(reversed(shown)):
        assert output.auroc is not None
        if (held := real.get(output.name)) is not None:
            _bars(axes, row - 0.16, held, REAL, 5)
            lowest = min(lowest, held.value)
        _bars(axes, row + 0.12, output.auroc, GENERATED)
        lowest = min(lowest, output.auroc.value)
    axes.set_yticks(range(len(shown)), [words(output.name) for output in reversed(shown)])
    axes.axvline(0.5, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.set_xlim(max(lowest - 0.04, 0), 1.01)
    axes.set_xlabel("AUROC (0.5: chance, 1: always right)", color=INK, fontsize=9)
    axes.grid(axis="x", color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    return svg(figure)


def floor_plot(fidelity: Fidelity) -> str:
    """Fréchet distance of generated images beside that of other real patients, with intervals."""
    comparison = fidelity.metrics["frechet"]
    figure, axes = _axes(7.4, 1.35)
    _bars(axes, 1, comparison.floor, REAL)
    _bars(axes, 0, comparison.value, GENERATED)
    axes.set_yticks([0, 1], ["generated vs real", "real vs real (the floor)"])
    axes.set_ylim(-0.6, 1.6)
    axes.set_xlim(0, None)
    axes.set_xlabel(f"Fréchet distance in {fidelity.encoder} features", color=INK, fontsize=9)
    axes.grid(axis="x", color="#e6eaee", linewidth=0.8)
    return svg(figure)


def population_plot(real: Features, fake: Features, largest: int = 1500) -> str:
    """Both populations on the two directions in which real images differ most (principal components)."""
    gaussian = Gaussian.of(real)
    directions = np.linalg.eigh(gaussian.covariance)[1][:, -2:][:, ::-1]
    figure, axes = _axes(4.6, 4.0)
    for values, colour, label in ((real, REAL, "real"), (fake, GENERATED, "generated")):
        step = max(len(values) // largest, 1)
        points = (np.asarray(values[::step], dtype=np.float64) - gaussian.mean) @ directions
        axes.scatter(points[:, 0], points[:, 1], s=9, color=colour, alpha=0.5, linewidths=0, label=label)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("first principal component of the real images", color=INK, fontsize=9)
    axes.set_ylabel("second", color=INK, fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="upper right", handletextpad=0.1)
    return svg(figure)
