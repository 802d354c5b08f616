"""The reading page in Firefox and in a WebKit (Safari's engine): read by keys, films stepped, closed, reopened, saved.

`make browsers` runs it; it needs Debian's firefox-esr, libavcodec-extra, webkit2gtk-driver, gstreamer1.0-libav and xvfb.
"""

import numpy as np
import pytest
from other_browsers import Firefox, WebKit, await_that
from reading import FILM_FRAMES, ReadingStudy

from medgen.study.responses import read_pack, read_responses


@pytest.fixture
def study(tmp_path):
    """An image, a pair, a stack, a film with its ECG, and a picture to be marked."""
    made = ReadingStudy(tmp_path / "pack")
    made.item("likert_realism", made.image())
    made.item("two_alternative", made.image(label="left"), made.image(label="right"))
    made.item("likert_realism", made.frames("stack", [f"{5 * n} mm" for n in range(8)]))
    made.item("ejection_fraction", made.film(), made.image(np.zeros((40, 400), np.uint8), label="ECG"))
    made.item("artefact", made.image())
    return made.write()


def to_case(browser, number):
    """Through the pages before a case, by Enter, until it can be answered."""
    place = f"Case {number} of 5"
    answers = "document.querySelector('#questions')"
    ready = f"return {answers}.checkVisibility() && !{answers}.inert && document.querySelector('#place').innerText"

    def there():
        if place in str(browser.js(ready)):
            return True
        if browser.js("return document.querySelector('#screen .primary')?.checkVisibility()"):
            title = browser.text("#screen h1")
            browser.press("Enter")
            await_that(lambda: browser.text("#screen h1") != title or browser.js(ready), title)
        return False

    await_that(there, place)


@pytest.fixture
def opened(study, tmp_path):
    """Starts a browser with the study's page; the second time with what it kept."""
    running = []

    def start(make):
        running.append(make(tmp_path / "browser"))
        running[-1].size(1040, 640)
        running[-1].open(f"file://{study.folder}/index.html")
        return running[-1]

    yield start
    for browser in running:
        browser.kill()


@pytest.mark.browsers
@pytest.mark.parametrize("make", [Firefox, WebKit])
def test_a_study_is_read_by_keys_over_a_closed_page(make, study, opened):
    browser = opened(make)
    to_case(browser, 1)
    await_that(lambda: abs(browser.grey(".area", 0.5 + 0.5 / 16) - 8 * 17) <= 1, "the picture")
    browser.press("i")
    await_that(lambda: abs(browser.grey(".area", 0.5 + 0.5 / 16) - (255 - 8 * 17)) <= 1, "the inverted picture")
    browser.press("i", *["Shift+ArrowRight"] * 8, *["Shift+ArrowUp"] * 4)
    wanted = (8 * 17 - (107.5 - 335 / 2)) / 335 * 255
    await_that(lambda: abs(browser.grey(".area", 0.5 + 0.5 / 16) - wanted) <= 1, "the windowed picture")
    browser.press("4", "Enter")
    to_case(browser, 2)
    browser.press("2", "5", "Enter")
    to_case(browser, 3)
    browser.press("ArrowDown", "ArrowDown", ".")
    browser.see("figcaption", "15 mm")
    await_that(lambda: abs(browser.grey(".area") - 30) <= 1, "the fourth slice")
    browser.press("3", "Enter")
    to_case(browser, 4)
    step_film(browser, plays=make is Firefox)
    browser.press("5", "5")

    if make is Firefox:
        browser.close()
        browser = opened(make)
    else:  # its sessions are private
        browser.open("about:blank")
        browser.open(f"file://{study.folder}/index.html")
    browser.see("#screen", "3 of 5 cases answered in this browser")
    to_case(browser, 4)
    assert browser.js("return document.querySelector('.entry input').value") == "55"
    browser.press("Enter")
    to_case(browser, 5)
    browser.press("m", *["ArrowLeft"] * 4, "Space", "m")
    browser.see(".found", "1 mark")
    box = browser.js("const b = document.querySelector('.area').getBoundingClientRect(); return [b.x, b.y, b.width, b.height]")
    browser.click(box[0] + box[2] / 2, box[1] + box[3] / 2)
    browser.see(".found", "2 marks")
    browser.press("Enter")
    browser.see("h1", "Thank you")
    browser.press("Enter")
    file = await_that(lambda: next(browser.downloads.glob("*.csv"), None), "the saved answers")
    browser.close()

    answers, notes = read_responses([file], read_pack(study.folder))
    assert notes == []
    given = [(a.question, a.value, a.confidence) for a in answers]
    points = [{"media": 0, "frame": 0, "x": 25.6, "y": 32}, {"media": 0, "frame": 0, "x": 32, "y": 32}]
    assert given == [
        ("realism", 4, None),
        ("which", "right", 5),
        ("realism", 3, None),
        ("ef", 55, None),
        ("points", points, None),
    ]


def step_film(browser, plays):
    """Paused, a film shows the frame that it numbers, wherever it was; then frame by frame round its end."""
    browser.see("#tools", "Pause" if plays else "Play")  # by itself, unless less motion is asked for
    stops = [["Space"], ["Space", "Space"]] if plays else []
    for keys in (*stops, *[["."]] * (FILM_FRAMES + 1), [","]):
        browser.press(*keys)
        browser.see("#tools", "Play")
        frame = int(browser.js("return document.querySelector('#tools input').value"))
        assert browser.text(".counter") == f"{frame + 1} / {FILM_FRAMES}"
        await_that(lambda frame=frame: abs(browser.grey(".area") - 20 * frame) <= 3, f"the picture of frame {frame}", 20)
