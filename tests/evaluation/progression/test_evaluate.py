"""The whole evaluation on generators whose quality is known: a prophet makes no error, a copier scores what copying must score."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from generators import generate, generate_volumes, prophet

from medgen.data.visit_images import VisitPreprocessing
from medgen.digital.progression import write_dataset
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.progression import controls
from medgen.evaluation.progression.baselines import NEIGHBOURS, JudgeError, copy_last, extrapolate
from medgen.evaluation.progression.cases import write_progression_cases
from medgen.evaluation.progression.collect import Reader, Sampled, read_real
from medgen.evaluation.progression.evaluate import READABLE, evaluate
from medgen.evaluation.progression.patients import read_patients
from medgen.evaluation.progression.scores import below, means
from medgen.models.film_meter import load_film_meter


@pytest.fixture(scope="module")
def good(tmp_path_factory, true_follow_ups, copies, reference, judge):
    out = tmp_path_factory.mktemp("good")
    page = evaluate(true_follow_ups, reference, out, str(judge), regressor=copies, split="all")
    return page, json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def bad(tmp_path_factory, copies, reference, judge):
    out = tmp_path_factory.mktemp("bad")
    evaluate(copies, reference, out, str(judge), split="all")
    return json.loads((out / "metrics.json").read_text())


def test_who_knows_what_comes_makes_no_error(good):
    _, metrics = good
    assert metrics["pictures"]["forecast"]["mae"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["changed_pictures"]["forecast"]["delta_ssim"]["value"] == pytest.approx(1, abs=1e-4)
    assert metrics["changed_pictures"]["forecast"]["auroc"]["value"] > 0.99
    assert metrics["biomarkers"]["normalised"]["forecast"]["value"] == pytest.approx(0, abs=1e-4)
    assert metrics["biomarkers"]["below"]["copy_last"]["value"] > 0.99
    assert metrics["zero_gap"]["ssim"]["value"] == pytest.approx(1, abs=1e-4)
    assert metrics["identity"]["generated"]["value"] == metrics["identity"]["real"]["value"]


def test_copying_scores_what_copying_must(bad, good):
    changed = bad["changed_pictures"]["forecast"]
    assert changed["auroc"]["value"] == pytest.approx(0.5)
    assert changed["rank_error"]["value"] == pytest.approx(0.5)
    assert changed["relative_error"]["value"] == pytest.approx(1)
    errors = bad["biomarkers"]["normalised"]
    assert errors["forecast"]["value"] == pytest.approx(errors["copy_last"]["value"], rel=1e-3)
    assert bad["biomarkers"]["below"]["copy_last"]["value"] == pytest.approx(0, abs=1e-3)
    assert bad["longer_gap"]["right"]["value"] == 0
    assert bad["identity"]["generated"]["value"] == 1
    assert {t["name"]: t["met"] for t in bad["targets"]}[
        "Brighter or darker where it changed, changed patients: AUROC (copying: 0.5)"
    ] is False
    # a folder of the same cases is read as the regressor's
    assert good[1]["biomarkers"]["normalised"]["regressor"]["value"] == pytest.approx(errors["forecast"]["value"], rel=1e-3)


def test_futures_without_width_cover_nothing(bad):
    assert bad["calibration"]["draws"] == 4
    assert bad["calibration"]["seen"]["coverage"]["0.8"]["value"] < 0.4
    errors = bad["calibration"]["realised"]["crps"]
    assert errors["forecast"]["value"] == pytest.approx(errors["copy_last"]["value"], rel=1e-3)  # CRPS of one value is its error


def test_the_simulators_own_futures_are_the_best_there_is(good):
    bands = good[1]["calibration"]["seen"]["crps"]
    assert bands["ideal"]["value"] < min(bands[name]["value"] for name in ("copy_last", "linear"))


def test_blends_between_two_visits_lead_from_one_to_the_other(good):
    between = good[1]["between"]
    assert between["ends"]["value"] == pytest.approx(1, abs=1e-4)
    assert between["monotone"]["value"] >= between["strictly"]["value"] > 0


def test_rollouts_of_the_same_films_do_not_drift_apart(bad):
    drift = bad["rollout"]["drift"]
    assert drift["joint"]["brightness"]["value"] == drift["autoregressive"]["brightness"]["value"] == 0
    assert {"heart area", "lung area", "sharpness"} <= set(drift["joint"])


def test_removed_visits_cost_a_copier_what_they_cost_the_baseline(bad):
    assert bad["missing"]["growth"]["value"] == pytest.approx(bad["missing"]["copy_last"]["value"], abs=1e-3)


def test_what_was_not_sampled_is_said(tmp_path, cases, reference, judge):
    few = generate(cases, reference, tmp_path / "few", prophet, purposes=("forecast",), n=1)
    page = evaluate(few, reference, tmp_path / "out", str(judge), split="all")
    metrics = json.loads((page.parent / "metrics.json").read_text())
    assert metrics["calibration"] is None and metrics["treatment"] is None
    for words in ("a gap of zero", "treatments on and off", "several futures", "--regressor", "--pipeline"):
        assert words in metrics["warnings"][0]
    assert "not measured" in page.read_text()


def test_folders_that_do_not_fit_are_named(tmp_path, true_follow_ups, reference, judge):
    other = tmp_path / "other"
    shutil.copytree(true_follow_ups, other)
    lines = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(re.sub(r'"record_id": "[^"]*"', '"record_id": "nobody"', lines))
    with pytest.raises(EvaluationError, match="none of its"):
        evaluate(other, reference, tmp_path / "out", str(judge), split="all")
    with pytest.raises(EvaluationError, match="no film meter"):
        evaluate(true_follow_ups, reference, tmp_path / "out", "no-such-judge", split="all")


def test_a_manifest_without_truth_is_read_by_the_judge(tmp_path, reference, judge):
    from dataclasses import replace

    reader = Reader(VisitPreprocessing(size=64), load_film_meter(judge, "cpu"), tmp_path)
    patients = read_patients(reference, None)[:2]
    blank = [
        replace(p, series=replace(p.series, visits=tuple(replace(v, truth={}) for v in p.series.visits)), futures=None)
        for p in patients
    ]
    for one in read_real(blank, reader).values():
        assert (one.truth("cardiothoracic_ratio") == one.readings["cardiothoracic_ratio"]).all()


def test_volumes_are_measured_by_their_hu(tmp_path):
    reference = write_dataset(tmp_path / "ct", 3, seed=1384, dim=3, size=32, futures=8, processes=1)
    cases = write_progression_cases(reference, tmp_path / "cases", trajectories=1, pairs=1, controls=2, rollouts=1, split=None)
    page = evaluate(generate_volumes(cases, reference, tmp_path / "made"), reference, tmp_path / "out", split="all")
    metrics = json.loads((page.parent / "metrics.json").read_text())
    assert metrics["facts"]["judge"] == "HU threshold" and metrics["identity"] is None
    assert list(metrics["biomarkers"]["spread"]) == ["aerated_lung_ml"]
    assert metrics["biomarkers"]["normalised"]["forecast"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["biomarkers"]["normalised"]["copy_last"]["value"] > 0
    assert metrics["pictures"]["forecast"]["ssim"]["value"] == pytest.approx(1, abs=1e-4)
    assert page.read_text().count('<article class="patient">') >= 3


def test_what_the_judge_cannot_read_is_nobodys_primary(bad):
    fit = bad["judge_fit"]
    unread = [name for name, r2 in fit.items() if r2 < READABLE]
    told = " ".join(bad["warnings"])
    assert set(fit) == set(bad["biomarkers"]["spread"])
    assert all(name in told for name in unread) or len(unread) == len(fit)


def test_a_straight_line_goes_on_and_stays_in_range():
    past = np.array([[0.2, 0.9], [0.3, 0.95]])
    assert extrapolate([0, 10], past, [20, 30], 0, 1) == pytest.approx(np.array([[0.4, 1.0], [0.5, 1.0]]))
    assert extrapolate([5], past[:1], [20]) == pytest.approx(past[:1])
    assert copy_last(past, 3).shape == (3, 2)


def test_the_judges_error_is_drawn_from_films_of_about_that_value():
    truth = np.concatenate([np.zeros(100), np.linspace(100, 200, 100)])
    error = JudgeError.of(truth, truth + np.where(truth > 0, 10, 1))
    seen = error.seen(np.array([[0.0, 150.0], [0.0, 199.0]]), np.random.default_rng(0))
    assert (seen == [[1, 160], [1, 209]]).all()
    assert JudgeError.of(truth[: NEIGHBOURS - 1], truth[: NEIGHBOURS - 1]) is None


def _pair(moves, direction=-1):
    def case(variant, value):
        line = {"purpose": "treatment", "record_id": "a", "pair_id": "a", "variant": variant, "biomarker": "edema_ml"}
        line |= {"direction": direction, "truth_change": -50.0, "frames": [{"time": 1.0}]}
        return Sampled(line, ((),), {"edema_ml": np.array([[value]])}, np.zeros((1, 1, 0), np.float32))

    return [case("off", 100.0), case("on", 100.0 + moves)]


@pytest.mark.parametrize(("moves", "right"), [(-20.0, 1.0), (20.0, 0.0), (0.0, 0.0)])
def test_directions_are_read_off_pairs(moves, right):
    found = controls.directions(_pair(moves), "treatment", ("off", "on"), {"edema_ml": 100.0})
    assert found.right.value == right
    assert found.points == (("edema_ml", -0.5, moves / 100),)
    assert controls.directions(_pair(moves)[:1], "treatment", ("off", "on"), {"edema_ml": 100.0}) is None


def test_means_leave_out_what_is_unknown_and_resample_patients():
    found = means({"a": np.array([1.0, 3.0, np.nan, 5.0]), "b": np.full(4, np.nan)}, ["p", "p", "q", "r"])
    assert found["a"].value == 3 and found["a"].n == 3 and found["a"].low < 3 < found["a"].high
    assert "b" not in found


def test_below_is_a_share_of_the_other_error():
    ours, other = np.array([1.0, 1.0]), {"copy": np.array([2.0, 2.0])}
    assert below(ours, other, ["p", "q"])["copy"].value == pytest.approx(0.5)
