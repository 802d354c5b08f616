"""The pictures of the reading page, looked at pixel by pixel: window, zoom, films, stacks, marks and order; mouse, keys and fingers."""

import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from reading import CHROMIUM, DESKTOP, FILM_FRAMES, TABLET, Reading, ReadingStudy, rows_of


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        running = play.chromium.launch(**CHROMIUM)
        yield running
        running.close()


@pytest.fixture
def one(tmp_path, browser):
    """A study of two cases of one kind, open at the first."""
    context = browser.new_context(viewport=DESKTOP)

    def opened(task, *media):
        study = ReadingStudy(tmp_path)
        for _ in range(2):
            study.item(task, *[make(study) for make in media])
        return Reading(context.new_page()).open(study.write()).to_case()

    yield opened
    context.close()


def pixels(locator):
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("L")).astype(int)


def alike(first, second):
    """The share of pixels that are the same."""
    return np.mean(np.abs(first - second) <= 2)


def await_that(holds, seconds=30):
    """A decoder takes its time; that it never comes is what fails."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "never came"


def test_window_and_level_are_exact_on_8_bit_values(one):
    reading = one("likert_realism", ReadingStudy.image)
    stripes = np.arange(16) * 17
    area = reading.page.locator(".area")

    def shown():
        row = pixels(area)[250]
        box = area.bounding_box()
        size = min(box["width"], box["height"])
        left = (box["width"] - size) / 2
        return row[[int(left + (n + 0.5) * size / 16) for n in range(16)]]

    assert np.abs(shown() - stripes).max() <= 1
    reading.press("i")
    assert np.abs(shown() - (255 - stripes)).max() <= 1
    reading.press("i", *["Shift+ArrowLeft"] * 10, *["Shift+ArrowUp"] * 4)
    assert reading.text("#values").startswith("W 155  L 108")
    wanted = np.clip((stripes - (107.5 - 155 / 2)) / 155 * 255, 0, 255)
    assert np.abs(shown() - wanted).max() <= 1
    box = area.bounding_box()
    reading.page.mouse.move(box["x"] + 300, box["y"] + 300)
    reading.page.mouse.down()
    reading.page.mouse.move(box["x"] + 350, box["y"] + 280, steps=5)
    reading.page.mouse.up()
    assert reading.text("#values").startswith("W 205  L 88")
    reading.press("r")
    assert np.abs(shown() - stripes).max() <= 1


def test_pairs_zoom_together_until_they_are_unlinked(one):
    reading = one("two_alternative", ReadingStudy.image, ReadingStudy.image)
    left, right = (reading.page.locator(".area").nth(n) for n in (0, 1))
    before = pixels(right)
    box = left.bounding_box()
    reading.page.mouse.move(box["x"] + 100, box["y"] + 200)
    reading.page.mouse.wheel(0, -400)
    zoomed = pixels(right)
    assert alike(zoomed, before) < 0.9 and alike(zoomed, pixels(left)) > 0.98
    reading.press("l")
    reading.page.mouse.wheel(0, -400)
    reading.press("d", "w", "+")
    assert alike(pixels(right), zoomed) > 0.98 and alike(pixels(left), zoomed) < 0.9


def test_pixels_are_shown_as_equal_blocks_or_smoothed(one):
    def noise(study):
        return study.image(np.random.default_rng(0).integers(0, 255, (40, 40), dtype=np.uint8))

    reading = one("likert_realism", noise)
    smooth = len(np.unique(pixels(reading.page.locator(".area"))))
    reading.press("n")
    middle = pixels(reading.page.locator(".area"))[250]
    runs = np.diff(np.flatnonzero(np.diff(middle)))
    assert smooth > 200 and len(set(runs % runs.min())) == 1  # every block as wide as the others, or a whole multiple


def test_a_film_is_stepped_frame_by_frame_and_played(one):
    reading = one("ejection_fraction", ReadingStudy.film)
    reading.see("#tools button", "Pause")  # it plays by itself
    reading.press("Space").see("#tools button", "Play")
    area = reading.page.locator(".area")
    slider = reading.page.locator("#tools input")
    for frame in (0, 1, 2, FILM_FRAMES - 1, FILM_FRAMES, 4):
        while int(slider.input_value()) != frame % FILM_FRAMES:
            reading.press(".")
        assert reading.text(".counter") == f"{frame % FILM_FRAMES + 1} / {FILM_FRAMES}"
        column = int(area.bounding_box()["width"] // 2)
        await_that(lambda column=column, grey=20 * (frame % FILM_FRAMES): abs(pixels(area)[250, column] - grey) <= 3)
    reading.press("<", "<", "Space")
    assert reading.text(".rate") == "0.5×"
    await_that(lambda: int(slider.input_value()) != 4)


def test_a_paused_film_shows_the_frame_that_it_numbers(one):
    reading = one("ejection_fraction", ReadingStudy.film)
    area = reading.page.locator(".area")
    for _ in range(6):
        reading.see("#tools button", "Pause")
        reading.press("Space").see("#tools button", "Play")
        grey = 20 * int(reading.page.locator("#tools input").input_value())
        column = int(area.bounding_box()["width"] // 2)
        await_that(lambda column=column, grey=grey: abs(pixels(area)[250, column] - grey) <= 3, seconds=10)
        reading.press("Space")


def test_a_stack_turns_with_wheel_keys_and_slider(one):
    reading = one("likert_realism", lambda study: study.frames("stack", [f"{n} mm" for n in range(9)]))
    area = reading.page.locator(".area")
    box = area.bounding_box()

    def slice_shown():
        return round(pixels(area)[250, int(box["width"] // 2)] / 10)

    reading.press("ArrowDown", "ArrowDown", ",")
    assert slice_shown() == 1 and reading.text("figcaption") == "1 mm"
    reading.page.mouse.move(box["x"] + 200, box["y"] + 200)
    for _ in range(3):
        reading.page.mouse.wheel(0, 100)
    reading.see("figcaption", "4 mm")
    reading.page.locator("#tools input").fill("8")
    assert slice_shown() == 8
    reading.press(".")
    assert slice_shown() == 8  # the end is the end


def test_visits_stand_side_by_side_with_their_dates_or_are_flipped_through(one):
    reading = one("likert_realism", lambda study: study.frames("sequence", ["day 0", "day 9", "day 30"]))
    assert reading.page.locator(".pane:visible").count() == 3
    assert [c.inner_text() for c in reading.page.locator("figcaption").all()] == ["day 0", "day 9", "day 30"]
    reading.press("v", "ArrowDown")
    assert reading.page.locator(".pane:visible").count() == 1
    reading.see(".pane:visible figcaption", "day 9")


def test_films_are_ordered_by_drag_too(one):
    labels = [lambda study, label=label: study.image(label=label) for label in "ABC"]
    reading = one("progression_order", *labels)
    for label, slot in (("C", 0), ("A", 1), ("B", 0)):  # B goes before what lies there
        chip, place = reading.page.locator(f".chip[data-value={label}]"), reading.page.locator(f".slots [data-slot='{slot}']")
        chip.drag_to(place)
    assert [li.inner_text().split()[-1] for li in reading.page.locator(".slots li").all()] == ["B", "C", "A"]
    reading.answer().to_case().press("p")
    assert json.loads(rows_of(reading.saved())[0]["answer"]) == ["B", "C", "A"]


def test_points_are_put_and_taken_by_click_and_by_keys(one):
    reading = one("artefact", ReadingStudy.image)
    box = reading.page.locator(".area").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    reading.page.mouse.click(middle[0] + 100, middle[1])
    reading.page.mouse.click(middle[0], middle[1])
    reading.see(".found", "2 marks")
    reading.page.mouse.click(middle[0] + 3, middle[1])
    reading.see(".found", "1 mark")
    reading.press("m", "Space").see(".found", "2 marks")
    reading.press("Space").see(".found", "1 mark")
    reading.press("ArrowUp", "Enter").see(".found", "2 marks")
    reading.press("Escape", "0").see("[aria-pressed=true]", "None")
    reading.answer().to_case().press("p")
    assert rows_of(reading.saved())[0]["answer"] == "[]"


def test_two_fingers_zoom_and_move_and_one_windows(browser, tmp_path):
    study = ReadingStudy(tmp_path)
    study.item("likert_realism", study.image())
    context = browser.new_context(viewport=TABLET, has_touch=True)
    reading = Reading(context.new_page()).open(study.write()).to_case()
    session = context.new_cdp_session(reading.page)

    def touch(kind, *points):
        session.send(
            "Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y, "id": n} for n, (x, y) in points]}
        )

    touch("touchStart", (0, (330, 300)), (1, (430, 300)))
    touch("touchMove", (0, (280, 300)), (1, (480, 300)))
    touch("touchEnd")
    assert reading.text("#values") == "W 255  L 128  ×2.0"
    touch("touchStart", (0, (330, 300)))
    touch("touchMove", (0, (340, 300)))
    touch("touchMove", (0, (360, 310)))
    touch("touchEnd")
    assert reading.text("#values").startswith("W 275  L 138") or reading.text("#values").startswith("W 285  L 138")
    for name in ("3", "Next case"):
        reading.page.wait_for_timeout(600)  # sooner, the browser takes it for the second half of a double tap
        reading.page.get_by_role("button", name=name).tap()
    reading.see("h1", "Thank you")
    context.close()
