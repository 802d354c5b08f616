"""The measures of the augmentation report: as scikit-learn's on every resample, and intervals that hold what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made_up_runs import skill_for, true_auroc, write_runs
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from medgen.augmentation import measures
from medgen.augmentation.claims import holm
from medgen.augmentation.predictions import Films, read_experiment


@pytest.fixture(scope="module")
def scored():
    """Truth and scores [60] with many ties, and weights [20,60]."""
    rng = np.random.default_rng(1)
    truth = rng.random(60) < 0.3
    scores = np.round((truth * 0.3 + rng.random(60)) / 1.4, 1)
    return truth, scores, rng.integers(0, 4, (20, 60)).astype(float)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(measures.auroc, roc_auc_score), (measures.auprc, average_precision_score), (measures.brier, brier_score_loss)],
)
def test_measures_are_scikit_learns_on_every_resample(scored, ours, theirs):
    truth, scores, weights = scored
    assert ours(truth, scores, weights) == pytest.approx([theirs(truth, scores, sample_weight=w) for w in weights])


def test_calibration_error_is_the_distance_of_a_probability_from_what_happens():
    rng = np.random.default_rng(2)
    told = rng.random(200_000)
    happens = rng.random(200_000) < told
    everyone = np.ones((1, len(told)))
    assert measures.ece(happens, told, everyone)[0] < 0.005
    assert measures.ece(happens, 0.5 * told, everyone)[0] == pytest.approx(0.25, abs=0.01)


def test_threshold_is_where_both_classes_come_apart():
    truth, scores = np.array([False] * 6 + [True] * 4), np.array([0.1, 0.1, 0.2, 0.2, 0.3, 0.9, 0.5, 0.6, 0.7, 0.8])
    cut = measures.threshold(truth, scores)
    assert 0.3 < cut < 0.5
    sensitivity, specificity = measures.recall(truth, scores, np.ones((1, 10)), cut)
    assert (sensitivity[0], specificity[0]) == (1.0, pytest.approx(5 / 6))


def test_resample_takes_all_films_of_a_patient_or_none():
    patients = np.array(["a", "a", "b", "c", "c", "c"])
    weights = measures.resampled(Films((), patients, np.zeros((6, 1), bool), np.ones((6, 1), bool)), 50)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()


def test_interval_of_one_seed_leaves_trainings_out_and_that_of_three_holds_them():
    rng = np.random.default_rng(3)
    among_patients = rng.normal(0, 0.01, 501)
    one = measures.spread(0.8 + among_patients[None], 300)
    three = measures.spread(np.array([0.75, 0.8, 0.85])[:, None] + among_patients, 300)
    assert one.seeds == 1 and one.high - one.low == pytest.approx(4 * 0.01, rel=0.1)
    assert three.high - three.low > 2 * 4.3 * 0.05 / 3**0.5 * 0.8  # Student's t of three, not a normal's 1.96
    assert three.se_patients == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("gain", [0.0, 0.05])
def test_intervals_of_a_paired_difference_cover_the_true_one(tmp_path: Path, gain: float):
    """Other patients and other trainings every time; 95 % of the intervals should hold the truth, few should not."""
    truth = true_auroc(skill_for(0.75 + gain)) - true_auroc(skill_for(0.75))
    found = []
    for draw in range(32):
        out = write_runs(
            tmp_path / str(draw),
            {("real", 0.1): 0.75, ("mixed-1x", 0.1): 0.75 + gain},
            patients=40,
            draw=draw,
            sets=("val", "test"),
        )
        found.append(measures.measure(read_experiment(out), 120).difference("mixed-1x", "real", 0.1, "test", "auroc"))
    assert np.mean([one.low <= truth <= one.high for one in found]) >= 0.87
    assert np.mean([one.value for one in found]) == pytest.approx(truth, abs=0.01)


def test_pairing_makes_a_difference_surer_than_its_parts(tmp_path: Path):
    out = write_runs(tmp_path, {("real", 0.1): 0.75, ("mixed-1x", 0.1): 0.8}, patients=80, sets=("val", "test"))
    measured = measures.measure(read_experiment(out), 300)
    parts = [measured.estimate(arm, 0.1, "test", "auroc").se_patients for arm in ("real", "mixed-1x")]
    assert measured.difference("mixed-1x", "real", 0.1, "test", "auroc").se_patients < 0.8 * float(np.hypot(*parts))


def test_holm_is_holms():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, float("nan")])[0] == pytest.approx(0.02)  # what could not be measured was still meant
