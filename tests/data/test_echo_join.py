"""Joining echo and ECG: same patient, nearest in time within a limit, and one clock only where it is proven."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset

from medgen.data.ecg_records import ECGRecord
from medgen.data.echo_join import JoinError, TimedECG, clock_of, join, join_ecgs
from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest, write_manifest


def clip(name: str, patient: str = "p1", acquired: str | None = "2180-05-06T12:00:00", **extra: Any) -> EchoRecord:
    known = {"acquired": acquired} if acquired else {}
    return EchoRecord(name, patient, "s", f"videos/{name}.avi", "A4C", 50.0, 101, "train", extra={**known, **extra})


def ecg(name: str, time: str, patient: str = "p1", **values: Any) -> TimedECG:
    return TimedECG(name, patient, datetime.fromisoformat(time), **values)


def test_the_nearest_of_the_patient_within_the_limit() -> None:
    signals = [
        ecg("before", "2180-05-06T09:00:00"),
        ecg("after", "2180-05-06T13:30:00"),
        ecg("another's", "2180-05-06T12:00:01", "p2"),
        ecg("late", "2180-05-09T12:00:00", "p3"),
    ]
    clips = [clip("a"), clip("b", "p2"), clip("c", "p3"), clip("d", "p4"), clip("e", acquired=None)]
    joined, report = join_ecgs(clips, signals, limit_hours=24)
    assert [record.ecg for record in joined] == ["after", "another's", None, None, None]
    assert joined[0].pairing == "patient" and joined[0].ecg_offset == -5400 and joined[0].extra["ecg_hours"] == 1.5
    assert {item.record_id: item.reason for item in report.unmatched} == {
        "c": "the nearest ECG is 72.0 h away, more than 24",
        "d": "no ECG of this patient",
        "e": "the clip's time is not known (extra.acquired)",
    }
    assert report.pairings == {"patient": 2} and "2 patient" in str(report) and "3 without an ECG" in str(report)
    assert not [problem for record in joined for problem in record.problems()]


def test_beat_synchronous_needs_one_clock_and_an_ecg_that_runs_through_the_clip() -> None:
    on = clip("a", clock="1.2.3")
    through = ecg("through", "2180-05-06T11:59:58", clock="1.2.3", seconds=10)
    for other, pairing in (
        (through, "beat_synchronous"),
        (ecg("short", "2180-05-06T11:59:58", clock="1.2.3", seconds=3), "patient"),
        (ecg("later", "2180-05-06T12:00:01", clock="1.2.3", seconds=10), "patient"),
        (ecg("other clock", "2180-05-06T11:59:58", clock="1.2.4", seconds=10), "patient"),
        (ecg("no clock", "2180-05-06T11:59:58", seconds=10), "patient"),
    ):
        (joined,), _ = join_ecgs([on], [other])
        assert joined.pairing == pairing, other.ecg
    (joined,), _ = join_ecgs([on], [ecg("nearer", "2180-05-06T12:00:00"), through])
    assert (joined.ecg, joined.ecg_offset) == ("through", 2.0), "the shared clock outweighs nearness"


def test_an_ecg_that_is_there_is_kept() -> None:
    synchronous = EchoRecord(
        "a", "p1", "s", "a.avi", "A4C", 50.0, 9, "train", ecg="own", ecg_offset=1.5, pairing="beat_synchronous"
    )
    (joined,), report = join_ecgs([synchronous], [ecg("other", "2180-05-06T12:00:00")])
    assert joined == synchronous and report.pairings == {"beat_synchronous": 1} and report.median_hours is None


def test_a_clock_counts_only_if_acquisition_was_synchronised_to_it() -> None:
    header = Dataset()
    header.SynchronizationFrameOfReferenceUID = "1.2.3"
    assert clock_of(header) is None
    header.AcquisitionTimeSynchronized = "N"
    assert clock_of(header) is None
    header.AcquisitionTimeSynchronized = "Y"
    assert clock_of(header) == "1.2.3"


def test_two_manifests(tmp_path: Path) -> None:
    echo = write_manifest([clip("a"), clip("b", "p9")], tmp_path / "echo" / "m.parquet", name="echo", source="s")
    signal = ECGRecord("x", "p1", "s", "files/x", "train", extra={"time": "2180-05-06T11:00:00"})
    ecgs = write_manifest([signal], tmp_path / "ecg" / "m.parquet", name="ecg", source="s")
    report = join(echo, ecgs, tmp_path / "joined.parquet")
    first, second = read_manifest(tmp_path / "joined.parquet", record=EchoRecord).records
    assert (first.video, first.ecg, first.ecg_offset) == ("echo/videos/a.avi", "ecg/files/x", 3600.0)
    assert second.ecg is None and report.pairings == {"patient": 1}
    lines = [json.loads(line) for line in (tmp_path / "unmatched.jsonl").read_text().splitlines()]
    assert lines == [{"record_id": "b", "reason": "no ECG of this patient"}]
    with pytest.raises(JoinError, match="does not lie below"):
        join(echo, ecgs, tmp_path / "echo" / "joined.parquet")
    timeless = write_manifest([ECGRecord("x", "p1", "s", "x", "train")], tmp_path / "t" / "m.jsonl", name="t", source="s")
    with pytest.raises(JoinError, match="says when it was taken"):
        join(echo, timeless, tmp_path / "joined.parquet")
