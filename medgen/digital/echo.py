"""Digital echo patients, from a seed to clips, 12-lead ECGs and truth per frame, written as a manifest like any other data set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgen.data.ecg import ECG, SIMULATED, write_wfdb
from medgen.data.echo_records import EchoRecord
from medgen.data.video import write_video
from medgen.digital.ecg import simulate_ecg
from medgen.digital.echo_view import ApicalView, Clip, Window, draw_window, film
from medgen.digital.heart import BeatVolumes, Heart, Motion, beat_volumes, draw_heart, move
from medgen.digital.rhythm import Rhythm, RhythmKind, draw_rhythm
from medgen.digital.writing import split_of, write_patients
from medgen.seeds import stable_seed

ECG_MARGIN = 1.5  # seconds of ECG before frame 0 and after the last frame
VIEWS: tuple[ApicalView, ...] = ("A4C", "A2C")


@dataclass(frozen=True)
class Echo:
    """One clip of a heart with the ECG that was recorded with it; `times` [T] s, on the ECG's clock."""

    heart: Heart
    rhythm: Rhythm
    window: Window
    times: np.ndarray
    motion: Motion
    clip: Clip
    ecg: ECG
    ejection_fraction: float  # percent, mean of the clip's beats
    edv_ml: float
    esv_ml: float


def record_echo(
    heart: Heart,
    frames: int = 32,
    fps: float = 20.0,
    size: int = 112,
    view: ApicalView | None = None,
    twa_mv: float = 0.0,
    take: int = 0,
) -> Echo:
    """Film `heart` for `frames` at `fps` Hz; `take` numbers its clips (other moments, another placement of the probe)."""
    rng = np.random.default_rng(stable_seed("echo take", heart.seed, take))
    view = view or VIEWS[int(rng.random() < 0.35)]
    times = np.arange(frames) / fps
    last = float(times[-1])
    key = stable_seed(heart.seed, take)
    rhythm = draw_rhythm(key, heart.rhythm, heart.heart_rate, -ECG_MARGIN, last + ECG_MARGIN, heart.variability)
    motion = move(heart, rhythm, times)
    window = draw_window(heart, view, take)
    clip = film(heart, window, motion, rhythm.respiration(times), size)
    ecg, _ = simulate_ecg(rhythm, heart.seed, start=-ECG_MARGIN, end=last + ECG_MARGIN, twa_mv=twa_mv)
    near = [b for b in beat_volumes(heart, rhythm) if b.beat.r + b.beat.rr > 0 and b.beat.r <= last]
    seen = [b for b in near if b.beat.t_end > 0] or near  # a short clip may lie between two systoles
    edv, esv = (float(np.mean([getattr(b, name) for b in seen])) for name in ("edv_ml", "esv_ml"))
    return Echo(heart, rhythm, window, times, motion, clip, ecg, _mean_fraction(seen), edv, esv)


def write_dataset(
    out: Path,
    n: int,
    seed: int = 0,
    size: int = 112,
    frames: int = 32,
    fps: float = 20.0,
    rhythm: RhythmKind | None = None,
    twa_mv: float = 0.0,
    processes: int | None = None,
) -> Path:
    """Write `n` echo clips of `n` digital hearts, each with the ECG that drove it, and return the path of `manifest.parquet`.

    The same command again continues where it stopped. Beside the manifest lie videos/ (lossless AVI), ecg/ (WFDB, 12 leads at
    500 Hz), annotations/ (.npz: LV volume, cardiac phase and masks per frame, R peaks, T ends) and sheet.png to look at.

    Args:
        out: folder to write into.
        n: how many clips.
        seed: of the population; patients of a smaller n are the first of a larger one.
        size: width and height in pixels.
        frames: per clip.
        fps: frames per second.
        rhythm: only hearts of this rhythm; default: two thirds sinus, the rest atrial fibrillation, premature beats, paced.
        twa_mv: T-wave alternans, mV.
        processes: how many cores to use; default: all there are.
    """
    if n < 1 or size < 32 or frames < 2 or not 1 <= fps <= 200:
        raise ValueError(f"n must be at least 1 (got {n}), size 32 ({size}), frames 2 ({frames}), fps from 1 to 200 ({fps:g})")
    for name in ("videos", "ecg", "annotations"):
        (out / name).mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"seed": seed, "size": size, "frames": frames, "fps": fps, "rhythm": rhythm, "twa_mv": twa_mv}
    work = partial(_write_patient, out=str(out), **settings)
    records = write_patients(out, n, work, EchoRecord, settings, name="digital-echo", what="clips", processes=processes)
    _write_sheet(out, records[:12])
    return out / "manifest.parquet"


