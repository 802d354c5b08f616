"""Every DICOM class: accepted by dciodvfy, values as sampled, marked synthetic many times, hung and dated for a workstation."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import wfdb
from samples import PERSONAL, RAS, bytes_of, film, hounsfield, write_clips, write_edits, write_films, write_visits, write_volumes

from medgen.data.dicom import read_dicom
from medgen.data.ecg_files import read_ecg
from medgen.data.ultrasound_dicom import read_cine
from medgen.data.video import read_video
from medgen.export.dicom import export
from medgen.export.dicom_volume import slices_of

SHORT_AXIS = np.array([[1.2, 0, 0, -40], [0, 0.9, -6.0, 10], [0, 0.8, 6.75, 5], [0, 0, 0, 1]])  # thick slices, tilted


def errors_of(path: Path) -> tuple[str, list[str]]:
    """The class that `dciodvfy` finds in a file, and its errors but the one: its dictionary is older than Synthetic Data (0008,001C)."""
    assert shutil.which("dciodvfy"), "dciodvfy (Debian package dicom3tools) judges the DICOM files"
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    lines = (said.stdout + said.stderr).splitlines()
    errors = [one for one in lines if one.startswith("Error")]
    allowed = [one for one in errors if "(0x0008,0x001c)" in one]
    assert len(allowed) == 1
    kind = next(one for one in lines if one.isalnum())
    return kind, [one for one in errors if one not in allowed]


def exported(folder: Path, **options: Any) -> list[Path]:
    out = folder.with_name(f"{folder.name}-dicom")
    export(folder, out, progress=False, **options)
    return sorted(out.rglob("*.dcm"))


def make(kind: str, at: Path) -> list[Path]:
    """The DICOM files of one kind of sample."""
    if kind in ("film", "film 16"):
        return exported(write_films(at / "s", 16 if kind.endswith("16") else 8))
    if kind == "visit":
        return exported(write_visits(at / "s"))
    if kind == "edit":
        return exported(write_edits(at / "s"))
    if kind == "clip":
        return exported(write_clips(at / "s", at / "cases"), ecg_root=at / "cases", pixel_mm=0.8)
    if kind == "long ecg":
        return exported(write_clips(at / "s", at / "cases", seconds=40.0), ecg_root=at / "cases")
    if kind == "ct":
        return exported(write_volumes(at / "s", hounsfield(), RAS))
    values = np.random.default_rng(2).random((9, 10, 5)).astype(np.float32)
    return exported(write_volumes(at / "s", values, SHORT_AXIS, "phase"))


CLASSES = {
    "film": {"DXImageForPresentation"}, "film 16": {"DXImageForPresentation"}, "visit": {"DXImageForPresentation"},
    "edit": {"DXImageForPresentation"}, "clip": {"USMultiFrameImage", "TwelveLeadECG"}, "long ecg": {"USMultiFrameImage", "GeneralECG"},
    "ct": {"CTImage"}, "mr": {"MRImage"},
}  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
def test_dciodvfy_finds_no_error_and_every_mark_is_there(kind: str, tmp_path: Path) -> None:
    files = make(kind, tmp_path)
    judged = {path: errors_of(path) for path in files}
    assert {name for name, _ in judged.values()} == CLASSES[kind]
    assert not [errors for _, errors in judged.values() if errors]
    for path in files:
        header = pydicom.dcmread(path)
        assert header.SyntheticData == "YES" and str(header.PatientName).startswith("SYNTHETIC^SYN-")
        assert (
            header.PatientID.startswith("SYN-")
            and "SYNTHETIC" in header.SeriesDescription
            and header.StudyDescription.startswith("SYNTHETIC")
        )
        purpose = header.ContributingEquipmentSequence[0].PurposeOfReferenceCodeSequence[0]
        assert (purpose.CodeValue, purpose.CodingSchemeDesignator, purpose.CodeMeaning) == (
            "109100",
            "DCM",
            "Synthesizing Equipment",
        )
        if header.Modality == "ECG":
            assert "SYNTHETIC" in header.WaveformAnnotationSequence[0].UnformattedTextValue
            continue
        assert (
            header.ImageType[0] == "DERIVED"
            and header.BurnedInAnnotation == "NO"
            and header.ImageComments.startswith("SYNTHETIC")
        )
        assert all(word in header.DerivationDescription for word in ("model tiny", "ab" * 32, "seed 69563034953515038"))
        assert (
            header.PhotometricInterpretation == "MONOCHROME2" and header.PresentationLUTShape == "IDENTITY" and header.WindowWidth
        )
    uids = [pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID for path in files]
    assert len(set(uids)) == len(uids) and all(uid.startswith("2.25.") and uid.is_valid for uid in uids)


@pytest.mark.parametrize("kind", ["film", "visit", "edit", "clip", "ct"])
def test_nothing_of_whose_case_it_was_is_released(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path)
    release = bytes_of(tmp_path / "s-dicom")
    assert {"release.json", "SHA256SUMS"} < set(release)
    for name, content in release.items():
        assert not [word for word in PERSONAL if word.encode() in content or word in name]
    assert PERSONAL[0] in (tmp_path / "s-dicom.sources.jsonl").read_text()  # which stays beside it


@pytest.mark.parametrize(("bits", "kind"), [(8, np.uint8), (16, np.uint16)])
def test_films_keep_their_pixels_their_bits_and_what_is_known_of_them(bits: int, kind: Any, tmp_path: Path) -> None:
    first, second = sorted((pydicom.dcmread(p) for p in make(f"film {bits}" if bits == 16 else "film", tmp_path)),
                           key=lambda d: d.get("ViewPosition", ""))  # fmt: skip
    for i, dataset in enumerate((first, second)):
        expected = np.rint(film(i) * (2**bits - 1)).astype(kind)
        assert dataset.pixel_array.dtype == kind and np.array_equal(dataset.pixel_array, expected)
        assert dataset.BitsStored == bits and list(dataset.PatientOrientation) == ["L", "F"]
    assert "ViewPosition" not in first and first.ViewCodeSequence[0].CodeMeaning == "frontal"  # nobody said which
    assert second.ViewPosition == "AP" and second.PatientAge == "090Y" and second.PatientSex == "F"
    assert "do not measure" in first.DerivationDescription and "Small left effusion" in first.ImageComments
    shown, _ = read_dicom(tmp_path / "s-dicom" / first.PatientID / "00" / "DX.dcm")
    assert np.allclose(shown, film(0), atol=1 / (2**bits - 1))


def test_visits_are_studies_of_one_patient_at_made_up_dates_of_true_intervals(tmp_path: Path) -> None:
    found: dict[str, list[Any]] = {}
    for path in make("visit", tmp_path):
        dataset = pydicom.dcmread(path)
        found.setdefault(dataset.PatientID, []).append(dataset)
    assert sorted(len(visits) for visits in found.values()) == [1, 1, 3, 3]  # a changed course is another patient's
    for visits in (v for v in found.values() if len(v) == 3):
        days = [datetime.strptime(v.StudyDate, "%Y%m%d") for v in sorted(visits, key=lambda v: v.StudyDate)]
        assert [(b - a).days for a, b in pairwise(days)] == [36, 354]
        assert len({v.StudyInstanceUID for v in visits}) == 3 and {v.ViewPosition for v in visits} == {"AP"}
        assert {v.LongitudinalTemporalInformationModified for v in visits} == {"MODIFIED"}
        assert (
            sorted(v.PatientAge for v in visits) == ["061Y", "061Y", "062Y"] and "not an observation" in visits[0].ImageComments
        )
    changed = next(v[0] for v in found.values() if len(v) == 1)
    assert changed.PatientID.endswith("-CF") and "not a causal effect" in changed.ImageComments


def test_of_an_edit_only_the_rounds_leave_and_never_the_source_film(tmp_path: Path) -> None:
    datasets = [pydicom.dcmread(path) for path in make("edit", tmp_path)]
    assert [dataset.InstanceNumber for dataset in datasets] == [1, 2] and len({d.SeriesInstanceUID for d in datasets}) == 1
    for number, dataset in enumerate(datasets, 1):
        assert np.array_equal(dataset.pixel_array, np.rint(film(number) * 255))
        assert "no time, not a forecast" in dataset.ImageComments and "is to be kept" in dataset.ImageComments


def test_a_clip_keeps_frames_and_rhythm_and_its_ecg_keeps_every_sample(tmp_path: Path) -> None:
    files = {path.name: path for path in make("clip", tmp_path) if (path.parent / "ECG.dcm").exists()}
    frames, fps = read_video(tmp_path / "s" / "p10000032-0_000.avi")
    dataset = pydicom.dcmread(files["US.dcm"])
    assert np.array_equal(dataset.pixel_array, frames) and float(dataset.FrameTime) == pytest.approx(1000 / fps, abs=1e-6)
    assert (dataset.CineRate, dataset.HeartRate, list(dataset.RWaveTimeVector)) == (30, 71, pytest.approx([100, 200]))
    assert dataset.ViewCodeSequence[0].CodeMeaning == "Apical four chamber"
    cine = read_cine(files["US.dcm"])
    assert cine.pixel_mm == pytest.approx(0.8) and cine.fps == pytest.approx(30)
    ecg = pydicom.dcmread(files["ECG.dcm"])
    assert ecg.StudyInstanceUID == dataset.StudyInstanceUID and ecg.PatientID == dataset.PatientID
    record = wfdb.rdrecord(str(tmp_path / "cases/ecg/p10000032"), physical=False)
    group = ecg.WaveformSequence[0]
    stored = np.frombuffer(group.WaveformData, "<i2").reshape(-1, 12)
    assert (
        np.array_equal(stored, record.d_signal)
        and int(np.frombuffer(group.WaveformPaddingValue, "<i2")[0]) == stored.min() == -32768
    )
    again, before = read_ecg(files["ECG.dcm"]), read_ecg(tmp_path / "cases/ecg/p10000032")
    there = np.isfinite(before.signal)
    assert again.leads == before.leads and again.rate == 500 and np.allclose(again.signal[there], before.signal[there], atol=1e-6)


def test_without_a_known_pixel_no_ultrasound_region_is_claimed(tmp_path: Path) -> None:
    clip = pydicom.dcmread(next(path for path in make("long ecg", tmp_path) if path.name == "US.dcm"))
    assert "SequenceOfUltrasoundRegions" not in clip and "PixelSpacing" not in clip


@pytest.mark.parametrize("comments", [(), ("ECG of the patient",)])
def test_a_recording_that_may_be_a_patients_stays_where_it_is(comments: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    clips = write_clips(tmp_path / "s", tmp_path / "cases", comments=comments)
    assert {path.name for path in exported(clips, ecg_root=tmp_path / "cases")} == {"US.dcm"}
    assert "may be a patient's" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("affine", "plane"),
    [
        (RAS, "axial"),
        (np.diag([-2.0, -2.5, 3.0, 1.0]), "axial"),
        (
            np.array([[0, 0, 2.0, -9], [3.0, 0, 0, 4], [0, -2.5, 0, 7], [0, 0, 0, 1]]),
            "axial",
        ),  # axes in another order, one reversed
        (np.diag([2.0, 6.0, 2.0, 1.0]), "coronal"),
        (np.diag([6.0, 2.0, 2.0, 1.0]), "sagittal"),
        (SHORT_AXIS, "oblique"),
    ],
)
def test_slices_lie_where_the_affine_says_and_hang_as_read(affine: np.ndarray, plane: str) -> None:
    values = hounsfield((5, 6, 7))
    found = slices_of(values, affine)
    across, down = found.directions
    hung = {"axial": ([1, 0, 0], [0, 1, 0]), "coronal": ([1, 0, 0], [0, 0, -1]), "sagittal": ([0, 1, 0], [0, 0, -1])}
    if plane in hung:
        assert np.allclose(across, hung[plane][0]) and np.allclose(down, hung[plane][1])
    steps = np.diff(found.positions, axis=0)
    assert (steps @ np.cross(across, down) > 0).all() and np.allclose(
        np.linalg.norm(steps, axis=1).max(), found.between, rtol=0.05
    )
    for (n, r, c), value in np.ndenumerate(found.pixels):
        lps = found.positions[n] + r * found.spacing[0] * down + c * found.spacing[1] * across  # PS3.3 C.7.6.2.1.1
        x, y, z = np.rint(np.linalg.solve(affine, [*(lps * [-1, -1, 1]), 1])[:3]).astype(int)
        assert values[x, y, z] == value


def test_a_ct_series_gives_back_its_volume_in_hu_and_its_affine(tmp_path: Path) -> None:
    series = [pydicom.dcmread(path) for path in make("ct", tmp_path)][:5]
    series.sort(key=lambda d: d.ImagePositionPatient[2])
    assert [d.InstanceNumber for d in series] == [1, 2, 3, 4, 5] and len({d.FrameOfReferenceUID for d in series}) == 1
    hu = np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in series])
    assert np.array_equal(hu[:, ::-1, ::-1].transpose(2, 1, 0), hounsfield())  # left to right, back to front: RAS again
    first, last = series[0], series[-1]
    corner = np.array(first.ImagePositionPatient, float) * [-1, -1, 1] - [(first.Columns - 1) * 2.0, (first.Rows - 1) * 2.5, 0]
    assert np.allclose(corner, RAS[:3, 3]) and list(first.PixelSpacing) == [2.5, 2.0]
    assert last.ImagePositionPatient[2] - first.ImagePositionPatient[2] == pytest.approx(12) and first.RescaleType == "HU"
    assert list(first.WindowCenterWidthExplanation) == ["SOFT TISSUE", "LUNG"]


def test_mr_phases_are_series_of_one_study_with_values_to_16_bits(tmp_path: Path) -> None:
    series = [pydicom.dcmread(path) for path in make("mr", tmp_path)]
    assert len({d.StudyInstanceUID for d in series}) == 1 and len({d.SeriesInstanceUID for d in series}) == 2
    source = np.asarray(nibabel.load(tmp_path / "s/p10000032_000_00.nii.gz").dataobj)
    stored = np.sort(np.stack([d.pixel_array for d in series[:5]]).ravel()) / 65535
    assert np.abs(stored - np.sort(source.ravel())).max() <= 0.51 / 65535 and series[0].SliceThickness == pytest.approx(
        9.03, abs=0.01
    )


def test_the_same_samples_give_the_same_bytes_and_other_samples_other_uids(tmp_path: Path) -> None:
    first, again = write_films(tmp_path / "a"), write_films(tmp_path / "b")
    for folder in (first, again):
        exported(folder)
    one, two = bytes_of(tmp_path / "a-dicom"), bytes_of(tmp_path / "b-dicom")
    assert one == two
    exported(write_films(tmp_path / "c", 16))
    uids = [{pydicom.dcmread(p).SOPInstanceUID for p in (tmp_path / f"{n}-dicom").rglob("*.dcm")} for n in "ac"]
    assert not uids[0] & uids[1]


def test_a_killed_export_continues_to_the_same_bytes(tmp_path: Path) -> None:
    folder = write_films(tmp_path / "s", count=60)
    exported(write_films(tmp_path / "whole", count=60))
    out = tmp_path / "s-dicom"
    run = [
        "-c",
        f"from pathlib import Path; from medgen.export.dicom import export; export(Path({str(folder)!r}), Path({str(out)!r}))",
    ]
    process = subprocess.Popen([sys.executable, *run], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while len(list(out.rglob("*.dcm"))) < 10:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    log = out.with_name("s-dicom.sources.jsonl")
    log.write_bytes(log.read_bytes()[:-7])  # the last line as a kill may leave it
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.dcm")}
    assert 10 <= len(before) < 60 and not (out / "SHA256SUMS").exists()
    exported(folder)
    assert bytes_of(out) == bytes_of(tmp_path / "whole-dicom")
    kept = [p for p, when in before.items() if p.stat().st_mtime_ns == when]
    assert len(kept) >= len(before) - 2  # only what was being written is written again
