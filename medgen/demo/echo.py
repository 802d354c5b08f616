"""The demo's second part, from an ECG to a beating heart: one first frame, one seed, and one thing changed at a time."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medgen.data.ecg import SIMULATED, write_wfdb
from medgen.data.video import read_video
from medgen.demo.page import video, volume_chart
from medgen.demo.session import Session, read_lines
from medgen.demo.sheet import write_sheet
from medgen.digital.ecg import simulate_ecg
from medgen.digital.echo import Echo, record_echo
from medgen.digital.heart import draw_heart
from medgen.digital.rhythm import RhythmKind, draw_rhythm
from medgen.evaluation.echo.measure import Reading, interpret, load_judge, read_frames
from medgen.models.segmenter import VideoSegmenter
from medgen.sampling.ecg_to_echo import sample

_SEED, _PATIENT = 20_260, 3  # a population that no shipped model has seen
_EARLIEST = 1.5  # s: a clip begins at an R peak after this, so that its first beat has a past


@dataclass(frozen=True)
class Change:
    """One clip of the page: what differs from the first one."""

    title: str
    words: str
    rhythm: RhythmKind = "sinus"
    heart_rate: float = 70.0
    ejection_fraction: float | None = 60.0
    frames: int | None = None
    with_ecg: bool = True


CHANGES = {
    "start": Change("The heart as it is", "70 a minute, ejection fraction 60 %"),
    "slow": Change("A slower heart", "only the ECG changed: 50 a minute", heart_rate=50),
    "fast": Change("A faster heart", "only the ECG changed: 110 a minute", heart_rate=110),
    "weak": Change("A failing heart", "only a number changed: ejection fraction 25 %", ejection_fraction=25.0),
    "poor": Change("A weaker heart", "only a number changed: ejection fraction 40 %", ejection_fraction=40.0),
    "af": Change("Atrial fibrillation", "no two beats alike", rhythm="af", heart_rate=85, frames=56),
    "pvc": Change("A premature beat", "one beat too early, then a pause", rhythm="pvc", heart_rate=70, frames=56),
    "silent": Change("No ECG", "the heart beats as the model likes", with_ecg=False),
}
"""Case id → its change. All start from one first frame and one noise."""


def follow_ecg(session: Session) -> dict[str, Any]:
    """Film `CHANGES` from the shipped echo pipeline, measure every clip by the judge; the page's part about it."""
    with session.step("one heart, one thing changed at a time", "echo") as folder:
        cases = folder / "cases.jsonl"
        if not cases.exists():
            folder.mkdir(parents=True, exist_ok=True)
            cases.write_text("".join(json.dumps(line) + "\n" for line in write_cases(folder, session.sizes.clips)))
        sample(session.echo, folder / "films", cases=cases, steps=session.sizes.echo_steps)
    with session.step("every clip measured by a judge that saw no ECG", "echo/films") as films:
        judge = load_judge(device="cpu")
        clips = [look(films, line, judge) for line in read_lines(films / "metadata.jsonl")]
        write_sheet(films.parent / "sheet.png", films.parent, [(clip.line, clip.frames, clip.reading) for clip in clips])
    return {"clips": [describe(films, clip) for clip in clips], "control": control(clips)}


def write_cases(folder: Path, most: int) -> list[dict[str, Any]]:
    """The first frame (end-diastole of a digital heart) and an ECG for each change, all of the same patient."""
    heart = dataclasses.replace(draw_heart(_SEED, _PATIENT, "sinus"), heart_rate=70.0, ejection_fraction=60.0, variability=0.02)
    echo = record_echo(heart, view="A4C")
    at_peak = _frame_at_r_peak(echo)
    Image.fromarray(np.rint(echo.clip.frames[at_peak] * 255).astype(np.uint8)).save(folder / "first_frame.png")
    lines = []
    for name, change in list(CHANGES.items())[:most]:
        rhythm = draw_rhythm(_SEED, change.rhythm, change.heart_rate, 0.0, 8.0, variability=0.02)
        ecg, truth = simulate_ecg(rhythm, heart.seed, start=0.0, end=8.0)
        # The beat before last sets the pace; of premature beats, one falls into the middle of the clip.
        wanted = {"pvc": 2}.get(change.rhythm, 0)
        start = next(
            float(r)
            for i, r in enumerate(truth.r_peaks)
            if r > _EARLIEST and truth.kinds[i] != "pvc" and truth.kinds[i + wanted] == change.rhythm
        )
        if change.with_ecg:
            write_wfdb(ecg, folder / "ecg" / name, [SIMULATED])
        line = {"case_id": name, "seed": 7, "first_frame": "first_frame.png", "view": "A4C", "title": change.title}
        line |= {"ecg": f"ecg/{name}", "ecg_start": round(start, 3)} if change.with_ecg else {}
        line |= {"ejection_fraction": change.ejection_fraction, "num_frames": change.frames, "words": change.words}
        lines.append({key: value for key, value in line.items() if value is not None})
    return lines


@dataclass(frozen=True)
class Seen:
    """A clip's metadata line, its frames [T,H,W] uint8, and what the judge sees in them."""

    line: dict[str, Any]
    frames: np.ndarray
    reading: Reading

    @property
    def t_ends(self) -> list[float]:
        """Of the ECG, s from frame 0; inside the clip."""
        return [second for second in self.line["t_ends"] if second is not None and 0 <= second <= self.reading.duration]


def look(films: Path, line: dict[str, Any], judge: VideoSegmenter) -> Seen:
    """Measure one clip."""
    frames, fps = read_video(films / line["frames_file"])
    return Seen(line, frames, interpret(read_frames(judge, torch.from_numpy(frames) / 255), np.arange(len(frames)) / fps))


def describe(films: Path, seen: Seen) -> dict[str, Any]:
    """One clip of the page: film, volume curve, and what was asked beside what is seen."""
    line, reading = seen.line, seen.reading
    return {
        "title": line["title"],
        "words": line["words"],
        "video": video(films / line["file_name"]),
        "chart": volume_chart(reading.times, reading.volume, line["r_peaks"], seen.t_ends),
        "rows": [
            ("beats a minute", _number(line["heart_rate"]), _number(reading.rate)),
            ("ejection fraction, %", _number(line.get("ejection_fraction")), _number(reading.ejection_fraction)),
        ],
    }


def control(clips: list[Seen]) -> str:
    """How far from the T waves' ends the volume is smallest: for each clip's own ECG, and for ECGs of other heart rates."""
    heard = [clip for clip in clips if clip.t_ends and len(clip.reading.beats.es)]
    own = [_apart(clip, clip) for clip in heard]
    rates = [clip.line["heart_rate"] or 0.0 for clip in heard]
    other = [_apart(a, b) for a, x in zip(heard, rates) for b, y in zip(heard, rates) if abs(x - y) > 5]
    if not other:
        return ""
    return f"{np.median(own):.0f} ms from where its own ECG's T wave ends, and {np.median(other):.0f} ms from where those of the others end"


def _apart(clip: Seen, ecg: Seen) -> float:
    """Median distance in ms of the clip's end-systoles from the nearest T end of the ECG."""
    return 1000 * float(np.median([min(abs(end - es) for end in ecg.t_ends) for es in clip.reading.beats.es]))


def _frame_at_r_peak(echo: Echo) -> int:
    peaks = [beat.r for beat in echo.rhythm.beats]
    return int(np.argmin([min(abs(second - peak) for peak in peaks) for second in echo.times]))


def _number(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.0f}"
