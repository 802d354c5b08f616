"""The whole evaluation: a generator made of the digital heart itself scores as real clips do, a deaf one falls to chance."""

from __future__ import annotations

import json
import re

import pytest

from medgen.evaluation.echo.evaluate import evaluate


@pytest.fixture(scope="module")
def good(tmp_path_factory, obedient, reference):
    page = evaluate(obedient, reference, tmp_path_factory.mktemp("good"), split="all")
    return page, json.loads((page.parent / "metrics.json").read_text())


@pytest.fixture(scope="module")
def bad(tmp_path_factory, deaf, reference):
    page = evaluate(deaf, reference, tmp_path_factory.mktemp("bad"), split="all")
    return json.loads((page.parent / "metrics.json").read_text())


def test_a_generator_that_obeys_scores_as_real_clips_do(good):
    _, metrics = good
    generated, real = metrics["generated"], metrics["real"]
    assert generated["heart_rate"]["mae"]["value"] < 2
    for kind in ("ed", "es"):
        assert generated["phase"][kind]["hits"]["value"] > 0.75  # paced hearts are asynchronous: 55 to 70 ms, real ones too
        assert abs(generated["phase"][kind]["median_ms"]["value"] - real["phase"][kind]["median_ms"]["value"]) < 12
    assert generated["ejection_fraction"]["mae"]["value"] < 3.5
    assert metrics["grid_ef"]["r2"]["value"] > 0.95
    assert metrics["shift"]["moved"]["value"] > 0.9
    assert metrics["shift"]["slope"] == pytest.approx(1, abs=0.1)


def test_the_judge_knows_real_volumes(good):
    _, metrics = good
    assert metrics["judge"]["volume_error"] < 4
    assert metrics["real"]["ejection_fraction"]["r2"]["value"] > 0.9


def test_controls_of_the_obedient_generator_fall_to_chance(good):
    _, metrics = good
    given, own = metrics["shuffled_given"]["es"], metrics["shuffled_own"]["es"]
    assert given["hits"]["value"] > 0.85
    assert own["hits"]["low"] <= own["chance_hits"]["high"]
    assert metrics["absent"]["es"]["hits"]["low"] <= metrics["absent"]["es"]["chance_hits"]["high"]


def test_a_deaf_generator_is_exposed(bad):
    assert bad["generated"]["phase"]["es"]["hits"]["value"] < 0.6
    assert bad["generated"]["heart_rate"]["mae"]["value"] > 8
    assert bad["shift"]["moved"]["value"] < 0.3
    assert bad["grid_ef"]["r2"]["value"] < 0.3
    met = {t["name"]: t["met"] for t in bad["targets"]}
    assert not met["ECG shifted by Δ moves end-systole by Δ"]
    assert not met["Ejection fraction asked against measured"]


def test_the_page_stands_alone_and_shows_films_curves_and_controls(good):
    page, _ = good
    html = page.read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", html)
    assert html.count("data:image/webp;base64,") > 20
    assert html.count("<svg") >= 5
    assert "another patient&#39;s ECG" in html or "another patient's ECG" in html
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().replace("finance", "")


def test_too_little_is_said_rather_than_measured(tmp_path, obedient, reference):
    few = tmp_path / "few"
    few.mkdir()
    lines = [json.loads(line) for line in (obedient / "metadata.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["purpose"] == "population"][:3]  # no floor can be made of so few
    for line in lines:
        (few / line["file_name"]).write_bytes((obedient / line["file_name"]).read_bytes())
    (few / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = evaluate(few, reference, tmp_path / "out", split="all", limit=6)
    metrics = json.loads((page.parent / "metrics.json").read_text())
    assert metrics["videos"] is None
    assert "shifted ECGs" in metrics["warnings"][0]
