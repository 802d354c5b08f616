"""Two generators for echo cases, made of the digital heart itself: one that obeys every condition, and one that is deaf to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.records import Manifest
from medgen.data.video import write_video
from medgen.digital.echo import ECG_MARGIN
from medgen.digital.echo_view import Window, film
from medgen.digital.heart import Heart, move
from medgen.digital.rhythm import Rhythm, draw_rhythm
from medgen.seeds import stable_seed


def rhythm_of(heart: Heart, frames: int, fps: float) -> Rhythm:
    """The rhythm that `record_echo` filmed."""
    last = (frames - 1) / fps
    return draw_rhythm(
        stable_seed(heart.seed, 0), heart.rhythm, heart.heart_rate, -ECG_MARGIN, last + ECG_MARGIN, heart.variability
    )


def generate(manifest: Manifest[Any], cases: Path, out: Path, obedient: bool = True) -> Path:
    """Clips for `cases` by the hearts of their records. Obedient: the ECG given drives the heart, at the EF asked for.

    A deaf generator (or one without an ECG) lets a heart of its own beat, the same for every case of one seed.
    """
    records = {Path(str(record.ecg)).name: record for record in manifest.records}
    by_id = {record.record_id: record for record in manifest.records}
    lines = []
    out.mkdir(parents=True)
    for case in map(json.loads, cases.read_text().splitlines()):
        own = by_id[case["record_id"]]
        heart, window = Heart(**own.extra["heart"]), Window(**own.extra["window"])
        given = records[Path(case["ecg"]).stem] if "ecg" in case and obedient else None
        for trajectory in range(case["n"]):
            key = stable_seed("oracle", case["seed"], trajectory)
            rng = np.random.default_rng(key)
            times = np.arange(case["num_frames"]) / case["fps"]
            if given is not None:
                driver = Heart(**given.extra["heart"])
                rhythm = rhythm_of(driver, given.frames, given.fps)
                times = times + case["ecg_start"] - given.ecg_offset
                fraction = case["ejection_fraction"]
                heart = replace(heart, heart_rate=driver.heart_rate, rhythm=driver.rhythm, ejection_fraction=fraction)
            else:
                rate = float(rng.uniform(50, 120))
                rhythm = draw_rhythm(key, "sinus", rate, 0.0, float(times[-1]), 0.02)
                heart = replace(heart, heart_rate=rate, rhythm="sinus", ejection_fraction=float(rng.uniform(20, 70)))
            moved = replace(window, seed=key) if trajectory else window
            clip = film(heart, moved, move(heart, rhythm, times), rhythm.respiration(times))
            name = f"{case['case_id']}_{trajectory:03d}"
            frames = (clip.frames * 255).round().astype(np.uint8)
            write_video(out / f"{name}.avi", frames, case["fps"])
            lines.append({**case, "file_name": f"{name}.avi", "trajectory": trajectory, "model": "oracle", "synthetic": True})
    (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out
