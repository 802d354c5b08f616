"""Manifests: what is written is read back, and a bad one is refused with file, row and column."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from medgen.data.records import CXRRecord, FindingLabel, ManifestError, read_manifest, write_manifest


def record(number: int = 1, **changes: Any) -> CXRRecord:
    values: dict[str, Any] = {
        "record_id": f"r{number}",
        "patient_id": f"p{number}",
        "study_id": f"s{number}",
        "image": f"images/r{number}.png",
        "view": "PA",
        "findings": "Small left pleural effusion.",
        "impression": "Effusion.",
        "split": "train",
        "labels": (FindingLabel("pleural_effusion", "present", "left", "small"), FindingLabel("edema", "absent")),
        "age": 61.0,
        "sex": "F",
        "study_date": "2180-05-06",
        "truth": {"pleural_effusion_left_ml": 120.5, "severity": {"edema": 0.0}},
        "extra": {"note": "ä"},
    }
    return CXRRecord(**(values | changes))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    records = [record(1), record(2, split="val", labels=(), age=None, sex=None, study_date=None, truth={}, extra={})]
    path = write_manifest(records, tmp_path / f"manifest{suffix}", name="tiny", source="a test")
    manifest = read_manifest(path)
    assert manifest.records == tuple(records)
    assert (manifest.name, manifest.source, manifest.root) == ("tiny", "a test", tmp_path)
    assert [r.record_id for r in read_manifest(path, split="val").records] == ["r2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"manifest{suffix}"], "a temporary file was left behind"


def test_hash_follows_content(tmp_path: Path) -> None:
    first = read_manifest(write_manifest([record(1)], tmp_path / "a.parquet", name="n", source="s"))
    same = read_manifest(write_manifest([record(1)], tmp_path / "b.parquet", name="n", source="s"))
    other = read_manifest(write_manifest([record(2)], tmp_path / "c.parquet", name="n", source="s"))
    assert first.sha256 == same.sha256 != other.sha256


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"view": "SIDEWAYS"}, "row 2, column 'view'"),
        ({"image": "../other/secret.png"}, "row 2, column 'image': expected a POSIX path below"),
        ({"image": "/etc/passwd"}, "row 2, column 'image'"),
        ({"image": "C:\\x.png"}, "row 2, column 'image'"),
        ({"record_id": "a/b"}, "row 2, column 'record_id'"),
        ({"record_id": "r1"}, "also row 1"),
        ({"patient_id": "p1", "split": "test"}, "split by patient"),
        ({"patient_id": 7}, "row 2, column 'patient_id': input should be a valid string, got 7"),
        ({"age": float("nan")}, "row 2, column 'age'"),
        ({"study_date": "21800506"}, "row 2, column 'study_date': expected an ISO date"),
        ({"labels": (FindingLabel("fracture", "present"),)}, "row 2, column 'labels.0.name'"),  # type: ignore[arg-type]
    ],
)
def test_bad_records_are_refused_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = tmp_path / "manifest.parquet"
    with pytest.raises(ManifestError, match="manifest.parquet") as error:
        write_manifest([record(1), record(2, **changes)], path, name="n", source="s")
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_path_outside_the_root_is_refused_on_read(tmp_path: Path) -> None:
    path = write_manifest([record(1)], tmp_path / "manifest.jsonl", name="n", source="s")
    path.write_text(path.read_text().replace("images/r1.png", "images/../../r1.png"))
    with pytest.raises(ManifestError, match="row 1, column 'image'"):
        read_manifest(path)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = write_manifest([record(1)], tmp_path / "manifest.parquet", name="n", source="s")
    table = pq.read_table(path)
    pq.write_table(table.rename_columns(["img" if column == "image" else column for column in table.column_names]), path)
    with pytest.raises(ManifestError, match=r"missing columns \['image'\] and unknown columns \['img'\]"):
        read_manifest(path)


def test_unknown_and_missing_fields_in_jsonl_are_named(tmp_path: Path) -> None:
    path = write_manifest([record(1)], tmp_path / "manifest.jsonl", name="n", source="s")
    header, row = path.read_text().splitlines()
    values = json.loads(row)
    for change, said in (({"colour": 1}, "unknown column 'colour'"), ({"view": None}, "column 'view'")):
        path.write_text(header + "\n" + json.dumps({**values, **change}) + "\n")
        with pytest.raises(ManifestError, match=said):
            read_manifest(path)
    del values["view"]
    path.write_text(header + "\n" + json.dumps(values) + "\n")
    with pytest.raises(ManifestError, match="row 1: missing column 'view'"):
        read_manifest(path)


def test_not_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest at"):
        read_manifest(tmp_path / "absent.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(ManifestError, match="not a readable Parquet"):
        read_manifest(tmp_path / "cut.parquet")
    (tmp_path / "plain.jsonl").write_text(json.dumps(dataclasses.asdict(record(1))) + "\n")
    with pytest.raises(ManifestError, match="header"):
        read_manifest(tmp_path / "plain.jsonl")
    with pytest.raises(ManifestError, match="none of its 1 records is in split 'test'"):
        read_manifest(write_manifest([record(1)], tmp_path / "m.jsonl", name="n", source="s"), split="test")
