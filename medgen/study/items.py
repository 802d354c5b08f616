"""From drawn cases to what the page shows and what the key keeps: media, questions, right answers, feedback."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.records import FindingLabel
from medgen.data.report_labels import label_text
from medgen.study.draw import Draft
from medgen.study.material import Candidate, Frame
from medgen.study.media import Source, kind_of
from medgen.study.protocol import Protocol, Section
from medgen.study.tasks import MOST_FILMS, TASKS, Question

LETTERS = "ABCDEFGHIJ"[:MOST_FILMS]


@dataclass(frozen=True)
class Shown:
    """Something that stands on the page: one picture, or (several sources) a sequence of them. `labels` are those of its frames."""

    sources: tuple[Source, ...]
    label: str | None = None
    labels: tuple[str, ...] = ()
    reveal: bool = False


@dataclass(frozen=True)
class Item:
    """One item with its opaque id: what is shown, asked and told in training; `correct` and `draft` are for the key."""

    id: str
    draft: Draft
    shown: tuple[Shown, ...]
    questions: tuple[Question, ...]
    correct: Mapping[str, Any] | None
    prompt: str | None = None
    feedback: str | None = None
    repeats: str | None = field(default=None, compare=False)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every file that it shows."""
        return tuple(source for shown in self.shown for source in shown.sources)


class Secret:
    """The pack's salt, and what is derived from it: opaque names and random numbers."""

    def __init__(self, seed: int, files: Mapping[Path, str]) -> None:
        content = "\n".join(sorted(set(files.values())))
        self.salt = hmac.new(str(seed).encode(), content.encode(), hashlib.sha256).hexdigest()

    def name(self, length: int, *what: object) -> str:
        """A name that says nothing to those without the salt."""
        return self._digest(what).hex()[:length]

    def rng(self, *what: object) -> np.random.Generator:
        """Random numbers of a purpose."""
        return np.random.default_rng(int.from_bytes(self._digest(what), "big"))

    def _digest(self, what: Sequence[object]) -> bytes:
        return hmac.new(bytes.fromhex(self.salt), "\x1f".join(map(str, what)).encode(), hashlib.sha256).digest()


def source_files(protocol: Protocol, drafts: Sequence[Draft]) -> list[Path]:
    """Every file that the drafted items show or draw from, once."""
    found: dict[Path, None] = {}
    for draft in drafts:
        for source in _all_sources(protocol, draft):
            found[source.path] = None
            if source.ecg is not None:
                for path in _ecg_files(source.ecg.path):
                    found[path] = None
    return list(found)


def make_items(protocol: Protocol, drafts: Sequence[Draft], secret: Secret) -> list[Item]:
    """All items, in the order of their drafts. A repeat shows the same in the same places as the first time."""
    ids = [secret.name(12, "item", i) for i in range(len(drafts))]
    lefts = _lefts(drafts, secret)
    items = []
    for i, draft in enumerate(drafts):
        origin = i if draft.repeat_of is None else draft.repeat_of
        shown, correct = _layout(protocol, draft, secret.rng("layout", origin), lefts.get(origin, True))
        prompt = _text(draft) if draft.section.task == "text_alignment" else None
        items.append(
            Item(
                ids[i], draft, shown, _questions(draft.section, draft, shown), correct, prompt,
                _feedback(draft, correct) if draft.training else None, None if draft.repeat_of is None else ids[origin],
            )
        )  # fmt: skip
    return items


def _lefts(drafts: Sequence[Draft], secret: Secret) -> dict[int, bool]:
    """Whether a pair's first picture stands on the left: in half of each arm's pairs of a section."""
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for i, draft in enumerate(drafts):
        if TASKS[draft.section.task].shows == "pair" and draft.repeat_of is None:
            groups.setdefault((draft.section.name, draft.arm.name, bool(draft.same)), []).append(i)
    chosen = {}
    for key, members in groups.items():
        rng = secret.rng("sides", *key)
        half = (len(members) + int(rng.integers(2))) // 2
        for place, j in enumerate(rng.permutation(len(members))):
            chosen[members[j]] = place < half
    return chosen


# ---------------------------------------------------------------- what is shown


def _layout(
    protocol: Protocol, draft: Draft, rng: np.random.Generator, left: bool
) -> tuple[tuple[Shown, ...], dict[str, Any] | None]:
    """What the item shows, and its right answers."""
    shows = TASKS[draft.section.task].shows
    if shows == "one":
        return (Shown((_source(protocol, draft, draft.main, draft.main.future[-1]),)),), _single(draft)
    if shows == "pair":
        return _pair(protocol, draft, left)
    return _films(protocol, draft, rng) if shows == "films" else (_course(protocol, draft), None)


def _source(protocol: Protocol, draft: Draft, candidate: Candidate, frame: Frame) -> Source:
    kind = kind_of(frame.path, protocol.kind(draft.arm))
    return Source(frame.path, kind, candidate.ecg, candidate.fps)


def _pair(protocol: Protocol, draft: Draft, left: bool) -> tuple[tuple[Shown, ...], dict[str, Any]]:
    """Real beside another arm's, or an earlier film beside a later one of the same or another patient."""
    if draft.same is None:
        assert draft.partner is not None
        first, second = (draft.partner, draft.partner.future[-1]), (draft.main, draft.main.future[-1])
        correct = {"which": "left" if left else "right"}
    else:
        later = draft.partner or draft.main
        first, second = (draft.main, cut(draft.main, draft)[0][-1]), (later, cut(later, draft)[1][0])
        correct = {"same": "yes" if draft.same else "no"}
    sides = (first, second) if left else (second, first)
    return tuple(
        Shown((_source(protocol, draft, *side),), label) for side, label in zip(sides, ("left", "right"), strict=True)
    ), correct


