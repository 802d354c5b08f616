"""A generated echo clip as a person watches it: enlarged, its ECG on paper underneath, a cursor at the frame's real second."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# An echo machine's screen, not pink paper: a bright strip would blind the eye to the dim image above it.
_PAPER, _FINE, _COARSE, _TRACE = (10, 14, 18), (26, 36, 44), (56, 76, 90), (126, 226, 160)
_CURSOR, _PEAK, _TEXT, _MARK = (255, 240, 170), (124, 196, 255), (176, 189, 202), (255, 179, 124)
_LARGER = 3  # lines are drawn this much larger and then reduced, which smooths them
_HEADER = 30  # px above the trace: a line of text, then the R peaks' ticks
_PAGE = 6.0  # s of signal on one page of paper; a longer clip turns the page


@dataclass(frozen=True)
class Strip:
    """What is drawn under a clip; all seconds count from frame 0.

    `signal` [S] mV (NaN: not recorded) of `lead`, at `rate` Hz from second `start`; None without an ECG. `r_peaks` [K] s.
    `mark`: stands in the corner; only a blinded study, which says the same of every clip, leaves it empty.
    """

    seconds: float
    words: str
    lead: str | None = None
    signal: np.ndarray | None = None
    rate: float = 1.0
    start: float = 0.0
    r_peaks: Sequence[float] = ()
    mark: str = "SYNTHETIC"


def film(frames: np.ndarray, times: np.ndarray, strip: Strip) -> np.ndarray:
    """[T,H,W] in [0,1] at seconds `times` [T] → [T,H',W',3] uint8: the frames enlarged and untouched, the strip below them.

    H' and W' are even, as H.264 asks.
    """
    scale = max(1, math.ceil(320 / frames.shape[2]))  # large enough for eyes, and for the strip's text
    height, width = frames.shape[1] * scale, frames.shape[2] * scale
    size = (width, max(96, width // 4))
    pages = max(1, math.ceil(strip.seconds / _PAGE - 1e-6))
    length = min(strip.seconds, _PAGE)
    papers = [_paper(strip, (page * length, (page + 1) * length), size) for page in range(pages)]
    canvas = np.zeros((len(frames), _even(height + size[1]), _even(width), 3), np.uint8)
    for picture, frame, second in zip(canvas, frames, times):
        grey = Image.fromarray(np.rint(np.clip(frame, 0, 1) * 255).astype(np.uint8))
        picture[:height, :width] = np.asarray(grey.resize((width, height), Image.Resampling.BICUBIC))[..., None]
        page = min(int(second / length), pages - 1)
        paper, x = papers[page].copy(), (second / length - page) * width
        ImageDraw.Draw(paper).line([(x, _HEADER - 8), (x, size[1])], fill=_CURSOR, width=2)
        picture[height : height + size[1], :width] = np.asarray(paper)
    return canvas


def tile(frames: Sequence[np.ndarray], width: int = 192) -> Image.Image:
    """Frames [H,W] uint8 side by side as one grey picture, each `width` pixels wide."""
    joined = Image.fromarray(np.concatenate(list(frames), axis=1))
    width *= len(frames)
    return joined.resize((width, round(width * joined.height / joined.width)), Image.Resampling.BICUBIC)


def _even(size: int) -> int:
    return size + size % 2


@lru_cache(maxsize=2)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


@dataclass(frozen=True)
class _Axes:
    """Seconds and millivolts → pixels of the enlarged paper of `size` (width, height)."""

    seconds: tuple[float, float]
    millivolts: tuple[float, float]
    size: tuple[int, int]

    def x(self, second: float) -> float:
        return (second - self.seconds[0]) / (self.seconds[1] - self.seconds[0]) * self.size[0]

    def y(self, mv: float) -> float:
        top, (low, high) = _HEADER * _LARGER, self.millivolts
        return top + (high - mv) / (high - low) * (self.size[1] - top - 4 * _LARGER)


def _paper(strip: Strip, window: tuple[float, float], size: tuple[int, int]) -> Image.Image:
    """One page of the strip without its cursor: grid, R peaks, trace, text."""
    large = Image.new("RGB", (size[0] * _LARGER, size[1] * _LARGER), _PAPER)
    draw, axes = ImageDraw.Draw(large), _Axes(window, _millivolts(strip, window), large.size)
    _grid(draw, axes)
    for peak in strip.r_peaks:
        if window[0] - 0.02 <= peak <= window[1] + 0.02:  # one at frame 0 is seen to be there
            x, y, half = axes.x(peak), (_HEADER - 5) * _LARGER, 4 * _LARGER
            draw.polygon([(x - half, y - half), (x + half, y - half), (x, y + half)], fill=_PEAK)
    for part in _parts(strip, axes):
        draw.line(part, fill=_TRACE, width=4, joint="curve")
    paper = large.resize(size, Image.Resampling.LANCZOS)
    text = ImageDraw.Draw(paper)
    text.text((5, 2), strip.words if strip.lead is None else f"{strip.lead}   {strip.words}", fill=_TEXT, font=_font(12))
    text.text((size[0] - 5, 2), strip.mark, fill=_MARK, font=_font(12), anchor="ra")
    return paper


def _millivolts(strip: Strip, window: tuple[float, float]) -> tuple[float, float]:
    """Range of the paper: what the trace needs, at least 1.5 mV, so that a small signal does not look like a large one."""
    low, high = -0.5, 1.0
    if strip.signal is not None:
        seconds = strip.start + np.arange(len(strip.signal)) / strip.rate
        shown = strip.signal[(seconds >= window[0]) & (seconds <= window[1]) & np.isfinite(strip.signal)]
        low, high = (float(shown.min()), float(shown.max())) if len(shown) else (low, high)
    middle, half = (low + high) / 2, max(high - low, 1.5) / 2
    return middle - half, middle + half


def _grid(draw: ImageDraw.ImageDraw, axes: _Axes) -> None:
    """ECG paper: a line every 0.04 s and 0.1 mV, a stronger one every 0.2 s and 0.5 mV; the fine ones only where there is room."""
    top, (width, height) = _HEADER * _LARGER, axes.size
    for step, colour in (((0.04, 0.1), _FINE), ((0.2, 0.5), _COARSE)):
        if axes.x(axes.seconds[0] + step[0]) < 4 * _LARGER:
            continue
        for number in range(math.ceil(axes.seconds[0] / step[0]), math.floor(axes.seconds[1] / step[0]) + 1):
            draw.line([(axes.x(number * step[0]), top), (axes.x(number * step[0]), height)], fill=colour, width=_LARGER)
        for number in range(math.ceil(axes.millivolts[0] / step[1]), math.floor(axes.millivolts[1] / step[1]) + 1):
            draw.line([(0, axes.y(number * step[1])), (width, axes.y(number * step[1]))], fill=colour, width=_LARGER)


def _parts(strip: Strip, axes: _Axes) -> Iterator[list[tuple[float, float]]]:
    """The trace as unbroken lines in pixels: what was not recorded is not drawn."""
    signal = np.empty(0) if strip.signal is None else strip.signal
    seconds = strip.start + np.arange(len(signal)) / strip.rate
    there = np.isfinite(signal) & (seconds >= axes.seconds[0] - 0.1) & (seconds <= axes.seconds[1] + 0.1)
    for run in np.split(np.flatnonzero(there), np.flatnonzero(np.diff(np.flatnonzero(there)) > 1) + 1):
        if len(run) > 1:
            yield [(axes.x(seconds[i]), axes.y(signal[i])) for i in run]
