"""From answers to the report: known skill is found again, claims follow the margin, hostile text stays text."""

import csv
import json
import re

import numpy as np
import pytest

from medgen.study.analyze import analyze
from medgen.study.responses import ResponseError


def run(study, **given):
    out = study.folder / "out"
    analyze(study.pack, (study.write(),), study.key_file, out, **given)
    return json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text(), out


def test_skilled_readers_are_found_and_said_so(make_study):
    study = make_study(readers=6, cases=60, repeats=8).build().read_by_guessers(skill=2.0, spread=0.3)
    metrics, page, _ = run(study)
    result = metrics["sections"][0]["result"]
    assert 1.5 < result["d_prime"]["value"] < 2.5
    assert result["auc"]["value"] > 0.85
    assert result["equivalence"]["accuracy"]["verdict"] == "different"
    assert result["accuracy_mrmc"]["low"] < result["accuracy_mrmc"]["value"] < result["accuracy_mrmc"]["high"]
    assert result["agreement"]["repeats"]["n"] == 48 and result["agreement"]["repeats"]["value"] > 0.7
    assert "above 50 %" in page and "no equivalence" in page


def test_few_guessers_leave_it_open_and_never_read_as_sameness(make_study):
    study = make_study(readers=3, cases=24).build().read_by_guessers(skill=0.0, spread=1.0, seed=1)
    metrics, page, _ = run(study)
    tests = metrics["sections"][0]["result"]["equivalence"]
    assert tests["accuracy"]["p_difference"] > 0.05
    assert tests["accuracy"]["verdict"] == "inconclusive"
    assert "that is no evidence of sameness" in page
    for word in ("indistinguish", "cannot be told apart", "no difference between real and synthetic"):
        assert word not in page.lower()


def test_many_alike_guessers_show_equivalence(make_study):
    study = make_study(readers=12, cases=120, repeats=0).build().read_by_guessers(skill=0.0, spread=0.05, seed=1)
    metrics, page, _ = run(study)
    assert metrics["sections"][0]["result"]["equivalence"]["accuracy"]["verdict"] == "equivalent"
    assert "Equivalence is shown" in page


def test_where_an_interval_promises_too_much_the_page_says_so(make_study):
    """test_coverage.py measures what it says; with ordinary readers it says nothing of it."""
    study = make_study(readers=5, cases=40, repeats=0).build().read_by_guessers(skill=4.0, spread=0.3, seed=2)
    _, page, _ = run(study)
    assert re.search(r"[2-5] of 5 readers missed nothing or raised no false alarm", page) and "take it for a least value" in page


def test_ordinary_readers_get_no_such_warning(make_study):
    _, page, _ = run(make_study(readers=5, cases=60, repeats=0).build().read_by_guessers(skill=1.0, spread=0.3))
    assert "least value" not in page


def test_a_study_too_small_to_show_equivalence_says_that_it_could_not(make_study):
    _, page, _ = run(make_study(readers=3, cases=12, repeats=0).build().read_by_guessers(skill=0.0, spread=1.0, seed=1))
    assert "hardly any answers of so few readers and cases could have shown it" in page


def test_html_in_a_comment_is_shown_as_text(make_study):
    study = make_study().build().read_by_guessers()
    study.answer("r1", study.orders["r1"][0], "comment", "<script>alert(1)</script><img src=x onerror=alert(2)>")
    study.answer("r2", study.orders["r2"][0], "comment", '=HYPERLINK("http://x")')
    _, page, _ = run(study)
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page and "<img" not in page
    assert not re.search(r"https?://(?!www\.w3\.org)[^&]*\.(js|css|png)", page)


def test_missing_answers_are_counted_and_said(make_study):
    study = make_study(readers=4, cases=40).build().read_by_guessers(skill=1.0)
    gone = [row for row in study.rows if row["reader"] == "r2"][:7]
    study.rows = [row for row in study.rows if row not in gone]
    metrics, page, _ = run(study)
    assert metrics["missing"]["r2"] == [7, 44]
    assert "Unanswered questions (r2 7 of 44)" in page


def test_a_reader_who_sent_nothing_is_named(make_study):
    study = make_study(readers=4).build().read_by_guessers()
    study.rows = [row for row in study.rows if row["reader"] != "r3"]
    assert "no answers from 1 of 4 readers: r3" in run(study)[1]


def test_two_generators_and_a_copied_control_arm(make_study):
    study = make_study(readers=5, cases=80, repeats=0, arms=("real", "good", "real", "bad", "copied")).build()
    rng = np.random.default_rng(0)
    for reader in study.readers:
        for item in study.orders[reader]:
            says = rng.random() < {"real": 0.3, "copied": 0.3, "good": 0.4, "bad": 0.9}[study.truth[item]["arm"]]
            study.answer(reader, item, "origin", "synthetic" if says else "real", int(rng.integers(1, 4)))
    metrics, page, out = run(study)
    result = metrics["sections"][0]["result"]
    apart = result["comparisons"]["good − bad"]
    assert apart["high"] < 0
    assert result["arms"]["copied"]["value"] > 0.5
    assert "the arms differ" in page
    with (out / "imrmc.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["modalityID"] for row in rows} == {"truth", "good", "bad"}
    assert sum(row["readerID"] == "truth" for row in rows) == 80
    with (out / "mrmcaov.csv").open() as file:
        long = list(csv.DictReader(file))
    assert len(long) == 5 * (2 * 48 + 32)  # real and copied cases serve both generators
    assert {row["truth"] for row in long} == {"0", "1"}


OTHER_TASKS = ("two_alternative", "same_patient", "likert_realism", "plausible_course") + (
    "ejection_fraction",
    "progression_order",
    "text_alignment",
    "artefact",
)


def answer_of(question, truth, rng):
    """A reader who mostly knows."""
    right = truth["correct"]
    liking = rng.normal(3.4 if truth["arm"] == "real" else 2.6, 1)
    return {
        "which": rng.choice([right["which"], "left"]),
        "same": rng.choice([right["same"], "yes"]),
        "expectation": "worse",
        "realism": int(np.clip(liking, 1, 5)),
        "plausible": int(rng.integers(1, 6)),
        "ef": round(float(np.clip(right["ef"] + rng.normal(2, 5), 0, 100)), 1),
        "order": json.dumps(list(rng.permutation(["a", "b", "c"]))),
        "effusion": rng.choice(["present", "wrong side"]),
        "points": json.dumps([[0.2, 0.3]] if rng.random() < 0.4 else []),
    }[question]


@pytest.mark.parametrize("task", OTHER_TASKS)
def test_every_task_has_its_section(make_study, task):
    study = make_study(readers=4, cases=20, repeats=2, task=task).build()
    rng = np.random.default_rng(1)
    for reader in study.readers:
        for item in study.orders[reader]:
            for question in study.items[item]["questions"]:
                study.answer(reader, item, question["id"], answer_of(question["id"], study.truth[item], rng))
    metrics, page, _ = run(study)
    section = metrics["sections"][0]
    assert section["task"] == task and section["cases"] == 20
    assert "<svg" in page
    if task == "ejection_fraction":
        assert section["result"]["estimate minus truth"]["mean"]["value"] == pytest.approx(2, abs=1.5)
    if task == "likert_realism":
        assert section["result"]["superiority"]["value"] < 0.5
        assert section["result"]["odds"]["effects"][0]["value"] < 0
        assert "with so few readers rather too wide" in page


def test_a_margin_cannot_be_changed_after_reading(make_study):
    study = make_study().build().read_by_guessers()
    with pytest.raises(ResponseError, match="frozen before reading"):
        run(study, margin=0.3)