def _write_patient(
    index: int, out: str, seed: int, size: int, frames: int, fps: float, rhythm: RhythmKind | None, twa_mv: float
) -> list[EchoRecord]:
    torch.set_num_threads(1)
    heart = draw_heart(seed, index, rhythm)
    return [write_echo(Path(out), record_echo(heart, frames, fps, size, twa_mv=twa_mv))]


def write_echo(folder: Path, echo: Echo, record_id: str | None = None) -> EchoRecord:
    """Write the clip's video, ECG and annotations below `folder`; the record that names them."""
    heart, times = echo.heart, echo.times
    record_id = record_id or f"{heart.patient_id}-{echo.window.view.lower()}"
    fps = 1 / float(times[1] - times[0])
    write_video(folder / f"videos/{record_id}.avi", (echo.clip.frames * 255).round().astype(np.uint8), fps)
    write_wfdb(echo.ecg, folder / f"ecg/{record_id}", [SIMULATED])
    np.savez_compressed(folder / f"annotations/{record_id}.npz", **frame_truth(echo))
    return EchoRecord(
        record_id=record_id,
        patient_id=heart.patient_id,
        study_id=f"{heart.patient_id}-s1",
        video=f"videos/{record_id}.avi",
        view=echo.window.view,
        fps=fps,
        frames=len(times),
        split=split_of(heart.patient_id),
        ejection_fraction=round(echo.ejection_fraction, 3),
        edv_ml=round(echo.edv_ml, 3),
        esv_ml=round(echo.esv_ml, 3),
        ecg=f"ecg/{record_id}",
        ecg_offset=-echo.ecg.start,  # a WFDB file's own clock begins with its first sample
        pairing="beat_synchronous",
        annotations=f"annotations/{record_id}.npz",
        age=heart.age,
        sex=heart.sex,
        truth={"rhythm": heart.rhythm, "heart_rate": round(heart.heart_rate, 3), "pixel_mm": round(echo.clip.pixel_mm, 4)},
        extra={"heart": asdict(heart), "window": asdict(echo.window)},
    )


def frame_truth(echo: Echo) -> dict[str, Any]:
    """Truth per frame (`times` and `lv_volume_ml` [T], `phase` [T] rad, `masks` [T,H,W]) and per beat (`r_peaks`, `t_ends` in s).

    `phase` runs from 0 at the R peak over pi at the end of the T wave to 2 pi at the next R peak. `ed_frames` and `es_frames` are
    the frames nearest to an R peak and to a T end inside the clip.
    """
    beats, times = echo.rhythm.beats, echo.times
    r_peaks = np.array([beat.r for beat in beats])
    t_ends = np.array([beat.t_end for beat in beats])
    knots = np.ravel(np.column_stack([r_peaks, t_ends]))
    step = times[1] - times[0]

    def nearest(events: np.ndarray) -> np.ndarray:
        inside = events[(events >= times[0]) & (events <= times[-1])]
        return np.rint((inside - times[0]) / step).astype(np.int64)

    return {
        "times": times,
        "lv_volume_ml": echo.motion.volume_ml.astype(np.float32),
        "phase": np.mod(np.interp(times, knots, np.arange(len(knots)) * np.pi), 2 * np.pi).astype(np.float32),
        "masks": echo.clip.masks,
        "r_peaks": r_peaks,
        "t_ends": t_ends,
        "beat_kinds": np.array([beat.kind for beat in beats]),
        "ed_frames": nearest(r_peaks),
        "es_frames": nearest(t_ends),
        "px_mm": np.float32(echo.clip.pixel_mm),
        "axis": np.array([*echo.window.apex, echo.window.tilt], dtype=np.float32),
    }


def _mean_fraction(beats: list[BeatVolumes]) -> float:
    return float(np.mean([b.ejection_fraction for b in beats]))


def _write_sheet(out: Path, records: list[EchoRecord]) -> None:
    """The first clips, a row each: six frames from one R peak on, to look at."""
    from torchvision.utils import make_grid, save_image

    from medgen.data.video import read_video

    rows = []
    for record in records:
        frames, _ = read_video(out / record.video)
        with np.load(out / str(record.annotations)) as truth:
            first = int(truth["ed_frames"][0]) if len(truth["ed_frames"]) else 0
        picked = frames[(first + np.arange(6) * max(1, round(record.fps / 12))) % len(frames)]
        rows.append(torch.from_numpy(picked.copy())[:, None].float() / 255)
    save_image(make_grid(torch.cat(rows), nrow=6), out / "sheet.png")
