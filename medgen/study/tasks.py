"""What readers can be asked: each task with the pictures it shows, its questions, and what the right answer is. One table.

`medgen study build` makes items from it, simulated readers answer by it, and the analysis reads the same ids (`medgen.study.sections`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medgen.data.records import FindingLabel

Question = dict[str, Any]
Shows = Literal["one", "pair", "films", "course"]
Kind = Literal["chest", "echo", "progression"]
KINDS: tuple[Kind, ...] = ("chest", "echo", "progression")

CONFIDENCE = (1, 6)
"""Of a question with "confidence": true: 1 guessing, 6 certain."""
FEWEST_FILMS, MOST_FILMS = 3, 5
COMMENT: Question = {"id": "comment", "kind": "text", "label": "Comment (optional)", "required": False, "before_reveal": False}


@dataclass(frozen=True)
class Task:
    """`shows`: one picture; a pair side by side; 3-5 films of one patient; a past, then (revealed) a future.

    `kinds`: what records it can be made from. `asks`: the questions of one item, from the findings its text names (text_alignment only).
    `right`: what the key's `correct` holds per question id; None: there is no right answer. `instruction`: told to readers.
    `contrast`: the task compares arms within the item or section, so it needs a real (or copied) arm and another one.
    """

    name: str
    shows: Shows
    kinds: tuple[Kind, ...]
    instruction: str
    asks: Callable[[Sequence[FindingLabel]], list[Question]]
    right: str | None
    contrast: bool = False


def _choice(name: str, label: str, options: Sequence[tuple[str, str]], **more: Any) -> Question:
    listed = [{"value": value, "label": text} for value, text in options]
    return {"id": name, "kind": "choice", "label": label, "options": listed, "required": True, "before_reveal": False, **more}


def _scale(name: str, label: str, low: str, high: str) -> Question:
    ends = {"min": 1, "max": 5, "min_label": low, "max_label": high}
    return {"id": name, "kind": "scale", "label": label, **ends, "required": True, "before_reveal": False}


def _asks(*questions: Question) -> Callable[[Sequence[FindingLabel]], list[Question]]:
    return lambda labels: [dict(question) for question in (*questions, COMMENT)]


def finding_questions(labels: Sequence[FindingLabel]) -> list[Question]:
    """One choice per finding that the text states or denies; what it doubts is not asked."""
    asked = []
    for label in labels:
        if label.state == "uncertain":
            continue
        name = label.name.replace("_", " ")
        said = ", ".join(word for word in (label.size, label.side) if word) or "present"
        options = [("present", "as the text says"), ("absent", "not there")]
        if label.state == "absent":
            said, options = "absent", [("absent", "absent, as the text says"), ("present", "there all the same")]
        if label.state == "present" and label.side is not None:
            options.append(("wrong side", "wrong side"))
        if label.state == "present" and label.size is not None:
            options.append(("wrong size", "wrong size"))
        asked.append(_choice(label.name, f"{name.capitalize()} (text: {said})", options))
    return [*asked, dict(COMMENT)]


_TABLE = (
    Task(
        "real_or_synthetic", "one", ("chest", "echo", "progression"),
        "Some images come from patients, some from a generative model. Say for each which it is, and how sure you are (1 guessing, "
        "6 certain). How many there are of each is not told.",
        _asks(_choice("origin", "Real or synthetic?", [("real", "real"), ("synthetic", "synthetic")], confidence=True)),
        "real (also a copied real image) or synthetic", True,
    ),
    Task(
        "two_alternative", "pair", ("chest", "echo", "progression"),
        "Of two images side by side, one comes from a patient. Say which one is real, and how sure you are.",
        _asks(_choice("which", "Which one is real?", [("left", "left"), ("right", "right")], confidence=True)),
        "the side of the real image: left or right", True,
    ),
    Task(
        "likert_realism", "one", ("chest", "echo", "progression"),
        "Rate how realistic each image looks, from 1 (clearly not a patient's image) to 5 (fully realistic).",
        _asks(_scale("realism", "How realistic is this image?", "clearly not realistic", "fully realistic")),
        None,
    ),
    Task(
        "text_alignment", "one", ("chest",),
        "A text describes what an image should show. Say for each finding that it names whether the image shows it so.",
        finding_questions,
        "per finding what the text says (present, absent); beside another patient's text, what the image's own report says of it",
    ),
    Task(
        "progression_order", "films", ("progression",),
        "Films of one patient are shown in mixed order. Put them in the order in which they were taken, the earliest first.",
        _asks({"id": "order", "kind": "order", "label": "Order, the earliest first", "required": True, "before_reveal": False}),
        "the films' labels in the order of their dates",
    ),
    Task(
        "plausible_course", "course", ("progression",),
        "A patient's earlier films are shown. Say what you expect; only then later films appear, and you rate "
        "how plausible that course is.",
        _asks(
            _choice(
                "expectation", "What do you expect at the later films?",
                [("better", "better"), ("stable", "stable"), ("worse", "worse")], before_reveal=True,
            ),
            _scale("plausible", "How plausible is the course shown?", "impossible", "fully plausible"),
        ),
        None,
    ),
    Task(
        "same_patient", "pair", ("progression",),
        "Two films are shown side by side. Say whether they show the same patient, and how sure you are.",
        _asks(_choice("same", "The same patient?", [("yes", "yes"), ("no", "no")], confidence=True)),
        "yes or no",
    ),
    Task(
        "ejection_fraction", "one", ("echo",),
        "Estimate the left ventricle's ejection fraction in percent, by eye.",
        _asks({"id": "ef", "kind": "number", "label": "Ejection fraction (%)", "min": 0, "max": 100, "required": True,
               "before_reveal": False}),
        "the ejection fraction that was measured (real) or asked of the model (synthetic), in percent",
    ),
    Task(
        "artefact", "one", ("chest", "echo", "progression"),
        "Mark every place that looks like an artefact, or say that there is none.",
        _asks({"id": "points", "kind": "points", "label": "Places that look like artefacts (or none)", "required": True,
               "before_reveal": False}),
        None,
    ),
)  # fmt: skip
TASKS: Mapping[str, Task] = {task.name: task for task in _TABLE}
