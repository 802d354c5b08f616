"""Reports of digital patients say what is there, in varied words, and the text labeller reads it back."""

from __future__ import annotations

import pytest

from medgen.data.report_labels import label_text
from medgen.digital.chest import draw_study
from medgen.digital.patient import Finding, Study, draw_patient
from medgen.digital.reports import size_word, write_report


def report(*findings: Finding, paraphrase: int = 0):
    return write_report(Study(draw_patient(0, 1), "s", findings), paraphrase)


def test_side_size_and_finding_are_named():
    findings, impression, labels = report(Finding("pleural_effusion", 0.9, "left"))
    assert "left" in impression.lower()
    assert "large" in impression.lower() or "fluid" in impression.lower()
    assert ("pleural_effusion", "present", "left", "large") in [(x.name, x.state, x.side, x.size) for x in labels]
    assert impression.rstrip(".").lower() in findings.lower()


def test_paraphrases_differ():
    assert len({report(Finding("edema", 0.5), paraphrase=k)[1] for k in range(12)}) >= 3


def test_normal_studies_have_only_negatives():
    _, _, labels = report()
    assert labels
    assert {label.state for label in labels} == {"absent"}


@pytest.mark.parametrize(("severity", "word"), [(0.2, "small"), (0.5, "moderate"), (1.0, "large")])
def test_size_words(severity, word):
    assert size_word(severity) == word


def test_labeller_recovers_the_truth_of_the_grammar():
    """Two hundred reports: what the labeller reads in the findings section is what the study holds."""
    wrong = []
    for index in range(200):
        study = draw_study(11, index)
        findings, _, truth = write_report(study)
        said = {label.name: (label.state, label.side) for label in truth}
        read = {label.name: (label.state, label.side) for label in label_text(findings)}
        wrong += [
            (findings, name, said.get(name), read.get(name))
            for name in said.keys() | read.keys()
            if said.get(name) != read.get(name)
        ]
    assert not wrong, f"{len(wrong)} disagreements, the first: {wrong[:3]}"
