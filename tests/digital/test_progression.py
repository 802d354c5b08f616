"""Digital follow-ups on disk: films and volumes of the same patient, truth that is measured, futures that agree with it."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medgen.data.records import read_manifest
from medgen.data.visit_records import BIOMARKERS, VisitSeries
from medgen.digital.anatomy import load_anatomy
from medgen.digital.courses import Track
from medgen.digital.findings import edema, nodule, relative_place
from medgen.digital.patient import Acquisition, Finding, draw_patient
from medgen.digital.progression import draw_follow_up, futures_cut, study_at, write_dataset
from medgen.digital.visit_rendering import EXTENTS, HabitualBody, biomarker_table, findings_at, render_film

SIZE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("progression")
    write_dataset(out, 7, seed=7, size=SIZE, visits=(2, 4), futures=16, processes=1)
    return out


@pytest.fixture(scope="module")
def manifest(folder):
    return read_manifest(folder / "manifest.parquet", record=VisitSeries)


def test_manifest_tells_the_truth_about_every_visit(folder, manifest):
    assert len(manifest) == 7
    assert (folder / "sheet.png").stat().st_size > 10_000
    for record in manifest.records:
        assert record.time_unit == "days"
        assert record.visits[0].time == 0
        assert 2 <= len(record.visits) <= 4
        for visit in record.visits:
            assert np.asarray(Image.open(folder / visit.image)).shape == (SIZE, SIZE)
            assert set(BIOMARKERS) <= set(visit.truth)
            assert visit.truth["aerated_lung_ml"] > 500
            assert 0.3 < visit.truth["cardiothoracic_ratio"] < 0.85
            assert visit.report
            assert visit.view == record.visits[0].view
        dates = [visit.date for visit in record.visits]
        assert dates == sorted(set(dates))


def test_thickness_adds_up_to_millilitres(folder, manifest):
    """Up to the cone beam's magnification, 1.1 to 1.6 in area."""
    pixel_cm2 = (315.0 / SIZE * 2) ** 2 / 100
    checked = 0
    for visit in (visit for record in manifest.records for visit in record.visits):
        mm = np.load(folder / visit.extra["thickness"])["mm"]
        assert mm.shape == (len(EXTENTS), SIZE // 2, SIZE // 2)
        assert mm.dtype == np.uint8
        for name in ("pleural_effusion", "consolidation", "edema"):
            if visit.truth[f"{name}_ml"] > 100:
                assert 1.0 < mm[EXTENTS.index(name)].sum() / 10 * pixel_cm2 / visit.truth[f"{name}_ml"] < 1.8
                checked += 1
    assert checked > 3


def test_futures_are_of_the_visits_after_the_cut(folder, manifest):
    held_out = [record for record in manifest.records if record.split != "train"]
    assert held_out
    assert not any("futures" in record.extra for record in manifest.records if record.split == "train")
    for record in held_out:
        cut = record.extra["futures_cut"]
        assert 1 <= cut == futures_cut(record.record_id, len(record.visits)) < len(record.visits)
        with np.load(folder / record.extra["futures"]) as futures:
            assert futures["times"].tolist() == [visit.time for visit in record.visits[cut:]]
            assert futures["values"].shape == (16, len(record.visits) - cut, len(BIOMARKERS))
            assert futures["names"].tolist() == list(BIOMARKERS)


def test_same_bytes_whatever_n_and_resumed(folder, manifest, tmp_path):
    write_dataset(tmp_path / "two", 2, seed=7, size=SIZE, visits=(2, 4), futures=16, processes=1)
    (tmp_path / "resumed").mkdir()
    settings = '{"seed": 7, "dim": 2, "size": 64, "visits": [2, 4], "futures": 16}\n'
    (tmp_path / "resumed/progress.jsonl").write_text(settings + '[{"unfin')  # as a kill leaves it
    write_dataset(tmp_path / "resumed", 2, seed=7, size=SIZE, visits=(2, 4), futures=16, processes=1)
    for other in ("two", "resumed"):
        again = read_manifest(tmp_path / other / "manifest.parquet", record=VisitSeries)
        assert again.records == manifest.records[:2]
        for visit in again.records[1].visits:
            assert (tmp_path / other / visit.image).read_bytes() == (folder / visit.image).read_bytes()
    (tmp_path / "two/progress.jsonl").write_text(settings)
    with pytest.raises(ValueError, match="other settings"):
        write_dataset(tmp_path / "two", 2, seed=8, size=SIZE, visits=(2, 4), futures=16, processes=1)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"dim": 4}, {"size": 15}, {"visits": (1, 3)}, {"visits": (5, 3)}, {"futures": 0}])
