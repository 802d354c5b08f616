"""Standard cases: balanced prompts, pairs that differ in one thing, one seed per pair, always the same file."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import cycle, islice

import pytest

from medgen.data.records import CXRRecord, write_manifest
from medgen.data.report_labels import label_text
from medgen.evaluation.cases import write_alignment_cases
from medgen.evaluation.images import EvaluationError

REPORTS = (
    *("No acute cardiopulmonary abnormality.",) * 12,
    "Small left pleural effusion. No pneumothorax.", "Large right pneumothorax with a visible pleural line.",
    "Moderate consolidation in the right lower lobe. The heart size is normal.", "12 mm nodule in the left upper lobe.",
    "Severe cardiomegaly. No pleural effusion.", "Mild pulmonary edema.", "Moderate hyperinflation of the lungs.",
    "Moderate atelectasis of the left lower lobe.", "Nodule in the right middle lobe, 9 mm.",
    "Possible right pleural effusion.", "Bilateral pleural effusions.",
    "Small right pleural effusion. Moderate cardiomegaly.", "Left pneumothorax. Right pleural effusion.",
)  # fmt: skip


@pytest.fixture
def manifest(tmp_path):
    texts = [f"{text} Film {i}." for i, text in enumerate(islice(cycle(REPORTS), 3 * len(REPORTS)))]
    records = [CXRRecord(f"r{i}", f"p{i}", f"s{i}", "a.png", "PA", text, "", "test") for i, text in enumerate(texts)]
    return write_manifest(records, tmp_path / "manifest.jsonl", name="reports", source="test")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def present(prompt: str) -> dict[str, str | None]:
    return {label.name: label.side for label in label_text(prompt) if label.state == "present"}


def test_the_population_is_drawn_as_it_occurs_and_what_is_rare_is_added(manifest, tmp_path):
    cases = read(write_alignment_cases(manifest, tmp_path / "cases.jsonl", n=40, pairs=4, least=3))
    drawn, rare = ([case for case in cases if case["purpose"] == purpose] for purpose in ("population", "rare"))
    assert len(drawn) == 40
    normal = sum(not present(case["prompt"]) for case in drawn) / 40
    assert 0.3 < normal < 0.75  # half of the reports are normal
    assert rare
    assert all(present(case["prompt"]) for case in rare)
    strata = Counter(key for case in [*drawn, *rare] for key in present(case["prompt"]).items())
    assert min(strata.values()) >= 3
    assert len({case["prompt"] for case in [*drawn, *rare]}) == len(drawn) + len(rare)
    assert Counter(case["n"] for case in cases) == {4: 8, 1: len(cases) - 8}


def test_every_patient_is_asked_for_once(tmp_path):
    records = [CXRRecord(f"r{i}", f"p{i // 4}", "s", "a.png", "PA", f"{REPORTS[-2]} Film {i}.", "", "test") for i in range(40)]
    path = write_manifest(records, tmp_path / "manifest.jsonl", name="four films each", source="test")
    cases = read(write_alignment_cases(path, tmp_path / "cases.jsonl", n=40, pairs=0, least=0))
    assert len(cases) == 10


def test_laterality_pairs_swap_the_side_and_nothing_else(manifest, tmp_path):
    cases = read(write_alignment_cases(manifest, tmp_path / "cases.jsonl", n=5, pairs=8))
    lateral = [case for case in cases if case.get("pair_id", "").startswith("laterality")]
    assert len(lateral) == 16
    for left, right in zip(lateral[::2], lateral[1::2], strict=True):
        assert (left["variant"], right["variant"]) == ("left", "right")
        assert left["seed"] == right["seed"]
        assert re.sub("left", "right", left["prompt"].lower()) == right["prompt"].lower()
        assert "middle lobe" not in left["prompt"]  # there is none on the left
        (name, side), *others = [item for item in present(left["prompt"]).items() if item[1]]
        assert not others
        assert side == "left"
        assert present(right["prompt"])[name] == "right"


def test_negation_pairs_deny_one_finding_and_keep_the_others(manifest, tmp_path):
    cases = read(write_alignment_cases(manifest, tmp_path / "cases.jsonl", n=5, pairs=10))
    negated = [case for case in cases if case.get("pair_id", "").startswith("negation")]
    assert len(negated) == 20
    for asserted, denied in zip(negated[::2], negated[1::2], strict=True):
        assert (asserted["variant"], denied["variant"]) == ("present", "absent")
        gone = present(asserted["prompt"]).keys() - present(denied["prompt"]).keys()
        assert len(gone) == 1
        assert next(label.state for label in label_text(denied["prompt"]) if label.name in gone) == "absent"
        assert present(denied["prompt"]).items() <= present(asserted["prompt"]).items()


def test_the_same_seed_gives_the_same_file_and_another_seed_another(manifest, tmp_path):
    first, again, other = (
        write_alignment_cases(manifest, tmp_path / f"{i}.jsonl", n=9, pairs=3, seed=s) for i, s in enumerate((1, 1, 2))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_the_sampler_reads_them(manifest, tmp_path):
    from medgen.sampling.cases import TextConditions, read_cases

    cases = read_cases(write_alignment_cases(manifest, tmp_path / "cases.jsonl", n=4, pairs=2), TextConditions)
    assert {case.extra.get("variant") for case in cases} == {None, "left", "right", "present", "absent"}


def test_reports_without_a_sided_finding_make_no_pairs(tmp_path):
    record = CXRRecord("r", "p", "s", "a.png", "PA", "Normal chest radiograph.", "", "test")
    path = write_manifest([record], tmp_path / "manifest.jsonl", name="normal", source="test")
    with pytest.raises(EvaluationError, match="no prompt of this manifest allows a laterality pair"):
        write_alignment_cases(path, tmp_path / "cases.jsonl")
