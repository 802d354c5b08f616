"""One section of a study after another: which question answers its task, how an answer becomes a number, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from medgen.evaluation.statistics import Floats
from medgen.study.measures import Detecting, Rating, Scoring, detecting, rating, scoring
from medgen.study.responses import Answer, Pack, option_values
from medgen.study.tables import Bools, Cell, Key, Table, ratings_of, table

# The right answer that counts as the signal of d′ and ROC, in tasks with one right answer of two.
SIGNALS = {"real_or_synthetic": "synthetic", "two_alternative": "right", "same_patient": "yes"}
RATED = ("likert_realism", "plausible_course")
Result = Detecting | Rating | Mapping[str, Scoring]


@dataclass(frozen=True)
class Scores:
    """What the exports for other software need of a detecting section: ratings [N,J] of cases seen once, and their truth [N]."""

    table: Table
    ratings: Floats
    truth: Bools


@dataclass(frozen=True)
class Section:
    """One section's results, with readers' comments (reader, item, text)."""

    name: str
    task: str
    question: str
    cases: int
    repeats: int
    result: Result
    comments: tuple[tuple[str, str, str], ...]
    scores: Scores | None = None


def sections(pack: Pack, key: Key, answers: Sequence[Answer], margin: float) -> list[Section]:
    """All sections with an answer, in the order of the pack; training items take no part."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item, shown in pack.items.items():
        if not shown.get("training"):
            groups.setdefault((str(shown["section"]), str(shown["task"])), []).append(item)
    found = []
    for (name, task), items in groups.items():
        inside = set(items)
        own = [answer for answer in answers if answer.item in inside]
        if own:
            found.append(_section(name, task, items, pack, key, own, margin))
    return found


def _section(name: str, task: str, items: list[str], pack: Pack, key: Key, answers: list[Answer], margin: float) -> Section:
    readers = tuple(reader for reader in pack.orders if any(a.reader == reader for a in answers))
    questions = {(item, q["id"]): q for item in items for q in pack.items[item]["questions"]}
    comments = tuple(
        (a.reader, a.item, a.value) for a in answers if questions[a.item, a.question]["kind"] == "text" and str(a.value).strip()
    )
    answers = [a for a in answers if questions[a.item, a.question]["kind"] != "text"]
    main = main_question(pack, items[0])
    repeats = sum(key[item].get("repeat_of") is not None for item in items)
    scores = None
    result: Result
    if task in SIGNALS:
        result, scores = _detect(task, items, pack, key, answers, readers, margin)
    elif task in RATED:
        scale = next(q for q in pack.items[items[0]]["questions"] if q["id"] == main)
        cells = _cells(answers, lambda a: float(a.value), main)
        result = rating(table(pack, key, cells, items, readers), float(scale["min"]), float(scale["max"]), margin)
    else:
        result = _score(task, items, pack, key, answers, readers)
    return Section(name, task, main, len(items) - repeats, repeats, result, comments, scores)


def main_question(pack: Pack, item: str) -> str:
    """The question that answers the task: the last scale of a plausible course (the rating comes after the reveal), else the first."""
    shown = pack.items[item]
    asked = [q for q in shown["questions"] if q["kind"] != "text" and q["id"] != "confidence"]
    if shown["task"] in RATED:
        asked = [q for q in asked if q["kind"] == "scale" and not q.get("before_reveal")] or asked
    return str(asked[0]["id"])


