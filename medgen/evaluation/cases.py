"""The standard evaluation cases: held-out reports balanced over findings and sides, and pairs that change one thing.

`pair_id` and `variant` (left/right, present/absent) travel through sampling into metadata.jsonl, where evaluation finds them.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.records import FINDINGS, FindingLabel, Manifest, Split, read_manifest
from medgen.data.report_labels import label_text
from medgen.data.report_text import FINDING_WORDS, PromptConfig, ReportError, report_to_prompt, split_sentences
from medgen.evaluation.alignment import VARIANTS
from medgen.evaluation.images import EvaluationError
from medgen.models.classifier import SIDED_FINDINGS
from medgen.seeds import stable_seed

_SIDE_WORD = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_ONE_SIDED_ANATOMY = re.compile(r"\b(?:middle lobe|lingula\w*|ventric\w*|atri\w*|hemidiaphragm)\b", re.IGNORECASE)
_NO = {"cardiomegaly": "No cardiomegaly.", "hyperinflation": "No hyperinflation."}
Cases = list[dict[str, Any]]


def write_alignment_cases(
    reference: Path, out: Path, n: int = 200, pairs: int = 60, repeats: int = 8, seed: int = 0, split: Split | None = "test"
) -> Path:
    """Write evaluation cases for `medgen sample text-to-cxr --cases` from the reports of a held-out manifest.

    Args:
        reference: manifest whose reports become prompts.
        out: file to write (.jsonl).
        n: single prompts, balanced over findings and sides.
        pairs: laterality pairs, and as many negation pairs.
        repeats: prompts of which four images are sampled, for diversity.
        seed: of the choice of prompts and of the noise.
        split: which split of the manifest; all of it with None.
    """
    cases = alignment_cases(read_manifest(reference, split), n, seed, pairs, repeats)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    return out


def alignment_cases(
    manifest: Manifest, n: int = 200, seed: int = 0, pairs: int = 60, repeats: int = 8, prompts: PromptConfig | None = None
) -> Cases:
    """Case lines: `n` prompts, `pairs` laterality and `pairs` negation pairs, and of the first `repeats` prompts four images each.

    Both images of a pair share one seed, so they start from the same noise. Raises `EvaluationError` where the manifest has no
    prompt that can be used.
    """
    pool = _prompts(manifest, prompts or PromptConfig(), seed)
    chosen = [prompt for prompt, _ in zip(_balanced(pool), range(n), strict=False)]
    cases: Cases = []
    for number, prompt in enumerate(chosen):
        case_id = f"single-{number:04d}"
        cases.append({"case_id": case_id, "prompt": prompt, "seed": _seed(seed, case_id), "n": 4 if number < repeats else 1})
    cases += _pair_cases("laterality", _lateral(pool), pairs, seed)
    cases += _pair_cases("negation", _negated(pool), pairs, seed)
    return cases


def _prompts(manifest: Manifest, config: PromptConfig, seed: int) -> dict[str, tuple[FindingLabel, ...]]:
    """Different prompts of the manifest with what they state, in random order; contradictory ones never enter."""
    pool: dict[str, tuple[FindingLabel, ...]] = {}
    order = np.random.default_rng(stable_seed("alignment prompts", seed)).permutation(len(manifest.records))
    for record in (manifest.records[i] for i in order):
        try:
            prompt = report_to_prompt(record.findings, record.impression, record.view, config)
        except ReportError:
            continue
        pool[prompt] = label_text(prompt)
    if not pool:
        raise EvaluationError(f"none of the {len(manifest)} reports of {manifest.name!r} makes a prompt")
    return pool


def _present(labels: tuple[FindingLabel, ...]) -> list[FindingLabel]:
    return [label for label in labels if label.state == "present"]


def _balanced(pool: dict[str, tuple[FindingLabel, ...]]) -> Iterator[str]:
    """Prompts in turns over (finding, side) and normal, each prompt once: rare strata come as often as common ones while they last."""
    strata: dict[tuple[str, str | None], list[str]] = defaultdict(list)
    for prompt, labels in pool.items():
        stated: list[tuple[str, str | None]] = [(label.name, label.side) for label in _present(labels)]
        for key in stated or [("normal", None)]:
            strata[key].append(prompt)
    queues = [iter(strata[key]) for key in sorted(strata, key=str)]
    used: set[str] = set()
    while queues:
        for queue in list(queues):
            fresh = next((candidate for candidate in queue if candidate not in used), None)
            if fresh is None:
                queues.remove(queue)
                continue
            used.add(fresh)
            yield fresh


def _lateral(pool: dict[str, tuple[FindingLabel, ...]]) -> dict[str, list[tuple[str, str]]]:
    """(left prompt, right prompt) by finding: one sided finding on one side, every "left" and "right" swapped, nothing else changed."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for prompt, labels in pool.items():
        sided = [label for label in _present(labels) if label.side is not None]
        if len(sided) != 1 or sided[0].name not in SIDED_FINDINGS or _ONE_SIDED_ANATOMY.search(prompt):
            continue
        swapped = _SIDE_WORD.sub(_other_side, prompt)
        if _states(swapped) == {**_states(prompt), sided[0].name: ("present", "right" if sided[0].side == "left" else "left")}:
            found[sided[0].name].append((prompt, swapped) if sided[0].side == "left" else (swapped, prompt))
    return found


def _other_side(match: re.Match[str]) -> str:
    word = match.group()
    other = "right" if word.lower() == "left" else "left"
    return other.capitalize() if word[0].isupper() else other


def _negated(pool: dict[str, tuple[FindingLabel, ...]]) -> dict[str, list[tuple[str, str]]]:
    """(present, absent) prompts by finding: the sentences that state it give way to "No ..."; nothing else changes."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for prompt, labels in pool.items():
        for label in _present(labels):
            kept = [s for s in split_sentences(prompt) if label.name not in {x.name for x in label_text(s)}]
            negated = " ".join([*kept, _NO.get(label.name, f"No {FINDING_WORDS[label.name]}.")])
            expected = {name: state for name, state in _states(prompt).items() if name != label.name and state[0] == "present"}
            now = _states(negated)
            if now.get(label.name) == ("absent", None) and {k: v for k, v in now.items() if v[0] != "absent"} == expected:
                found[label.name].append((prompt, negated))
    return found


def _states(prompt: str) -> dict[str, tuple[str, str | None]]:
    return {label.name: (label.state, label.side) for label in label_text(prompt)}


def _pair_cases(kind: str, found: dict[str, list[tuple[str, str]]], count: int, seed: int) -> Cases:
    """`count` pairs in turns over the findings."""
    if count and not found:
        raise EvaluationError(
            f"no prompt of this manifest allows a {kind} pair (one finding stated plainly, on one side or negatable)"
        )
    cases: Cases = []
    names = [name for name in FINDINGS if found.get(name)]
    number = 0
    for turn in range(max((len(found[name]) for name in names), default=0)):
        for name in names:
            if number >= count or turn >= len(found[name]):
                continue
            pair_id = f"{kind}-{number:04d}"
            for variant, prompt in zip(VARIANTS[kind], found[name][turn], strict=True):
                case = {"case_id": f"{pair_id}-{variant}", "prompt": prompt, "seed": _seed(seed, pair_id), "n": 1}
                cases.append({**case, "pair_id": pair_id, "variant": variant})
            number += 1
    return cases


def _seed(seed: int, name: str) -> int:
    return stable_seed("alignment case", seed, name) % 2**31
