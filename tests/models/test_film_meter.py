"""The film meter: maps at half the film's resolution, millilitres and a ratio from them, each film judged alone."""

from __future__ import annotations

import pytest
import torch

from medgen.data.visit_records import BIOMARKERS
from medgen.models.film_meter import EXTENTS, FilmMeter, cardiothoracic_ratio, load_film_meter, silhouette, volumes_ml


def small(**options: object) -> FilmMeter:
    torch.manual_seed(0)
    return FilmMeter(image_size=32, patch_size=2, channels=(8, 16), norm_groups=4, **options).eval()


def test_maps_are_half_as_large_and_never_negative():
    maps, features = small().thickness_and_features(torch.randn(3, 1, 32, 32))
    assert maps.shape == (3, len(EXTENTS), 16, 16)
    assert maps.min() >= 0
    assert features.shape == (3, small().feature_dim)


def test_a_person_is_known_by_heart_and_lungs_alone():
    maps = torch.rand(1, len(EXTENTS), 16, 16) * 100
    ill = maps.clone()
    ill[:, 2:] += 50
    torch.testing.assert_close(silhouette(maps), silhouette(ill))
    assert small().feature_dim == silhouette(maps).shape[1]
    assert small(identity_dim=5).features(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


def test_a_film_is_judged_alone():
    model, films = small(), torch.randn(4, 1, 32, 32)
    torch.testing.assert_close(model(films)[2:3], model(films[2:3]), rtol=1e-4, atol=1e-4)


def test_every_biomarker_is_measured():
    readings = small().measure(torch.randn(2, 1, 32, 32))
    assert set(readings) == set(BIOMARKERS)
    assert all(values.shape == (2,) for values in readings.values())


def test_millilitres_are_the_maps_sum_times_the_pixels_area():
    maps = torch.zeros(1, 6, 16, 16)
    maps[0, 2, 3:5, 3:8] = 100.0  # ten pixels of 20 mm x 20 mm, 100 mm deep: 400 mL
    assert volumes_ml(maps, field_mm=320.0)[0].tolist() == pytest.approx([0, 0, 400, 0, 0, 0])
    meter = small(field_mm=320.0, calibration=(1, 1, 0.8, 1, 1, 1))
    readings = meter.biomarkers(maps)
    assert readings["pleural_effusion_ml"].item() == pytest.approx(320)
    maps[0, 4, 0, 0] = 10.0
    maps[0, 1] = 50.0  # lungs: 256 pixels x 400 mm² x 50 mm = 5,120 mL
    readings = meter.biomarkers(maps)
    assert readings["nodule_mm3"].item() == pytest.approx(4000)
    assert readings["aerated_lung_ml"].item() == pytest.approx(5120 - 320 - 4)


def test_the_ratio_is_of_widths_between_the_edges():
    heart, lungs = torch.zeros(2, 16, 16), torch.zeros(2, 16, 16)
    heart[0, 5:9, 6:10], lungs[0, 2:12, 2:14] = 30.0, 30.0  # edges half-way to the empty neighbours: 4 and 12 columns
    assert cardiothoracic_ratio(heart, lungs)[0].item() == pytest.approx(4 / 12)
    heart[0, 7, 10] = 1.0  # the edge is crossed 15 / 29 of the way from 30 mm to this 1 mm
    assert cardiothoracic_ratio(heart, lungs)[0].item() == pytest.approx((4 - 1 / 2 + 15 / 29) / 12)
    assert cardiothoracic_ratio(heart, lungs)[1].isnan()


def test_it_comes_back_from_disk_with_its_calibration(tmp_path):
    model = small(calibration=(1, 0.9, 0.8, 0.7, 0.6, 0.5))
    model.save_pretrained(tmp_path)
    films = torch.randn(2, 1, 32, 32)
    before, after = model.measure(films), load_film_meter(tmp_path, "cpu").measure(films)
    for name in BIOMARKERS:
        torch.testing.assert_close(after[name], before[name])


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="patch_size must be even"):
        FilmMeter(patch_size=1)
    with pytest.raises(ValueError, match="2 calibration factors for the 6 extents"):
        FilmMeter(calibration=(1.0, 1.0))
    with pytest.raises(ValueError, match="image_size 30 must be a multiple of 32"):
        FilmMeter(image_size=30)
    with pytest.raises(FileNotFoundError, match="no film meter at .*train one: medgen train film-meter"):
        load_film_meter(tmp_path)
