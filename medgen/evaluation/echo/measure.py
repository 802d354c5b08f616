"""What the judge reads from one video: area, length and features of every frame, grey values and flicker; from them a volume curve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medgen.data import disk_cache
from medgen.data.images import to_square
from medgen.data.video import load_video
from medgen.evaluation.echo.function import area_length, ejection_fraction, volumes
from medgen.evaluation.echo.heart_rate import period_rate, video_rate
from medgen.evaluation.echo.phase import Beats, find_beats
from medgen.evaluation.features import PRETRAINED, fingerprint
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.statistics import Floats
from medgen.models.segmenter import ATRIUM, CAVITY, VideoSegmenter

JUDGE = PRETRAINED / "digital_echo_judge"
BATCH = 32
_VERSION = 1  # raise it when the same judge and file give other arrays


def load_judge(path: str | Path | None = None, device: torch.device | str | None = None) -> VideoSegmenter:
    """The video segmenter at `path`, or the shipped one, in float32 and evaluation mode. Raises `EvaluationError` if there is none."""
    folder = Path(path) if path else JUDGE
    if not (folder / "config.json").is_file():
        advice = "train it: medgen train segmenter --config configs/segmenter/digital_echo.yaml"
        raise EvaluationError(f"no video segmenter at {folder}; {advice}, and pass its export folder with --judge")
    model = VideoSegmenter.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, VideoSegmenter)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


@torch.inference_mode()
def read_frames(judge: VideoSegmenter, frames: Tensor) -> dict[str, NDArray]:
    """What the judge sees in `frames` [T,H,W] in [0,1], at its own size.

    area [T] square pixels, length [T] pixels (of the judge's size), features [T,F], grey [T] mean of the sector, bend [T] mean
    absolute second difference in time of the sector's pixels (NaN at the ends).
    """
    size = int(judge.config["image_size"])
    frames = to_square(frames.float(), size, pad=True)
    device = next(judge.parameters()).device
    areas, lengths, features = [], [], []
    for part in frames.split(BATCH):
        logits, seen = judge.with_features((part[:, None] * 2 - 1).to(device))
        probability = functional.softmax(logits, 1)
        area, length = area_length(probability[:, CAVITY], probability[:, ATRIUM])
        areas.append(area.cpu())
        lengths.append(length.cpu())
        features.append(seen.cpu())
    sector = frames.amax(0) > 0.02
    inside = frames[:, sector] if sector.any() else frames.flatten(1)
    bend = torch.full((len(frames),), float("nan"))
    if len(frames) > 2:
        bend[1:-1] = (inside[2:] - 2 * inside[1:-1] + inside[:-2]).abs().mean(1)
    arrays = {"area": torch.cat(areas), "length": torch.cat(lengths), "grey": inside.mean(1), "bend": bend}
    return {**{name: values.double().numpy() for name, values in arrays.items()}, "features": torch.cat(features).numpy()}


@dataclass(frozen=True)
class Reading:
    """One video as the judge sees it. Times s from frame 0, volumes mL where the pixel's size is known, else cubic pixels; EF percent.

    rate and period_rate in bpm (NaN: too short to say); features [T,F]; grey, bend [T] (see `read_frames`).
    """

    times: Floats
    volume: Floats
    beats: Beats
    ejection_fraction: float
    edv: float
    esv: float
    rate: float
    period_rate: float
    features: NDArray[np.float32]
    grey: Floats
    bend: Floats

    @property
    def duration(self) -> float:
        return float(self.times[-1])

    @property
    def frame(self) -> float:
        """Seconds from one frame to the next."""
        return float(self.times[1] - self.times[0])


def interpret(arrays: dict[str, NDArray], times: Floats, pixel_mm: float | None = None) -> Reading:
    """Volumes, beats, EF and rates of what `read_frames` has read; `pixel_mm`: size of a pixel at the judge's resolution."""
    volume = volumes(arrays["area"], arrays["length"], pixel_mm)
    beats = find_beats(volume, times)
    fraction, edv, esv = ejection_fraction(volume, times, beats)
    rates = video_rate(beats), period_rate(volume, times)
    return Reading(times, volume, beats, fraction, edv, esv, *rates, arrays["features"], arrays["grey"], arrays["bend"])


def volume_curve(judge: VideoSegmenter, frames: NDArray, times: Floats, pixel_mm: float | None = None) -> Floats:
    """LV volume [T] of `frames` [T,H,W] in [0,1] at `times` [T] s: mL where `pixel_mm` is given, else cubic pixels."""
    return interpret(read_frames(judge, torch.as_tensor(np.asarray(frames, dtype=np.float32))), times, pixel_mm).volume


def read_file(path: Path, judge: VideoSegmenter, cache: Path, fps: float | None = None, pixel_mm: float | None = None) -> Reading:
    """The `Reading` of a video file; arrays of a file and judge that were read before come from `cache`.

    `pixel_mm` is the pixel's size in the file. Raises `EvaluationError` for a video of one frame.
    """
    mark = fingerprint(judge, _VERSION)[:16]
    where = disk_cache.entry(cache / f"digital-echo-judge-{mark}", ".npz", disk_cache.file_state(path), fps)

    def make() -> dict[str, NDArray]:
        video = load_video(path, fps)
        arrays = read_frames(judge, torch.from_numpy(video.frames).float() / 255)
        return {**arrays, "times": video.times, "side": np.array(max(video.frames.shape[1:]))}

    arrays = disk_cache.arrays(where, make)
    if len(arrays["times"]) < 2:
        raise EvaluationError(f"{path} has one frame: nothing moves in it")
    shrunk = float(arrays["side"]) / int(judge.config["image_size"])
    return interpret(arrays, arrays["times"].astype(np.float64), None if pixel_mm is None else pixel_mm * shrunk)
