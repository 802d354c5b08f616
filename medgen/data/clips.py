"""From a video file to the clip that models see: `[T, size, size]` grey frames near the wanted frame rate, with their real times.

`VideoPreprocessing` is saved with every echo pipeline, so that a model always meets the geometry and rhythm it was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from medgen.config import Config
from medgen.data import disk_cache
from medgen.data.images import to_square
from medgen.data.video import VideoError, load_video

_CACHE_VERSION = 1  # raise it when the same file and preprocessing give other frames
_SAME_RATE = 1.02  # a camera said to run at 20 Hz may run at 19.7


class VideoPreprocessing(Config):
    """How a video file becomes frames; part of a pipeline's saved configuration."""

    size: int = Field(112, ge=8, le=2048, description="height and width in pixels")
    frames: int = Field(32, ge=1, le=4096, description="frames in a window")
    fps: float = Field(20.0, gt=0, le=1000, description="frames per second")
    pad: bool = Field(True, description="pad to a square with black; otherwise crop the centre square")


@dataclass(frozen=True)
class Clip:
    """`frames` uint8 `[T, size, size]`, `times` float64 `[T]` seconds from the file's frame 0, `source` `[T]` its (nearest) frames."""

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    source: NDArray[np.int64]

    def video(self, first: int = 0, count: int | None = None) -> Tensor:
        """`[T, 1, size, size]` float32 in [-1, 1] of `count` frames (default: all) from `first` on."""
        frames = torch.from_numpy(self.frames[first : None if count is None else first + count])
        return frames[:, None].float().mul_(2 / 255).sub_(1)


def load_clip(
    path: str | Path, preprocessing: VideoPreprocessing, fps: float | None = None, cache: str | Path | None = None
) -> Clip:
    """The whole of a video file at `preprocessing`'s size and frame rate; `fps` is the file's true rate where that is known.

    A file at least as fast as wanted gives real frames, those nearest to the even grid, at the times they were really taken: frames
    are never blended then, so speckle stays speckle, and a gap in the recording stays a gap. A slower file is interpolated
    linearly. `cache` is a folder for the resized frames (`None` decodes every time). Raises `VideoError` naming the file.
    """
    path = Path(path)
    resized = partial(_resized, path, preprocessing, fps)
    if cache is None:
        stored = resized()
    else:
        try:
            state = disk_cache.file_state(path)
        except OSError:
            raise VideoError(f"no video at {path}") from None
        where = disk_cache.entry(Path(cache), ".npz", "clip", _CACHE_VERSION, state, preprocessing.size, preprocessing.pad, fps)
        stored = disk_cache.arrays(where, resized)
    return resampled(stored["frames"], stored["times"], preprocessing.fps)


def _resized(path: Path, preprocessing: VideoPreprocessing, fps: float | None) -> dict[str, NDArray]:
    video = load_video(path, fps)
    parts = [  # float32 of a long wide film at once would be gigabytes
        to_square(torch.from_numpy(part) / 255, preprocessing.size, preprocessing.pad)
        for part in np.array_split(video.frames, -(-len(video.frames) // 32))
    ]
    frames = torch.cat(parts).mul_(255).round_().to(torch.uint8).numpy()
    return {"frames": frames, "times": video.times}


def resampled(frames: NDArray[np.uint8], times: NDArray[np.float64], fps: float) -> Clip:
    """Frames `[T, H, W]` taken at `times` `[T]` (rising), near an even grid of `fps` Hz from the first to the last of them."""
    if len(frames) == 1:
        return Clip(frames, times, np.zeros(1, dtype=np.int64))
    step = 1 / fps
    grid = times[0] + np.arange(int((times[-1] - times[0]) / step + 1 + 1e-6)) * step
    nearest = _nearest(times, grid)
    gaps = np.diff(times)
    if np.median(gaps) <= step * _SAME_RATE:
        nearest = np.unique(nearest)  # a clip a little slower than wanted, or with a gap, repeats none
        return Clip(frames[nearest], times[nearest], nearest)
    after = np.clip(np.searchsorted(times, grid, side="right"), 1, len(times) - 1)
    weight = np.clip((grid - times[after - 1]) / gaps[after - 1], 0, 1)[:, None, None]
    blended = frames[after - 1] * (1 - weight) + frames[after] * weight
    return Clip(np.rint(blended).astype(np.uint8), grid, nearest)


def _nearest(times: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.int64]:
    after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    nearest: NDArray[np.int64] = after - (wanted - times[after - 1] < times[after] - wanted)
    return nearest
