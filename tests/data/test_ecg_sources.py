"""MIMIC-IV-ECG and PTB-XL in their own layouts, with real WFDB files, become ECG records that can be read."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wfdb

from medgen.data.ecg import ECG, LEADS, prepare_ecg, read_ecg
from medgen.data.ecg_records import ECGRecord
from medgen.data.records import ManifestError, read_manifest, write_manifest
from medgen.data.sources import mimic_iv_ecg, ptb_xl
from medgen.data.sources.base import Quarantined, SourceError, SourceOptions
from medgen.digital.ecg import simulate_ecg
from medgen.digital.rhythm import draw_rhythm

MIMIC_ORDER = ("I", "II", "III", "aVR", "aVF", "aVL", "V1", "V2", "V3", "V4", "V5", "V6")


def an_ecg(seed: int, rate: float = 500.0) -> ECG:
    return simulate_ecg(draw_rhythm(seed, "sinus", 70, 0, 10), seed, start=0, end=10, rate=rate)[0]


def wfdb_record(path: Path, ecg: ECG, order: Sequence[str], gain: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [ecg.leads.index(name) for name in order]
    names = [name.upper() if "ptbxl" in str(path) else name for name in order]
    options: dict[str, Any] = {"fmt": ["16"] * len(order), "adc_gain": [gain] * len(order), "baseline": [0] * len(order)}
    signal = ecg.signal[rows].T.astype(float)
    wfdb.wrsamp(path.name, ecg.rate, ["mV"] * len(order), names, signal, write_dir=str(path.parent), **options)


def table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def found(source: Any, root: Path) -> tuple[dict[str, ECGRecord], dict[str, str]]:
    items = list(source.records(root, SourceOptions()))
    records = {item.record_id: item for item in items if isinstance(item, ECGRecord)}
    return records, {item.record_id: item.reason for item in items if isinstance(item, Quarantined)}


@pytest.fixture
def mimic(tmp_path: Path) -> Path:
    root = tmp_path / "mimic-iv-ecg"
    rows = []
    for subject, study, there in ((10000032, 40689238, True), (10000032, 44458630, True), (10000764, 42662580, False)):
        path = f"files/p{str(subject)[:4]}/p{subject}/s{study}/{study}"
        if there:
            wfdb_record(root / path, an_ecg(study), MIMIC_ORDER, gain=200.0)
        rows.append(
            {"subject_id": subject, "study_id": study, "file_name": study, "ecg_time": "2180-07-23 08:44:00", "path": path}
        )
    table(root / "record_list.csv", [*rows, rows[0] | {"study_id": 1, "path": "../../secret/1"}])
    measured = {"subject_id": 10000032, "study_id": 40689238, "cart_id": 6848296, "ecg_time": "2180-07-23 08:44:00"}
    reports = {"report_0": "Sinus rhythm", "report_1": "Possible anterior infarct - age undetermined", "report_2": ""}
    numbers = {
        "rr_interval": 659,
        "p_onset": 40,
        "p_end": 128,
        "qrs_onset": 170,
        "qrs_end": 258,
        "t_end": 518,
        "p_axis": 81,
        "t_axis": 29999,
    }
    table(root / "machine_measurements.csv", [measured | reports | numbers])
    return root


def test_mimic_iv_ecg(mimic: Path) -> None:
    records, held = found(mimic_iv_ecg, mimic)
    assert set(records) == {"40689238", "44458630"}
    assert held == {
        "42662580": "no files/p1000/p10000764/s42662580/42662580.hea",
        "1": "path outside the data set: ../../secret/1",
    }
    first = records["40689238"]
    assert (first.patient_id, first.study_id, first.time) == ("p10000032", "s40689238", "2180-07-23T08:44:00")
    assert first.split == records["44458630"].split  # a patient is in one split
    assert first.extra["machine_report"] == ["Sinus rhythm", "Possible anterior infarct - age undetermined"]
    assert first.extra["machine_measurements"]["rr_interval"] == 659 and "t_axis" not in first.extra["machine_measurements"]


def test_mimics_order_of_leads_does_not_swap_avl_and_avf(mimic: Path) -> None:
    records, _ = found(mimic_iv_ecg, mimic)
    ecg = read_ecg(mimic / records["40689238"].ecg)
    assert ecg.leads == MIMIC_ORDER
    prepared, truth = prepare_ecg(ecg), prepare_ecg(an_ecg(40689238))
    assert prepared.leads == LEADS and prepared.flags == ()
    np.testing.assert_allclose(prepared.signal, truth.signal, atol=0.01)


@pytest.fixture
def ptbxl(tmp_path: Path) -> Path:
    root = tmp_path / "ptbxl"
    for name, rate in (
        ("records500/00000/00001_hr", 500.0),
        ("records100/00000/00001_lr", 100.0),
        ("records100/00000/00002_lr", 100.0),
    ):
        wfdb_record(root / name, an_ecg(1, rate), LEADS, gain=1000.0)
    said = [  # ecg_id, patient_id, age, sex, scp_codes, baseline_drift, strat_fold
        (1, "15709.0", "56.0", 1, "{'NORM': 100.0, 'LVOL': 0.0, 'SR': 0.0}", " , I-V1,  ", 3),
        (2, "13243.0", "300.0", 0, "{'IMI': 80.0}", "", 10),
        (3, "20372.0", "37.0", 1, "broken {", "", 9),
        (4, "20373.0", "37.0", 1, "{}", "", ""),
    ]
    columns = ("ecg_id", "patient_id", "age", "sex", "scp_codes", "baseline_drift", "strat_fold")
    rows = [
        dict(zip(columns, row, strict=True))
        | {"report": "sinusrhythmus", "recording_date": "1984-11-09 09:17:34"}
        | {"filename_lr": f"records100/00000/0000{row[0]}_lr", "filename_hr": f"records500/00000/0000{row[0]}_hr"}
        for row in said
    ]
    rows[3]["filename_lr"] = rows[0]["filename_lr"]
    table(root / "ptbxl_database.csv", rows)
    statements = [("NORM", "normal ECG", "NORM"), ("IMI", "inferior myocardial infarction", "MI"), ("SR", "sinus rhythm", "")]
    table(
        root / "scp_statements.csv",
        [{"": code, "description": text, "diagnostic_class": kind} for code, text, kind in statements],
    )
    return root


def test_ptb_xl(ptbxl: Path) -> None:
    records, held = found(ptb_xl, ptbxl)
    assert set(records) == {"ptbxl-00001", "ptbxl-00002"}
    assert "no record at records500/00000/00003_hr nor records100" in held["ptbxl-00003"] and "fold ''" in held["ptbxl-00004"]
    first, second = records["ptbxl-00001"], records["ptbxl-00002"]
    assert (first.ecg, second.ecg) == ("records500/00000/00001_hr", "records100/00000/00002_lr")  # the best that is there
    assert (first.split, first.sex, first.age, first.time) == ("train", "F", 56.0, "1984-11-09T09:17:34")
    assert (second.split, second.sex, second.age) == ("test", "M", None)  # 300 years: older than 89
    assert first.extra["scp_codes"] == {"NORM": 100.0, "LVOL": 0.0, "SR": 0.0} and first.extra["superclasses"] == ["NORM"]
    assert second.extra["superclasses"] == ["MI"] and first.extra["signal_problems"] == {"baseline_drift": ", I-V1,"}


def test_both_sampling_rates_prepare_to_the_same_signal(ptbxl: Path) -> None:
    fast, slow = (prepare_ecg(read_ecg(ptbxl / f"records{rate}/00000/00001_{kind}")) for rate, kind in ((500, "hr"), (100, "lr")))
    assert fast.leads == slow.leads == LEADS and fast.signal.shape == slow.signal.shape
    assert len(fast.r_peaks) == len(slow.r_peaks) and np.abs(fast.r_peaks - slow.r_peaks).max() < 0.012


def test_records_go_into_a_manifest_and_back(ptbxl: Path) -> None:
    records = list(found(ptb_xl, ptbxl)[0].values())
    path = write_manifest(records, ptbxl / "manifest.parquet", name="ptb_xl", source="test")
    manifest = read_manifest(path, record=ECGRecord)
    assert list(manifest.records) == records
    assert read_ecg(manifest.path(manifest.records[0].ecg)).rate == 500
    with pytest.raises(ManifestError, match="'time'.*ISO date and time"):
        write_manifest([replace(records[0], time="yesterday")], path, name="ptb_xl", source="test")


@pytest.mark.parametrize(("source", "named"), [(mimic_iv_ecg, "record_list.csv"), (ptb_xl, "ptbxl_database.csv")])
def test_another_folder_is_an_error_that_names_what_is_missing(source: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=named):
        found(source, tmp_path)
