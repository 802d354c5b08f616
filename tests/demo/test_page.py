"""The demo's page: one file, whole and self-contained, that a browser opens without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import Markup

from medgen.data.video import write_video
from medgen.demo import page
from medgen.sampling import echo_pictures

GREY = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    mask = page.overlay(np.eye(64, dtype=np.uint8))
    film = {
        "prompt": "Small <left> effusion.",
        "marked": page.marked("Small <left> effusion."),
        "image": page.picture(GREY),
        "change": page.change(GREY, GREY[::-1]),
        "scores": [("pleural effusion, left", 0.9, True)],
    }
    times = np.arange(16) / 10
    frames = np.random.default_rng(0).random((16, 32, 32))
    write_video(tmp_path / "clip.mp4", echo_pictures.film(frames, times, echo_pictures.Strip(1.6, "no ECG")), 10.0, "libx264")
    clip = {
        "title": "A slow heart",
        "words": "w",
        "video": page.video(tmp_path / "clip.mp4"),
        "chart": page.volume_chart(times, 90 + 40 * np.cos(2 * np.pi * times), [0.0, 1.0], [0.4, 1.4]),
        "rows": [("beats a minute", "60", "61")],
    }
    (tmp_path / "clip.mp4").unlink()
    visit = {"image": film["image"], "label": "day 3", "kind": "past", "value": "9 mL"}
    course = {
        "title": "F 50: effusion", "words": "drainage on day 4", "rows": [("the past", [visit, None, visit])], "columns": 3,
        "chart": page.fan_chart([0, 3, 9], [1, 2, 3], 2, np.array([[2.0], [4.0]]), [4], "effusion, mL"),
    }  # fmt: skip
    losses = [(step, 1 / step) for step in range(1, 9)]
    return {
        "command": "make demo", "duration": "3 min", "facts": [("model", "x")], "films": [film] * 4,
        "patients": [{"image": film["image"], "mask": mask, "title": "t", "report": "r", "truth": [("a", "1 mL")]}],
        "training": {"films": 9, "steps": 8, "killed_at": 5, "verdict": "v", "events": [("kill", Markup("<b>k</b>"))],
                     "chart": page.loss_chart(losses, losses[:5], losses[4:])},
        "evaluation": {"words": "w", "rows": [{"name": "n", "value": "1", "meaning": "m"}], "chart_title": "c", "caution": "few",
                       "chart": page.bar_chart([("edema", 0.9), ("nodule", 0.4)], 0.85, 0.5)},
        "echo": {"clips": [clip] * 2, "control": "4 ms from its own"},
        "progression": {"patients": [course], "changes": [{"image": film["image"], "words": "without drainage"}], "futures": 2},
        "code": {name: page.code("medgen doctor  # see")
                 for name in ("sample", "patients", "train", "evaluate", "echo", "progression", "study")},
        "study": {"items": 9, "readers": 2, "answers": 18, "pack": "study/pack/index.html", "report": "study/report/report.html"},
        "provenance": '{"seed": 7}', "steps": [{"name": "s", "time": "1 s", "path": "out"}], "version": "0", "date": "today",
    }  # fmt: skip


def test_the_page_is_one_file_that_needs_nothing_else(content: dict[str, Any], tmp_path: Path) -> None:
    text = page.write_page(tmp_path / "index.html", content).read_text("utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:|#|study/)""", text), "nothing is loaded from elsewhere"
    assert "&lt;" in text, "what a prompt says is text"
    assert "<left>" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium (Debian's package) is not installed")
def test_a_browser_shows_it(content: dict[str, Any], tmp_path: Path) -> None:
    index = page.write_page(tmp_path / "index.html", content)
    listen = """<script>for (const video of document.querySelectorAll("video")) video.addEventListener("canplaythrough", () =>
        { video.dataset.ready = video.readyState; video.dataset.width = video.videoWidth; })</script>"""
    index.write_text(index.read_text("utf-8").replace("</body>", listen + "</body>"), "utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [
        "chromium",
        *flags.split(),
        "--disable-sync",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        index.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.stdout.count("<figure>") == 4
    assert shown.stdout.count("<svg") == 5
    assert re.findall(r'data-ready="(\d)" data-width="(\d+)"', shown.stdout) == [("4", "320")] * 2, (
        "the films can be played through"
    )


def test_changes_are_transparent_where_nothing_changed_and_masks_where_nothing_is_marked() -> None:
    assert page.overlay(np.zeros((8, 8), dtype=np.uint8)) is None
    same, different = page.change(GREY, GREY), page.change(GREY, GREY[::-1])
    assert len(same) < len(different)


def test_the_words_that_matter_are_marked() -> None:
    assert page.marked("No large left effusion, 12 mm.") == Markup(
        '<mark class="not">No</mark> <mark>large</mark> <mark>left</mark> effusion, <mark>12 mm</mark>.'
    )
