"""The reading page in a real browser, opened from the disk: read by keys alone, closed, reopened, saved, looked at pixel by pixel."""

import contextlib
import json
import re
import subprocess
import sys
import time

import psutil
import pytest
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright
from reading import CHROMIUM, DESKTOP, TABLET, Reading, ReadingStudy, rows_of

from medgen.study.responses import COLUMNS, read_pack, read_responses
from medgen.study.viewer import VERSION, render

FIRST_HALF = [
    ["2", "5"],
    ["Enter"],
    ["1", "4"],
    ["2", "6"],
    ["3"],
    ["3", "1"],
]  # the training case, its feedback, then four tasks
SECOND_HALF = [["3", "1", "2"], ["3", "Enter"], ["4"], ["2", "1"], ["5", "5"]]


@pytest.fixture(scope="module")
def play():
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(play):
    running = play.chromium.launch(**CHROMIUM)
    yield running
    running.close()


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    return ReadingStudy(tmp_path_factory.mktemp("nine")).all_tasks().write()


@pytest.fixture
def reading(browser):
    context = browser.new_context(viewport=DESKTOP)
    yield Reading(context.new_page())
    context.close()


def test_the_same_study_gives_the_same_page_and_no_text_of_it_ends_its_block(nine):
    page = (nine.folder / "index.html").read_text("utf-8")
    assert page == render(nine.study()) and VERSION in page
    hostile = nine.study() | {"title": "</script><script>window.harmed=1</script>", "study_id": "<!--<script>"}
    assert render(hostile).lower().count("<script") == page.lower().count("<script")
    assert "<script>window" not in render(hostile)


def test_nine_tasks_are_read_by_keys_alone_over_a_closed_browser_and_the_analysis_takes_the_file(play, nine, tmp_path):
    asked, options = [], {"viewport": DESKTOP, "accept_downloads": True, **CHROMIUM}
    context = play.chromium.launch_persistent_context(tmp_path / "profile", **options)
    reading = Reading(context.pages[0]).open(nine).to_case()
    for keys in FIRST_HALF:
        reading.answer(*keys) if keys != ["Enter"] else reading.press("Enter")
        reading.to_case()
    reading.press("3")  # half an order: nothing to keep yet
    asked += reading.asked
    assert reading.faults == []
    context.close()  # the browser's processes end

    context = play.chromium.launch_persistent_context(tmp_path / "profile", **options)
    reading = Reading(context.pages[0]).open(nine)
    reading.see("#screen", "5 of 10 cases answered in this browser")
    reading.to_case()
    for keys in SECOND_HALF:
        reading.press(*keys) if "Enter" in keys else reading.answer(*keys)
        reading.to_case()
    reading.press("m", *["ArrowLeft"] * 4, "Space", "m", "Enter").see("h1", "Thank you")
    with reading.page.expect_download() as saving:
        reading.press("Enter")
    file = reading.file(saving.value)
    asked += reading.asked
    assert reading.faults == []
    context.close()

    pack = read_pack(nine.folder)
    answers, notes = read_responses([file], pack)
    assert notes == []
    given = {(a.task, a.question): (a.value, a.confidence) for a in answers if not pack.items[a.item]["training"]}
    point = {"media": 0, "frame": 0, "x": 25.6, "y": 32}
    assert given == {
        ("real_or_synthetic", "origin"): ("real", 4),
        ("two_alternative", "which"): ("right", 6),
        ("likert_realism", "realism"): (3, None),
        ("text_alignment", "pleural_effusion"): ("wrong side", None),
        ("text_alignment", "pneumothorax"): ("absent", None),
        ("progression_order", "order"): (["C", "A", "B"], None),
        ("plausible_course", "expectation"): ("worse", None),
        ("plausible_course", "plausible"): (4, None),
        ("same_patient", "same"): ("no", 1),
        ("ejection_fraction", "ef"): (55, None),
        ("artefact", "points"): ([point], None),
    }
    assert [a.position for a in answers] == sorted(a.position for a in answers) and {a.session for a in answers} == {"1"}
    assert asked and all(url.startswith(("file://", "blob:")) for url in asked)


