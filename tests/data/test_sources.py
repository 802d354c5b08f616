"""Each public data set in its own layout, with the oddities that are known of it, becomes records."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from medgen.data.build import build
from medgen.data.dicom import write_dx
from medgen.data.records import CXRRecord, read_manifest
from medgen.data.sources import SOURCES
from medgen.data.sources.base import Quarantined, SourceError, SourceOptions, as_age, as_date, as_view, hashed_split


def table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(source: str, root: Path, **options: Any) -> tuple[dict[str, CXRRecord], dict[str, str]]:
    """Records and quarantine reasons by id."""
    items = list(SOURCES[source].records(root, SourceOptions(**options)))
    records = {item.record_id: item for item in items if isinstance(item, CXRRecord)}
    return records, {item.record_id: item.reason for item in items if isinstance(item, Quarantined)}


def said(record: CXRRecord) -> dict[str, tuple[str, str | None]]:
    return {label.name: (label.state, label.side) for label in record.labels}


# ---------------------------------------------------------------- MIMIC-CXR-JPG

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PORTABLE AP)

 INDICATION:  ___ year old man with cough

 IMPRESSION:

 As compared to the previous radiograph of ___, small left pleural effusion. No pneumothorax.
"""


def mimic(root: Path) -> Path:
    films = [  # dicom, subject, study, ViewPosition, split
        ("a1", 10000032, 50414267, "PA", "train"),
        ("a2", 10000032, 50414267, "LATERAL", "train"),
        ("b1", 10000764, 57375967, "AP", "validate"),
        ("c1", 11000011, 51029426, "", "test"),
        ("d1", 12000022, 52000000, "AP AXIAL", "test"),  # its report is missing
        ("e1", 12000033, 53000000, "LL", "train"),
        ("f1", 12000044, 54000000, "PA", ""),  # no split
    ]
    keys = ("dicom_id", "subject_id", "study_id")
    metadata = [dict(zip(keys, f, strict=False)) | {"ViewPosition": f[3], "StudyDate": "21800506", "Rows": 3056} for f in films]
    table(root / "mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    table(root / "mimic-cxr-2.0.0-split.csv.gz", [dict(zip(keys, f, strict=False)) | {"split": f[4]} for f in films if f[4]])
    labels = {
        "subject_id": 10000032,
        "study_id": 50414267,
        "Pleural Effusion": "1.0",
        "Edema": "-1.0",
        "Pneumothorax": "",
        "No Finding": "",
    }
    table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", [labels])
    for _, subject, study, *_ in films:
        if study != 52000000:
            path = root / "mimic-cxr-reports" / f"files/p{str(subject)[:2]}/p{subject}/s{study}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(REPORT)
    return root


def test_mimic(tmp_path: Path) -> None:
    records, held = read("mimic_cxr_jpg", mimic(tmp_path))
    assert set(records) == {"a1", "b1"} and set(held) == {"d1", "f1"}
    assert "no report at files/p12/p12000022/s52000000.txt" in held["d1"] and "no split for f1" in held["f1"]
    first = records["a1"]
    assert first.image == "files/p10/p10000032/s50414267/a1.jpg" and first.view == "PA" and first.study_date == "2180-05-06"
    assert first.findings == "" and first.impression.startswith("As compared")
    assert records["b1"].split == "val" and (first.patient_id, first.study_id) == ("p10000032", "s50414267")
    # CheXpert's own states, with the side from the text; what CheXpert left blank comes from the text.
    assert said(first) == {
        "pleural_effusion": ("present", "left"),
        "edema": ("uncertain", None),
        "pneumothorax": ("absent", None),
    }


def test_mimic_views_can_be_widened(tmp_path: Path) -> None:
    records, _ = read("mimic_cxr_jpg", mimic(tmp_path), views=("LATERAL", "UNKNOWN"))
    assert {name: r.view for name, r in records.items()} == {"a2": "LATERAL", "c1": "UNKNOWN", "e1": "LATERAL"}


def test_mimic_layout_is_asked_for_by_name(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"mimic-cxr-2\.\*-metadata\.csv"):
        read("mimic_cxr_jpg", tmp_path)
    mimic(tmp_path)
    table(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", [{"dicom": 1, "subject_id": 2}])
    with pytest.raises(
        SourceError, match=r"metadata\.csv\.gz lacks the columns dicom_id, study_id, ViewPosition; it has dicom, subject_id"
    ):
        read("mimic_cxr_jpg", tmp_path)
    mimic(tmp_path)
    path = tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match="cannot be read as CSV"):
        read("mimic_cxr_jpg", tmp_path)


# ---------------------------------------------------------------- ReXGradient


def rexgradient(root: Path) -> Path:
    def study(patient: str, views: list[str | None], findings: str = "Small right pleural effusion.") -> dict[str, Any]:
        paths = [f"../deid_png/{patient}/acc/studies/1.2/series/{i}/instances/{i}.png" for i in range(len(views))]
        return {"Findings": findings, "Impression": None, "Indication": "Cough", "Comparison": "None", "StudyInstanceUid": "1.2",
                "ImagePath": paths, "ImageViewPosition": views}  # fmt: skip

    folder = root / "metadata"
    folder.mkdir(parents=True)
    train = {
        "pGRDN1_s1": study("GRDN1", ["POSTERO_ANTERIOR", "LATERAL"]),
        "pGRDN1_s2": study("GRDN1", [None, "AP AXIAL"]),
        "pGRDN2_s1": study("GRDN2", ["PA"]) | {"ImageViewPosition": ["PA", "LL"]},  # lists of unequal length
    }
    (folder / "train_metadata_view_position.json").write_text(json.dumps(train))
    table(
        folder / "train_metadata.csv",
        [{"id": "pGRDN1_s1", "PatientAge": "058Y", "PatientSex": "F", "Findings": "x", "ImagePath": "[]"}],
    )
    (folder / "test_metadata_view_position.json").write_text(json.dumps({"pGRDN3_s1": study("GRDN3", ["ANTERO_POSTERIOR"])}))
    row = {"id": "pGRDN4_s1", "Findings": "No effusion.", "Impression": "Normal.", "ImagePath": "['../deid_png/GRDN4/a/1.png']"}
    table(folder / "valid_metadata.csv", [row | {"ImageViewPosition": "['AP']"}])
    return root


def test_rexgradient(tmp_path: Path) -> None:
    records, held = read("rexgradient", rexgradient(tmp_path))
    assert sorted((r.patient_id, r.view, r.split) for r in records.values()) == [
        ("pGRDN1", "AP", "train"), ("pGRDN1", "PA", "train"), ("pGRDN3", "AP", "test"), ("pGRDN4", "AP", "val"),
    ]  # fmt: skip
    first = next(r for r in records.values() if r.view == "PA")
    assert first.image == "deid_png/GRDN1/acc/studies/1.2/series/0/instances/0.png", "the leading ../ is taken off"
    assert first.findings == "Small right pleural effusion." and first.impression == "" and (first.age, first.sex) == (58.0, "F")
    assert said(first) == {"pleural_effusion": ("present", "right")}
    assert list(held.values()) == ["study 'pGRDN2_s1' has 1 ImagePath entries and 2 views"]


def test_rexgradient_cut_off(tmp_path: Path) -> None:
    path = rexgradient(tmp_path) / "metadata" / "train_metadata_view_position.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(SourceError, match="is not JSON"):
        read("rexgradient", tmp_path)
    with pytest.raises(SourceError, match="holds no train_metadata"):
        read("rexgradient", tmp_path / "metadata" / "..." / "..")


# ---------------------------------------------------------------- CheXpert, NIH


def test_chexpert(tmp_path: Path) -> None:
    common = {"Sex": "Female", "Age": "68", "No Finding": "", "Pneumonia": ""}
    front = {"Frontal/Lateral": "Frontal", "AP/PA": "AP", "Pleural Effusion": "1.0", "Edema": "-1.0", "Consolidation": "0.0"}
    side = front | {"Frontal/Lateral": "Lateral", "AP/PA": ""}
    table(tmp_path / "train.csv", [
        {"Path": "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", **common, **front},
        {"Path": "CheXpert-v1.0-small/train/patient00001/study1/view2_lateral.jpg", **common, **side},
        {"Path": "elsewhere.jpg", **common, **front},
    ])  # fmt: skip
    valid = {"Path": "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg", **common, **front, "No Finding": "1.0"}
    table(tmp_path / "valid.csv", [valid | {"Pleural Effusion": "", "Edema": "", "Consolidation": ""}])
    records, held = read("chexpert_csv", tmp_path)
    assert set(records) == {"patient00001_study1_view1_frontal", "patient64541_study1_view1_frontal"} and "elsewhere.jpg" in held
    first, healthy = records.values()
    assert first.image == "train/patient00001/study1/view1_frontal.jpg" and (first.age, first.sex, first.split) == (
        68.0,
        "F",
        "train",
    )
    assert said(first) == {"pleural_effusion": ("present", None), "edema": ("uncertain", None), "consolidation": ("absent", None)}
    assert first.impression == "Pleural effusion. No consolidation. Possible pulmonary edema."
    assert healthy.split == "val" and {state for state, _ in said(healthy).values()} == {"absent"} and len(said(healthy)) == 7


def test_nih(tmp_path: Path) -> None:
    row = {"Follow-up #": 0, "Patient Gender": "M", "View Position": "PA"}
    table(tmp_path / "Data_Entry_2017_v2020.csv", [
        {"Image Index": "00000001_000.png", "Finding Labels": "Cardiomegaly|Effusion", "Patient ID": "1", "Patient Age": "058Y", **row},
        {"Image Index": "00000002_000.png", "Finding Labels": "No Finding", "Patient ID": "2", "Patient Age": "411", **row},
        {"Image Index": "00000003_000.png", "Finding Labels": "Mass", "Patient ID": "3", "Patient Age": "7", **row},
    ])  # fmt: skip
    for name in ("images_001/images/00000001_000.png", "images_002/images/00000002_000.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "test_list.txt").write_text("00000002_000.png\n")
    records, held = read("chexpert_csv", tmp_path)
    first, second = records["00000001_000"], records["00000002_000"]
    assert first.image == "images_001/images/00000001_000.png" and first.age == 58.0 and second.age is None, "nobody is 411"
    assert first.split != "test" and second.split == "test" and "00000003_000.png is missing" in held["00000003_000"]
    assert [name for name, (state, _) in said(first).items() if state == "present"] == ["pleural_effusion", "cardiomegaly"]
    assert len(said(second)) == 8 and second.impression.startswith("No pleural effusion.")


# ---------------------------------------------------------------- ChestMNIST, DICOM, ImageFolder


def test_chestmnist(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (2, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.eye(14, dtype=np.uint8)[[2, 13]]  # effusion; hernia, which is none of ours
    np.savez(tmp_path / "chestmnist.npz", **arrays)
    build("chestmnist", tmp_path / "chestmnist.npz", tmp_path / "out" / "manifest.parquet")
    records = read_manifest(tmp_path / "out" / "manifest.parquet").records
    assert len(records) == 6 and {r.split for r in records} == {"train", "val", "test"}
    assert said(records[0])["pleural_effusion"] == ("present", None) and records[0].image == "chestmnist/train_000000.png"
    assert {state for state, _ in said(records[1]).values()} == {"absent"}
    np.savez(tmp_path / "chestmnist.npz", **(arrays | {"val_images": arrays["val_images"][..., None]}))
    with pytest.raises(SourceError, match=r"expected val_images \[N, H, W\] uint8"):
        build("chestmnist", tmp_path, tmp_path / "again" / "manifest.parquet")
    np.savez(tmp_path / "chestmnist.npz", **(arrays | {"val_labels": np.array([None])}))
    with pytest.raises(SourceError, match="plain arrays"):
        build("chestmnist", tmp_path, tmp_path / "again" / "manifest.parquet")


def test_dicom_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 65535, (16, 16), dtype=np.uint16)

    def film(name: str, **attributes: Any) -> None:
        known: dict[str, Any] = {"patient_id": name, "study_id": name, "record_id": name, "model": "m", "seed": 0}
        write_dx(tmp_path / name, pixels, **known, description="Effusion.", age=61, sex="M")
        dataset = pydicom.dcmread(tmp_path / name)
        for key, value in attributes.items():
            setattr(dataset, key, value)
        dataset.save_as(tmp_path / name)

    film("a/one.dcm", AccessionNumber="A1")
    film("a/no_suffix")
    film("ct.dcm", Modality="CT")
    film("raw.dcm", PresentationIntentType="FOR PROCESSING")
    film("lateral.dcm", ViewPosition="LL")
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "ct.dcm").read_bytes()[:140])
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    table(
        tmp_path / "reports.csv",
        [{"AccessionNumber": "A1", "report": "FINDINGS: Large left pneumothorax.\nIMPRESSION: Pneumothorax."}],
    )
    records, held = read("dicom_folder", tmp_path)
    by_image = {r.image: r for r in records.values()}
    assert set(by_image) == {"a/one.dcm", "a/no_suffix"} and len(held) == 2
    assert any("For Processing" in reason for reason in held.values()) and any("cut.dcm" in reason for reason in held.values())
    one = by_image["a/one.dcm"]
    assert one.findings == "Large left pneumothorax." and said(one)["pneumothorax"] == ("present", "left") and one.age == 61
    assert "SYN" not in one.patient_id and by_image["a/no_suffix"].impression == "SYNTHETIC. Effusion."


def test_imagefolder_splits_and_columns(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "validation").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text(
        '{"file_name": "x/1.png", "text": "FINDINGS: Edema.\\nIMPRESSION: Edema."}\n\n'
    )
    table(
        tmp_path / "validation" / "metadata.csv",
        [{"file_name": "2.png", "caption": "No edema.", "patient_id": "p", "view": "PA", "age": "5"}],
    )
    records, _ = read("imagefolder", tmp_path)
    first, second = records["train_x_1"], records["validation_2"]
    assert (first.image, first.split, first.view, first.findings) == ("train/x/1.png", "train", "UNKNOWN", "Edema.")
    assert (second.split, second.patient_id, second.view, second.age, second.findings) == ("val", "p", "PA", 5.0, "No edema.")
    (tmp_path / "train" / "metadata.jsonl").write_text('["not an object"]')
    with pytest.raises(SourceError, match="line 1: expected an object"):
        read("imagefolder", tmp_path)


def test_small_words() -> None:
    assert [as_age(x) for x in ("58", "058Y", "18M", "", "411", "x")] == [58.0, 58.0, 1.5, None, None, None]
    assert [as_date(x) for x in ("21800506", "2180-05-06", "", "21801399")] == ["2180-05-06", "2180-05-06", None, None]
    words = {
        "PA": "PA",
        "POSTERO_ANTERIOR": "PA",
        "AP AXIAL": "AP",
        "ANTERO_POSTERIOR": "AP",
        "LL": "LATERAL",
        "PA LLD": "PA",
        "": "UNKNOWN",
    }
    assert {word: as_view(word) for word in words} == words
    parts = [hashed_split(f"p{i}", SourceOptions(val_fraction=0.2, test_fraction=0.1)) for i in range(2000)]
    assert abs(parts.count("val") / 2000 - 0.2) < 0.03 and abs(parts.count("test") / 2000 - 0.1) < 0.03
