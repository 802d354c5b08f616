"""Each longitudinal data set in its own layout, with the oddities that are known of it, becomes series of visits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_build import film
from test_sources import table

from medgen.data.build import BuildError, build, check
from medgen.data.records import Manifest, ManifestError, read_manifest
from medgen.data.sources import SOURCES
from medgen.data.sources.base import Quarantined, SourceError, SourceOptions, Unwritten
from medgen.data.sources.visits import as_moment
from medgen.data.visit_images import VisitImages, VisitPreprocessing
from medgen.data.visit_records import VisitSeries
from medgen.data.volumes import VolumePreprocessing, read_header


def read(source: str, root: Path, **options: Any) -> tuple[dict[str, VisitSeries], dict[str, str]]:
    """Series and quarantine reasons by id."""
    items = [x.record if isinstance(x, Unwritten) else x for x in SOURCES[source].records(root, SourceOptions(**options))]
    held = {item.record_id: item.reason for item in items if isinstance(item, Quarantined)}
    return {item.record_id: item for item in items if isinstance(item, VisitSeries)}, held


def built(source: Any, root: Path, out: Path, **options: Any) -> tuple[Manifest[VisitSeries], dict[str, str]]:
    """The manifest that `build` writes, and the reasons in its quarantine."""
    build(source, root, out / "manifest.parquet", **options)
    lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    return read_manifest(out / "manifest.parquet", record=VisitSeries), {line["record_id"]: line["reason"] for line in lines}


def times(record: VisitSeries) -> list[float]:
    return [visit.time for visit in record.visits]


@pytest.mark.parametrize(
    ("day", "clock", "iso"),
    [
        ("21800506", "213014.531", "2180-05-06T21:30:14.531000"),
        ("21800506", "80556.875", "2180-05-06T08:05:56.875000"),  # MIMIC's lost zero
        ("21800506.0", "0.0", "2180-05-06T00:00:00"),
        ("2180-05-06", "", "2180-05-06T00:00:00"),
        ("1898-03-04T11:30:05", "", "1898-03-04T11:30:05"),  # BIDS: a shifted date
        ("2019-03-02T11:30", "", "2019-03-02T11:30:00"),
        ("21800506", "256199", "2180-05-06T00:00:00"),  # no such time
        ("20180230", "", None),
        ("", "120000", None),
        ("n/a", "", None),
    ],
)
def test_moments(day: str, clock: str, iso: str | None) -> None:
    moment = as_moment(day, clock)
    assert (None if moment is None else moment.isoformat()) == iso


# ---------------------------------------------------------------- MIMIC-CXR


def mimic(root: Path) -> Path:
    films = [  # dicom, subject, study, ViewPosition, StudyDate, StudyTime, split
        ("a1", 10000032, 50414267, "PA", "21800506", "213014.531", "train"),
        ("a2", 10000032, 50414267, "LATERAL", "21800506", "213014.531", "train"),
        ("a3", 10000032, 50414267, "AP", "21800506", "213014.531", "train"),
        ("b1", 10000032, 53189527, "AP", "21800626", "80556.875", "train"),  # listed before an earlier one
        ("c1", 10000032, 53911762, "AP", "21800507", "93014.531", "train"),
        ("d1", 10000032, 56699142, "LL", "21800923", "120000.0", "train"),  # only a lateral, but read
        ("e1", 10000032, 57777777, "PA", "", "120000.0", "train"),  # undated
        ("f1", 10000764, 57375967, "AP", "21321015", "82818.843", "validate"),
        ("g1", 10000764, 57375968, "LATERAL", "21321115", "82818.843", "validate"),  # lateral, no report
        ("h1", 11000011, 51029426, "PA", "21440416", "20758.421", ""),  # no split
    ]
    keys = ("dicom_id", "subject_id", "study_id", "ViewPosition", "StudyDate", "StudyTime")
    table(root / "mimic-cxr-2.0.0-metadata.csv.gz", [dict(zip(keys, f, strict=False)) for f in films])
    split = [dict(zip(keys[:3], f, strict=False)) | {"split": f[6]} for f in films if f[6]]
    table(root / "mimic-cxr-2.0.0-split.csv.gz", split)
    table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", [{"subject_id": 10000032, "study_id": 50414267, "Pleural Effusion": "1.0"}])
    table(root / "patients.csv.gz", [{"subject_id": 10000032, "gender": "F", "anchor_age": 52, "anchor_year": 2178}])
    for number, (name, subject, study, view, *_) in enumerate(films):
        folder = root / f"files/p{str(subject)[:2]}/p{subject}"
        if view in ("PA", "AP"):
            film(folder / f"s{study}" / f"{name}.png", number)
            Image.open(folder / f"s{study}" / f"{name}.png").save(folder / f"s{study}" / f"{name}.jpg")
        if study not in (57375968, 53911762):
            text = f"FINAL REPORT\n\n IMPRESSION:\n\n As compared to ___, small left pleural effusion {study}. No pneumothorax.\n"
            (root / "mimic-cxr-reports" / folder.relative_to(root)).mkdir(parents=True, exist_ok=True)
            (root / "mimic-cxr-reports" / folder.relative_to(root) / f"s{study}.txt").write_text(text)
    return root


def test_mimic_studies_become_dated_visits(tmp_path: Path) -> None:
    found, held = read("mimic_cxr_visits", mimic(tmp_path))
    series = found["p10000032"]
    assert [visit.visit_id for visit in series.visits] == ["s50414267", "s53911762", "s53189527", "s56699142"]
    assert times(series) == pytest.approx([0.0, 0.5, 50.4414, 139.6040], abs=1e-3)  # hours count
    assert [visit.view for visit in series.visits] == ["PA", "AP", "AP", None]
    assert series.visits[0].image == "files/p10/p10000032/s50414267/a1.jpg" and series.visits[3].image is None
    assert series.visits[0].date == "2180-05-06" and "effusion" in series.visits[3].report
    assert series.visits[0].extra["labels"]["pleural_effusion"] == "present"
    assert series.visits[1].report == "" and "___" not in series.visits[0].report
    assert series.covariates == {"age": 54.0, "sex": "F"} and series.time_unit == "days" and series.split == "train"
    assert [visit.visit_id for visit in found["p10000764"].visits] == ["s57375967"] and found["p10000764"].split == "val"
    assert held == {
        "p10000032/s57777777": "undated: StudyDate ''",
        "p11000011": "no split for p11000011 in mimic-cxr-2.0.0-split.csv.gz",
    }


def test_mimic_is_built_and_a_lost_film_costs_its_visit_only(tmp_path: Path) -> None:
    root = mimic(tmp_path / "set")
    (root / "files/p10/p10000032/s53911762/c1.jpg").write_bytes(b"\xff\xd8cut off")
    with pytest.raises(BuildError, match=r"3 of 6 records are unusable \(1 undated, 1 other, 1 cannot be decoded"):
        built("mimic_cxr_visits", root, tmp_path / "out")
    manifest, held = built("mimic_cxr_visits", root, tmp_path / "out", max_quarantined=0.6)
    (series,) = manifest.records  # the other patient has one film
    assert [visit.image is not None for visit in series.visits] == [True, False, True, False] and len(series.visits) == 4
    assert "cannot be decoded" in held["p10000032/s53911762"] and "fewer than min_images=2" in held["p10000764"]
    assert len(VisitImages(manifest, VisitPreprocessing(size=32))) == 2
    assert "1 series of 2 images, every image opens" in check(tmp_path / "out" / "manifest.parquet")
    manifest, _ = built("mimic_cxr_visits", root, tmp_path / "out", max_quarantined=0.6, min_images=1)
    assert len(manifest) == 2


# ---------------------------------------------------------------- NIH, PadChest


def nih(root: Path) -> Path:
    rows = [  # image, Follow-up #, patient, age, sex, view, labels
        ("00000001_000.png", 0, 1, "058Y", "M", "PA", "Cardiomegaly"),
        ("00000001_001.png", 1, 1, "058Y", "M", "PA", "Cardiomegaly|Emphysema"),
        ("00000001_004.png", 4, 1, "414", "M", "AP", "No Finding"),  # a gap, and a famous age
        ("00000002_000.png", 0, 2, "081Y", "F", "PA", "No Finding"),
        ("00000002_001.png", 1, 2, "082Y", "F", "PA", "Effusion"),  # not there
        ("00000002_002.png", "", 2, "082Y", "F", "PA", "Effusion"),
    ]
    keys = ("Image Index", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position", "Finding Labels")
    table(root / "Data_Entry_2017.csv", [dict(zip(keys, row, strict=True)) for row in rows])
    for number, (name, *_) in enumerate(rows):
        if name != "00000002_001.png":
            film(root / "images_001/images" / name, number)
    (root / "test_list.txt").write_text("00000002_000.png\n")
    return root


def test_nih_follow_ups_are_an_order_with_gaps(tmp_path: Path) -> None:
    found, held = read("nih_followups", nih(tmp_path))
    series = found["00000001"]
    assert series.time_unit == "order" and times(series) == [0, 1, 4] and series.visits[2].view == "AP"
    assert series.covariates == {"age": 58.0, "sex": "M"}
    assert [visit.extra["age"] for visit in series.visits] == [58, 58, None]
    assert series.visits[0].image == "images_001/images/00000001_000.png" and "ardiomegaly" in series.visits[0].report
    assert found["00000002"].split == "test" and [visit.image is None for visit in found["00000002"].visits] == [False, True]
    assert held["00000002/00000002_001"].startswith("no image at") and held["00000002/00000002_002"] == "undated: Follow-up # ''"
    only = read("nih_followups", tmp_path, views=("PA",))[0]["00000001"]
    assert times(only) == [0, 1]


def padchest(root: Path) -> Path:
    rows = [  # ImageID, ImageDir, StudyDate_DICOM, StudyID, PatientID, PatientBirth, sex, Projection, Report, Labels
        ("1_a.png", 0, 20140915, "S1", "P1", "1930.0", "F", "PA", "sin hallazgos", "['normal']"),
        ("1_b.png", 0, 20140915, "S1", "P1", "1930.0", "F", "L", "sin hallazgos", "['normal']"),
        ("1_c.png", 0, 20140930, "S2", "P1", "1930.0", "F", "AP_horizontal", "derram", "[]"),
        (
            "1_d.png",
            0,
            20140930,
            "S3",
            "P1",
            "1930.0",
            "F",
            "PA",
            "derram pleural",
            "['pleural effusion', 'exclude']",
        ),  # the same day
        ("1_e.png", 0, "20151301", "S4", "P1", "1930.0", "F", "PA", "", "[]"),  # month 13
        ("2_a.png", 1, 20100101, "S5", "P2", "", "M", "COSTAL", "costillas", "[]"),
    ]
    keys = ("ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM", "Projection",
            "Report", "Labels")  # fmt: skip
    table(root / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", [dict(zip(keys, row, strict=True)) for row in rows])
    for number, (name, *_) in enumerate(rows):
        film(root / "0" / name, 100 + number)
    return root


def test_padchest_is_dated_and_a_day_holds_one_film(tmp_path: Path) -> None:
    found, held = read("nih_followups", padchest(tmp_path))
    assert set(found) == {"P1"}
    series = found["P1"]
    assert times(series) == [0, 15] and [visit.date for visit in series.visits] == ["2014-09-15", "2014-09-30"]
    assert [visit.view for visit in series.visits] == ["PA", "PA"] and series.covariates == {"age": 84.0, "sex": "F"}
    assert series.visits[1].extra["labels"] == ["pleural effusion", "exclude"] and series.visits[1].report == "derram pleural"
    assert held == {"P1/S2": "same time as visit S3, which stays", "P1/1_e": "undated: StudyDate_DICOM '20151301'"}


# ---------------------------------------------------------------- ACDC

SHORT_AXIS = np.diag([1.5625, 1.5625, 10.0, 1.0])


def acdc(root: Path) -> Path:
    """Three patients of 16 frames: one whose systole wraps around the loop, one whose Info.cfg names frames that are not there."""
    for folder, name, ed, es in (
        ("training", "patient001", 1, 9),
        ("testing", "patient101", 13, 5),
        ("training", "patient002", 1, 40),
    ):
        home = root / folder / name
        home.mkdir(parents=True)
        cine = np.random.default_rng(int(name[-3:])).integers(0, 400, (20, 24, 8, 1))
        cine = cine + 100 * np.arange(16)  # each frame brighter than the one before
        image = nibabel.Nifti1Image(cine.astype(np.int16), SHORT_AXIS)
        image.header.set_xyzt_units("mm", "sec")
        if folder == "testing":  # says nothing of its axes
            image.set_sform(SHORT_AXIS, code=0)
            image.set_qform(SHORT_AXIS, code=0)
        nibabel.save(image, home / f"{name}_4d.nii.gz")
        nibabel.save(nibabel.Nifti1Image(cine[..., 0].astype(np.int16), SHORT_AXIS), home / f"{name}_frame01.nii.gz")
        group = "" if folder == "testing" else "Group: DCM\n"
        (home / "Info.cfg").write_text(f"ED: {ed}\nES: {es}\n{group}Height: 184.0\nNbFrame: 16\nWeight: 95.0\n")
    (root / "training" / "patient003").mkdir()
    (root / "training" / "patient003" / "Info.cfg").write_text("ED: 1\nES: 4\nNbFrame: 16\n")  # no cine
    return root


def frame_of(path: Path, first: NDArray[Any]) -> float:
    """Which frame (from 1) the written volume is, by its brightness."""
    return float(np.mean(np.asarray(nibabel.load(path).dataobj) - first)) / 100 + 1


def test_acdc_as_sadm_reads_it(tmp_path: Path) -> None:
    root = acdc(tmp_path / "set")
    manifest, held = built("acdc", root, tmp_path / "out", max_quarantined=1, frames=12)
    series = {record.record_id: record for record in manifest.records}
    assert set(series) == {"patient001", "patient101"} and series["patient101"].split == "test" != series["patient001"].split
    one = series["patient001"]
    assert one.time_unit == "phase" and one.dim == 3 and times(one) == pytest.approx(np.linspace(0, 1, 12), abs=1e-5)
    assert (
        one.covariates == {"group": "DCM", "height_cm": 184.0, "weight_kg": 95.0}
        and "group" not in series["patient101"].covariates
    )
    first = np.asarray(nibabel.load(root / "training/patient001/patient001_4d.nii.gz").dataobj)[..., 0]
    seen = [frame_of(manifest.path(str(visit.image)), first) for visit in one.visits]
    assert seen == pytest.approx(np.linspace(1, 9, 12), abs=1e-3)
    assert [visit.extra["frame"] for visit in one.visits] == pytest.approx(seen, abs=1e-3)
    written = nibabel.load(manifest.path(str(one.visits[3].image)))
    assert written.ndim == 3 and np.allclose(written.affine, SHORT_AXIS)
    bare = manifest.path(str(series["patient101"].visits[0].image))
    assert read_header(bare).axes == "" and read_header(bare).spacing == pytest.approx((1.5625, 1.5625, 10))
    wraps = [visit.extra["frame"] for visit in series["patient101"].visits]
    assert wraps[0] == 13 and wraps[-1] == 5 and max(wraps) < 17
    assert (
        "says ED 1, ES 40, but patient002_4d.nii.gz has the shape" in held["patient002"] and "no image at" in held["patient003"]
    )

    sadm = VisitPreprocessing(dim=3, size=(32, 128, 128), volume=VolumePreprocessing(intensity="minmax", max_anisotropy=12))
    item = VisitImages(manifest, sadm, tmp_path / "cache")[0]
    assert item["image"].shape == (1, 32, 128, 128) and item["image"].min() < -0.9 and item["image"].max() > 0.9
    said = check(tmp_path / "out" / "manifest.parquet")
    assert "12 of 24 volumes say no orientation: volume.orientation=null" in said
    assert "volume.max_anisotropy=7" in said and "volume.intensity=percentile (or minmax)" in said


def test_acdc_frames_are_written_once_and_again_when_the_cine_changes(tmp_path: Path) -> None:
    root = acdc(tmp_path / "set")
    manifest, _ = built("acdc", root, tmp_path / "out", max_quarantined=1, frames=0)
    assert times(manifest.records[0]) == pytest.approx(np.linspace(0, 1, 9), abs=1e-5)
    path = manifest.path(str(manifest.records[0].visits[0].image))
    before = path.stat().st_mtime_ns
    built("acdc", root, tmp_path / "out", max_quarantined=1, frames=0)
    assert path.stat().st_mtime_ns == before
    cine = root / "training/patient001/patient001_4d.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(cine).dataobj) + np.int16(7), SHORT_AXIS), cine)
    built("acdc", root, tmp_path / "out", max_quarantined=1, frames=0)
    assert path.stat().st_mtime_ns > before
    with pytest.raises(BuildError, match="frames must be 0"):
        built("acdc", root, tmp_path / "out", frames=1)


# ---------------------------------------------------------------- BIDS


def tsv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def brain(path: Path, number: int, spacing: float = 1.2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(number).gamma(2.0, 200.0, (12, 14, 16)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([-spacing, -1.2, 1.2, 1.0])), path)  # LPS, as most scanners


def bids(root: Path) -> Path:
    tsv(
        root / "participants.tsv",
        [("participant_id", "age", "sex", "apoe"), ("sub-01", "71.5", "F", "34"), ("sub-02", "89+", "n/a", "n/a")],
    )
    tsv(
        root / "sub-01/sub-01_sessions.tsv",
        [
            ("session_id", "days", "cdr", "mmse"),
            ("ses-01", "0", "0", "29"),
            ("ses-02", "n/a", "0.5", "n/a"),  # a missing day
            ("ses-03", "731", "0.5", "26"),
            ("ses-04", "1096", "1", "24"),  # seen, not scanned
        ],
    )
    for number, session in enumerate(("ses-01", "ses-02", "ses-03")):
        brain(root / f"sub-01/{session}/anat/sub-01_{session}_T1w.nii.gz", number)
    brain(root / "sub-01/ses-01/anat/sub-01_ses-01_run-2_T1w.nii.gz", 50)
    brain(root / "sub-01/ses-01/anat/sub-01_ses-01_T2w.nii.gz", 51)
    for number, session in enumerate(("ses-d0129", "ses-d0757", "ses-d2430"), 10):  # OASIS-3
        brain(root / f"sub-02/{session}/anat/sub-02_{session}_T1w.nii.gz", number)
    for number, (session, moment) in enumerate((("ses-b", "1898-03-04T11:30:00"), ("ses-a", "1899-03-04T11:30:00")), 20):
        brain(root / f"sub-03/{session}/anat/sub-03_{session}_T1w.nii", number)
        scans = [("filename", "acq_time"), (f"anat/sub-03_{session}_T1w.nii", moment)]
        tsv(root / f"sub-03/{session}/sub-03_{session}_scans.tsv", scans)
    for number, session in enumerate(("ses-M006", "ses-M000"), 30):  # ADNI by Clinica
        brain(root / f"sub-04/{session}/anat/sub-04_{session}_T1w.nii.gz", number)
    brain(root / "sub-05/anat/sub-05_T1w.nii.gz", 40)  # no sessions at all
    (root / "sub-06/ses-01/anat").mkdir(parents=True)
    return root


def test_bids_sessions_by_the_clock_they_have(tmp_path: Path) -> None:
    found, held = read("bids_sessions", bids(tmp_path))
    one = found["sub-01"]
    assert times(one) == [0, 731, 1096] and [visit.visit_id for visit in one.visits] == ["ses-01", "ses-03", "ses-04"]
    assert one.visits[2].image is None and one.visits[2].extra == {"days": 1096.0, "cdr": 1.0, "mmse": 24.0}
    assert one.visits[0].image == "sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz"
    assert one.visits[0].extra["other_runs"] == "sub-01_ses-01_run-2_T1w.nii.gz"
    assert one.covariates == {"age": 71.5, "sex": "F", "apoe": 34.0} and one.time_unit == "days" and one.modality == "mr"
    assert times(found["sub-02"]) == [0, 628, 2301] and found["sub-02"].covariates == {"age": 89.0}
    assert [v.visit_id for v in found["sub-03"].visits] == ["ses-b", "ses-a"] and times(found["sub-03"]) == [0, 365]
    assert found["sub-03"].visits[0].date == "1898-03-04" and found["sub-03"].covariates == {}
    assert times(found["sub-04"]) == pytest.approx([0, 182.625]) and times(found["sub-05"]) == [0]
    assert (
        held["sub-01/ses-02"] == "undated: no time where its other sessions have one" and "no image at sub-06" in held["sub-06"]
    )
    assert set(read("bids_sessions", tmp_path, contrast="T2w")[0]) == {"sub-01"}


def test_bids_without_any_clock_is_an_order(tmp_path: Path) -> None:
    for session in ("ses-10", "ses-2", "ses-1"):
        brain(tmp_path / f"sub-01/{session}/anat/sub-01_{session}_T1w.nii.gz", 1)
    series = read("bids_sessions", tmp_path)[0]["sub-01"]
    assert series.time_unit == "order" and [v.visit_id for v in series.visits] == ["ses-1", "ses-2", "ses-10"]


def tool(path: Path) -> str:
    """A brain extraction of sorts, which only copies; fails for one subject; notes each run."""
    path.write_text(
        "import sys, shutil\n"
        "source, target = sys.argv[1:3]\n"
        "open(sys.argv[3], 'a').write(source + '\\n')\n"
        "if 'sub-02_ses-d0757' in source: sys.exit('no brain found')\n"
        "shutil.copyfile(source, target)\n"
    )
    return f"{sys.executable} -S '{path}' {{input}} {{output}} '{path.parent}/runs; touch pwned.txt'"


def test_a_command_runs_on_every_image_once(tmp_path: Path) -> None:
    root = bids(tmp_path / "set")
    command = tool(tmp_path / "strip it.py")  # a space in its name, and a shell's marks that no shell reads
    manifest, held = built("bids_sessions", root, tmp_path / "out", command=command, max_quarantined=0.5)
    runs = tmp_path / "runs; touch pwned.txt"
    assert len(runs.read_text().splitlines()) == 10 and not (tmp_path / "pwned.txt").exists() and not Path("pwned.txt").exists()
    assert "command ended with 1" in held["sub-02/ses-d0757"] and "no brain found" in held["sub-02/ses-d0757"]
    two = next(record for record in manifest.records if record.record_id == "sub-02")
    assert [visit.image is None for visit in two.visits] == [False, True, False]
    source = root / "sub-02/ses-d0129/anat/sub-02_ses-d0129_T1w.nii.gz"
    assert manifest.path(str(two.visits[0].image)).read_bytes() == source.read_bytes()
    assert "strip it.py" in next((tmp_path / "out").glob("bids_*/command.txt")).read_text()
    assert not list((tmp_path / "out").glob("**/.*.nii*"))
    built("bids_sessions", root, tmp_path / "out", command=command, max_quarantined=0.5)
    assert len(runs.read_text().splitlines()) == 11  # only what had failed is tried again


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("mri_synthstrip -i {input}", r"must name \{input\} and \{output\}"),
        ("no-such-tool {input} {output}", "'no-such-tool' is not on this machine's PATH"),
        ("tool '{input} {output}", "cannot be split into words"),
    ],
)
def test_a_command_that_cannot_work_is_refused_at_once(tmp_path: Path, command: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        read("bids_sessions", bids(tmp_path), command=command)


def test_volumes_are_checked_before_training(tmp_path: Path) -> None:
    root = bids(tmp_path / "set")
    brain(root / "sub-04/ses-M006/anat/sub-04_ses-M006_T1w.nii.gz", 30, spacing=1.5)  # another protocol
    path = root / "sub-02/ses-d0129/anat/sub-02_ses-d0129_T1w.nii.gz"
    image = nibabel.load(path)
    values = np.asarray(image.dataobj).copy()
    values[0] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    nibabel.save(nibabel.Nifti1Image(np.stack([values] * 2, -1), image.affine), root / "sub-03/ses-a/anat/sub-03_ses-a_T1w.nii")
    manifest, held = built("bids_sessions", root, tmp_path / "out", max_quarantined=0.9)
    assert {record.record_id for record in manifest.records} == {"sub-01", "sub-02"}
    assert "holds 224 NaN" in held["sub-02/ses-d0129"] and "is 4D" in held["sub-03/ses-a"]
    assert "spacing changes within the series: ses-M000 has 1.2 x 1.2 x 1.2 mm, ses-M006 1.5 x 1.2 x 1.2 mm" in held["sub-04"]
    assert "--no-same-spacing" in held["sub-04"] and "fewer than min_images" in held["sub-05"]
    manifest, _ = built("bids_sessions", root, tmp_path / "out", max_quarantined=0.9, same_spacing=False)
    assert len(manifest) == 3 and "1 series change their spacing: volume.fit=crop" in check(tmp_path / "out/manifest.parquet")
    brain(root / "sub-01/ses-01/anat/sub-01_ses-01_T1w.nii.gz", 0)
    (root / "sub-01/ses-03/anat/sub-01_ses-03_T1w.nii.gz").unlink()
    with pytest.raises(ManifestError, match="1 of 6 images are unusable:\n  sub-01/ses-03: no image at"):
        check(tmp_path / "out" / "manifest.parquet")


# ---------------------------------------------------------------- plain tables


def fundus(root: Path) -> Path:
    rows = [
        ("p1", "left", "2019-03-02", "img/a.png", "fundus", "7.1", "F", ""),
        ("p1", "left", "2020-03-02", "", "fundus", "8.4", "", ""),  # came, no picture
        ("p1", "left", "2018-03-02", "img/b.png", "fundus", "", "F", ""),  # not in order
        ("p1", "right", "2019-03-02", "img/c.png", "fundus", "7.1", "F", ""),
        ("p1", "right", "2019-04-01", "img/d.png", "fundus", "7.1", "F", "Drusen."),
        ("p2", "left", "soon", "img/e.png", "fundus", "n/a", "M", ""),
        ("", "left", "2019-04-01", "img/e.png", "fundus", "n/a", "M", ""),
    ]
    keys = ("patient", "series", "date", "image", "modality", "hba1c", "sex", "report")
    table(root / "visits.csv", [dict(zip(keys, row, strict=True)) for row in rows])
    table(root / "events.csv", [{"patient": "p1", "series": "left", "date": "2019-01-01", "name": "laser", "value": "2"}])
    for number, name in enumerate("abcde"):
        film(root / "img" / f"{name}.png", 200 + number)
    return root


def test_a_plain_table(tmp_path: Path) -> None:
    found, held = read("visit_csv", fundus(tmp_path))
    left, right = found["p1_left"], found["p1_right"]
    assert times(left) == [0, 365, 731] and [visit.image for visit in left.visits] == ["img/b.png", "img/a.png", None]
    assert left.patient_id == right.patient_id == "p1" and left.split == right.split and left.modality == "fundus"
    assert left.covariates == {"hba1c": 7.1, "sex": "F"} and [v.extra for v in left.visits] == [
        {},
        {"hba1c": 7.1},
        {"hba1c": 8.4},
    ]
    assert [(e.name, e.time, e.value) for e in left.events] == [("laser", 305.0, 2.0)] and right.events == ()
    assert right.visits[1].report == "Drusen." and right.visits[1].extra == {} and left.dim == 2
    assert held == {"p2_left/e": "undated: date 'soon'", "visits.csv-line-8": "no patient in its row"}


def test_a_plain_table_of_orders_and_of_volumes(tmp_path: Path) -> None:
    rows = [{"patient": "p", "order": i, "image": f"{i}.nii.gz", "split": "test"} for i in (1, 2)]
    table(tmp_path / "visits.csv", rows)
    series = read("visit_csv", tmp_path)[0]["p"]
    assert series.dim == 3 and series.time_unit == "order" and series.split == "test" and times(series) == [1, 2]
    table(tmp_path / "visits.csv", [*rows, {"patient": "q", "order": 1, "image": "a.png", "split": ""}])
    with pytest.raises(SourceError, match="pictures and volumes"):
        read("visit_csv", tmp_path)
    table(tmp_path / "visits.csv", [{"patient": "p", "image": "a.png"}])
    with pytest.raises(SourceError, match="needs a column date, day or order"):
        read("visit_csv", tmp_path)


def test_the_same_file_twice_is_one_visit_and_paths_stay_inside(tmp_path: Path) -> None:
    root = fundus(tmp_path / "set")
    (root / "img/d.png").write_bytes((root / "img/a.png").read_bytes())  # the right eye is the left one
    manifest, held = built("visit_csv", root, tmp_path / "out", max_quarantined=0.5)
    assert [record.record_id for record in manifest.records] == ["p1_left"]
    assert held["p1_right/date-2019-04-01"] == "near-duplicate of p1_left/date-2019-03-02"
    manifest, _ = built("visit_csv", root, tmp_path / "out", max_quarantined=0.5, duplicates="keep")
    assert len(manifest) == 2
    text = (root / "visits.csv").read_text()
    (root / "visits.csv").write_text(text.replace("img/a.png", "../../secret.png"))
    _, held = built("visit_csv", root, tmp_path / "out", max_quarantined=0.9, duplicates="keep")
    assert "images that are POSIX paths below the manifest's folder" in held["p1_left"]


@pytest.mark.parametrize("source", ["mimic_cxr_visits", "nih_followups", "acdc", "bids_sessions", "visit_csv"])
def test_another_folder_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceError, match=tmp_path.name):
        read(source, tmp_path)


def test_a_manifest_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"did you mean .*out/manifest.parquet\?"):
        build("visit_csv", fundus(tmp_path / "set"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
