"""The reports that a plan draws its prompts from: those of real patients, or new ones by the digital patients' own writer.

A caption of a real report carries that report's words wherever the plan, its prompts and the synthetic records go. Written captions
carry nobody's: the writer describes digital patients who are in no data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from medgen.data.records import CXRRecord, FindingLabel
from medgen.data.report_labels import label_text
from medgen.data.report_text import PromptConfig, ReportError, report_to_prompt
from medgen.digital.chest import draw_study
from medgen.digital.reports import write_report
from medgen.seeds import stable_seed

CaptionSource = Literal["reports", "written"]
FRONTAL = ("PA", "AP", "UNKNOWN")
_PROMPTS = PromptConfig(sections="both", view=True)
_labels = lru_cache(maxsize=65536)(label_text)  # reports repeat, and reading one takes milliseconds
_WORDS = {"F": "woman", "M": "man"}


def present_sides(labels: Iterable[FindingLabel]) -> dict[str, str | None]:
    """Side (None: has none, or it is not said) of every finding that is stated present."""
    return {label.name: label.side for label in labels if label.state == "present"}


def kind_of(labels: Iterable[FindingLabel]) -> Literal["abnormal", "normal", "in doubt"]:
    """Abnormal: a finding is present; normal: none is, without any doubt; else in doubt."""
    stated = {label.state for label in labels}
    return "abnormal" if "present" in stated else "in doubt" if "uncertain" in stated else "normal"


@dataclass(frozen=True)
class Caption:
    """What one report says, as a prompt after its view; `labels` are read from exactly these words, so no label lacks its words."""

    findings: str
    impression: str
    text: str
    labels: tuple[FindingLabel, ...]
    sex: Literal["F", "M"] | None
    age: float | None  # years
    source: str  # a study, so that repeats can be counted; it stays in memory

    @property
    def present(self) -> dict[str, str | None]:
        """Side (None: has none, or it is not said) by finding that is stated present."""
        return present_sides(self.labels)

    def prompt(self, view: str, person: bool) -> str:
        """The words after the view's ("PA chest X-ray.") and, if asked, the person's ("67-year-old woman.")."""
        who = f"{round(self.age)}-year-old {_WORDS[self.sex]}. " if person and self.sex and self.age is not None else ""
        return f"{view} chest X-ray. {who}{self.text}"


def _claims(labels: Iterable[FindingLabel]) -> set[tuple[str, str, str | None]]:
    return {(label.name, label.state, label.side) for label in labels if label.state != "absent"}


def caption(findings: str, impression: str, sex: Literal["F", "M"] | None, age: float | None, source: str) -> Caption:
    """A report as a caption. Raises `ReportError` if no words about the image remain."""
    prefix = "PA chest X-ray."  # as long in tokens as any other view's
    text = report_to_prompt(findings, impression, "PA", _PROMPTS).removeprefix(prefix).strip()
    return Caption(findings, impression, text, _labels(text), sex, age, source)


def real_captions(records: Sequence[CXRRecord]) -> list[Caption]:
    """One caption for every study among frontal `records`; reports without words are left out."""
    found = []
    for record in {record.study_id: record for record in records if record.view in FRONTAL}.values():
        try:
            found.append(caption(record.findings, record.impression, record.sex, record.age, record.study_id))
        except ReportError:
            continue
    return found


def written_captions(count: int, seed: int) -> list[Caption]:
    """`count` reports about digital patients drawn from `seed`; no film of them exists.

    The few in which our labeller reads another finding, side or doubt than the writer meant are left out. It may read more denials
    ("clear lungs and normal heart" has no cardiomegaly), and those hold: otherwise hardly a normal report would remain.
    """
    found = []
    for index in range(count):
        study = draw_study(stable_seed("augmentation captions", seed) % 2**31, index)
        findings, impression, labels = write_report(study)
        one = caption(findings, impression, study.patient.sex, study.patient.age, study.study_id)
        if _claims(labels) == _claims(one.labels):
            found.append(one)
    return found
