"""What a search found, on one page: the Pareto front beside the usual ways of fine-tuning, the chosen mask, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from medgen.config import load_config
from medgen.evaluation.plots import GENERATED, INK, QUIET, REAL, svg
from medgen.memcontrol.comparison import EQUAL, NAMES, arms, comparisons, conclusions, estimate, number
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.front import as_good_as, chosen, pareto, searched
from medgen.memcontrol.trials import Result, read_repeats, read_results, write_json

FACTS = "facts.json"
_MARKERS = {
    "start": "X",
    "full": "s",
    "lora": "D",
    "attention": "^",
    "bias": "v",
    "norm": "P",
    "random_words": "<",
    "deduplicated": ">",
}


def report(search: Path) -> Path:
    """Draw the Pareto front of a search (finished or not) with its baselines, and the chosen mask: OUT/report.html.

    Args:
        search: the folder of a search.

    Returns the page. Beside it, pareto.json holds every mask of the front.
    """
    config = load_config(MemControlConfig, search / "config.yaml")
    facts, results, repeats = json.loads((search / FACTS).read_text()), read_results(search), read_repeats(search)
    front = pareto(searched(results))
    choices = _choices(results, config)
    found = comparisons(results, repeats)
    environment = Environment(
        loader=PackageLoader("medgen.memcontrol"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": estimate, "number": number}
    page = environment.get_template("report.html.j2").render(
        config=config,
        memorisation_name=_memorisation_name(config),
        quality_name=_quality_name(config),
        facts=facts,
        names=NAMES,
        results=sorted(results, key=lambda one: one.values),
        front=[one.trial.name for one in front],
        choices=[(one, why, Markup(mask_plot(one, front, facts["layers"]))) for one, why in choices],
        finished=len(searched(results)),
        comparisons=found,
        conclusions=conclusions(results, found),
        arms=arms(repeats),
        equal=f"{EQUAL:.0%}",
        plot=Markup(front_plot(results, config)),
        layers=facts["layers"],
    )
    write_json(
        search / "pareto.json", [{**asdict(one.trial), "memorisation": one.values[0], "quality": one.values[1]} for one in front]
    )
    path = search / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page)
    temporary.replace(path)
    return path


def _choices(results: Sequence[Result], config: MemControlConfig) -> list[tuple[Result, str]]:
    """The chosen masks, each with why: one may be chosen against several baselines."""
    why: dict[str, list[str]] = {}
    found = {}
    for kind in config.confirmation.baselines:
        one = chosen(results, kind)
        if one is not None:
            found[one.trial.name] = one
            name = f"{NAMES[kind]} fine-tuning at its best rate"
            as_good = f"the least memorising mask whose quality is not worse than that of {name}"
            nearest = f"no mask reaches the quality of {name}, and of the front this one is nearest to the best of both scores"
            why.setdefault(one.trial.name, []).append(as_good if as_good_as(results, one, kind) else nearest)
    return [(one, "; ".join(why[name])) for name, one in found.items()]


def front_plot(results: Sequence[Result], config: MemControlConfig) -> str:
    """Every trial by both objectives: masks, their front, and the baselines at each of their rates, which are written beside them."""
    figure = Figure(figsize=(9.4, 5.8), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(QUIET)
    masks, front = searched(results), pareto(searched(results))
    axes.scatter(*_points(masks), s=24, color=REAL, linewidths=0, alpha=0.75, label="masks tried", zorder=2)
    if front:
        axes.step(*_points(front), where="post", color=GENERATED, linewidth=1.2, alpha=0.6, zorder=2)
        axes.scatter(*_points(front), s=42, color=GENERATED, linewidths=0, label="front of the masks", zorder=4)
    for kind, marker in _MARKERS.items():
        these = sorted((one for one in results if one.trial.kind == kind), key=lambda one: one.trial.learning_rate)
        if not these:
            continue
        axes.plot(*_points(these), color=INK, linewidth=0.7, alpha=0.35, zorder=1)
        axes.scatter(
            *_points(these), s=46, marker=marker, facecolor="white", edgecolor=INK, linewidths=1.2, label=NAMES[kind], zorder=3
        )
        for one in these:
            rate = f" {one.trial.learning_rate:.2g}" if one.trial.learning_rate else ""
            axes.annotate(NAMES[kind] + rate, one.values, (6, 5), textcoords="offset points", fontsize=7.5, color=INK)
    for one, _ in _choices(results, config):
        axes.scatter(*_points([one]), s=190, facecolor="none", edgecolor=GENERATED, linewidths=1.6, zorder=5)
        axes.annotate(
            f"chosen: {one.trial.name}",
            one.values,
            (9, -13),
            textcoords="offset points",
            fontsize=8.5,
            color=GENERATED,
            weight="bold",
        )
    # What fine-tuning gains over none at all dwarfs what the trained ones differ by.
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel(f"{_memorisation_name(config)} (less is better)", fontsize=9, color=INK)
    axes.set_ylabel(f"{_quality_name(config)} (less is better)", fontsize=9, color=INK)
    axes.tick_params(which="both", colors=INK, length=0, labelsize=9)
    axes.grid(which="both", color="#e6eaee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return svg(figure)


def _points(results: Sequence[Result]) -> tuple[list[float], list[float]]:
    return [one.values[0] for one in results], [one.values[1] for one in results]


def mask_plot(choice: Result, front: Sequence[Result], layers: Sequence[str]) -> str:
    """Blocks as columns, their attention layers as rows; the chosen mask's filled, each with how often the front opens it."""
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in layers))
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    figure = Figure(figsize=(min(1.4 + 0.62 * len(blocks), 14), 0.7 + 0.5 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    opened = set((choice.trial.adaptation.layers if choice.trial.adaptation else None) or ())
    for name in layers:
        column, row = blocks.index(name.rpartition(".")[0]), kinds.index(name.rpartition(".")[2])
        is_open = name in opened
        share = sum(name in ((one.trial.adaptation.layers if one.trial.adaptation else None) or ()) for one in front)
        axes.add_patch(_box(column, row, GENERATED if is_open else "#f1f4f7", GENERATED if is_open else "#c9d1d9"))
        axes.text(
            column, row, f"{share}/{len(front)}", ha="center", va="center", fontsize=7.5, color="white" if is_open else QUIET
        )
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_yticks(range(len(kinds)), [_LAYER_WORDS.get(kind, kind) for kind in kinds])
    axes.set_xticks(range(len(blocks)), [_short(block) for block in blocks], rotation=0 if len(blocks) < 14 else 60)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, length=0, labelsize=8.5)
    return svg(figure)


_LAYER_WORDS = {"space": "attention in space", "cross": "attention to the text", "time": "attention in time",
                "attn1": "attention in space", "attn2": "attention to the text"}  # fmt: skip


def _box(column: int, row: int, face: str, edge: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (column - 0.38, row - 0.34), 0.76, 0.68, boxstyle="round,pad=0,rounding_size=0.08", facecolor=face, edgecolor=edge
    )


def _short(block: str) -> str:
    """ "blocks.3" as "3"; a U-Net's "down_blocks.0.attentions.1.transformer_blocks.0" as "down 0.1"."""
    words = block.split(".")
    numbers = [word for word in words if word.isdigit()]
    side = words[0].partition("_")[0] if words[0] in ("down_blocks", "mid_block", "up_blocks") else ""
    return f"{side} {'.'.join(numbers[:2])}".strip()


def _quality_name(config: MemControlConfig) -> str:
    if config.quality.measure == "frechet":
        return f"Fréchet distance ({config.quality.encoder}) to validation films"
    return "denoising loss of validation films"


def _memorisation_name(config: MemControlConfig) -> str:
    if config.memorisation.measure == "loss_gap":
        return "memorisation: how much more ln(loss) fell at repeated films than at films never seen"
    return "memorisation: text-noise norm at the repeated films"
