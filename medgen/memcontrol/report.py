"""What a search found, on one page: the Pareto front beside the usual ways of fine-tuning, the chosen mask, and how sure that is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from medgen.config import load_config
from medgen.evaluation.plots import GENERATED, INK, QUIET, REAL, svg
from medgen.evaluation.statistics import Estimate, group_bootstrap
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.front import as_good_as_full, best_of, chosen, pareto, searched, worth_confirming
from medgen.memcontrol.trials import Result, read_results, write_json

FACTS = "facts.json"
NAMES = {
    "start": "no fine-tuning",
    "full": "full",
    "lora": "LoRA",
    "attention": "attention only",
    "bias": "biases",
    "norm": "norms",
    "random_words": "full + random words",
    "deduplicated": "full + duplicates removed",
    "search": "chosen mask",
}
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


@dataclass(frozen=True)
class Difference:
    """The chosen mask minus a baseline at its best rate, on films and noises that chose neither; negative is better."""

    baseline: str
    memorisation: Estimate
    validation_loss: Estimate
    frechet: float | None


def report(search: Path) -> Path:
    """Draw the Pareto front of a search (finished or not) with its baselines, and the chosen mask: OUT/report.html.

    Args:
        search: the folder of a search.

    Returns the page. Beside it, pareto.json holds every mask of the front.
    """
    config = load_config(MemControlConfig, search / "config.yaml")
    facts, results = json.loads((search / FACTS).read_text()), read_results(search)
    front, choice = pareto(searched(results)), chosen(results)
    found = differences(results, facts)
    environment = Environment(
        loader=PackageLoader("medgen.memcontrol"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": _estimate, "number": _number}
    page = environment.get_template("report.html.j2").render(
        config=config,
        quality_name=_quality_name(config),
        facts=facts,
        names=NAMES,
        results=sorted(results, key=lambda one: one.values),
        front=[one.trial.name for one in front],
        choice=choice,
        finished=len(searched(results)),
        as_good=as_good_as_full(results, choice),
        differences=found,
        conclusions=conclusions(results, found),
        compared=[one for one in worth_confirming(results) if one.confirmed is not None],
        plot=Markup(front_plot(results, config)),
        mask=Markup(mask_plot(choice, front, facts["layers"])) if choice is not None else "",
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


def differences(results: Sequence[Result], facts: dict[str, Any]) -> list[Difference]:
    """Of the chosen mask to the start and every baseline, paired by film, with intervals over patients."""
    choice = chosen(results)
    if choice is None or choice.confirmed is None:
        return []
    found, ours = [], choice.confirmed
    for kind in dict.fromkeys(one.trial.kind for one in results if one.trial.kind != "search"):
        other = best_of(results, kind)
        if other is None or other.confirmed is None:
            continue
        theirs = other.confirmed
        found.append(
            Difference(
                kind,
                _paired(ours.norms, theirs.norms, facts["seen"]),
                _paired(ours.loss_validation, theirs.loss_validation, facts["confirmation"]),
                None if ours.frechet is None or theirs.frechet is None else ours.frechet - theirs.frechet,
            )
        )
    return found


def _paired(ours: list[float], theirs: list[float], patients: Sequence[str]) -> Estimate:
    gap = np.array(ours) - np.array(theirs)
    return group_bootstrap(lambda rows: np.array([gap[rows].mean()]), patients, seed=0)[0]


def conclusions(results: Sequence[Result], found: Sequence[Difference]) -> list[tuple[str, str]]:
    """Sentences with their state: "shown", "open" or "warning"."""
    said = [_against(one) for one in found if one.baseline in ("full", "lora")]
    masks = searched(results)
    others = [one for one in results if one.trial.kind not in ("search", "start")]
    beaten = [one for one in others if any(all(a < b for a, b in zip(mask.values, one.values)) for mask in masks)]
    if masks and others:
        text = f"By the search's own scores {len(beaten)} of {len(others)} baseline points lose to a mask in both objectives at once."
        said.append(("open", text))
    start, choice = best_of(results, "start"), chosen(results)
    if start is not None and choice is not None and choice.scores.quality >= start.scores.quality:
        text = "No fine-tuning at all is at least as good as the chosen mask: nothing was gained that memorising could be the price of."
        said.append(("warning", text))
    if choice is not None and choice.confirmed is not None and choice.confirmed.membership > 0.6:
        share = f"{choice.confirmed.membership:.2f}"
        text = f"The chosen mask still remembers: its losses tell repeated films from films never seen with an AUC of {share}."
        said.append(("warning", text))
    return said


def _against(one: Difference) -> tuple[str, str]:
    """Whether less memorisation at no worse quality is shown against this baseline: both ends of both intervals must say so."""
    less, loss = _estimate(one.memorisation, sign=True), _estimate(one.validation_loss, sign=True)
    name = f"{NAMES[one.baseline]} fine-tuning at its best rate"
    if one.memorisation.high >= 0:
        return "open", f"That the chosen mask memorises less than {name} is not shown ({less}; validation loss {loss})."
    if one.validation_loss.low > 0:
        return "open", f"The chosen mask memorises less than {name} ({less}), but it loses quality: validation loss {loss}."
    better = "and its validation loss is lower" if one.validation_loss.high < 0 else "and no loss of quality is seen"
    return "shown", f"The chosen mask memorises less than {name} ({less}), {better}: validation loss {loss}."


def front_plot(results: Sequence[Result], config: MemControlConfig) -> str:
    """Every trial by both objectives: masks, their front, and the baselines at each of their rates."""
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(QUIET)
    masks, front, choice = searched(results), pareto(searched(results)), chosen(results)
    axes.scatter(*_points(masks), s=22, color=REAL, linewidths=0, alpha=0.75, label="masks tried", zorder=2)
    if front:
        axes.step(*_points(front), where="post", color=GENERATED, linewidth=1.2, alpha=0.6, zorder=2)
        axes.scatter(*_points(front), s=42, color=GENERATED, linewidths=0, label="front of the masks", zorder=4)
    for kind, marker in _MARKERS.items():
        these = [one for one in results if one.trial.kind == kind]
        if not these:
            continue
        axes.plot(
            *_points(sorted(these, key=lambda one: one.trial.learning_rate)), color=INK, linewidth=0.7, alpha=0.35, zorder=1
        )
        axes.scatter(
            *_points(these), s=46, marker=marker, facecolor="white", edgecolor=INK, linewidths=1.2, label=NAMES[kind], zorder=3
        )
    if choice is not None:
        axes.scatter(*_points([choice]), s=190, facecolor="none", edgecolor=GENERATED, linewidths=1.6, label="chosen", zorder=5)
    axes.set_xlabel("memorisation: text-noise norm at the repeated films (less is better)", fontsize=9, color=INK)
    axes.set_ylabel(f"{_quality_name(config)} (less is better)", fontsize=9, color=INK)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.grid(color="#e6eaee", linewidth=0.8)
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


def _estimate(value: Estimate, digits: int = 4, sign: bool = False) -> str:
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    ends = f" [{form.format(value.low)}, {form.format(value.high)}]" if math.isfinite(value.low) else ""
    return (form.format(value.value) + ends).replace("-", "−")


def _number(value: float | None, digits: int = 4) -> str:
    return "not measured" if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")
