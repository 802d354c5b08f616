"""Which patients a study's synthetic arms are made from: as many as its sections ask for, balanced as they ask, as lines of cases.

Every arm and section has its own patients, as long as there are enough; in a section that is `paired` all arms have the same ones. A line
carries the record it was drawn from, by which `medgen study build` finds the patient again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, Record, Split, read_manifest
from medgen.data.report_labels import label_text
from medgen.data.report_text import PromptConfig, ReportError, report_to_prompt
from medgen.data.visit_records import VisitSeries
from medgen.seeds import stable_seed
from medgen.study.material import RECORD_OF, Candidate, read_pool
from medgen.study.protocol import Arm, Protocol, ProtocolError, Section, find_manifest
from medgen.study.tasks import FEWEST_FILMS, MOST_FILMS

Line = dict[str, Any]


def arm_cases(
    protocol: Protocol, arms: Sequence[Arm], reference: Path | None, splits: tuple[Split, ...] | None = None
) -> dict[str, list[Line]]:
    """Lines of cases of each arm, by name; the same for the same protocol and manifest.

    `splits`: whose patients, if not those that the arm names. Raises `ProtocolError` where the manifest has too few.
    """
    chosen: dict[str, list[Line]] = {arm.name: [] for arm in arms}
    taken: dict[str, set[str]] = defaultdict(set)  # patients, by kind
    pools = {arm.name: _Pool(protocol, arm, reference, splits) for arm in arms}
    for section in protocol.sections:
        of_section = protocol.arms_of(section)
        drawn: dict[str, list[Record]] = {}
        for arm in (arm for arm in of_section if arm.name in chosen):
            kind, pool = protocol.kind(arm), pools[arm.name]
            wanted = -(-section.cases // len(of_section)) + section.training
            if not section.paired or kind not in drawn:
                drawn[kind] = pool.draw(section, wanted, taken[kind])
                taken[kind] |= {record.patient_id for record in drawn[kind]}
            chosen[arm.name] += [pool.line(record, section) for record in drawn[kind]]
    return chosen


class _Pool:
    """The patients that an arm may be made from, in an order that the protocol's seed draws."""

    def __init__(self, protocol: Protocol, arm: Arm, reference: Path | None, splits: tuple[Split, ...] | None) -> None:
        kind = protocol.kind(arm)
        real = Arm(name=arm.name, source="real", kind=kind, reference=arm.reference, splits=splits or arm.splits)
        found = read_pool(protocol, real, None, reference)
        manifest = read_manifest(find_manifest(protocol, arm, reference), record=RECORD_OF[kind])
        records = {record.record_id: record for record in manifest.records}
        order = np.random.default_rng(stable_seed("study cases", protocol.seed, kind)).permutation(len(found.candidates))
        self.arm, self.seed, self.root = arm, protocol.seed, manifest.root
        self.candidates = [found.candidates[i] for i in order]
        self.records: Mapping[str, Record] = records

    def draw(self, section: Section, wanted: int, taken: set[str]) -> list[Record]:
        """`wanted` records of as many new patients, every value of the section's balance in turn."""
        by_value: dict[str, list[Candidate]] = defaultdict(list)
        patients = set(taken)
        for candidate in self.candidates:
            if candidate.patient not in patients and _serves(self.records[candidate.case_id], section):
                by_value[candidate.value(section.balance) if section.balance else ""].append(candidate)
                patients.add(candidate.patient)
        if section.balance and len(by_value) > 1:
            by_value.pop("unknown", None)
        found: list[Record] = []
        queues = [iter(by_value[value]) for value in sorted(by_value)]
        while queues and len(found) < wanted:
            for queue in list(queues):
                if (candidate := next(queue, None)) is None:
                    queues.remove(queue)
                elif len(found) < wanted:
                    found.append(self.records[candidate.case_id])
        if len(found) < wanted:
            raise ProtocolError(
                f"section {section.name!r} wants {wanted} patients for arm {self.arm.name!r}, of whom the reference has only "
                f"{len(found)} more (one film, clip or series each, in the arm's splits, not used by another section); give a larger "
                "reference, other `splits`, or more `material.patients`"
            )
        return found

    def line(self, record: Record, section: Section) -> Line:
        """A record as a case: what its sampler is asked for, and who it was drawn from."""
        asked = _ASKED[type(record)](record, section)
        facts = {"patient_id": record.patient_id, "record_id": record.record_id, "section": section.name}
        facts |= {name: value for name in ("sex",) if (value := getattr(record, name, None)) is not None}
        # Of the record, not of the arm: two generators in a paired section start from the same noise.
        seed = stable_seed("study case", self.seed, record.record_id) % 2**31
        return {"case_id": record.record_id, **asked, "seed": seed, "n": 1, **facts}


def _serves(record: Record, section: Section) -> bool:
    """Whether the record has what the section's task needs."""
    if isinstance(record, CXRRecord):
        prompt = _prompt(record)
        return bool(prompt) and (section.task != "text_alignment" or any(x.state != "uncertain" for x in label_text(prompt)))
    if isinstance(record, EchoRecord):
        return record.ecg is not None and (section.task != "ejection_fraction" or record.ejection_fraction is not None)
    assert isinstance(record, VisitSeries)
    return len(record.imaged) >= (FEWEST_FILMS + 1 if section.task == "progression_order" else 2)


def _prompt(record: CXRRecord) -> str:
    try:
        return report_to_prompt(record.findings, record.impression, record.view, PromptConfig())
    except ReportError:
        return ""


def _text(record: Any, section: Section) -> Line:  # noqa: ARG001
    return {"prompt": _prompt(record)}


def _clip(record: Any, section: Section) -> Line:  # noqa: ARG001
    """The patient's ECG, ejection fraction and view; no first frame, which would make it half a copy."""
    asked = {"ecg": record.ecg, "ejection_fraction": record.ejection_fraction}
    if record.pairing == "beat_synchronous":
        asked["ecg_start"] = record.ecg_offset
    if record.view != "UNKNOWN":
        asked["view"] = record.view
    return {name: value for name, value in asked.items() if value is not None}


def _visits(record: Any, section: Section) -> Line:
    """The first half of the visits is known (fewer where the task shows several later films); the dates of the rest are asked for."""
    seen = record.imaged
    later = FEWEST_FILMS if section.task == "progression_order" else 1
    cut = max(1, min(len(seen) // 2, len(seen) - later))
    past = [{"time": v.time, "image": v.image, "date": v.date, "report": v.report, "view": v.view} for v in seen[:cut]]
    return {
        "past": [{name: value for name, value in visit.items() if value is not None} for visit in past],
        "times": [float(visit.time) for visit in seen[cut : cut + MOST_FILMS]],
        "events": [asdict(event) for event in record.events],
        "covariates": dict(record.covariates),
        "time_unit": record.time_unit,
    }


_ASKED = {CXRRecord: _text, EchoRecord: _clip, VisitSeries: _visits}
