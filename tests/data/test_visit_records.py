"""Visit series: what is written is read back, what is unknown stays unknown, and impossible series are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medgen.data.records import ManifestError, manifest_kind, read_manifest, write_manifest
from medgen.data.visit_records import Event, Visit, VisitSeries

VISITS = (
    Visit("v0", 0.0, "images/v0.png", "2180-05-06", "PA", "Small effusion.", {"pleural_effusion_ml": 120.5}, {"labels": ["a"]}),
    Visit("v1", 12.5, None, "2180-05-18"),
    Visit("v2", 400.0, "images/v2.png"),
)


def series(number: int = 1, **changes: Any) -> VisitSeries:
    values: dict[str, Any] = {
        "record_id": f"r{number}", "patient_id": f"p{number}", "study_id": f"s{number}", "visits": VISITS, "modality": "cxr",
        "dim": 2, "time_unit": "days", "split": "train", "events": (Event("drainage", 12.0), Event("diuretic", 20.0, 40.0)),
        "covariates": {"age": 61.0, "smoker": "yes"}, "truth": {"course": "stable"}, "extra": {"futures_cut": 2},
    }  # fmt: skip
    return VisitSeries(**(values | changes))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    bare = VisitSeries("r2", "p2", "s2", (Visit("a", 0.0),), "mr", 3, "phase", "test")
    path = write_manifest([series(), bare], tmp_path / f"m{suffix}", name="follow-ups", source="a test")
    manifest = read_manifest(path, record=VisitSeries)
    assert manifest.records == (series(), bare)
    assert manifest_kind(path) == "visits"
    assert [visit.visit_id for visit in manifest.records[0].imaged] == ["v0", "v2"]
    assert read_manifest(path, "test", record=VisitSeries).records == (bare,)
    with pytest.raises(ManifestError, match="expected a manifest of 'cxr' records"):
        read_manifest(path)


def test_what_is_unknown_is_absent_and_never_zero(tmp_path: Path) -> None:
    path = write_manifest([series(covariates={})], tmp_path / "m.parquet", name="n", source="s")
    (record,) = read_manifest(path, record=VisitSeries).records
    assert record.covariates == {} and record.visits[1].image is None and record.visits[1].truth == {}


def test_whole_numbers_of_another_writer_become_numbers(tmp_path: Path) -> None:
    path = write_manifest([series()], tmp_path / "m.jsonl", name="n", source="s")
    path.write_text(path.read_text().replace('"age": 61.0', '"age": 61').replace('"time": 0.0', '"time": 0'))
    (record,) = read_manifest(path, record=VisitSeries).records
    assert record.covariates["age"] == 61.0 and isinstance(record.covariates["age"], float)


def test_images_named_from_another_folder() -> None:
    moved = series().below("set/")
    assert [visit.image for visit in moved.visits] == ["set/images/v0.png", None, "set/images/v2.png"]
    assert moved.visits[0].report == "Small effusion."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"visits": ()}, "at least one visit"),
        ({"visits": (Visit("a", 1.0), Visit("b", 1.0))}, "each later than the one before"),
        ({"visits": (Visit("a", 2.0), Visit("b", 1.0))}, "each later than the one before"),
        ({"visits": (Visit("a", float("nan")),)}, "finite times"),
        ({"visits": (Visit("a", 0.0), Visit("a", 1.0))}, "visit_ids that differ"),
        ({"visits": (Visit("a/b", 0.0),)}, "visit_ids of letters, digits"),
        ({"visits": (Visit("a", 0.0, "../secret.png"),)}, r"POSIX paths below the manifest's folder \(visit 'a'\)"),
        ({"visits": (Visit("a", 0.0, "/etc/passwd"),)}, "POSIX paths below"),
        ({"visits": (Visit("a", 0.0, date="06.05.2180"),)}, "ISO dates"),
        ({"visits": (Visit("a", 0.0, date="2180-02-30"),)}, "ISO dates"),
        ({"visits": (Visit("a", 0.0), Visit("b", 1.5)), "time_unit": "phase"}, "phases from 0 to 1"),
        ({"events": (Event("drainage", float("inf")),)}, "column 'events': expected finite times"),
        ({"covariates": {"age": float("nan")}}, r"column 'covariates': expected finite numbers .* \(age\)"),
        ({"dim": 4}, "dim"),
        ({"time_unit": "years"}, "time_unit"),
        ({"record_id": "a b"}, "column 'record_id'"),
    ],
)
def test_impossible_series_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        write_manifest([series(2), series(**changes)], tmp_path / "m.parquet", name="n", source="s")
    assert not (tmp_path / "m.parquet").exists()


def test_unknown_fields_of_a_visit_are_errors(tmp_path: Path) -> None:
    path = write_manifest([series()], tmp_path / "m.jsonl", name="n", source="s")
    path.write_text(path.read_text().replace('"view": "PA"', '"veiw": "PA"', 1))
    with pytest.raises(ManifestError, match="row 1.*veiw"):
        read_manifest(path, record=VisitSeries)
