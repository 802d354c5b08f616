"""The augmentation report says what is known to be true of made-up runs, and no more; what cannot be compared is refused by name."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from made_up_runs import FINDINGS, write_runs

from medgen.augmentation.report import report
from medgen.config import ConfigError

ARMS = {
    ("real", 0.1): 0.75, ("mixed-1x", 0.1): 0.83, ("mixed-3x", 0.1): 0.75, ("pretrained", 0.1): 0.75,
    ("real", 1.0): 0.85, ("synthetic", 1.0): 0.85, ("mixed-1x", 1.0): 0.86,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"), ARMS, seeds=4, patients=200, missed_women=0.9)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = {("real", 0.1): 0.75, ("mixed-1x", 0.1): 0.83, ("mixed-3x", 0.1): 0.75}
    return write_runs(tmp_path_factory.mktemp("small"), arms, seeds=2, patients=60)


@pytest.fixture(scope="module")
def written(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    page = report(runs, tmp_path_factory.mktemp("page"), resamples=100)
    return json.loads((page.parent / "report.json").read_text()), page.read_text()


def test_gain_that_is_there_is_shown_on_both_sets(written):
    told, page = written
    gains = {c["set"]: c for c in told["primary"] if c["kind"] == "gain"}
    assert set(gains) == {"test", "external"}
    for one in gains.values():
        assert one["arm"] == "mixed-1x" and one["verdict"] == "better" and one["difference"]["low"] > 0
        assert one["difference"]["value"] == pytest.approx(0.08, abs=0.03)
        assert one["sentence"] in html.unescape(page)
    assert all(row["met"] for row in told["targets"] if row["what"].startswith("mixed-1x − real at 10 %"))


def test_arm_without_a_gain_gets_no_claim(written):
    told, page = written
    same = [c for c in told["secondary"] if c["arm"] in ("mixed-3x", "pretrained")]
    assert len(same) == 4
    assert all("verdict" not in c for c in same)  # uncorrected: shown, never claimed
    assert "No difference is shown" not in page or "not evidence that there is none" in page


def test_named_arm_without_a_gain_is_not_called_a_gain(small: Path, tmp_path: Path):
    told = json.loads((report(small, tmp_path, arm="mixed-3x", resamples=100).parent / "report.json").read_text())
    gains = [c for c in told["primary"] if c["kind"] == "gain"]
    assert [c["verdict"] for c in gains] == ["none shown"] * 2
    assert all("not evidence that there is none" in c["sentence"] for c in gains)


def test_synthetic_alone_is_held_against_as_many_real_films(written):
    told, _ = written
    equal = [c for c in told["primary"] if c["kind"] == "equal"]
    assert [(c["arm"], c["fraction"]) for c in equal] == [("synthetic", 1.0)] * 2
    for one in equal:
        inside = -0.03 < one["difference"]["low"] and one["difference"]["high"] < 0.03
        assert (one["verdict"] == "within the margin") <= inside


def test_single_training_is_no_claim(tmp_path: Path):
    runs = write_runs(tmp_path / "runs", {("real", 0.1): 0.7, ("mixed-1x", 0.1): 0.9}, seeds=1, patients=120)
    told = json.loads((report(runs, tmp_path / "page", resamples=100).parent / "report.json").read_text())
    assert {c["verdict"] for c in told["primary"]} == {"one seed"}
    assert not any(row["met"] for row in told["targets"])
    assert any("1 seed" in text for text in told["warnings"])


def test_group_that_is_missed_more_is_found_and_small_groups_are_counted(written):
    told, page = written
    for one in told["missed"]:
        women, men = (next(g for g in one["groups"] if g["name"] == name) for name in ("women", "men"))
        assert women["rates"]["real"]["value"] > men["rates"]["real"]["value"] + 0.1
        gap = next(g for g in one["gaps"] if g["axis"] == "sex")
        assert gap["by_arm"]["real"]["low"] > gap["chance"]["real"]
        assert all(g["patients"] >= one["smallest"] for g in one["groups"])
        assert dict(map(tuple, one["hidden"])).keys() <= {"age", "sex × age", "sex × age × view"}
        assert any(g["axis"] == "sex × age × view" for g in one["groups"])
    assert "too small to show" in page or not any(one["hidden"] for one in told["missed"])


def test_rare_finding_is_told_with_what_was_trained_on(written):
    told, _ = written
    rare = [r for r in told["rare"] if r["set"] == "test" and r["fraction"] == 0.1]
    assert [r["finding"] for r in rare] == ["nodule"]
    assert rare[0]["trained_on"]["real"] == 4  # 1 % of 400 films
    assert rare[0]["auroc_change"]["mixed-1x"]["low"] > 0
    assert {"real", "mixed-1x"} <= rare[0]["specificity"].keys()


def test_everything_is_counted(written):
    told, _ = written
    assert told["facts"]["runs"] == len(ARMS) * 4
    films = told["facts"]["sets"]["test"]["films"]
    for finding in FINDINGS:
        assert sum(told["counts"]["tested"]["test"][finding].values()) == films
    assert {row["arm"] for row in told["counts"]["trained"]} == {arm for arm, _ in ARMS}


def test_page_is_one_file_without_paths_or_scripts(written, runs: Path):
    _, page = written
    assert str(runs) not in page and "<script" not in page and not re.search(r"(src|href)=\"(?!#)", page)


def _broken(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "runs"))


def test_unfinished_experiment_says_so(small: Path, tmp_path: Path):
    copy = _broken(small, tmp_path)
    facts = json.loads((copy / "experiment.json").read_text())
    facts |= {"planned": 40, "complete": False, "runs": facts["runs"][:3]}
    (copy / "experiment.json").write_text(json.dumps(facts))
    page = report(copy, tmp_path / "page", resamples=100).read_text()
    assert "3 of 40 planned runs are complete" in page


def test_patient_in_two_sets_is_refused_by_name(small: Path, tmp_path: Path):
    copy = _broken(small, tmp_path)
    for file in copy.glob("*/*/*/predictions.parquet"):
        table = pd.read_parquet(file)
        table.loc[table["record_id"] == "external0003-PA", "patient_id"] = "test0005"
        table.to_parquet(file)
    with pytest.raises(ConfigError, match="test and external: test0005"):
        report(copy, tmp_path / "page")


def test_runs_on_other_films_are_refused(small: Path, tmp_path: Path):
    copy = _broken(small, tmp_path)
    file = copy / "real/10/0/predictions.parquet"
    table = pd.read_parquet(file)
    table.iloc[:-1].to_parquet(file)
    with pytest.raises(ConfigError, match="same films"):
        report(copy, tmp_path / "page")


def test_changed_manifest_leaves_groups_out(small: Path, tmp_path: Path):
    copy = _broken(small, tmp_path)
    facts = json.loads((copy / "experiment.json").read_text())
    facts["manifests"]["external"]["sha256"] = "0" * 64
    (copy / "experiment.json").write_text(json.dumps(facts))
    told = json.loads((report(copy, tmp_path / "page", resamples=100).parent / "report.json").read_text())
    assert [one["set"] for one in told["missed"]] == ["test"]
    assert any("has changed since the runs" in text for text in told["warnings"])


@pytest.mark.parametrize(
    ("spoil", "message"), [("absent", "medgen augment train"), ("columns", "p_nodule"), ("numbers", "from 0 to 1")]
)
def test_files_that_are_not_what_they_should_be_are_named(small: Path, tmp_path: Path, spoil: str, message: str):
    copy = _broken(small, tmp_path)
    file = copy / "real/10/0/predictions.parquet"
    table = pd.read_parquet(file)
    if spoil == "absent":
        (copy / "experiment.json").unlink()
    elif spoil == "columns":
        table.drop(columns="p_nodule").to_parquet(file)
    else:
        table.assign(p_nodule=2.0).to_parquet(file)
    with pytest.raises(ConfigError, match=message):
        report(copy, tmp_path / "page")
