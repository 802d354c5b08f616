"""Digital chest patients: the same seed gives the same films, findings change what they should, and the manifest is a manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgen.data.records import FINDINGS, read_manifest
from medgen.digital.chest import draw_study, render, write_dataset
from medgen.digital.patient import Acquisition, Finding, Study, draw_patient

PA = Acquisition("PA", seed=3)
PATIENT = dataclasses.replace(draw_patient(0, 0), heart_scale=0.86, deformation_mm=4.0)


def film(*findings: Finding, acquisition: Acquisition = PA):
    return render(Study(PATIENT, "s", findings, (acquisition,)), size=96)[0]


def halves(image: np.ndarray) -> dict[str, float]:
    """Mean brightness of the lower half of each side of the body; the patient's right is on the image's left."""
    rows = image[image.shape[0] * 4 // 10 : image.shape[0] * 3 // 4]
    width = image.shape[1]
    return {
        "right": float(rows[:, width // 6 : width * 4 // 10].mean()),
        "left": float(rows[:, width * 6 // 10 : width * 5 // 6].mean()),
    }


def test_same_study_renders_the_same_bytes():
    first, second = (render(draw_study(5, 7), size=64) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.image == b.image).all()
        assert (a.mask == b.mask).all()
        assert a.truth == b.truth


@pytest.mark.parametrize("side", ["left", "right"])
def test_effusion_whitens_its_own_side_and_knows_its_volume(side):
    other = {"left": "right", "right": "left"}[side]
    before, small, large = film(), film(Finding("pleural_effusion", 0.3, side)), film(Finding("pleural_effusion", 0.9, side))
    gain = {s: halves(large.image)[s] - halves(before.image)[s] for s in ("left", "right")}
    assert gain[side] > 0.1
    assert gain[side] > gain[other] + 0.1
    assert 100 < small.truth[f"pleural_effusion_{side}_ml"] < large.truth[f"pleural_effusion_{side}_ml"] < 2500


def test_meniscus_is_higher_at_the_chest_wall():
    mask = film(Finding("pleural_effusion", 0.5, "right")).mask & (1 << FINDINGS.index("pleural_effusion")) > 0
    tops = [int(np.argmax(mask[:, c])) for c in np.nonzero(mask.any(0))[0]]
    lateral, middle = min(tops[:6]), tops[len(tops) // 2]
    assert lateral < middle


def test_pneumothorax_is_darker_than_the_lung_it_replaces():
    before, after = film(), film(Finding("pneumothorax", 0.9, "left"))
    mask = after.mask & (1 << FINDINGS.index("pneumothorax")) > 0
    assert mask.sum() > 50
    assert after.image[mask].mean() < before.image[mask].mean()
    assert np.nonzero(mask)[1].mean() > 0.6 * 96  # the patient's left is on the image's right


def test_cardiomegaly_widens_the_heart():
    ratios = [
        film(*fs).truth["cardiothoracic_ratio"] for fs in ((), (Finding("cardiomegaly", 0.3),), (Finding("cardiomegaly", 1.0),))
    ]
    assert ratios[0] < 0.5 < ratios[1] < ratios[2] < 0.8


def test_nodule_has_the_size_it_says():
    truth = film(Finding("nodule", 0.5, "right", "upper", diameter_mm=30)).truth
    assert truth["nodule_right_mm"] == 30
    assert truth["nodule_right_ml"] == pytest.approx(4 / 3 * np.pi * 1.5**3, rel=0.35)  # mL of a 30 mm ball


def test_hyperinflation_opens_the_lungs():
    normal, inflated = film().image, film(Finding("hyperinflation", 1.0)).image
    assert (inflated < 0.45).mean() > (normal < 0.45).mean() * 1.05


def test_atelectasis_raises_the_diaphragm_of_its_side():
    normal, collapsed = (halves(film(*fs).image) for fs in ((), (Finding("atelectasis", 1.0, "left", "lower"),)))
    assert collapsed["left"] - normal["left"] > 0.04 + abs(collapsed["right"] - normal["right"])


def test_ap_magnifies_the_heart():
    pa, ap = (film(acquisition=dataclasses.replace(PA, view=view)) for view in ("PA", "AP"))
    assert ap.truth["cardiothoracic_ratio"] > pa.truth["cardiothoracic_ratio"]


def test_left_lung_has_no_middle_lobe():
    with pytest.raises(ValueError, match="no middle lobe"):
        film(Finding("consolidation", 0.5, "left", "middle"))


def test_dataset_is_a_valid_manifest_and_more_patients_keep_the_first_ones(tmp_path: Path):
    small = read_manifest(write_dataset(tmp_path / "a", n=6, seed=1, size=64, processes=1))
    large = read_manifest(write_dataset(tmp_path / "b", n=10, seed=1, size=64, processes=1))
    assert small.records == large.records[:6]
    assert len({record.patient_id for record in large.records}) == 5  # a PA and an AP film each
    for record in large.records:
        with Image.open(large.image_path(record)) as image:
            assert image.size == (64, 64)
            assert image.mode == "L"
        assert (large.root / record.extra["mask"]).is_file()
        assert record.findings
        assert record.impression
    assert (tmp_path / "b" / "sheet.png").is_file()


def test_further_patients_all_have_the_wanted_finding(tmp_path: Path):
    plain = read_manifest(write_dataset(tmp_path / "plain", n=4, seed=1, size=64, processes=1))
    more = read_manifest(write_dataset(tmp_path / "more", n=4, seed=1, size=64, processes=1, focus="nodule", focus_n=6))
    assert more.records[:4] == plain.records and len(more.records) == 10
    assert all(any(label.name == "nodule" for label in record.labels) for record in more.records[4:])
    with pytest.raises(ValueError, match="focus must be one of"):
        write_dataset(tmp_path / "wrong", n=4, focus="tumour", focus_n=2)
    with pytest.raises(ValueError, match="with its focus_n films"):
        write_dataset(tmp_path / "wrong", n=4, focus="nodule")


def test_interrupted_dataset_is_continued(tmp_path: Path):
    whole = read_manifest(write_dataset(tmp_path / "whole", n=6, seed=2, size=64, processes=1))
    part = tmp_path / "part"
    write_dataset(part, n=2, seed=2, size=64, processes=1)
    # what a kill leaves behind: a progress file with a finished study and half a line, and no manifest
    progress = '{"seed": 2, "size": 64, "views": ["PA", "AP"], "dicom": false}\n[{"record_id": "half'
    (part / "manifest.parquet").unlink()
    (part / "progress.jsonl").write_text(progress)
    assert read_manifest(write_dataset(part, n=6, seed=2, size=64, processes=1)).records == whole.records


def test_other_settings_in_a_begun_folder_are_refused(tmp_path: Path):
    (tmp_path / "progress.jsonl").write_text('{"seed": 9}\n')
    with pytest.raises(ValueError, match="begun with other settings"):
        write_dataset(tmp_path, n=2, seed=1, size=64)


def test_dicom_films_are_marked_synthetic(tmp_path: Path):
    import pydicom

    manifest = read_manifest(write_dataset(tmp_path, n=1, seed=4, size=64, dicom=True, processes=1))
    dataset = pydicom.dcmread(manifest.image_path(manifest.records[0]))
    assert dataset["SyntheticData"].value == "YES"
    assert dataset.Rows == dataset.Columns == 64
