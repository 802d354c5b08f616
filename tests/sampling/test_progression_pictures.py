"""Strips, movies and maps of visits: nothing is drawn on the anatomy, what is synthetic is framed and says so, times are where they are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from medgen.sampling.progression_pictures import (
    _BORDER,
    _EVENT,
    _GAP,
    _LINE,
    _MARK,
    _WIDTH,
    Course,
    Shown,
    difference_map,
    film_strip,
    futures_sheet,
    movie,
    section,
)

IMAGE = np.random.default_rng(0).random((32, 32)) * 0.8
KNOWN = [Shown(IMAGE, 0, "2101-03-05"), Shown(IMAGE, 40, "2101-04-14")]
MADE = [Shown(IMAGE, 40, "2101-04-14", True), Shown(IMAGE, 400, "2102-04-09", True)]
COURSE = Course("p1   future 0   age 63", "days", [("drainage", 50.0), ("antibiotic", 52.0), ("before", -30.0)])


def coloured(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where `colour` is, exactly."""
    return (picture == np.array(colour)).all(-1)


def tiles(strip: np.ndarray, count: int) -> list[np.ndarray]:
    """The images of a strip's first row, each with the frame around it."""
    top, side, step = 2 * _LINE + _GAP // 2 + _LINE, _WIDTH + 2 * _BORDER, _WIDTH + 2 * _BORDER + _GAP
    return [strip[top : top + side, _GAP + i * step : _GAP + i * step + side] for i in range(count)]


def test_generated_images_are_framed_and_no_image_is_drawn_on() -> None:
    strip = np.asarray(film_strip([*MADE, *KNOWN], COURSE))
    enlarged = Image.fromarray(np.rint(IMAGE * 255).astype(np.uint8)).resize((_WIDTH, _WIDTH), Image.Resampling.BICUBIC)
    for i, tile in enumerate(tiles(strip, 4)):
        assert np.array_equal(tile[_BORDER:-_BORDER, _BORDER:-_BORDER], np.asarray(enlarged.convert("RGB")))
        frame = np.concatenate([tile[:_BORDER].reshape(-1, 3), tile[:, :_BORDER].reshape(-1, 3)])
        assert coloured(frame, _MARK).all() == (i >= 2), "in the order of time; at the same time the known one first"
        assert coloured(frame, _MARK).any() == (i >= 2)


def test_many_visits_wrap_and_all_are_shown() -> None:
    many = [Shown(IMAGE, float(day), None, day > 30) for day in range(0, 90, 10)]
    strip = film_strip(many, COURSE)
    assert strip.width == 5 * (_WIDTH + 2 * _BORDER + _GAP) + _GAP, "nine visits are rows of five and four"
    assert strip.height > film_strip(many[:6], COURSE).height + _WIDTH


def test_events_lie_where_they_happened_and_only_those_within_the_axis() -> None:
    strip = np.asarray(film_strip([*KNOWN, *MADE], COURSE))
    axis = strip[2 * _LINE + _WIDTH + 60 :]
    lines = np.flatnonzero(coloured(axis, _EVENT).sum(0) > 12)
    assert len(lines), "the events' lines are drawn"
    margin, width = 2 * _GAP, strip.shape[1]
    for day in (50, 52):
        assert np.abs(lines - (margin + day / 400 * (width - 2 * margin))).min() <= 1
    assert lines.min() > margin + 20, "what came before the first visit is not on it"


def test_a_movie_is_a_picture_a_visit_with_a_cursor_that_moves_on() -> None:
    pictures = movie([*MADE, *KNOWN], COURSE)
    assert len(pictures) == 4 and pictures.dtype == np.uint8 and pictures.shape[1] % 2 == pictures.shape[2] % 2 == 0
    cursors = [np.flatnonzero(coloured(picture[-22:], _MARK).any(0)).mean() for picture in pictures]
    assert cursors[1] == cursors[2] and cursors[0] < cursors[1] < cursors[3]
    framed = [coloured(picture[:_WIDTH], _MARK).sum() > _WIDTH for picture in pictures]
    assert framed == [False, False, True, True]


def test_the_difference_is_signed_and_its_scale_symmetric() -> None:
    brighter = [Shown(np.where(np.arange(32) < 16, one.image + 0.1, one.image - 0.1), one.time, None, True) for one in MADE]
    picture = np.asarray(difference_map(MADE, brighter, COURSE, "without drainage (day 50)"))
    side = _WIDTH + 2 * _BORDER
    top = 3 * _LINE + 2 * (side + 4 + 3 * _LINE + _GAP // 2 + _GAP)  # the third row, or near it
    found = picture[top:].reshape(-1, 3)
    red, blue = found[(found[:, 0] > 90) & (found[:, 2] < 60)], found[(found[:, 2] > 90) & (found[:, 0] < 30)]
    assert len(red) > _WIDTH * 100 and abs(len(red) / len(blue) - 1) < 0.2


def test_no_difference_is_white_and_not_amplified() -> None:
    picture = np.asarray(difference_map(MADE, MADE, COURSE, "nothing changed"))
    assert (picture.reshape(-1, 3).min(1) > 240).sum() > 2 * _WIDTH**2


def test_slices_of_a_volume_hang_as_on_a_light_box() -> None:
    volume = np.zeros((8, 8, 8))
    volume[7, 4] = 1  # the head's end, in the coronal slice
    volume[4, 7] = 0.5  # the front, in the axial one
    volume[4, 4, 0] = 0.7  # the patient's left
    shown = section(volume)
    assert shown.shape == (17, 8)
    assert (shown[0] == 1).all() and (shown[9] == 0.5).all()
    assert shown[3, 7] == 0.7 and shown[12, 7] == 0.7, "the left side is on the right"
    assert film_strip([Shown(volume, 0.0), Shown(volume, 0.4, None, True)], Course("x", "phase")).height > 2 * _WIDTH


@pytest.mark.parametrize("futures", [1, 3, 9])
def test_a_sheet_has_a_row_for_each_patient(futures: int) -> None:
    row = ("p1: 2 known visits", KNOWN[-1], [MADE[-1]] * futures)
    heights = [futures_sheet([row] * n, "days").height for n in (1, 2, 3)]
    assert len({b - a for a, b in pairwise(heights)}) == 1
    assert futures_sheet([row, row], "days").width == 7 * (_WIDTH + 2 * _BORDER + _GAP) + _GAP