def test_a_browser_that_is_killed_has_kept_every_case_before_the_open_one(play, nine, tmp_path):
    """SIGKILL to all its processes as soon as the next case is there: localStorage alone would have lost the last seconds."""
    options = {"viewport": DESKTOP, **CHROMIUM}
    context = play.chromium.launch_persistent_context(tmp_path / "profile", **options)
    reading = Reading(context.pages[0]).open(nine).to_case()
    reading.answer("2", "5").press("Enter").to_case().answer("1", "4").to_case().answer("2", "6").to_case()
    reading.see("#place", "Case 4 of 10")
    killed = [
        p for p in psutil.process_iter(["cmdline"]) if f"--user-data-dir={tmp_path / 'profile'}" in (p.info["cmdline"] or [])
    ]
    assert killed
    for process in [*killed, *(child for one in killed for child in one.children(recursive=True))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    with contextlib.suppress(PlaywrightError):
        context.close()

    context = play.chromium.launch_persistent_context(tmp_path / "profile", **options)
    again = Reading(context.pages[0]).open(nine)
    again.see("#screen", "3 of 10 cases answered in this browser")
    rows = rows_of(again.to_case().press("p").saved())
    assert [(row["answer"], row["confidence"]) for row in rows] == [("synthetic", "5"), ("real", "4"), ("right", "6")]
    context.close()


def test_text_of_the_study_and_of_readers_stays_text_and_no_cell_is_a_formula(reading, tmp_path):
    study = ReadingStudy(tmp_path)
    study.item("text_alignment", study.image(), prompt="<img src=x onerror='window.harmed=1'><script>window.harmed=1</script>")
    study.item("likert_realism", study.image())
    reading.open(study.write()).to_case()
    assert "<img src=x" in reading.text("#prompt")
    comment = '=HYPERLINK("http://x","a,b")\n<img src=x onerror=window.harmed=1>'
    reading.press("1", "1", "c")
    reading.page.keyboard.insert_text(comment)
    reading.press("Escape", "Enter").to_case().press("Backspace").to_case().see("#place", "Case 1 of 2")
    assert reading.page.locator("textarea").input_value() == comment
    reading.press("p")
    table, notes = rows_of(reading.saved()), json.loads(reading.saved("JSON").read_text("utf-8"))
    assert [row["answer"] for row in table if row["question"] == "comment"] == ["'" + comment]
    assert [row["answer"] for row in notes["answers"] if row["question"] == "comment"] == [comment]
    assert tuple(table[0]) == COLUMNS
    assert reading.page.evaluate("() => window.harmed === undefined && document.querySelectorAll('img, b, i').length === 0")


def test_time_stands_still_in_a_pause_and_on_a_hidden_page(reading, tmp_path):
    started = time.monotonic()
    study = ReadingStudy(tmp_path)
    for _ in range(2):
        study.item("likert_realism", study.image())
    reading.open(study.write()).to_case()
    reading.page.wait_for_timeout(250)
    reading.press("p").see("#paused[open]")
    reading.page.wait_for_timeout(1000)
    reading.press("p")
    # Headless pages are always in front: what a browser does when another tab covers this one is said by hand.
    reading.page.evaluate("() => Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    reading.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    reading.page.wait_for_timeout(1000)
    reading.page.evaluate("() => { delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); }")
    reading.answer("4")
    active = time.monotonic() - started - 2
    (row,) = rows_of(reading.to_case().press("p").saved())
    assert 250 <= int(row["ms"]) <= 1000 * active


def test_an_expectation_cannot_be_changed_after_what_came_next_was_seen(reading, nine):
    course = next(name for name, item in nine.items.items() if item["task"] == "plausible_course")
    study = ReadingStudy(nine.folder, {course: nine.items[course]})
    reading.page.goto("about:blank")
    (nine.folder / "course.html").write_text(render(study.study()), "utf-8")
    reading.page.goto(f"file://{nine.folder}/course.html")
    reading.to_case()
    later = nine.items[course]["media"][1]["frames"][0]["file"]
    assert reading.page.locator(".pane").count() == 2 and not any(later in url for url in reading.asked)
    reading.press("1", "2", "Enter").to_case().see(".revealed figcaption", "day 20")
    assert any(later in url for url in reading.asked)
    reading.press("4", "Enter").see("h1", "Thank you")
    reading.page.get_by_role("button", name="Look at the last case").click()
    reading.to_case()
    assert reading.page.get_by_role("button", name="better").is_disabled()
    assert reading.page.locator("[aria-pressed=true][data-value=stable]").count() == 1
    reading.press("5", "Enter").see("h1", "Thank you")  # the rating may be corrected
    assert [row["answer"] for row in rows_of(reading.saved())] == ["stable", "5"]
    (nine.folder / "course.html").unlink()


def test_training_shows_its_feedback_and_the_answer_then_stands(reading, nine):
    reading.open(nine).to_case().press("1", "1", "Enter").see("#feedback", "It is synthetic: <b>look</b> at the ribs.")
    reading.press("2", "6", "Enter").to_case().see("#place", "Case 2 of 10")
    reading.press("p")
    assert [(row["answer"], row["confidence"]) for row in rows_of(reading.saved())] == [("real", "1")]


def test_between_sessions_the_page_asks_to_wait(reading, tmp_path):
    study = ReadingStudy(tmp_path)
    for _ in range(2):
        study.item("likert_realism", study.image())
    reading.open(study.write(sessions=[1, 1])).to_case().press("5", "Enter").see("h1", "Session 1 is complete")
    assert "28 days" in reading.text("#screen") and reading.text("#screen .primary") == "Save answers (CSV)"
    reading.page.get_by_role("button", name="Begin session 2 now all the same").click()
    reading.to_case().see("#place", "session 2 of 2")
    assert reading.page.locator("#back").is_disabled()
    reading.press("1", "Enter").see("h1", "Thank you")
    assert [row["session"] for row in rows_of(reading.saved())] == ["1", "2"]


def test_a_browser_that_keeps_nothing_says_so_and_goes_on_from_a_file(reading, nine):
    reading.open(nine)
    reading.page.evaluate("""() => {
      for (const size of [1e6, 1e5, 1e4, 1e3, 100, 1]) {
        try { for (let n = 0; ; n++) localStorage.setItem(`${size}-${n}`, "1".repeat(size)); } catch {}
      }
    }""")  # full
    reading.open(nine).see(".warning", "This browser keeps nothing")
    reading.page.locator("#reader").select_option("r2")
    reading.to_case().answer("2", "5").press("Enter").to_case().answer("1", "4").to_case()
    reading.see("#unkept", "Not kept by this browser")
    reading.press("p")
    files = [reading.saved("CSV"), reading.saved("JSON")]
    first = rows_of(files[0])
    assert [row["reader"] for row in first] == ["r2", "r2"]
    for file in files:
        reading.open(nine).see(".note", "Nothing answered")
        reading.give(file).to_case().see("#place", "Case 3 of 10")
        assert rows_of(reading.press("p").saved()) == first


def test_a_file_of_another_study_is_refused(reading, nine, tmp_path):
    other = tmp_path / "other.csv"
    other.write_text(",".join(COLUMNS) + "\r\n" + "other," * 12 + "x\r\n", "utf-8")
    reading.open(nine).give(other).see("#alarm", "These answers are of another study")


def test_a_second_window_of_the_same_reader_stops_the_first(reading, nine):
    reading.open(nine).to_case()
    second = Reading(reading.page.context.new_page()).open(nine).to_case()
    second.press("1")
    reading.see("h1", "Open in another window")


CONTRASTS = """() => {
  const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);  // WCAG 2.2, relative luminance
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return /, 0\\)|transparent/.test(colour) ? ground(node.parentElement) : colour;
  };
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const owner = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !owner.checkVisibility() || owner.tagName.endsWith("SCRIPT")) continue;
    const [low, high] = [light(getComputedStyle(owner).color), light(ground(owner))].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), walker.currentNode.data]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
}"""
CONTROLS = """() => [...document.querySelectorAll("button, select, textarea, input:not([type=file])")]
  .filter((control) => control.checkVisibility())
  .map((control) => {
    const { width, height } = control.getBoundingClientRect();
    return { name: control.ariaLabel || control.innerText || control.labels?.[0]?.innerText || "", width, height };
  })"""


def test_every_page_can_be_read_touched_and_found_by_everyone(browser, nine):
    context = browser.new_context(viewport=TABLET, has_touch=True, reduced_motion="reduce")
    reading = Reading(context.new_page()).open(nine)
    seen = [reading.page.evaluate(CONTRASTS)]
    reading.to_case()
    for keys in [*FIRST_HALF, *SECOND_HALF]:
        seen.append(reading.page.evaluate(CONTRASTS))
        for control in reading.page.evaluate(CONTROLS):
            assert control["name"].strip() and control["height"] >= 44 and control["width"] >= 44, control
        assert reading.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        reading.press(*keys) if "Enter" in keys else reading.answer(*keys)
        reading.to_case()
    assert reading.page.locator("#tools button", has_text="Play").count() == 0
    worst = min(seen)
    assert worst[0] >= 4.5, worst
    reading.press("Tab")
    ring = reading.page.evaluate(
        "() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]; }"
    )
    assert ring == ["solid", "3px"]
    assert reading.page.locator("[aria-live=polite]").inner_text().startswith("Case 10 of 10")
    context.close()


SERVE = "import tyro; from medgen.study.serve import serve; tyro.cli(serve)"


@pytest.fixture
def served(nine, tmp_path):
    """Starts `medgen study serve` on one port, again after a kill; gives the process and the readers' links."""
    running = []

    def start(port=0):
        log = tmp_path / f"server{len(running)}.log"
        command = ["--pack", nine.folder, "--database", tmp_path / "answers.sqlite", "--port", port]
        with log.open("w") as said:
            started = subprocess.Popen([sys.executable, "-uc", SERVE, *map(str, command)], stdout=said, stderr=subprocess.STDOUT)
        running.append(started)
        while not (listening := re.search(r"http://127\.0\.0\.1:(\d+)(?!\S*token)", log.read_text())):
            assert started.poll() is None, log.read_text()
            time.sleep(0.05)
        return started, int(listening[1]), dict(re.findall(r"(\w+): (http\S+token=\S+)", log.read_text()))

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_with_a_server_the_next_case_opens_only_after_it_has_the_answer(browser, served, nine):
    process, port, links = served()
    context = browser.new_context(viewport=DESKTOP)
    reading = Reading(context.new_page())
    reading.page.goto(links["r1"])
    reading.to_case().press("2", "5", "Enter").see("#feedback")
    process.kill()
    process.wait()
    reading.press("Enter").to_case().press("1", "4", "Enter").see("#alarm", "cannot be reached")
    reading.press("Enter", "ArrowRight")
    assert reading.text("#place") == "Case 2 of 10"
    served(port)
    reading.see("#screen h1", "Which of the two is real?")
    assert {url.split("/")[2] for url in reading.asked} == {f"127.0.0.1:{port}"} and not reading.page.locator(
        "#alarm"
    ).is_visible()
    context.close()

    elsewhere = browser.new_context(viewport=DESKTOP)  # another computer
    reading = Reading(elsewhere.new_page())
    reading.page.goto(links["r1"])
    reading.to_case().see("#place", "Case 3 of 10")
    reading.press("Backspace").see("#place", "Case 2 of 10")
    assert reading.page.locator("[aria-pressed=true][data-value=real]").count() == 1
    reading.to_case().answer("2").to_case()
    kept = reading.page.evaluate("async () => (await (await fetch('/api/mine')).json()).answers")
    assert [(int(row["position"]), row["answer"]) for row in kept] == [(0, "synthetic"), (1, "synthetic")]
    assert reading.faults == []
    elsewhere.close()


def test_a_key_that_comes_while_an_answer_is_saved_changes_no_case(browser, served, nine):
    """Fast hands and a slow network: the digit for the next case must not become the answer to the one before."""
    _, _, links = served()
    context = browser.new_context(viewport=DESKTOP)
    reading, held = Reading(context.new_page()), []
    reading.page.goto(links["r1"])
    reading.to_case().answer("2", "5").press("Enter").to_case().see("#place", "Case 2 of 10")
    context.route("**/api/answers", lambda route: held.append(route))
    reading.press("1", "4", "Enter").see("#saved", "Saving")
    reading.press("2", "6", "Backspace", "Enter")
    assert reading.page.locator("#questions [aria-pressed=true]").all_inner_texts() == ["1\nreal", "4"]
    held.pop().continue_()
    reading.to_case()
    assert reading.page.locator("#questions [aria-pressed=true]").count() == 0 and held == []
    kept = reading.page.evaluate("async () => (await (await fetch('/api/mine')).json()).answers")
    assert [(row["answer"], row["confidence"]) for row in kept] == [("synthetic", "5"), ("real", "4")]
    context.close()
