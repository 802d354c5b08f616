"""The standard evaluation cases: held-out reports as they occur, more of what is rare, and pairs that change one thing.

`purpose`, `pair_id` and `variant` (left/right, present/absent) travel through sampling into metadata.jsonl, where evaluation finds them.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
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
    reference: Path,
    out: Path,
    n: int = 200,
    pairs: int = 60,
    repeats: int = 8,
    least: int = 10,
    seed: int = 0,
    split: Split | None = "test",
) -> Path:
    """Write evaluation cases for `medgen sample text-to-cxr --cases` from the reports of a held-out manifest.

    Args:
        reference: manifest whose reports become prompts.
        out: file to write (.jsonl).
        n: prompts drawn as they occur, one per patient: images of these are compared with the real population.
        pairs: laterality pairs, and as many negation pairs.
        repeats: prompts of which four images are sampled, for diversity.
        least: further prompts are added until every finding (on every side) that the manifest knows is asked for so often.
        seed: of the choice of prompts and of the noise.
        split: which split of the manifest; all of it with None.
    """
    cases = alignment_cases(read_manifest(reference, split), n, seed, pairs, repeats, least)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    return out


def alignment_cases(
    manifest: Manifest,
    n: int = 200,
    seed: int = 0,
    pairs: int = 60,
    repeats: int = 8,
    least: int = 10,
    prompts: PromptConfig | None = None,
) -> Cases:
    """Case lines with a `purpose`: "population" (as the reports come), "rare" (to have enough of everything), "pair".

    Both images of a pair share one seed, so they start from the same noise. Raises `EvaluationError` where the manifest has no
    prompt that can be used.
    """
    drawn = _prompts(manifest, prompts or PromptConfig(), seed)
    pool = {prompt: label_text(prompt) for prompt, _ in drawn}
    one_each = {patient: prompt for prompt, patient in reversed(drawn)}  # the first of each patient, in random order
    population = list(reversed(one_each.values()))[:n]
    cases: Cases = []
    for purpose, chosen in (("population", population), ("rare", _rare(pool, population, least))):
        for number, prompt in enumerate(chosen):
            case_id, count = f"{purpose}-{number:04d}", 4 if purpose == "population" and number < repeats else 1
            case = {"case_id": case_id, "prompt": prompt, "seed": _seed(seed, case_id), "n": count, "purpose": purpose}
            cases.append(case)
    cases += _pair_cases("laterality", _lateral(pool), pairs, seed)
    cases += _pair_cases("negation", _negated(pool), pairs, seed)
    return cases


def _prompts(manifest: Manifest, config: PromptConfig, seed: int) -> list[tuple[str, str]]:
    """(prompt, patient) of every report that makes one, in random order."""
    drawn: list[tuple[str, str]] = []
    order = np.random.default_rng(stable_seed("alignment prompts", seed)).permutation(len(manifest.records))
    for record in (manifest.records[i] for i in order):
        try:
            drawn.append((report_to_prompt(record.findings, record.impression, record.view, config), record.patient_id))
        except ReportError:
            continue
    if not drawn:
        raise EvaluationError(f"none of the {len(manifest)} reports of {manifest.name!r} makes a prompt")
    return drawn


def _present(labels: tuple[FindingLabel, ...]) -> list[FindingLabel]:
    return [label for label in labels if label.state == "present"]


def _rare(pool: dict[str, tuple[FindingLabel, ...]], population: list[str], least: int) -> list[str]:
    """Further prompts until every (finding, side) of the pool, and normal, is asked for `least` times, while prompts last."""

    def strata(prompt: str) -> list[tuple[str, str | None]]:
        return [(label.name, label.side) for label in _present(pool[prompt])] or [("normal", None)]

    counts = Counter(key for prompt in population for key in strata(prompt))
    wanted = sorted({key for prompt in pool for key in strata(prompt)}, key=str)
    unused = [prompt for prompt in pool if prompt not in set(population)]
    chosen: list[str] = []
    for key in wanted:
        for prompt in [prompt for prompt in unused if key in strata(prompt)]:
            if counts[key] >= least:
                break
            chosen.append(prompt)
            unused.remove(prompt)
            counts.update(strata(prompt))
    return chosen


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
                cases.append({**case, "purpose": "pair", "pair_id": pair_id, "variant": variant})
            number += 1
    return cases


def _seed(seed: int, name: str) -> int:
    return stable_seed("alignment case", seed, name) % 2**31
