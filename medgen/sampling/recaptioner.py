"""Stage prompts: from what a report says now to a wanted severity, in as many steps as there are rounds of editing.

Severity, not time: the stages order how much of a finding there is. Nothing here knows how fast a disease goes, or whether it goes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from medgen.data.records import FINDINGS, FindingLabel, Side
from medgen.data.report_labels import label_text
from medgen.data.report_text import FINDING_WORDS, clean_report, labels_to_text, split_sentences

_SIZED = ("pleural_effusion", "pneumothorax")
_SIDED = (*_SIZED, "consolidation", "nodule", "atelectasis")
WORDS = {name: ("", "small", "moderate", "large") if name in _SIZED else ("", "mild", "moderate", "severe") for name in FINDINGS}
NODULE_MM = (0.0, 12.0, 25.0, 45.0)
"""Degrees 0 (none) to 3 of every finding in words; of a nodule in millimetres."""
_DEGREES = {
    "tiny": 1, "trace": 1, "minimal": 1, "slight": 1, "small": 1, "mild": 1, "moderate": 2, "large": 3, "severe": 3, "extensive": 3,
    "massive": 3, "marked": 3, "gross": 3,
}  # fmt: skip
_SENTENCE = re.compile(r"[.!?]+\s*$")
_LINE = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•]|stage\s+\d+\s*:)\s*(?P<text>.+?)\s*$", re.IGNORECASE)


class StageError(ValueError):
    """Stages that cannot be written from what was given; the message says what is missing."""


@dataclass(frozen=True)
class Stages:
    """`source` says what the film shows now, `prompts` what each round shall show; `finding` and `side` are what changes.

    `degrees`: 0 to 3, of the source and of every prompt. `written_by`: "rules", "given", or the model; with why it was not followed.
    """

    source: str
    prompts: tuple[str, ...]
    finding: str | None = None
    side: str | None = None
    degrees: tuple[float, ...] = ()
    written_by: str = "rules"

    @property
    def direction(self) -> int:
        """1 progression, -1 resolution, 0 unknown."""
        return 0 if not self.degrees else (self.degrees[-1] > self.degrees[0]) - (self.degrees[-1] < self.degrees[0])


Recaptioner = Callable[[str, str, int], Stages]
"""(report, target, rounds) → stages."""


def recaption(report: str, target: str, rounds: int) -> Stages:
    """Stages by rules. `report`: what the film shows now ("" is a film without the target's finding, or with a large one if it shall go).

    `target`: one finding as a radiologist says it: "large left pleural effusion", "severe pulmonary edema", "no pleural effusion".
    What the report says of everything else stays, after the sentence that changes. Raises `StageError` for a target that names no
    finding or several, and for one that the report already says.
    """
    if rounds < 1:
        raise StageError(f"rounds must be at least 1, not {rounds}")
    wanted = _target(target)
    sentences = split_sentences(clean_report(report))
    stated = next((label for label in label_text(" ".join(sentences)) if label.name == wanted.name), None)
    if wanted.side is None and stated is not None and stated.name in _SIDED:
        wanted = replace(wanted, side=stated.side)
    end = _degree(wanted)
    begin = _degree(stated) if stated is not None else (3.0 if end == 0 else 0.0)
    if stated is not None and stated.side == "bilateral" and (size := _size_on(" ".join(sentences), wanted.side)):
        begin = _degree(replace(stated, size=size))
    if stated is not None and stated.state != "absent" and not _same_side(stated.side, wanted.side):
        begin = 0.0
    if begin == end:
        raise StageError(
            f"target {target!r}: the report already says so ({labels_to_text([wanted])!r}); ask for more or less of it"
        )
    others, own = _parted(sentences, wanted)
    degrees = _degrees(begin, end, rounds, wanted.name == "nodule")
    now = (report.strip() and " ".join(sentences)) or _sentence(wanted, begin, own)
    prompts = tuple(" ".join([_sentence(wanted, degree, own), *others]) for degree in degrees[1:])
    return Stages(now, prompts, wanted.name, None if wanted.side == "bilateral" else wanted.side, tuple(map(float, degrees)))


def model_recaptioner(folder: str | Path, device: str | None = None, max_new_tokens: int = 512) -> Recaptioner:
    """A recaptioner that asks the instruction-tuned language model in `folder` (transformers; safetensors; nothing is fetched).

    Its lines count only if there is one per round and the labeller reads in them a severity that goes the asked way and arrives;
    otherwise the rules' stages are used, and `written_by` says why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise StageError(f"no language model at {folder}: expected a transformers folder with config.json, weights and tokenizer")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, use_safetensors=True).eval()
    model = model.to(device) if device else model

    def ask(report: str, target: str, rounds: int) -> Stages:
        ruled = recaption(report, target, rounds)
        text = instruction(ruled.source, target, rounds)
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
        inputs.pop("token_type_ids", None)
        written = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        answer = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return _judged(answer, ruled, Path(folder).name)

    return ask


def instruction(source: str, target: str, rounds: int) -> str:
    """What a language model is asked."""
    return (
        f"A chest X-ray shows: {source}\nWrite {rounds} short radiology impressions, numbered 1 to {rounds}, one a line, that lead in "
        f"equal steps of severity from this to: {target.rstrip('. ')}. Change only that finding; keep the side; say nothing of time.\n"
    )


def _judged(answer: str, ruled: Stages, name: str) -> Stages:
    """The model's lines if they hold, else the rules' with the reason."""
    lines = tuple(match["text"] for line in answer.splitlines() if (match := _LINE.match(line)))
    if len(lines) != len(ruled.prompts):
        return replace(ruled, written_by=f"rules ({name} wrote {len(lines)} stages, not {len(ruled.prompts)})")
    degrees = [ruled.degrees[0]]
    for number, line in enumerate(lines, 1):
        label = next((label for label in label_text(line) if label.name == ruled.finding), None)
        if label is None or (label.state != "absent" and not _same_side(label.side, ruled.side)):
            return replace(ruled, written_by=f"rules ({name}'s stage {number} does not say the finding and its side)")
        degrees.append(_degree(label))
    moves = [(b - a) * ruled.direction for a, b in pairwise(degrees)]
    arrived = abs(degrees[-1] - ruled.degrees[-1]) < 0.75
    if min(moves) < 0 or not arrived:
        return replace(ruled, written_by=f"rules ({name}'s stages do not lead to the target)")
    return replace(ruled, prompts=lines, degrees=tuple(degrees), written_by=name)


def _target(text: str) -> FindingLabel:
    labels = label_text(_SENTENCE.sub("", text) + ".")
    if len(labels) != 1:
        said = ", ".join(FINDING_WORDS[label.name] for label in labels) or "none"
        raise StageError(f"target {text!r}: expected one finding ({', '.join(FINDING_WORDS.values())}), found {said}")
    label = labels[0]
    if label.state == "present" and label.size is None:
        return replace(label, size="30 mm" if label.name == "nodule" else WORDS[label.name][3])
    return label


def _degree(label: FindingLabel) -> float:
    """0 to 3; what is present without a size is taken for moderate, what is uncertain for slight."""
    if label.state == "absent":
        return 0.0
    if label.size is None:
        return 2.0 if label.state == "present" else 1.0
    if match := re.search(r"(\d+(?:\.\d+)?)[^a-z]*([cm]m)", label.size):
        mm = float(match[1]) * (10 if match[2] == "cm" else 1)
        below = max(i for i in range(3) if mm >= NODULE_MM[i])
        return below + (mm - NODULE_MM[below]) / (NODULE_MM[below + 1] - NODULE_MM[below])
    degrees = [degree for word, degree in _DEGREES.items() if re.search(rf"\b{word}", label.size)]
    return sum(degrees) / len(degrees) if degrees else 2.0


def _degrees(begin: float, end: float, rounds: int, exact: bool) -> list[float]:
    """Degree of the source and of every round. `exact`: a size in millimetres, which has steps as fine as one likes.

    Upwards each round is asked for the next whole degree ahead, so that the first one already moves. Downwards to none, half of the rounds
    are asked for a slight finding, the others for none: words for less of a large finding ("moderate") still ask for a finding, and
    guidance towards them takes nothing away (measured with digital_chest). The editor goes towards a prompt in equal steps.
    """
    steps = [begin + (end - begin) * number / rounds for number in range(rounds + 1)]
    if exact:
        return steps
    if end > begin:
        return [begin, *(float(min(-int(-(step - 1e-9) // 1), 3)) for step in steps[1:])]
    middle = min(max(end, 1.0), begin)
    first = rounds // 2 if end < middle < begin else 0
    return [begin, *[middle] * first, *[end] * (rounds - first)]


def _same_side(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one == other or "bilateral" in (one, other)


def _size_on(text: str, side: str | None) -> str | None:
    """The size of one side of a bilateral finding: "small on the right and large on the left"."""
    match = re.search(rf"\b({'|'.join(_DEGREES)})\s+(?:on the |in the )?{side}\b", text.lower()) if side else None
    return match[1] if match else None


def _parted(sentences: Sequence[str], wanted: FindingLabel) -> tuple[list[str], str | None]:
    """What the report says of everything else, and its own sentence about the wanted finding (with a size word) if it has one."""
    others, own = [], None
    for sentence in sentences:
        labels = label_text(sentence)
        mine = next((label for label in labels if label.name == wanted.name), None)
        if mine is None:
            others.append(sentence)
            continue
        rest = [label for label in labels if label is not mine]
        other_side: dict[str | None, Side] = {"left": "right", "right": "left"}
        if mine.state != "absent" and not _same_side(mine.side, wanted.side):
            rest.append(mine)
        elif mine.state != "absent" and mine.side == "bilateral" and wanted.side in other_side:
            there = other_side[wanted.side]
            rest.append(replace(mine, side=there, size=_size_on(sentence, there) or mine.size))
        elif len(labels) == 1 and mine.state == "present" and mine.size is not None and mine.side == wanted.side:
            own = sentence
        if rest:
            others.append(labels_to_text(rest))
    return others, own


def _sentence(wanted: FindingLabel, degree: float, own: str | None) -> str:
    """The finding at `degree`: the report's own sentence with another size, or a plain one."""
    if degree < (0.25 if wanted.name == "nodule" else 0.5):
        return labels_to_text([FindingLabel(wanted.name, "absent")])
    size = WORDS[wanted.name][min(3, max(1, round(degree)))]
    if wanted.name == "nodule":
        below = min(2, int(degree))
        size = f"{NODULE_MM[below] + (degree - below) * (NODULE_MM[below + 1] - NODULE_MM[below]):.0f} mm"
    stated = label_text(own)[0].size if own else None
    if own and stated:
        changed = re.sub(
            rf"\b{stated.replace(' ', '[ -]')}(ly)?\b", lambda m: size + (m[1] or ""), own, count=1, flags=re.IGNORECASE
        )
        changed = changed[0].upper() + changed[1:]
        if label_text(changed) == (replace(label_text(own)[0], size=size),):
            return changed
    return labels_to_text([FindingLabel(wanted.name, "present", wanted.side, size)])
