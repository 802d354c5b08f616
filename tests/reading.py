"""A study of all nine tasks, small enough for tests but with the pack's own files, and a reader who goes through it in a real browser."""

from __future__ import annotations

import csv
import hashlib
import io
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Download, Locator, Page

from medgen.data.records import FindingLabel
from medgen.study.media import mp4_bytes, png_bytes
from medgen.study.tasks import TASKS
from medgen.study.viewer import VERSION, render

CHROMIUM = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox", "--disable-gpu"]}
DESKTOP, TABLET = {"width": 1040, "height": 640}, {"width": 768, "height": 1024}
FINDINGS = [FindingLabel("pleural_effusion", "present", "left", "small"), FindingLabel("pneumothorax", "absent")]
FILM_FRAMES = 12


@dataclass
class ReadingStudy:
    """A pack folder in the making: `item` adds a case, `write` makes the page and the sums that `read_pack` checks."""

    folder: Path
    items: dict[str, dict[str, Any]] = field(default_factory=dict)

    def image(self, grey: np.ndarray | None = None, **more: Any) -> dict[str, Any]:
        """A medium of one picture; 16 vertical stripes from black to white unless other pixels are given."""
        grey = np.tile(np.repeat(np.arange(16) * 17, 4), (64, 1)).astype(np.uint8) if grey is None else grey
        name = f"media/{len(list(self.folder.glob('media/*'))):08x}.png"
        (self.folder / "media").mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(png_bytes(grey))
        return {"file": name, "kind": "image", "width": grey.shape[1], "height": grey.shape[0], **more}

    def frames(self, kind: str, labels: list[str], **more: Any) -> dict[str, Any]:
        """A stack or a sequence; picture n is all of grey 10 n."""
        made = [self.image(np.full((64, 64), 10 * n, np.uint8)) for n in range(len(labels))]
        listed = [{"file": one["file"], "label": label} for one, label in zip(made, labels, strict=True)]
        return {"kind": kind, "frames": listed, "width": 64, "height": 64, **more}

    def film(self) -> dict[str, Any]:
        """Frame n is all of grey 20 n."""
        grey = np.arange(FILM_FRAMES, dtype=np.uint8)[:, None, None, None] * np.full((1, 64, 64, 3), 20, np.uint8)
        name = f"media/{len(list(self.folder.glob('media/*'))):08x}.mp4"
        (self.folder / "media").mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(mp4_bytes([grey], 25.0)[0])
        return {"file": name, "kind": "video", "width": 64, "height": 64, "fps": 25.0}

    def item(self, task: str, *media: dict[str, Any], **more: Any) -> str:
        name = hashlib.sha256(f"{task}{len(self.items)}".encode()).hexdigest()[:12]
        questions = TASKS[task].asks(FINDINGS)
        for question in questions:
            if question["kind"] == "order":
                question["options"] = [medium["label"] for medium in media]
        shown = {"task": task, "section": task, "media": list(media), "questions": questions, "training": False, "feedback": None}
        self.items[name] = {**shown, **more}
        return name

    def all_tasks(self) -> ReadingStudy:
        self.item("real_or_synthetic", self.image(), training=True, feedback="It is synthetic: <b>look</b> at the ribs.")
        self.item("real_or_synthetic", self.image())
        self.item("two_alternative", self.image(label="left"), self.image(label="right"))
        self.item("likert_realism", self.frames("stack", [f"{5 * n} mm" for n in range(8)]))
        self.item("text_alignment", self.image(), prompt="Small left effusion. <img src=x onerror='window.harmed=1'>")
        self.item("progression_order", *(self.image(label=label) for label in "ABC"))
        past, future = self.frames("sequence", ["day 0", "day 9"]), self.frames("sequence", ["day 20"], reveal=True)
        self.item("plausible_course", past, future)
        self.item("same_patient", self.frames("stack", ["", "", ""]), self.frames("stack", ["", "", ""]))
        self.item("ejection_fraction", self.film(), self.image(np.zeros((40, 400), np.uint8), label="ECG"))
        self.item("artefact", self.image())
        return self

    def study(self, sessions: list[int] | None = None, readers: tuple[str, ...] = ("r1", "r2")) -> dict[str, Any]:
        entry = {"order": list(self.items), "sessions": sessions or [len(self.items)]}
        told = "Read as at work.\n\nThere is no time limit."
        names = {"study_id": "nine", "title": "Nine <i>tasks</i>", "version": VERSION, "pack_sha256": "ab" * 32}
        return {**names, "instructions": told, "readers": dict.fromkeys(readers, entry), "washout_days": 28, "items": self.items}

    def write(self, **more: Any) -> ReadingStudy:
        (self.folder / "index.html").write_text(render(self.study(**more)), "utf-8")
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.name != "SHA256SUMS"]
        lines = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(self.folder).as_posix()}\n" for path in files
        ]
        (self.folder / "SHA256SUMS").write_text("".join(lines), "utf-8")
        return self


class Reading:
    """Who reads: opens the page and presses keys."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: list[str] = []
        self.faults: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("console", lambda said: said.type == "error" and self.faults.append(said.text))

    def open(self, study: ReadingStudy) -> Reading:
        self.page.goto(f"file://{study.folder}/index.html")
        return self

    def press(self, *keys: str) -> Reading:
        for key in keys:
            self.page.keyboard.press(key)
        return self

    def to_case(self) -> Reading:
        """Through the pages before the next case, by Enter."""
        case = self.page.locator("#reading:visible #questions:not([inert])")
        while True:
            case.or_(self.page.locator("#screen:visible .primary")).first.wait_for()
            if case.count():
                return self
            title = self.text("#screen h1")
            self.press("Enter")
            self.page.locator("#screen h1", has_text=title).wait_for(state="hidden")

    def answer(self, *keys: str) -> Reading:
        """Answer this case and go on: the next case or page is there when it returns."""
        before = self.text("#place")
        self.press(*keys, "Enter")
        other = self.page.locator("#place").filter(has_not_text=before)
        self.page.locator("#screen:visible, #feedback:visible").or_(other).first.wait_for()
        return self

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def see(self, selector: str, text: str | None = None) -> Locator:
        found = self.page.locator(selector, has_text=text) if text else self.page.locator(selector)
        found.first.wait_for()
        return found

    def saved(self, how: str = "CSV") -> Path:
        with self.page.expect_download() as saving:
            self.page.get_by_role("button", name=f"Save answers ({how})").first.click()
        return self.file(saving.value)

    def give(self, file: Path) -> Reading:
        """Open a file of saved answers on the first page."""
        with self.page.expect_file_chooser() as choosing:
            self.page.get_by_role("button", name="Open saved answers…").click()
        choosing.value.set_files(file)
        return self

    @staticmethod
    def file(download: Download) -> Path:
        """Outside the browser, which deletes its downloads when it ends."""
        path = Path(tempfile.mkdtemp()) / download.suggested_filename
        download.save_as(path)
        return path


def rows_of(file: Path) -> list[dict[str, str]]:
    """The rows of a saved CSV, as a spreadsheet reads it."""
    return list(csv.DictReader(io.StringIO(file.read_text("utf-8"), newline="")))
