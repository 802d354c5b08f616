"""Volumes by area and length, and the ejection fraction that follows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medgen.evaluation.echo.function import area_length, ejection_fraction, volumes
from medgen.evaluation.echo.phase import find_beats


def ellipse(long: float, short: float, degrees: float = 0.0, row: float = 56.3, column: float = 54.8) -> torch.Tensor:
    """[112,112] soft mask of an ellipse of these half axes, its long axis turned from straight down."""
    rows, columns = torch.meshgrid(torch.arange(112.0), torch.arange(112.0), indexing="ij")
    angle = math.radians(degrees)
    along = (rows - row) * math.cos(angle) + (columns - column) * math.sin(angle)
    across = (columns - column) * math.cos(angle) - (rows - row) * math.sin(angle)
    radius = torch.sqrt((along / long) ** 2 + (across / short) ** 2)
    return torch.sigmoid((1 - radius) * short * 4)


@pytest.mark.parametrize("degrees", [0.0, 17.0, -33.0])
def test_area_and_length_of_a_turned_ellipse(degrees):
    area, length = area_length(torch.stack([ellipse(30, 13, degrees), ellipse(24.5, 9.2, degrees)]))
    np.testing.assert_allclose(area, [math.pi * 30 * 13, math.pi * 24.5 * 9.2], rtol=0.01)
    np.testing.assert_allclose(length, [60, 49], rtol=0.015)


def test_the_volume_of_an_ellipsoid_is_that_of_an_ellipsoid():
    area, length = (values.numpy().astype(float) for values in area_length(ellipse(30, 13)[None]))
    cubic = volumes(area, length)
    assert cubic[0] == pytest.approx(4 / 3 * math.pi * 30 * 13 * 13, rel=0.03)  # V = 8A²/3πL is exact for an ellipsoid
    assert volumes(area, length, pixel_mm=1.5)[0] == pytest.approx(cubic[0] * 1.5**3 / 1000)


def test_no_ventricle_has_no_volume():
    area, length = area_length(torch.zeros(2, 112, 112))
    assert np.isnan(volumes(area.numpy().astype(float), length.numpy().astype(float))).all()


def test_the_ejection_fraction_of_whole_beats_and_of_half_a_beat(beating):
    for index in range(5):
        volume, times, *_ = beating(index, noise=0.005)
        expected = 100 * (1 - volume.min() / volume.max())
        assert ejection_fraction(volume, times, find_beats(volume, times))[0] == pytest.approx(expected, abs=2.5)
    half = np.linspace(120.0, 48.0, 12)
    fraction, edv, esv = ejection_fraction(half, np.arange(12) / 20, find_beats(half, np.arange(12) / 20))
    assert fraction == pytest.approx(60, abs=1)
    assert (edv, esv) == pytest.approx((120, 48), rel=0.02)
