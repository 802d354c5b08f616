"""Echo manifests: what is written is read back, a film manifest is not taken for one, and impossible clips are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, ManifestError, manifest_kind, read_manifest, write_manifest


def clip(number: int = 1, **changes: Any) -> EchoRecord:
    values: dict[str, Any] = {
        "record_id": f"r{number}", "patient_id": f"p{number}", "study_id": f"s{number}", "video": f"videos/r{number}.avi",
        "view": "A4C", "fps": 46.5, "frames": 120, "split": "train", "ejection_fraction": 55.2, "edv_ml": 120.0, "esv_ml": 53.8,
        "ecg": f"ecg/r{number}", "ecg_offset": 1.5, "pairing": "beat_synchronous", "annotations": f"annotations/r{number}.npz",
        "age": 61.0, "sex": "F", "truth": {"rhythm": "af"}, "extra": {"quality": "Good"},
    }  # fmt: skip
    return EchoRecord(**(values | changes))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    bare = EchoRecord("r2", "p2", "s2", "v.mp4", "UNKNOWN", 50.0, 1, "test")
    path = write_manifest([clip(), bare], tmp_path / f"m{suffix}", name="echo", source="a test")
    manifest = read_manifest(path, record=EchoRecord)
    assert manifest.records == (clip(), bare)
    assert manifest.path(manifest.records[0].video) == tmp_path / "videos/r1.avi"
    assert [r.record_id for r in read_manifest(path, "test", record=EchoRecord).records] == ["r2"]
    assert manifest_kind(path) == "echo"


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_manifest_of_another_kind_is_named(tmp_path: Path, suffix: str) -> None:
    echo = write_manifest([clip()], tmp_path / f"e{suffix}", name="e", source="s")
    film = CXRRecord("r", "p", "s", "a.png", "PA", "Clear.", "Normal.", "train")
    cxr = write_manifest([film], tmp_path / f"c{suffix}", name="c", source="s")
    with pytest.raises(ManifestError, match="records of kind 'echo'; expected a manifest of 'cxr' records"):
        read_manifest(echo)
    with pytest.raises(ManifestError, match="records of kind 'cxr'; expected a manifest of 'echo' records"):
        read_manifest(cxr, record=EchoRecord)
    with pytest.raises(ManifestError, match="records of 2 kinds"):
        write_manifest([clip(), film], tmp_path / f"both{suffix}", name="b", source="s")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"video": "../secret.avi"}, "column 'video': expected a POSIX path below"),
        ({"ecg": "/etc/passwd"}, "column 'ecg': expected a POSIX path below"),
        ({"annotations": "a/../../b.npz"}, "column 'annotations': expected a POSIX path below"),
        ({"fps": 0.0}, "column 'fps': expected frames per second from 1 to 1000"),
        ({"fps": float("nan")}, "column 'fps'"),
        ({"frames": 0}, "column 'frames': expected at least 1"),
        ({"ejection_fraction": 0.55e3}, "column 'ejection_fraction': expected percent"),
        ({"ejection_fraction": float("nan")}, "column 'ejection_fraction'"),
        ({"esv_ml": 130.0}, "column 'esv_ml': expected no more than edv_ml"),
        ({"ecg": None}, "column 'pairing': expected \"none\" without an ECG"),
        ({"pairing": "none"}, "column 'pairing'"),
        ({"ecg_offset": float("inf")}, "column 'ecg_offset'"),
        ({"view": "LATERAL"}, "column 'view'"),
        ({"patient_id": "p1", "split": "test"}, "split by patient"),
    ],
)
def test_bad_records_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ManifestError, match="row 2") as error:
        write_manifest([clip(1), clip(2, **changes)], tmp_path / "m.parquet", name="n", source="s")
    assert said in str(error.value)