def _films(protocol: Protocol, draft: Draft, rng: np.random.Generator) -> tuple[tuple[Shown, ...], dict[str, Any]]:
    # Generated films alone: real ones among them would be known as the earlier ones by their looks.
    frames = draft.main.future[-draft.length.future :]
    places = rng.permutation(len(frames)).tolist()  # places[j]: which film stands at letter j
    shown = tuple(Shown((_source(protocol, draft, draft.main, frames[i]),), LETTERS[j]) for j, i in enumerate(places))
    return shown, {"order": [LETTERS[places.index(i)] for i in range(len(frames))]}


def _course(protocol: Protocol, draft: Draft) -> tuple[Shown, ...]:
    past, future = cut(draft.main, draft)
    begin = past[0].time

    def shown(frames: Sequence[Frame], label: str, first: int, reveal: bool) -> Iterator[Shown]:
        sources = [_source(protocol, draft, draft.main, frame) for frame in frames]
        if draft.main.time_unit == "days":
            labels = [f"day {frame.time - begin:.0f}" for frame in frames]
        else:
            labels = [f"visit {first + i + 1}" for i in range(len(frames))]
        if sources[0].kind == "image":
            yield Shown(tuple(sources), label, tuple(labels), reveal)
        else:  # a stack scrolls through slices, so every visit has its own
            yield from (Shown((s,), f"{label}, {said}", (), reveal) for s, said in zip(sources, labels, strict=True))

    return (*shown(past, "earlier", 0, False), *shown(future, "later", len(past), True))


def cut(candidate: Candidate, draft: Draft) -> tuple[tuple[Frame, ...], tuple[Frame, ...]]:
    """The last known visits and those after them. A real series is cut in its middle, where `medgen study sample` cuts the others:
    else the days between the films would tell the arms apart.
    """
    length = draft.length
    if candidate.past:
        return candidate.past[-length.past :], candidate.future[: length.future]
    frames = candidate.future
    at = max(length.past, min(len(frames) // 2, len(frames) - length.future))
    return frames[at - length.past : at], frames[at : at + length.future]


def _all_sources(protocol: Protocol, draft: Draft) -> Iterator[Source]:
    shown, _ = _layout(protocol, draft, np.random.default_rng(0), True)
    yield from (source for one in shown for source in one.sources)


def _ecg_files(path: Path) -> list[Path]:
    """A WFDB record's files, or the DICOM file."""
    return [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}.*"))


# ---------------------------------------------------------------- what is asked and told


def _questions(section: Section, draft: Draft, shown: Sequence[Shown]) -> tuple[Question, ...]:
    asked = TASKS[section.task].asks(label_text(_text(draft)) if section.task == "text_alignment" else ())
    for question in asked:
        if question["kind"] == "order":
            question["options"] = [one.label for one in shown]
    own = {extra.id: extra for extra in section.questions}
    for question in asked:
        if (extra := own.pop(question["id"], None)) is not None:
            question |= {"label": extra.label} | {
                k: v for k in ("min_label", "max_label") if (v := getattr(extra, k)) is not None
            }
    more = [extra.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for extra in own.values()]
    added = [{"kind": "text", "required": False, "before_reveal": False, **one} for one in more]
    return (*asked[:-1], *added, asked[-1])  # the free comment stays last


def _single(draft: Draft) -> dict[str, Any] | None:
    """The right answers where one picture is judged."""
    task = draft.section.task
    if task == "real_or_synthetic":
        return {"origin": "synthetic" if draft.arm.source == "synthetic" else "real"}
    if task == "ejection_fraction":
        return {"ef": draft.main.ejection_fraction}
    if task == "text_alignment":
        return {label.name: _as_is(label, draft) for label in label_text(_text(draft)) if label.state != "uncertain"}
    return None


def _text(draft: Draft) -> str:
    """What stands beside the picture: its own text, or in the mismatched arm another's."""
    return draft.main.text if draft.foreign is None else draft.foreign


def _as_is(said: FindingLabel, draft: Draft) -> str:
    """The right answer to a finding that a text names; of another's text by this image's own report (what that does not name is absent)."""
    own = next((label for label in label_text(draft.main.text) if label.name == said.name), None)
    if draft.foreign is None or own is None:
        return said.state if draft.foreign is None else "absent"
    if said.state == own.state == "present":
        if None not in (said.side, own.side) and said.side != own.side:
            return "wrong side"
        if None not in (said.size, own.size) and said.size != own.size:
            return "wrong size"
    return own.state


def _feedback(draft: Draft, correct: Mapping[str, Any] | None) -> str:
    task, made = draft.section.task, draft.arm.source == "synthetic"
    if task == "two_alternative":
        return f"The real image is on the {correct and correct['which']}."
    if task == "progression_order":
        return f"The films were taken in the order {', '.join(correct['order'] if correct else ())}."
    if task == "same_patient":
        return "Both are of the same patient." if draft.same else "They are of two patients."
    if task == "ejection_fraction":
        return f"The ejection fraction is {draft.main.ejection_fraction:.0f} %."
    if task == "text_alignment":
        told = "The image was made from this text." if made else "The text is this image's report."
        return told if draft.foreign is None else "The text is another patient's report."
    if task == "plausible_course":
        return "The later films were generated." if made else "The later films are the patient's own."
    return "This image is synthetic." if made else "This image is real."