def test_impossible_requests_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="at least"):
        write_dataset(tmp_path, **{"n": 1, **wrong})


@pytest.fixture(scope="module")
def anatomy():
    return load_anatomy(SIZE)


def test_table_agrees_with_what_is_rendered(anatomy):
    compared = 0
    for index in (0, 2, 4, 11):  # consolidation and oedema, heart, effusion and consolidation, two effusions
        follow_up = draw_follow_up(7, index, SIZE, (2, 4), anatomy)
        table = biomarker_table(follow_up.habit, follow_up.course.tracks, follow_up.places)
        wanted = table.biomarkers(follow_up.course.severities[None], np.random.default_rng(0))[0]
        for visit in range(2):
            truth = render_film(study_at(follow_up, visit), follow_up.habit).truth
            for value, name in zip(wanted[visit], BIOMARKERS, strict=True):
                assert value == pytest.approx(truth[name], rel=0.06, abs=8)
                compared += truth[name] > 0
    assert compared > 20


def test_biomarkers_rise_with_severity_from_nothing(anatomy):
    patient = draw_patient(7, 3)
    tracks = tuple(
        Track(name, side, lobe, seed=5)
        for name, side, lobe in (
            ("pleural_effusion", "left", None),
            ("consolidation", "right", "lower"),
            ("edema", None, None),
            ("nodule", "right", "upper"),
            ("cardiomegaly", None, None),
        )
    )
    table = biomarker_table(HabitualBody(patient, Acquisition("PA"), SIZE, anatomy), tracks, {})
    assert (np.diff(table.amounts[:4], axis=1) > 0).all()
    assert (np.diff(table.ctr[4]) > 0).all()
    assert table.ctr[4, 0] < 0.03  # a course begins where there is nothing to be seen
    assert (table.amounts[1:3, 0] < 0.2 * table.amounts[1:3, -1]).all()
    assert findings_at(tracks, np.full(5, 0.02), {}) == ()


def test_nodule_stays_where_it_is_while_it_grows_and_the_patient_moves(anatomy):
    patient = draw_patient(7, 3)
    place = relative_place(
        HabitualBody(patient, Acquisition("PA"), SIZE, anatomy).body(), Finding("nodule", 1, "right", "lower", 40.0, seed=9)
    )
    centres = []
    for diameter, breath, turn in ((14.0, 0.0, 0.0), (30.0, 2.0, 1.0), (40.0, -2.0, -1.0)):
        pose = Acquisition("PA", rotation_deg=turn, inspiration_mm=breath)
        body = HabitualBody(patient, pose, SIZE, anatomy).body()
        weight = nodule(body, Finding("nodule", 0.5, "right", "lower", diameter, seed=9, place=place)).weight
        centres.append([float((weight * axis).sum() / weight.sum()) for axis in body.axes_mm])
    assert np.ptp(np.array(centres), axis=0).max() < 7


def test_oedema_extent_is_its_volume(anatomy):
    body = HabitualBody(draw_patient(7, 3), Acquisition("PA"), SIZE, anatomy).body()
    edit = edema(body, Finding("edema", 0.4, seed=1))
    assert edit.extent is not None
    assert float(edit.extent.sum()) * body.voxel_ml == pytest.approx(edit.numbers["ml"], rel=1e-4)


def test_volumes_are_hounsfield_units_in_ras(tmp_path):
    manifest = read_manifest(
        write_dataset(tmp_path, 1, seed=7, dim=3, size=32, visits=(2, 2), futures=4, processes=1), record=VisitSeries
    )
    (record,) = manifest.records
    assert (record.dim, record.modality) == (3, "ct")
    image = nib.load(tmp_path / record.visits[0].image)
    assert image.shape == (32, 32, 32)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.get_data_dtype() == np.int16
    hu = np.asarray(image.dataobj)
    spacing = np.diag(image.affine)[:3]
    assert spacing == pytest.approx(315 / 32, rel=0.01)
    assert hu.min() >= -1024
    parts, _ = ndimage.label(hu < -500)
    outside = set(parts[[0, -1]].ravel()) | set(parts[:, [0, -1]].ravel())
    air = (~np.isin(parts, list(outside | {0}))).sum() * spacing.prod() / 1000
    assert air == pytest.approx(record.visits[0].truth["aerated_lung_ml"], rel=0.05)
    bone = np.argwhere(hu[12:20] > 200)[:, 1]  # near the midline
    assert np.median(bone) < 14  # the spine is behind
    inside = hu[8:24, 10:22]
    assert inside[..., :5].mean() > inside[..., 16:24].mean() + 200  # the abdomen is below the lungs
