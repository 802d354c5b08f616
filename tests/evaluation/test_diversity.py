"""Diversity: equal images score 1, prompts with one image are not measured, real pairs are different patients."""

from __future__ import annotations

import pytest
from toy_films import film, write_generated, write_reference

from medgen.data.records import read_manifest
from medgen.evaluation.diversity import _same_findings, diversity
from medgen.evaluation.images import read_generated, reference_set


def generated(tmp_path, name: str, seeds: list[int]):
    entries = [{"case_id": f"c{i % 4}", "trajectory": i // 4, "prompt": "Normal."} for i in range(8)]
    return read_generated(write_generated(tmp_path / name, entries, [film("left", False, seed) for seed in seeds]))


def test_a_model_that_repeats_one_patient_scores_one_and_a_varied_one_less(tmp_path, reference):
    real = reference_set(read_manifest(reference), 32)
    same = diversity(generated(tmp_path, "same", [0, 1, 2, 3, 0, 1, 2, 3]), real, 32)
    varied = diversity(generated(tmp_path, "varied", list(range(8))), real, 32)
    assert same is not None
    assert varied is not None
    assert same.generated.value == pytest.approx(1.0, abs=1e-4)
    assert varied.generated.value < 0.9
    assert same.real.value == varied.real.value < 0.95


def test_real_pairs_show_the_same_findings_in_different_patients(tmp_path):
    real = reference_set(read_manifest(write_reference(tmp_path / "r", 24, "test", 0)), 32)
    pairs = _same_findings(real)
    assert pairs
    for a, b in pairs:
        assert real.groups[a] != real.groups[b]
        assert real.metadata[a]["labels"] == real.metadata[b]["labels"]


def test_single_images_per_prompt_are_not_measured(tmp_path, reference):
    entries = [{"case_id": f"c{i}", "prompt": "Normal."} for i in range(4)]
    single = read_generated(write_generated(tmp_path / "s", entries, [film(None, False, i) for i in range(4)]))
    assert diversity(single, reference_set(read_manifest(reference), 32), 32) is None