def _cells(answers: Sequence[Answer], number: Callable[[Answer], float], question: str | None = None) -> list[Cell]:
    """One cell per reader and item; several questions of an item (all of them where `question` is None) are averaged."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        if question is None or answer.question == question:
            groups.setdefault((answer.item, answer.reader), []).append(answer)
    return [
        Cell(
            item,
            reader,
            float(np.mean([number(a) for a in own])),
            float(np.mean([np.nan if a.confidence is None else a.confidence for a in own])),
            float(sum(a.ms for a in own)),
            own[0].position,
        )
        for (item, reader), own in groups.items()
    ]


def correct(key: Key, item: str, question: str) -> Any:
    """The right answer to a question of an item, as the key has it; None where there is none."""
    answer = key[item].get("correct")
    return answer.get(question) if isinstance(answer, Mapping) else answer


def _detect(
    task: str, items: list[str], pack: Pack, key: Key, answers: list[Answer], readers: tuple[str, ...], margin: float
) -> tuple[Detecting, Scores]:
    main = main_question(pack, items[0])
    question = next(q for q in pack.items[items[0]]["questions"] if q["id"] == main)
    signal = SIGNALS[task]
    if question["kind"] == "scale":  # one scale from surely noise to surely signal: the half says what, the distance how sure
        middle = (float(question["min"]) + float(question["max"])) / 2
        cells = [
            Cell(c.item, c.reader, float(c.value > middle), abs(c.value - middle) + 0.5, c.ms, c.position)
            for c in _cells(answers, lambda a: float(a.value), main)
        ]
    else:
        signal = signal if signal in option_values(question) else option_values(question)[-1]
        sure = {(a.item, a.reader): float(a.value) for a in answers if a.question == "confidence"}
        cells = [
            Cell(c.item, c.reader, c.value, sure.get((c.item, c.reader), c.confidence), c.ms, c.position)
            for c in _cells(answers, lambda a: float(a.value == signal), main)
        ]
    whole = table(pack, key, cells, items, readers)
    truth = np.array([_is_signal(task, key, item, main, signal) for item in items])
    known = whole.confidence[np.isfinite(whole.confidence)]
    levels = int(np.ceil(known.max())) if known.size else 1
    result = detecting(whole, truth, levels, signal, margin, task)
    return result, Scores(whole.first, ratings_of(whole.first), truth[whole.repeat_of < 0])


def _is_signal(task: str, key: Key, item: str, question: str, signal: str) -> bool:
    if task == "real_or_synthetic":  # a copied real film is real, whatever the arm is called
        return key[item].get("source") == "synthetic"
    return str(correct(key, item, question)) == signal


def _score(
    task: str, items: list[str], pack: Pack, key: Key, answers: list[Answer], readers: tuple[str, ...]
) -> dict[str, Scoring]:
    def measured(number: Callable[[Answer], float], unit: str, continuous: bool = False) -> Scoring:
        return scoring(table(pack, key, _cells(answers, number), items, readers), unit, continuous)

    def right(a: Answer) -> Any:
        return correct(key, a.item, a.question)

    if task == "text_alignment":
        options = list(dict.fromkeys(str(a.value) for a in answers))
        found = (
            {"as the key says": measured(lambda a: float(str(a.value) == str(right(a))), "share")} if _has(answers, right) else {}
        )
        return found | {f"answered “{option}”": measured(partial(_says, option), "share") for option in options}
    if task == "progression_order":
        return {
            "whole order right": measured(lambda a: float(list(map(str, a.value)) == list(map(str, right(a)))), "share"),
            "pairs in the right order": measured(lambda a: pairs_in_order(a.value, right(a)), "share"),
        }
    if task == "ejection_fraction":
        found = {"estimate": measured(lambda a: float(a.value), "EF points", continuous=True)}
        if _has(answers, right):
            found |= {
                "estimate minus truth": measured(lambda a: float(a.value) - float(right(a)), "EF points"),
                "absolute error": measured(lambda a: abs(float(a.value) - float(right(a))), "EF points"),
            }
        return found
    if task == "artefact":
        return {
            "with a mark": measured(lambda a: float(len(a.value) > 0), "share"),
            "marks": measured(lambda a: float(len(a.value)), "marks a case"),
        }
    raise ValueError(
        f"no analysis for task {task!r}; known: {', '.join((*SIGNALS, *RATED))}, text_alignment, progression_order, …"
    )


def _says(option: str, answer: Answer) -> float:
    return float(str(answer.value) == option)


def _has(answers: Sequence[Answer], right: Callable[[Answer], Any]) -> bool:
    return all(right(a) is not None for a in answers)


def pairs_in_order(given: Sequence[Any], truth: Sequence[Any]) -> float:
    """Share of pairs that stand as in the truth: (Kendall's τ + 1) / 2; 0 if the answer does not hold the same things."""
    place = {str(thing): i for i, thing in enumerate(given)}
    names = [str(thing) for thing in truth]
    if set(place) != set(names) or len(names) < 2:
        return 0.0
    return float(np.mean([place[a] < place[b] for a, b in combinations(names, 2)]))
