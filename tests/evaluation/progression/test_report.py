"""The page stands alone and shows each patient's past, truth and futures, fans, pairs and sequences."""

from __future__ import annotations

import re

import pytest

from medgen.evaluation.progression.evaluate import evaluate
from medgen.evaluation.progression.plots import named


@pytest.fixture(scope="module")
def html(tmp_path_factory, true_follow_ups, reference, judge):
    return evaluate(true_follow_ups, reference, tmp_path_factory.mktemp("report"), str(judge), split="all").read_text()


def test_it_stands_alone(html):
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", html)
    text = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r">[^<]*\bnan\b[^<]*<", text, re.IGNORECASE)


def test_every_patient_has_past_truth_futures_and_a_fan(html):
    rows = html.count('<article class="patient">')
    assert rows >= 6
    for tag in (">past</p>", ">what came</p>", "of the futures · SYNTHETIC</p>"):
        assert html.count(tag) == rows
    assert html.count('<div class="fan"><svg') == rows


def test_every_baseline_stands_beside_the_forecast(html):
    for method in ("forecast: middle of the futures", "forecast: one future", "copy the last visit", "straight line"):
        assert html.count(method) >= 4


def test_pairs_and_sequences_are_shown_and_named_for_what_they_are(html):
    assert "model response" in html and "not a causal effect" in html
    assert "12 steps, autoregressive" in html and "between two known visits" in html
    assert "✓ met" in html and "Research only" in html


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pleural_effusion_ml", "pleural effusion (mL)"),
        ("nodule_mm3", "nodule (mm³)"),
        ("cardiothoracic_ratio", "cardiothoracic ratio"),
    ],
)
def test_biomarkers_are_named_with_their_units(name, said):
    assert named(name) == said
