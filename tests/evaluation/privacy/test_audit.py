from __future__ import annotations

import json
from pathlib import Path

import pytest

from medgen.evaluation.images import EvaluationError
from medgen.evaluation.privacy.audit import audit
from medgen.evaluation.privacy.leaky import write_leaky_patients

SMALL = {"patients": 12, "captions": 2, "n": 10, "films": 4, "draws": 2, "path_steps": 5, "progress": False}


@pytest.fixture(scope="session")
def audited(leaky: Path, innocent: Path, hospital: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit")
    audit(leaky, hospital, hospital, out, reference=innocent, skip=("copying", "re_identification"), **SMALL)
    return out


def test_one_table_says_what_was_flagged_and_what_was_not_measured(audited: Path) -> None:
    found = json.loads((audited / "audit.json").read_text())
    verdicts = {row["part"]: row["verdict"] for row in found["table"]}
    assert verdicts["membership"] == verdicts["extraction"] == "flagged"
    assert verdicts["copying"] == verdicts["re_identification"] == "not measured"
    assert all(row["criterion"] and row["cannot_show"] and row["question"] for row in found["table"])
    assert found["facts"]["training_patients"] == 12 and found["facts"]["pipeline_sha256"]


def test_the_page_shows_the_films_beside_their_copies_and_promises_nothing(audited: Path) -> None:
    page = (audited / "index.html").read_text()
    assert "anonym" not in page.lower() and "must be handled like the data" in page
    assert page.count("data:image/png") == 2 * (1 + 4)  # two captions: their film and four generations
    assert 'src="http' not in page and 'href="http' not in page


def test_the_same_command_again_measures_nothing(audited: Path, leaky: Path, innocent: Path, hospital: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in audited.glob("*/*") if path.suffix in (".json", ".png")}
    first = (audited / "audit.json").read_text()
    audit(leaky, hospital, hospital, audited, reference=innocent, skip=("copying", "re_identification"), **SMALL)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (audited / "audit.json").read_text() == first


def test_no_film_and_nothing_that_may_be_one_is_shown_where_that_is_asked(
    audited: Path, leaky: Path, innocent: Path, hospital: Path
) -> None:
    skip = ("copying", "re_identification")
    page = audit(leaky, hospital, hospital, audited, reference=innocent, skip=skip, no_real_images=True, **SMALL).read_text()
    assert "data:image/png" not in page and "left out" in page


def test_another_kind_of_pipeline_is_refused(hospital: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be audited"):
        audit("digital_echo", hospital, hospital, tmp_path, **SMALL)


def test_the_leaky_patients_are_half_members_half_strangers(tmp_path: Path) -> None:
    from medgen.data.records import read_manifest

    records = read_manifest(write_leaky_patients(tmp_path, patients=2)).records
    assert [(record.split, record.view) for record in records] == [
        ("train", "PA"), ("train", "AP"), ("test", "PA"), ("test", "AP"),
    ]  # fmt: skip
    elsewhere = read_manifest(write_leaky_patients(tmp_path / "b", patients=2, site="B", validation=1)).records
    assert [record.split for record in elsewhere] == ["train", "test", "val"]  # site B films everyone once
