"""From an analysis to one self-contained HTML page: conclusions in plain words first, then what they rest on.

Sentences of sameness come from the equivalence test alone; where it shows nothing, the page says that nothing is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medgen.evaluation.statistics import Estimate
from medgen.study import plots
from medgen.study.analyze import Analysis
from medgen.study.measures import Detecting, Rating, Scoring
from medgen.study.sections import Section
from medgen.study.statistics.equivalence import Equivalence, Verdict
from medgen.study.statistics.likert import OrdinalFit
from medgen.study.statistics.proportions import Mean

TASKS = {
    "real_or_synthetic": "Real or synthetic?",
    "two_alternative": "Which of the two is real?",
    "same_patient": "The same patient?",
    "likert_realism": "How realistic?",
    "plausible_course": "Is the course plausible?",
    "text_alignment": "Does the image show what the text says?",
    "progression_order": "In which order were they taken?",
    "ejection_fraction": "Which ejection fraction?",
    "artefact": "Where is something wrong?",
}
LARGEST_LOG_ODDS = 10.0  # beyond it the ratings of the arms are apart, and a likelihood has no maximum (separation)
WIDE = 0.9  # of the margin's range: a 90 % interval this wide leaves an equivalence test at most 4 % to err in
MEASURES = {"accuracy": "Share of right answers", "auc": "AUC from confidence"}


@dataclass(frozen=True)
class Conclusion:
    """One sentence of the summary: something shown, something left open, or a warning."""

    state: Literal["shown", "open", "warning"]
    text: str


def render(result: Analysis) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("medgen.study"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "estimate": estimate, "p": p_value}
    return environment.get_template("report.html.j2").render(
        r=result,
        tasks=TASKS,
        measures=MEASURES,
        sections=[
            {
                "s": section,
                "kind": _kind(section),
                "conclusions": conclusions(section),
                "plots": {name: Markup(text) for name, text in drawn(section, result.margin).items()},
            }
            for section in result.sections
        ],
        warnings=warnings(result),
    )


def _kind(section: Section) -> str:
    found = section.result
    return "detecting" if isinstance(found, Detecting) else "rating" if isinstance(found, Rating) else "scoring"


def percent(value: Estimate | Mean | float | None, digits: int = 0) -> str:
    """ "70 % (62–78)"; a dash where nothing was measured. A t interval of a share is cut at 0 and 100 %."""
    one = value.interval() if isinstance(value, Mean) else value
    if one is None or (isinstance(one, float) and not math.isfinite(one)):
        return "–"
    if isinstance(one, float | int):
        return f"{100 * one:.{digits}f} %"
    if not math.isfinite(one.value):
        return "–"
    middle = f"{100 * one.value:.{digits}f} %"
    if not math.isfinite(one.low):
        return middle
    return f"{middle} ({100 * max(one.low, 0):.{digits}f}–{100 * min(one.high, 1):.{digits}f})"


def estimate(value: Estimate | Mean | float | None, digits: int = 2) -> str:
    """ "0.70 (0.62 to 0.78)"; a dash where nothing was measured."""
    one = value.interval() if isinstance(value, Mean) else value
    if one is None or (isinstance(one, float) and not math.isfinite(one)):
        return "–"
    if isinstance(one, float | int):
        return f"{one:.{digits}f}"
    if not math.isfinite(one.value):
        return "–"
    middle = f"{one.value:.{digits}f}"
    return middle if not math.isfinite(one.low) else f"{middle} ({one.low:.{digits}f} to {one.high:.{digits}f})"


def p_value(value: float) -> str:
    """ "p = .012", "p < .001"."""
    if not math.isfinite(value):
        return "p –"
    return "p < .001" if value < 0.001 else f"p = {value:.3f}".replace("0.", ".")


def joint(tests: Sequence[Equivalence]) -> Verdict:
    """Equivalent only if every test says so (an intersection-union test keeps its level); different if the widest one does."""
    verdicts = [test.verdict for test in tests]
    if any(verdict == "unknown" for verdict in verdicts):
        return "unknown"
    if all(verdict.startswith("equivalent") for verdict in verdicts):
        return "equivalent but different" if all(verdict == "equivalent but different" for verdict in verdicts) else "equivalent"
    return "different" if all(verdict in ("different", "equivalent but different") for verdict in verdicts) else "inconclusive"


def equivalence_words(what: str, tests: Sequence[Equivalence]) -> Conclusion:
    """The verdict of one measure, in a sentence that a reader of the abstract cannot misread."""
    widest = max(tests, key=lambda test: test.high - test.low if math.isfinite(test.high) else -1)
    around = f"{100 * widest.reference:.0f} ± {100 * widest.margin:g} %"
    value, interval = f"{100 * widest.value:.0f} %", f"90 % interval {100 * widest.low:.0f} to {100 * widest.high:.0f} %"
    verdict = joint(tests)
    if verdict == "unknown":
        return Conclusion("open", f"{what}: {value} from one reader, which says nothing of other readers.")
    if verdict == "equivalent":
        worst = max(test.p_equivalence for test in tests)
        return Conclusion(
            "shown",
            f"{what}: {value}, {interval}, inside {around}, the margin fixed before reading. Equivalence is shown ({p_value(worst)}).",
        )
    if verdict == "equivalent but different":
        return Conclusion(
            "shown",
            f"{what}: {value}, {interval}: away from {100 * widest.reference:.0f} %, but by less than the margin ({around}).",
        )
    if verdict == "different":
        side = "above" if widest.value > widest.reference else "below"
        return Conclusion(
            "shown",
            f"{what}: {value}, {interval}: {side} {100 * widest.reference:.0f} % ({p_value(widest.p_difference)}), no equivalence.",
        )
    hardly = widest.high - widest.low > WIDE * 2 * widest.margin  # two tests at once then err in far less than 5 %
    careful = (
        " The interval is about as wide as the margin itself: hardly any answers of so few readers and cases could have shown it."
    )
    return Conclusion(
        "open",
        f"{what}: {value}, {interval}, reaches beyond {around}. Neither equivalence nor a difference is shown: "
        f"the study was too small for either, and that is no evidence of sameness.{careful if hardly else ''}",
    )


def conclusions(section: Section) -> list[Conclusion]:
    """What a section shows, in plain words."""
    found = section.result
    if isinstance(found, Detecting):
        said = [
            equivalence_words(
                MEASURES[name], [found.equivalence[key] for key in (name, f"{name}_mrmc") if key in found.equivalence]
            )
            for name in MEASURES
            if math.isfinite(found.equivalence[name].value)
        ]
        said += [_comparison(name, mean) for name, mean in found.comparisons.items()]
        said += _edges(found)
        return said + _trend_words(found.trend.change, found.trend.p_value, "Being right", "points")
    if isinstance(found, Rating):
        said = []
        if found.equivalence is not None:
            said.append(
                equivalence_words("How often a synthetic case was rated above a real one (half for ties)", [found.equivalence])
            )
        if found.odds is not None:
            said.append(_odds_words(found.odds, len(found.per_reader)))
        return said + _trend_words(found.trend.change, found.trend.p_value, "Ratings", "points of the scale's range")
    told = [f"answered “{option}”" for option in ("present", "absent")]  # that depends on what the texts say
    return [_score_words(name, scoring) for name, scoring in found.items() if name not in told]


def _edges(found: Detecting) -> list[Conclusion]:
    """Where an interval is known to promise too much, the page says so itself."""
    said, readers = [], len(found.readers)
    rates = [(r.detection.hits, r.detection.signals, r.detection.false_alarms, r.detection.noises) for r in found.readers]
    whole = sum(1 for h, s, f, n in rates if min(s, n) > 0 and (h in (0, s) or f in (0, n)))
    if 4 * whole >= max(readers, 1) and math.isfinite(found.d_prime.value):
        said.append(
            f"{whole} of {readers} readers missed nothing or raised no false alarm (or never did otherwise): only a correction keeps their "
            "d′ finite, and it draws it towards 0 (Hautus 1995), by 0.1 with 40 cases of each kind and 0.4 with 20 where d′ is 3. The "
            "interval of d′ leaves that out: take it for a least value. More cases mend it, more readers do not."
        )
    return [Conclusion("warning", text) for text in said]


def _odds_words(odds: OrdinalFit, readers: int) -> Conclusion:
    what, one = "Odds of a higher rating, synthetic against real", odds.effects[0]
    if not max(abs(one.low), abs(one.high)) < LARGEST_LOG_ODDS:  # NaN, too
        return Conclusion("open", f"{what}: not to be told from so few ratings, which leave them without bound.")
    # Student's t with readers − 1 degrees of freedom; with Satterthwaite's, five readers held the truth in 89 % of 120 studies, not in 97
    wide = "; with so few readers rather too wide" if 2 < readers < 8 else ""
    return Conclusion(
        "shown" if odds.p_values[0] < 0.05 else "open",
        f"{what}: × {math.exp(one.value):.2f} (95 % interval {math.exp(one.low):.2f} to {math.exp(one.high):.2f}; "
        f"ordinal mixed model, other readers, these cases{wide}).",
    )


def _comparison(name: str, mean: Mean) -> Conclusion:
    ends = mean.interval()
    state: Literal["shown", "open"] = "shown" if mean.p_value(0) < 0.05 else "open"
    verdict = "the arms differ" if state == "shown" else "no difference is shown, which is not evidence that there is none"
    return Conclusion(
        state,
        f"AUC of {name}: {ends.value:+.3f} (95 % interval {ends.low:+.3f} to {ends.high:+.3f}, {p_value(mean.p_value(0))}): {verdict}.",
    )


def _trend_words(change: Estimate, p: float, what: str, unit: str) -> list[Conclusion]:
    if not p < 0.05:
        return []
    way = "rose" if change.value > 0 else "fell"
    return [
        Conclusion(
            "warning",
            f"{what} {way} by {100 * abs(change.value):.0f} {unit} from first to last case ({p_value(p)}): readers changed while reading.",
        )
    ]


def _score_words(name: str, found: Scoring) -> Conclusion:
    share = found.unit == "share"
    value = percent(found.mean) if share else f"{estimate(found.mean)} {found.unit}"
    apart = found.difference
    text = f"{name[:1].upper()}{name[1:]}: {value} over readers"
    if apart is not None and math.isfinite(apart.p_value(0)):
        ends = apart.interval()
        scale = 100 if share else 1
        text += (
            f"; synthetic minus real {scale * ends.value:+.1f} (95 % interval {scale * ends.low:+.1f} to {scale * ends.high:+.1f}, "
            f"{p_value(apart.p_value(0))})"
        )
    return Conclusion("shown" if apart is not None and apart.p_value(0) < 0.05 else "open", text + ".")


def drawn(section: Section, margin: float) -> dict[str, str]:
    """The section's plots, by name."""
    found = section.result
    if isinstance(found, Detecting):
        pictures = {
            "accuracy": plots.accuracy_plot(found, margin),
            "roc": plots.roc_plot(found),
            "sensitivity": plots.sensitivity_plot(found),
            "confidence": plots.confidence_plot(found),
            "trend": plots.trend_plot(found.trend, "Right answers"),
            "times": plots.time_plot({row.reader: row.seconds for row in found.readers}),
        }
        if found.agreement.between:
            pictures["agreement"] = plots.interval_plot(
                found.agreement.between, "agreement between readers (1: complete, 0: chance)", reference=0
            )
        return pictures
    if isinstance(found, Rating):
        pictures = {
            "ratings": plots.rating_plot(found),
            "trend": plots.trend_plot(found.trend, "Ratings"),
            "times": plots.time_plot(found.seconds),
        }
        if found.agreement.between:
            pictures["agreement"] = plots.interval_plot(
                found.agreement.between, "agreement between readers (1: complete, 0: chance)", reference=0
            )
        return pictures
    return {name: plots.scoring_plot(scoring) for name, scoring in found.items()}


def warnings(result: Analysis) -> list[str]:
    """What a reader must know before the numbers."""
    said = list(result.notes)
    lacking = {reader: pair for reader, pair in result.missing.items() if pair[0]}
    if lacking:
        listed = ", ".join(f"{reader} {gone} of {asked}" for reader, (gone, asked) in lacking.items())
        said.append(
            f"Unanswered questions ({listed}). They are left out, not counted as wrong; if they are the hard ones, results are too good."
        )
    if result.facts["readers"] < 5:
        said.append(f"{result.facts['readers']} readers: intervals over readers are wide, whatever the number of cases.")
    return said
