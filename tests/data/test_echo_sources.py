"""Echo data sets as they are laid out on disk, with their known oddities, from folder to checked manifest."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from echo_fixture import beats, pulsing
from test_ultrasound_dicom import sector_frames, write_cine
from test_video import write_mjpeg

from medgen.data.build import BuildError, build, check
from medgen.data.ecg import write_wfdb
from medgen.data.echo_records import EchoRecord
from medgen.data.records import ManifestError, read_manifest
from medgen.data.sources.base import SourceError, as_echo_view, as_time
from medgen.data.sources.echoxflow import Sector, to_picture
from medgen.data.video import write_video

FILE_LIST = ["FileName", "EF", "ESV", "EDV", "FrameHeight", "FrameWidth", "FPS", "NumberOfFrames", "Split"]


def table(path: Path, columns: list[str], rows: list[list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def held(out: Path) -> dict[str, str]:
    return {i["record_id"]: i["reason"] for i in map(json.loads, (out.parent / "quarantine.jsonl").read_text().splitlines())}


def by_id(out: Path) -> dict[str, EchoRecord]:
    return {record.record_id: record for record in read_manifest(out, record=EchoRecord).records}


def annotations(out: Path, record: EchoRecord) -> dict[str, np.ndarray]:
    assert record.annotations is not None
    with np.load(out.parent / record.annotations) as stored:
        return dict(stored)


def disc_lines(radius: float) -> list[tuple[float, float, float, float]]:
    """A circle around (56, 60) as EchoNet traces it: the long axis, then 20 lines across it."""
    ys = np.linspace(-radius, radius, 22)[1:-1]
    across = [(56 - np.sqrt(radius**2 - y**2), 60 + y, 56 + np.sqrt(radius**2 - y**2), 60 + y) for y in ys]
    return [(56.0, 60 - radius, 56.0, 60 + radius), *across]


def echonet(root: Path, rows: list[list[Any]] | None = None, columns: list[str] = FILE_LIST) -> Path:
    """Three videos: traced with its name in another case, untraced, and a test one; names in FileList without .avi."""
    names = ["0X1A2B", "0X3C4D", "0X5E6F"]
    for i, name in enumerate(names):
        (root / "Videos").mkdir(parents=True, exist_ok=True)
        write_mjpeg(root / "Videos" / f"{name}.avi", np.roll(pulsing(30, 50, size=(112, 112)), i, axis=0), fps=50)
    default = [
        ["0X1A2B", 60.0, 40.0, 100.0, 112, 112, 50, 30, "TRAIN"],
        ["0x3c4d", 35.5, 90.0, 139.5, 112, 112, 50, 30, "VAL"],
        ["0X5E6F.avi", 55.0, 45.0, 100.0, 112, 112, 50, 30, "TEST"],
    ]
    table(root / "FileList.csv", columns, default if rows is None else rows)
    lines = [["0X1A2B.avi", *line, frame] for frame, radius in ((21, 14.0), (6, 24.0)) for line in disc_lines(radius)]
    lines += [["0X5E6F.AVI", *line, frame] for frame, radius in ((3, 10.0), (18, 20.0)) for line in disc_lines(radius)]
    table(root / "VolumeTracings.csv", ["FileName", "X1", "Y1", "X2", "Y2", "Frame"], lines)
    return root


def test_echonet_dynamic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "manifest.parquet"
    report = build("echonet_dynamic", echonet(tmp_path / "set"), out)
    assert (report.records, report.duplicates, report.quarantined) == (3, 0, {})
    found = by_id(out)
    traced, untraced, test = found["0X1A2B"], found["0x3c4d"], found["0X5E6F"]
    assert (traced.split, traced.view, traced.fps, traced.frames, traced.pairing) == ("train", "A4C", 50.0, 30, "none")
    assert (traced.ejection_fraction, traced.edv_ml, traced.esv_ml) == (60.0, 100.0, 40.0)
    assert untraced.annotations is None and untraced.split == "val" and (out.parent / untraced.video).is_file()
    stored = annotations(out, traced)
    assert stored["es_frames"] == [21] and stored["ed_frames"] == [6], "the last traced frame in file order is end-diastole"
    assert list(stored["mask_frames"]) == [21, 6] and stored["masks"].shape == (2, 112, 112)
    for mask, radius in zip(stored["masks"], (14, 24), strict=True):
        assert mask.sum() == pytest.approx(np.pi * radius**2, rel=0.12) and mask[60, 56] == 1 and mask.max() == 1
    assert annotations(out, test)["ed_frames"] == [18]
    assert "every clip opens" in check(out) and "with annotations" in capsys.readouterr().err


def test_echonet_oddities_are_named(tmp_path: Path) -> None:
    rows = [
        ["0X1A2B", 60.0, 40.0, 100.0, 112, 112, 50, 30, "TRAIN"],
        ["0X3C4D", 60.0, 40.0, 100.0, 112, 112, 50, 30, "TRAIN"],
        ["0X3C4D", 60.0, 40.0, 100.0, 112, 112, 50, 30, "TEST"],
        ["0X5E6F", 55.0, 45.0, 100.0, 112, 112, 50, 31, "TEST"],
        ["0X7777", 55.0, 45.0, 100.0, 112, 112, 50, 30, "TEST"],
        ["../0X1", 55.0, 45.0, 100.0, 112, 112, 0, 30, "TEST"],
        ["0X8888", 55.0, 45.0, 100.0, 112, 112, 50, 30, "HOLDOUT"],
    ]
    out = tmp_path / "set" / "manifest.parquet"
    root = echonet(tmp_path / "set", rows)
    (root / "Videos" / "0X9999.avi").write_bytes(b"")
    report = build("echonet_dynamic", root, out, max_quarantined=1)
    assert list(by_id(out)) == ["0X1A2B"]
    reasons = held(out)
    assert "listed 2 times in FileList.csv (splits TEST, TRAIN)" in reasons["0X3C4D"]
    assert "has 30 frames, its record says 31" in reasons["0X5E6F"]
    assert "no video at Videos/0X7777.avi" in reasons["0X7777"] and "expected TRAIN, VAL or TEST" in reasons["0X8888"]
    assert report.quarantined["missing video"] == 2
    with pytest.raises(BuildError, match="more than max_quarantined"):
        build("echonet_dynamic", root, out)


def test_echonet_without_a_column_or_a_folder(tmp_path: Path) -> None:
    root = echonet(tmp_path / "set", [["0X1A2B", 60.0, "TRAIN"]], ["FileName", "EF", "Split"])
    with pytest.raises(SourceError, match="lacks the columns ESV, EDV, FPS, NumberOfFrames"):
        build("echonet_dynamic", root, tmp_path / "m.parquet")
    with pytest.raises(SourceError, match="holds none of FileList"):
        build("echonet_dynamic", tmp_path / "set" / "Videos", tmp_path / "m.parquet")


def test_identical_videos_are_kept_once(tmp_path: Path) -> None:
    root = echonet(tmp_path / "set")
    (root / "Videos" / "0X3C4D.avi").write_bytes((root / "Videos" / "0X1A2B.avi").read_bytes())
    report = build("echonet_dynamic", root, root / "m.parquet")
    assert (report.records, report.duplicates) == (2, 1)


def camus(root: Path, frame_rate: str = "FrameRate: 46.5\n", zooms: tuple[float, float] = (0.4, 0.2)) -> Path:
    for number in (1, 2):
        folder = root / "database_nifti" / f"patient{number:04d}"
        folder.mkdir(parents=True)
        for name, ends in (("2CH", (9, 1)), ("4CH", (1, 9))):
            frames = np.roll(pulsing(9, 46.5, size=(60, 40)), 2 * number + (name == "4CH"), axis=2)
            masks = ((frames < 30) * 1).astype(np.uint8)
            masks[:, :5, :5], masks[:, -5:, -5:] = 2, 3
            for values, suffix in ((frames, ""), (masks, "_gt")):
                image = nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([*zooms, 1, 1]))
                nibabel.save(image, folder / f"patient{number:04d}_{name}_half_sequence{suffix}.nii.gz")
            text = f"ED: {ends[0]}\nES: {ends[1]}\nNbFrame: 9\nSex: F\nAge: 56\nImageQuality: Good\nEF: 53\n{frame_rate}"
            (folder / f"Info_{name}.cfg").write_text(text)
    for word, name in (("training", "patient0001"), ("validation", ""), ("testing", "patient0002")):
        path = root / "database_split" / f"subgroup_{word}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{name}\n")
    return root


def test_camus(tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.parquet"
    build("camus", camus(tmp_path / "set"), out)
    found = by_id(out)
    assert {name: (r.view, r.split) for name, r in found.items()} == {
        "patient0001_2CH": ("A2C", "train"), "patient0001_4CH": ("A4C", "train"),
        "patient0002_2CH": ("A2C", "test"), "patient0002_4CH": ("A4C", "test"),
    }  # fmt: skip
    record = found["patient0001_2CH"]
    assert (record.fps, record.frames, record.ejection_fraction, record.age, record.sex) == (46.5, 9, 53.0, 56.0, "F")
    stored = annotations(out, record)
    assert stored["ed_frames"] == [8] and stored["es_frames"] == [0], "the file counts from 1, and this beat runs backwards"
    assert stored["masks"].shape == (9, 60, 80), "pixels 0.4 mm wide and 0.2 mm high: the picture is stretched to square ones"
    assert set(np.unique(stored["masks"])) == {0, 1, 2, 3}
    assert "every clip opens" in check(out)
    assert {r.view for r in by_id_of("camus", tmp_path / "set", tmp_path / "o4" / "m.jsonl", views=["A4C"])} == {"A4C"}


def by_id_of(source: Any, root: Path, out: Path, **options: Any) -> tuple[EchoRecord, ...]:
    build(source, root, out, **options)
    return read_manifest(out, record=EchoRecord).records


def test_camus_without_a_frame_rate_or_with_a_cut_file(tmp_path: Path) -> None:
    root = camus(tmp_path / "set", frame_rate="")
    with pytest.raises(BuildError, match="says no FrameRate"):
        build("camus", root, tmp_path / "m.parquet")
    root = camus(tmp_path / "other")
    path = root / "database_nifti" / "patient0001" / "patient0001_4CH_half_sequence.nii.gz"
    path.write_bytes(path.read_bytes()[:200])
    build("camus", root, root / "m.parquet", max_quarantined=0.5)
    assert list(held(root / "m.parquet")) == ["patient0001_4CH"]
    (root / "database_split" / "subgroup_testing.txt").write_text("patient0001\n")
    with pytest.raises(SourceError, match="patient0001 is also in train; split by patient"):
        build("camus", root, root / "m.parquet")


def test_a_folder_of_ultrasound_dicom(tmp_path: Path) -> None:
    root = tmp_path / "set"
    first = write_cine(root / "deep" / "a.dcm", SeriesDescription="Apical 4 chamber", AcquisitionDateTime="20240506120000.5")
    write_cine(root / "b", np.roll(sector_frames(), 1, 0), PatientID="P2", RWaveTimeVector=[40.0, 220.0])
    write_cine(root / "still.dcm", sector_frames(1))
    write_cine(root / "xa.dcm", Modality="XA")
    write_cine(root / "notime.dcm", FrameTime=None, FrameIncrementPointer=None)
    colour = np.repeat(sector_frames()[..., None], 3, -1)
    colour[:, 40:70, 70:90] = [220, 30, 20]
    write_cine(root / "doppler.dcm", colour)
    table(root / "labels.csv", ["file_name", "view", "ejection_fraction"], [["b", "PLAX", 61]])
    out = tmp_path / "m.parquet"
    report = build("ultrasound_dicom", root, out, max_quarantined=1)
    records = {Path(record.video).name: record for record in by_id(out).values()}
    assert set(records) == {"a.dcm", "b"} and report.quarantined == {"colour Doppler": 1, "other": 1}
    a, b = records["a.dcm"], records["b"]
    assert (a.view, a.fps, a.frames, a.age, a.sex) == ("A4C", 40.0, 12, 61.0, "F")
    assert a.extra["acquired"] == "2024-05-06T12:00:00.500000" and (b.view, b.ejection_fraction) == ("PLAX", 61.0)
    assert b.extra["r_peaks_s"] == [0.04, 0.22]
    text = out.with_suffix(".txt")
    text.write_text(str(read_manifest(out, record=EchoRecord)))
    assert "DOE" not in text.read_text() and "P1" not in text.read_text(), "no name and no patient id"
    assert "every clip opens" in check(out) and first.is_file()


def mimic(root: Path) -> Path:
    """Two sets side by side: three cines and a still of two patients; ECGs an hour and four days away."""
    echo, ecg = root / "mimic-iv-echo" / "1.0", root / "mimic-iv-ecg"
    files = [(10, 901, "0001"), (10, 901, "0002"), (20, 902, "0001"), (10, 901, "0003")]
    rows = []
    for i, (subject, study, series) in enumerate(files):
        below = f"p10/p{subject}/s{study}/{study}_{series}.dcm"
        write_cine(echo / "files" / below, np.roll(sector_frames(), i, 0) if i < 3 else sector_frames(1))
        rows.append([subject, study, "2180-05-06 12:00:00", below])
    rows.append([30, 903, "2180-05-06 12:00:00", "p10/p30/s903/903_0001.dcm"])
    table(echo / "echo-record-list.csv", ["subject_id", "study_id", "acquisition_datetime", "dicom_filepath"], rows)
    table(echo / "echo-study-list.csv", ["subject_id", "study_id", "measurement_id"], [[10, 901, 77], [20, 902, ""]])
    table(
        echo / "structured-measurement.csv",
        ["measurement_id", "measurement", "result"],
        [[77, "lvef", 55], [77, "biplane_lvef", 57.5], [77, "biplane_lvedv", 110], [77, "lvot_diam", 2.1]],
    )
    table(echo / "views.csv", ["dicom_filepath", "view"], [["p10/p10/s901/901_0002.dcm", "apical 2-chamber"]])
    signals = [
        (10, 1, "2180-05-06 13:00:00"),
        (10, 2, "2180-05-05 12:00:00"),
        (10, 3, "2180-05-06 12:10:00"),
        (20, 4, "2180-05-10 12:00:00"),
    ]
    lines = []
    for subject, number, time in signals:
        path = f"files/p1000/p{subject}/s{number}/{number}"
        if number != 3:  # a partial download
            write_wfdb(beats(0.0, 10.0, rr=0.7 + 0.1 * number)[0], ecg / path)
        lines.append([subject, number, number, time, path])
    table(ecg / "record_list.csv", ["subject_id", "study_id", "file_name", "ecg_time", "path"], lines)
    return root


def test_mimic_iv_echo_with_mimic_iv_ecg(tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.parquet"
    report = build("mimic_iv_echo", mimic(tmp_path / "physionet"), out, max_quarantined=0.3)
    found = by_id(out)
    assert set(found) == {"901_0001", "901_0002", "902_0001"} and report.quarantined == {"missing video": 1}
    first = found["901_0001"]
    assert (first.patient_id, first.study_id, first.ejection_fraction, first.edv_ml) == ("p10", "s901", 57.5, 110.0)
    assert (first.pairing, first.ecg_offset, first.extra["ecg_hours"]) == ("patient", -3600.0, 1.0)
    assert first.ecg is not None and (out.parent / f"{first.ecg}.hea").is_file()
    assert [found[name].view for name in sorted(found)] == ["UNKNOWN", "A2C", "UNKNOWN"]
    assert found["902_0001"].ecg is None and found["902_0001"].ejection_fraction is None
    assert {r.split for r in found.values() if r.patient_id == "p10"} == {first.split}
    late = by_id_of("mimic_iv_echo", tmp_path / "physionet", tmp_path / "o2" / "m.jsonl", ecg_hours=200, max_quarantined=1)
    assert {r.record_id: r.pairing for r in late}["902_0001"] == "patient"


def echoxflow(root: Path) -> Path:
    """Three recordings of two exams in beam space: one with ECG and triggers, one without, one without times."""
    zarr = pytest.importorskip("zarr")
    rows = []
    ecg, r_peaks = beats(100.0, 4.0, first=100.3)  # the scanner's clock
    for i, (exam, name) in enumerate((("exam1", "rec.a"), ("exam1", "b"), ("exam2", "c"))):
        below = f"{exam}/{name}.zarr"
        group = zarr.open_group(root / below, mode="w")
        beams = np.roll(pulsing(40, 40, size=(60, 50)), i, axis=1)
        times = 101.0 + np.arange(40) / 40
        times[7] += 0.004
        group.create_array("data/2d_brightness_mode", data=beams)
        if name != "c":
            group.create_array("timestamps/2d_brightness_mode", data=times)
        if name == "rec.a":
            group.create_array("data/ecg", data=ecg.signal[0])
            group.create_array("timestamps/ecg", data=100.0 + np.arange(ecg.signal.shape[1]) / ecg.rate)
            group.create_array("timestamps/ecg_qrs", data=r_peaks)
        geometry = {"depth_start_m": 0.0, "depth_end_m": 0.16, "tilt_rad": 0.0, "width_rad": 1.3}
        sector = {"semantic_id": "bmode", "geometry": geometry, "view": "A4C" if i == 0 else ""}
        group.attrs["recording_manifest"] = {"sectors": [{"semantic_id": "tissue_doppler"}, sector]}
        rows.append({"recordings/exam_id": exam, "recordings/recording_id": name, "recordings/zarr_path": below})
    rows.append({"recordings/exam_id": "e", "recordings/recording_id": "d", "recordings/zarr_path": "../d.zarr"})
    doppler = {"recordings/exam_id": "e", "recordings/recording_id": "x", "recordings/zarr_path": "x.zarr"}
    rows.append({**doppler, "recordings/array_paths": ["data/1d_pulsed_wave_doppler"]})
    (root / "croissant.json").write_text(json.dumps({"recordSet": [{"@id": "arrays"}, {"@id": "recordings", "data": rows}]}))
    return root


def test_echoxflow(tmp_path: Path) -> None:
    out = tmp_path / "out" / "m.parquet"
    report = build("echoxflow", echoxflow(tmp_path / "set"), out, max_quarantined=0.6, val_fraction=0, test_fraction=0)
    assert report.records == 2
    found = by_id(out)
    record = found["exam1_rec_a"]
    assert (record.pairing, record.view, record.frames, record.patient_id) == ("beat_synchronous", "A4C", 40, "exam1")
    assert record.ecg_offset == pytest.approx(1.0) and record.fps == pytest.approx(40)
    triggers = annotations(out, record)["r_peaks"]
    assert np.allclose(triggers[:2], np.array([100.3, 101.1]) - 101.0, atol=1e-3), "seconds from frame 0"
    assert found["exam1_b"].pairing == "none" and found["exam1_b"].view == "UNKNOWN"
    reasons = held(out)
    assert "no timestamps/2d_brightness_mode" in reasons["exam2_c"] and "path outside the data set" in reasons["e_d"]
    assert "every clip opens" in check(out)
    before = (out.parent / record.video).stat().st_mtime_ns
    build("echoxflow", tmp_path / "set", out, max_quarantined=0.6)
    assert (out.parent / record.video).stat().st_mtime_ns == before, "a second run converts nothing again"


def test_scan_conversion_puts_depth_and_angle_where_they_belong() -> None:
    beams = np.zeros((2, 100, 91), np.uint8)
    beams[0, 50, 45], beams[1, :, -1] = 255, 100  # a point straight down at half depth; the rightmost beam
    point, edge = to_picture(beams, Sector(0.0, 0.2, -np.pi / 4, np.pi / 4), height=200)
    assert point.shape == (200, round(200 * np.sqrt(2)))
    y, x = np.unravel_index(point.argmax(), point.shape)
    assert (y, x) == (pytest.approx(100.5, abs=2), pytest.approx(141, abs=2))
    lit = np.argwhere(edge[20:130] > 50)
    assert len(lit) > 80 and np.allclose(lit[:, 1] - 141, lit[:, 0] + 20, atol=3), "45 degrees to the right"
    assert not edge[145:].any() and not edge[:, :141].any(), "black elsewhere, and outside the sector"


def test_check_opens_every_clip(tmp_path: Path) -> None:
    root = echonet(tmp_path / "set")
    out = root / "m.parquet"
    build("echonet_dynamic", root, out)
    write_video(root / "Videos" / "0X1A2B.avi", np.full((30, 112, 112), 7, np.uint8), 50)
    write_video(root / "Videos" / "0X3C4D.avi", np.repeat(pulsing(1, 50, size=(112, 112)), 30, 0), 50)
    with pytest.raises(ManifestError, match="2 of 3 clips are unusable") as error:
        check(out)
    assert "its first frame is one grey" in str(error.value) and "all its 30 frames are equal" in str(error.value)
    cut = root / "annotations" / "0X5E6F.npz"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(ManifestError, match="3 of 3 clips"):
        check(out)


@pytest.mark.parametrize(
    ("text", "view"),
    [
        ("A4C", "A4C"), ("4CH", "A4C"), ("Apical four chamber", "A4C"), ("apical 4-chamber", "A4C"), ("AP4", "UNKNOWN"), ("2ch", "A2C"),
        ("Apical two chamber view", "A2C"), ("PLAX", "PLAX"), ("Parasternal long axis", "PLAX"), ("PSAX_MV", "PSAX"),
        ("Parasternal short axis at the level of the mitral valve", "PSAX"), ("Subcostal", "UNKNOWN"), ("", "UNKNOWN"),
    ],
)  # fmt: skip
def test_views(text: str, view: str) -> None:
    assert as_echo_view(text) == view


def test_times() -> None:
    assert as_time("2180-05-06 12:30:00") == "2180-05-06T12:30:00"
    assert as_time("20160503121535.5") == "2016-05-03T12:15:35.500000"
    assert as_time("20160503") is None and as_time("") is None and as_time("20161303121535") is None
