"""What the judge reads of films in any arrangement, and the air in a volume's lungs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgen.data.visit_records import BIOMARKERS
from medgen.evaluation.progression.measure import read_films, read_volumes
from medgen.models.film_meter import FilmMeter


def judge() -> FilmMeter:
    torch.manual_seed(0)
    return FilmMeter(image_size=32, patch_size=2, channels=(8, 16), norm_groups=4).eval()


def test_films_in_any_arrangement_are_each_read_alone():
    films = np.random.default_rng(0).uniform(size=(2, 3, 4, 32, 32)).astype(np.float32)
    read = read_films(judge(), films)
    assert set(read.biomarkers) == set(BIOMARKERS)
    assert read.biomarkers["pleural_effusion_ml"].shape == (2, 3, 4)
    assert read.features.shape == (2, 3, 4, judge().feature_dim)
    alone = judge().measure(torch.from_numpy(films[1, 2, 3])[None, None] * 2 - 1)
    for name in BIOMARKERS:
        assert read.biomarkers[name][1, 2, 3] == pytest.approx(float(alone[name]), rel=1e-3, nan_ok=True)


def test_other_sizes_are_brought_to_the_judges():
    assert read_films(judge(), np.zeros((5, 48, 40))).biomarkers["edema_ml"].shape == (5,)
    with pytest.raises(ValueError, match="films must be finite"):
        read_films(judge(), np.full((1, 32, 32), np.nan))


def test_air_around_the_body_is_not_in_the_lungs():
    body = np.full((10, 20, 20), -1000.0)
    body[:, 2:18, 2:18] = 40
    body[:, 6:12, 4:8] = -800  # a lung that reaches the volume's top and bottom: 240 voxels
    body[3:6, 6:12, 12:16] = -800  # and one that does not: 72
    assert read_volumes(body, voxel_ml=0.5)["aerated_lung_ml"] == pytest.approx(156)
    filled = body.copy()
    filled[3:6, 6:12, 12:16] = 10
    assert read_volumes(np.stack([body, filled])[:, None], 0.5)["aerated_lung_ml"].tolist() == [[156], [120]]
    with pytest.raises(ValueError, match=r"\[\.\.\.,D,H,W\]"):
        read_volumes(body[0], 0.5)
