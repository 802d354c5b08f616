"""From an audit to one page that a data protection officer, a statistician and a radiologist can read."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from medgen.evaluation.images import ImageSet, load_square
from medgen.evaluation.memorisation import Neighbour
from medgen.evaluation.plots import GENERATED, INK, QUIET, REAL, svg
from medgen.evaluation.privacy.extraction import Extraction
from medgen.evaluation.privacy.membership import Attack, Membership
from medgen.evaluation.privacy.subjects import Subjects
from medgen.evaluation.privacy.text_noise import TextNoise
from medgen.evaluation.report import estimate, percent

FLAGGED, CLEAR, UNMEASURED = "flagged", "not flagged", "not measured"
_SHOWN = 6
SCORES = {
    "loss": "denoising loss",
    "caption": "loss without caption − loss with it",
    "reference": "loss of the reference pipeline − loss",
}


@dataclass(frozen=True)
class Row:
    """One part in the table: what was asked, what would count against the pipeline, what came out, what it cannot show."""

    part: str
    question: str
    verdict: str
    criterion: str
    measured: str
    cannot_show: str


@dataclass(frozen=True)
class Nearest:
    """The generated films nearest to training films, of each part that looked for them."""

    pairs: Mapping[str, Sequence[Neighbour]]
    generated: ImageSet
    train: ImageSet

    def pictures(self, real_images: bool) -> dict[str, list[dict[str, Any]]]:
        """Pairs to look at. Without real images none: the nearest may be copies."""
        size = self.generated.native or 128
        return {
            name: [
                {
                    "drawn": _picture(load_square(self.generated.paths[pair.generated], size)),
                    "film": _picture(load_square(self.train.paths[pair.train], size, size)),
                    "distance": pair.distance,
                }
                for pair in pairs[:_SHOWN]
            ]
            for name, pairs in self.pairs.items()
            if real_images
        }


@dataclass(frozen=True)
class _Text:
    question: str
    criterion: str
    cannot_show: str
    read: Callable[[Any], tuple[bool, str]]


def rows(results: Mapping[str, Any]) -> list[Row]:
    """The table; a result that is a sentence says why there is none."""
    table = []
    for name, result in results.items():
        text = TEXTS[name]
        if isinstance(result, str):
            verdict, measured = UNMEASURED, result
        else:
            flagged, measured = text.read(result)
            verdict = FLAGGED if flagged else CLEAR
        criterion, limits = getattr(result, "criterion", text.criterion), getattr(result, "cannot_show", text.cannot_show)
        table.append(Row(name, text.question, verdict, criterion, measured, limits))
    return table


def render(
    table: Sequence[Row],
    results: Mapping[str, Any],
    facts: Mapping[str, Any],
    train: Subjects,
    out: Path,
    nearest: Nearest | None = None,
    real_images: bool = True,
) -> str:
    """The page; without `real_images` it shows no picture at all: what was generated may be a copy."""
    environment = Environment(
        loader=PackageLoader("medgen.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": estimate, "percent": percent}
    measured = {name: result for name, result in results.items() if not isinstance(result, str)}
    return environment.get_template("privacy.html.j2").render(
        rows=table,
        flagged=[row for row in table if row.verdict == FLAGGED],
        unmeasured=[row for row in table if row.verdict == UNMEASURED],
        m=measured,
        facts=facts,
        scores=SCORES,
        roc=Markup(_roc(measured["membership"])) if "membership" in measured else "",
        strips=Markup(_membership_strip(measured["membership"].attack)) if "membership" in measured else "",
        pulls=Markup(_pull_strip(measured["text_noise"])) if "text_noise" in measured else "",
        asked=_asked(measured["extraction"], train, out, real_images) if "extraction" in measured else [],
        pairs={} if nearest is None else nearest.pictures(real_images),
        real_images=real_images,
    )


def _read_membership(result: Membership) -> tuple[bool, str]:
    attack = result.attack
    rates = [
        f"at {100 * at.false_positive_rate:.3g} % false alarms {percent(at.true_positive_rate)} of members found"
        for at in attack.at
        if at.true_positive_rate is not None
    ]
    hidden = [f"{100 * at.false_positive_rate:.3g} %" for at in attack.at if at.true_positive_rate is None]
    if hidden:
        rates.append(f"rates of {' and '.join(hidden)} not measurable with {len(attack.strangers)} strangers")
    return attack.found, f"AUC {estimate(attack.auc)} by {SCORES[attack.score]}; {'; '.join(rates)}"


def _read_text_noise(result: TextNoise) -> tuple[bool, str]:
    return result.auc.low > 0.5 or result.auc.high < 0.5, (
        f"AUC {estimate(result.auc)}; median norm {estimate(result.ratio, 2)} times the held-out captions'; "
        f"{percent(result.high)} of training captions above 99 % of held-out ones"
    )


def _read_extraction(result: Extraction) -> tuple[bool, str]:
    shown, all_of = round(result.extracted.value * result.extracted.n), result.extracted.n
    cliques = round(result.cliques.value * all_of)
    return shown > 0, (
        f"{shown} of {all_of} captions gave their training film ({percent(result.extracted)}); {cliques} gave a clique; near a film "
        f"of a stranger: {percent(result.near_strangers)}"
    )


TEXTS: Mapping[str, _Text] = {
    "membership": _Text(
        "Can someone who has a film, its report and the weights tell that the patient was in the training set?",
        "The 95 % interval of the area under the ROC curve of the decisive score lies above 0.5 (patients resampled).",
        "Stronger attacks exist (many shadow models, gradients). A model that is only queried gives less away than one whose weights are "
        "published. Nothing about patients who were not drawn.",
        _read_membership,
    ),
    "text_noise": _Text(
        "Do training captions pull the denoiser otherwise than captions it never saw?",
        "The 95 % interval of the AUC of training against held-out captions excludes 0.5 (patients resampled). Above: memorised captions "
        "pull harder (Wen et al. 2024). Below: the model knows the films without their captions too.",
        "It needs no film, so it cannot say which film was memorised, or whether one comes out. A model fine-tuned on differently worded "
        "reports may pull harder without any memory.",
        _read_text_noise,
    ),
    "extraction": _Text(
        "Does asking for a training caption again and again bring its film back?",
        "At least one caption whose generations form a clique (at least a fifth of them all near each other) around its training film, "
        "nearer to it than to any held-out film.",
        "Captions that were not asked, prompts made to extract, films that come back only in part. It looks at 32 x 32 pixels: a copy "
        "that was flipped or cropped passes.",
        _read_extraction,
    ),
    "copying": _Text(
        "Are generated films copies of training films?",
        "More than half of the generated films lie nearer to a training film than to any of as many held-out films.",
        "Copies of a part of a film.",
        lambda result: (result.flagged, result.measured),
    ),
    "re_identification": _Text(
        "Would a network that knows patients again meet training patients in generated films?",
        "More generated films match a training patient than a held-out patient.",
        "Patients whom this network would not know again, and any other network would.",
        lambda result: (result.flagged, result.measured),
    ),
}


def _asked(result: Extraction, train: Subjects, out: Path, real_images: bool) -> list[dict[str, Any]]:
    """Captions with what came of them, nearest first."""
    row_of = {record.record_id: row for row, record in enumerate(train.records)}
    size = train.films.preprocessing.size
    shown = []
    for asked in sorted(result.asked, key=lambda one: (not one.extracted, one.nearest))[:_SHOWN]:
        film = _picture(train.images([row_of[asked.record_id]])[0]) if real_images else None
        drawn = [] if not real_images else [_picture(load_square(out / "extraction" / name, size)) for name in asked.files]
        shown.append({"asked": asked, "film": film, "drawn": drawn})
    return shown


def _picture(image: Tensor) -> str:
    """A film [1,H,W] in [-1,1] as a data URI."""
    grey = ((image[0].clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    content = io.BytesIO()
    Image.fromarray(grey).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    return figure, axes


def _roc(result: Membership) -> str:
    """Members found over false alarms, of every score."""
    figure, axes = _axes(4.6, 4.0)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=":")
    for attack in result.attacks:
        members, strangers = np.array(attack.members), np.array(attack.strangers)
        cuts = np.concatenate([[np.inf], np.sort(np.concatenate([members, strangers]))[::-1]])
        found, false = ((side[None] >= cuts[:, None]).mean(1) for side in (members, strangers))
        decisive = attack.score == result.decisive
        axes.step(
            false, found, where="post", label=SCORES[attack.score] + (" (decisive)" if decisive else ""),
            color=GENERATED if decisive else REAL, linewidth=2.2 if decisive else 1.4, linestyle="-" if attack.score != "caption" else "--",
        )  # fmt: skip
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    axes.set_xlabel("strangers taken for members", fontsize=9, color=INK)
    axes.set_ylabel("members found", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return svg(figure)


def _membership_strip(attack: Attack) -> str:
    return _strip(
        {"training patients": attack.members, "held-out patients": attack.strangers},
        f"score of a patient: {SCORES[attack.score]}",
    )


def _pull_strip(result: TextNoise) -> str:
    return _strip(
        {"training captions": result.train, "held-out captions": result.heldout}, "difference that the caption makes to ε"
    )


def _strip(values: Mapping[str, Sequence[float]], label: str) -> str:
    """One dot a patient or caption, on one line a side."""
    figure, axes = _axes(6.2, 2.0)
    spread = np.random.default_rng(0)
    for row, (colour, (_, side)) in enumerate(zip((GENERATED, REAL), values.items(), strict=True)):
        axes.plot(
            side, -row + spread.uniform(-0.22, 0.22, len(side)), "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0
        )
        axes.plot([np.median(side)] * 2, [-row - 0.32, -row + 0.32], color=INK, linewidth=1.5)
    axes.set_yticks([0, -1], list(values))
    axes.set_xlabel(label, fontsize=9, color=INK)
    return svg(figure)
