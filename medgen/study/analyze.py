"""From readers' CSV files and the answer key to one report that says what the study shows, and what it does not.

Nothing is read before it has been checked against the pack (`responses`). Claims of equivalence go through the margin of the frozen
protocol, and both through readers alone and through readers and cases; a large p value is never one.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medgen.evaluation.statistics import Estimate
from medgen.study.measures import Detecting
from medgen.study.responses import Answer, Pack, ResponseError, read_key, read_pack, read_responses, write_csv
from medgen.study.sections import Section, sections
from medgen.study.statistics.equivalence import Equivalence
from medgen.study.statistics.proportions import Mean, Share


@dataclass(frozen=True)
class Analysis:
    """All that was measured. `notes`: what was put right or left out; `missing`: unanswered required questions per reader."""

    facts: Mapping[str, Any]
    margin: float
    sections: tuple[Section, ...]
    missing: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...]
    simulated: bool


def analyze(pack: Path, responses: tuple[Path, ...], key: Path, out: Path, margin: float | None = None) -> None:
    """Analyse readers' answers: metrics.json, report.html, and CSVs for iMRMC and MRMCaov.

    Args:
        pack: the folder that `medgen study build` wrote, as it was read.
        responses: CSV files that readers saved, or the server's responses.csv.
        key: the pack's .key.json.
        out: folder for the results.
        margin: only where the protocol states none: the equivalence margin as a share (0.1 = 10 points).
    """
    from medgen.study.report import render

    opened = read_pack(pack)
    truth = read_key(key, opened)
    answers, notes = read_responses(responses, opened)
    result = analysis(opened, truth, answers, tuple(notes), _margin(opened, margin))
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "metrics.json").write_text(json.dumps(as_json(result), indent=2, ensure_ascii=False) + "\n", "utf-8")
    (Path(out) / "report.html").write_text(render(result), "utf-8")
    export_scores(result.sections, Path(out))
    print(f"{len(answers)} answers of {result.facts['readers']} readers; report in {Path(out) / 'report.html'}")


def _margin(pack: Pack, given: float | None) -> float:
    """The protocol's margin; one given afterwards may not replace it."""
    frozen = pack.protocol.get("margin")
    if frozen is None and given is None:
        raise ResponseError(
            f"the protocol of {pack.folder} states no equivalence margin; give one as --margin, and say so when reporting"
        )
    if frozen is not None and given is not None and float(frozen) != given:
        raise ResponseError(
            f"--margin {given} is not the protocol's {frozen}, which was frozen before reading; leave the option out"
        )
    return float(frozen if frozen is not None else given)  # type: ignore[arg-type]


def analysis(pack: Pack, key: Mapping[str, Any], answers: Sequence[Answer], notes: tuple[str, ...], margin: float) -> Analysis:
    """Every section measured; missing answers counted per reader."""
    readers = [reader for reader in pack.orders if any(a.reader == reader for a in answers)]
    given = {(a.reader, a.item, a.question) for a in answers}
    missing = {}
    for reader in readers:
        required = [
            (reader, item, q["id"])
            for item in pack.orders[reader]
            if not pack.items[item].get("training")
            for q in pack.items[item]["questions"]
            if q.get("required", True)
        ]
        missing[reader] = (len(required) - len(given.intersection(required)), len(required))
    silent = [reader for reader in pack.orders if reader not in readers]
    if silent:
        notes += (f"no answers from {len(silent)} of {len(pack.orders)} readers: {', '.join(silent)}",)
    labels = {a.session for a in answers} | {a.file for a in answers} | set(readers)
    facts = {
        "study": pack.study_id,
        "title": pack.title,
        "pack": pack.sha256,
        "readers": len(readers),
        "answers": len(answers),
        "cases": sum(not shown.get("training") for shown in pack.items.values()),
        "margin": margin,
        "response_files": sorted({a.file for a in answers}),
        "protocol": pack.protocol.get("hypotheses", ""),
    }
    return Analysis(
        facts,
        margin,
        tuple(sections(pack, key, answers, margin)),
        missing,
        notes,
        any("simulated" in label.lower() for label in labels),
    )


def as_json(value: Any) -> Any:
    """Plain JSON of results: intervals spelled out, NaN as null, arrays as lists."""
    if isinstance(value, Mean):
        return {**as_json(value.interval()), "standard_error": as_json(value.standard_error), "df": as_json(value.df)}
    if isinstance(value, Share):
        return {**_fields(value), "value": as_json(value.value)}
    if isinstance(value, Equivalence):
        return {**_fields(value), "verdict": value.verdict}
    if isinstance(value, Section):
        return {k: v for k, v in _fields(value).items() if k != "scores"}
    if isinstance(value, Estimate):
        return {k: as_json(v) for k, v in value.as_dict().items()}
    if dataclasses.is_dataclass(value):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value) if field.name != "scores"}


def export_scores(found: Sequence[Section], out: Path) -> None:
    """imrmc*.csv (readerID, caseID, modalityID, score; truth rows first) and mrmcaov*.csv (reader, test, case, truth, rating).

    Several synthetic arms are several modalities, each with all the real cases; cases seen twice count once, by their first reading.
    """
    detected = [section for section in found if isinstance(section.result, Detecting) and section.scores is not None]
    for section in detected:
        assert section.scores is not None
        suffix = "" if len(detected) == 1 else "_" + re.sub(r"\W+", "-", section.name)
        scores, cases = section.scores, section.scores.table
        arms = list(dict.fromkeys(arm for arm, signal in zip(cases.arms, scores.truth, strict=True) if signal))
        split = section.task == "real_or_synthetic" and len(arms) > 1
        modalities = (
            {arm: (np.array(cases.arms) == arm) | ~scores.truth for arm in arms} if split else {section.name: scores.truth >= 0}
        )
        long = [
            (reader, modality, cases.items[i], int(scores.truth[i]), scores.ratings[i, j])
            for modality, rows in modalities.items()
            for j, reader in enumerate(cases.readers)
            for i in np.flatnonzero(rows & np.isfinite(scores.ratings[:, j]))
        ]
        truth = [("truth", item, "truth", int(signal)) for item, signal in zip(cases.items, scores.truth, strict=True)]
        imrmc = truth + [(reader, case, modality, f"{score:g}") for reader, modality, case, _, score in long]
        write_csv(out / f"imrmc{suffix}.csv", ("readerID", "caseID", "modalityID", "score"), imrmc)
        rows = [(reader, modality, case, signal, f"{score:g}") for reader, modality, case, signal, score in long]
        write_csv(out / f"mrmcaov{suffix}.csv", ("reader", "test", "case", "truth", "rating"), rows)
