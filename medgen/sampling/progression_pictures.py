"""A patient's visits as a person looks at them: strip, movie, map of a change, sheet of futures. Nothing is drawn on the anatomy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from medgen.sampling.progression_cases import moment

NOT_CAUSAL = "model response, not a causal effect"
_PAPER, _TEXT, _DIM, _AXIS = (14, 17, 22), (222, 228, 234), (140, 150, 160), (70, 80, 90)
_MARK, _EVENT = (255, 168, 72), (116, 188, 255)  # what is synthetic; what was done to the patient
_WIDTH, _BORDER, _GAP, _COLUMNS = 256, 4, 12, 6  # px of an image, of the frame around it, between two; images in a row
_LINE = 17  # px of a line of text
_SHEET = (12, 6)  # rows and futures of each that a sheet shows


@dataclass(frozen=True)
class Shown:
    """One visit in a picture: image [H,W] in [0,1], or [D,H,W] of which middle slices are shown; `words` are lines below it."""

    image: np.ndarray
    time: float
    date: str | None = None
    synthetic: bool = False
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Course:
    """What a strip tells besides its images: a title, the unit of time, and (name, time) of the events."""

    title: str
    unit: Any
    events: Sequence[tuple[str, float]] = ()


def film_strip(shown: Sequence[Shown], course: Course) -> Image.Image:
    """Visits in the order of time, known ones plain, generated ones framed and marked, over an axis of real time with the events."""
    ordered, tiles = _in_order(shown, course)
    rows = -(-len(tiles) // _COLUMNS)
    grid = _grid(tiles, -(-len(tiles) // rows))
    axis = _axis(ordered, course, grid.width)
    strip = Image.new("RGB", (grid.width, 2 * _LINE + grid.height + axis.height), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((_GAP, 8), _fitting(course.title, grid.width - 2 * _GAP), fill=_TEXT, font=_font(14))
    strip.paste(grid, (0, 2 * _LINE))
    strip.paste(axis, (0, 2 * _LINE + grid.height))
    return strip


def movie(shown: Sequence[Shown], course: Course) -> np.ndarray:
    """[T,H',W',3] uint8, a picture for each visit in the order of time: the image, its date, and where it lies on the axis.

    Nothing is made up between two visits. H' and W' are even, as H.264 asks.
    """
    ordered, tiles = _in_order(shown, course)
    width = 2 * (tiles[0].width // 2 + 70)
    height = max(tile.height for tile in tiles)
    pictures = []
    for one, tile in zip(ordered, tiles):
        axis = _axis(ordered, course, width, cursor=one.time)
        picture = Image.new("RGB", (width, 2 * ((height + axis.height + 9) // 2)), _PAPER)
        picture.paste(tile, ((width - tile.width) // 2, 8))
        picture.paste(axis, (0, height + 8))
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def difference_map(shown: Sequence[Shown], changed: Sequence[Shown], course: Course, change: str) -> Image.Image:
    """Three rows for each wanted time: as asked, with the change, and the signed difference (second minus first) with its scale."""
    differences = [np.asarray(b.image - a.image, dtype=np.float64) for a, b in zip(shown, changed)]
    limit = max(0.02, float(np.quantile(np.abs(np.stack(differences)), 0.999)))
    rows = [[_tile(one, course.unit) for one in row] for row in (shown, changed)]
    rows.append([_framed(_coloured(section(d), limit), ("DIFFERENCE", ""), (), True) for d in differences])
    names = ("as asked", change, "second minus first")
    columns = min(_COLUMNS, len(shown))
    blocks = []
    for start in range(0, len(shown), columns):  # more times than fit beside each other: the three rows again below
        for name, row in zip(names, rows):
            blocks.append((name, _grid(row[start : start + columns], columns)))
    width = max(blocks[0][1].width, 2 * _WIDTH)
    height = 3 * _LINE + sum(grid.height + _LINE for _, grid in blocks) + 3 * _LINE
    picture = Image.new("RGB", (width, height), _PAPER)
    draw, top = ImageDraw.Draw(picture), 3 * _LINE
    draw.text((_GAP, 8), _fitting(course.title, width - 2 * _GAP), fill=_TEXT, font=_font(14))
    draw.text((_GAP, 8 + _LINE), _fitting(f"{change}: {NOT_CAUSAL}", width - 2 * _GAP), fill=_MARK, font=_font(14))
    for name, grid in blocks:
        draw.text((_GAP, top), _fitting(name, width - 2 * _GAP), fill=_DIM, font=_font(13))
        picture.paste(grid, (0, top + _LINE))
        top += grid.height + _LINE
    _scale(picture, top + 4, limit)
    return picture


def futures_sheet(rows: Sequence[tuple[str, Shown, Sequence[Shown]]], unit: Any, left_out: str = "") -> Image.Image:
    """One patient a row: a caption, the last known visit, then one future beside the other."""
    parts = []
    for caption, last, futures in rows[: _SHEET[0]]:
        tiles = [_tile(last, unit), *(_tile(one, unit, last.time) for one in futures[: _SHEET[1]])]
        parts.append((caption, _grid(tiles, 1 + _SHEET[1] if len(rows) > 1 else len(tiles))))
    width = max(max(grid.width for _, grid in parts), 2 * _WIDTH)
    sheet = Image.new("RGB", (width, 2 * _LINE + sum(grid.height + _LINE for _, grid in parts)), _PAPER)
    draw, top = ImageDraw.Draw(sheet), 2 * _LINE
    said = "Last known visit, then SYNTHETIC futures: framed images show no patient" + left_out
    draw.text((_GAP, 8), _fitting(said, width - 2 * _GAP), fill=_MARK, font=_font(14))
    for caption, grid in parts:
        draw.text((_GAP, top), _fitting(caption, width - 2 * _GAP), fill=_TEXT, font=_font(13))
        sheet.paste(grid, (0, top + _LINE))
        top += grid.height + _LINE
    return sheet


def section(frame: np.ndarray) -> np.ndarray:
    """What of a frame is shown: a picture [H,W] itself; of a volume [D,H,W] in RAS order the middle coronal slice above the axial one.

    Both as they are hung: the patient's right on the picture's left, head or breast up.
    """
    if frame.ndim == 2:
        return frame
    depth, height, width = frame.shape
    coronal, axial = frame[::-1, height // 2, ::-1], frame[depth // 2, ::-1, ::-1]
    return np.concatenate([coronal, np.zeros((max(1, width // 32), width), frame.dtype), axial])


def picture_bytes(picture: Image.Image, notes: Mapping[str, str]) -> bytes:
    """The PNG of `picture` with `notes` as text chunks; the bytes depend on the arguments only."""
    text = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        text.add_itxt(key, value)
    stream = io.BytesIO()
    picture.save(stream, "PNG", pnginfo=text)
    return stream.getvalue()


@lru_cache(maxsize=4)
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _fitting(text: str, width: int, size: int = 14) -> str:
    """`text`, cut where `width` pixels end."""
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text} …") > width:
        text = text[:-1]
    return f"{text} …"


def _in_order(shown: Sequence[Shown], course: Course) -> tuple[list[Shown], list[Image.Image]]:
    """Visits in the order of time (a known one before a generated one of the same time), and their tiles."""
    ordered = sorted(shown, key=lambda one: (one.time, one.synthetic))
    known = [one.time for one in ordered if not one.synthetic]
    last = [max((time for time in known if time <= one.time), default=None) if one.synthetic else None for one in ordered]
    return ordered, [_tile(one, course.unit, before) for one, before in zip(ordered, last)]


def _tile(one: Shown, unit: Any, known: float | None = None) -> Image.Image:
    """`known`: the time of the last known visit, from which a generated one counts."""
    grey = Image.fromarray(np.rint(np.clip(section(one.image), 0, 1) * 255).astype(np.uint8))
    labels = ("SYNTHETIC" if one.synthetic else "known", "")
    since = "" if known is None else f"   (+{one.time - known:.6g})"
    return _framed(grey, labels, (moment(one.time, unit) + since, one.date or "", *one.words), one.synthetic)


def _framed(image: Image.Image, above: tuple[str, str], below: Sequence[str], synthetic: bool) -> Image.Image:
    """An image enlarged, untouched, with a frame around it (coloured: synthetic), a label above and lines of text below."""
    height = round(_WIDTH * image.height / image.width)
    enlarged = image.resize((_WIDTH, height), Image.Resampling.BICUBIC if image.width <= _WIDTH else Image.Resampling.LANCZOS)
    lines = [line for line in below if line]
    size = (_WIDTH + 2 * _BORDER, _LINE + height + 2 * _BORDER + 4 + _LINE * len(lines))
    tile = Image.new("RGB", size, _PAPER)
    draw, colour = ImageDraw.Draw(tile), _MARK if synthetic else _PAPER
    draw.text((_BORDER, 0), above[0], fill=_MARK if synthetic else _DIM, font=_font(13))
    draw.rectangle([(0, _LINE), (size[0] - 1, _LINE + height + 2 * _BORDER - 1)], fill=colour)
    tile.paste(enlarged.convert("RGB"), (_BORDER, _LINE + _BORDER))
    for number, line in enumerate(lines):
        y = _LINE + height + 2 * _BORDER + 3 + number * _LINE
        draw.text((_BORDER, y), _fitting(line, _WIDTH, 13), fill=_TEXT if number == 0 else _DIM, font=_font(13))
    return tile


def _grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    width, height = tiles[0].width + _GAP, max(tile.height for tile in tiles) + _GAP
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP // 2), _PAPER)
    for i, tile in enumerate(tiles):
        grid.paste(tile, (_GAP + i % columns * width, _GAP // 2 + i // columns * height))
    return grid


def _axis(shown: Sequence[Shown], course: Course, width: int, cursor: float | None = None) -> Image.Image:
    """Real time from the first visit to the last: known visits as dots, generated ones as squares, events as lines with names."""
    first, last = shown[0].time, max(one.time for one in shown)
    events = [(name, time) for name, time in course.events if first <= time <= last]
    lanes = _lanes(events, first, last, width)
    middle = 10 + 14 * (max(lanes, default=-1) + 1)
    axis = Image.new("RGB", (width, middle + 30), _PAPER)
    draw = ImageDraw.Draw(axis)

    def x(time: float) -> float:
        return _x(time, first, last, width)

    draw.line([(x(first), middle), (x(last), middle)], fill=_AXIS, width=2)
    for (name, time), lane in zip(events, lanes):
        top = 14 * lane + 4
        draw.line([(x(time), top + 2), (x(time), middle + 7)], fill=_EVENT, width=2)
        draw.text((_name_span(name, x(time), width)[0], top - 3), name, fill=_EVENT, font=_font(12))
    for one in shown:
        box = [(x(one.time) - 5, middle - 5), (x(one.time) + 5, middle + 5)]
        if one.synthetic:
            draw.rectangle(box, outline=_MARK, width=2)  # a known visit of the same time shows through
        else:
            draw.ellipse(box, fill=_TEXT)
    if cursor is not None:
        draw.polygon([(x(cursor), middle + 8), (x(cursor) - 5, middle + 15), (x(cursor) + 5, middle + 15)], fill=_MARK)
    below = middle + 12
    if cursor is None and last > first:
        draw.text((x(first) - 5, below), moment(first, course.unit), fill=_DIM, font=_font(12))
        draw.text((x(last) + 5, below), moment(last, course.unit), fill=_DIM, font=_font(12), anchor="ra")
    return axis


def _x(time: float, first: float, last: float, width: int) -> float:
    margin = 2 * _GAP
    return margin + (time - first) / max(last - first, 1e-9) * (width - 2 * margin)


def _name_span(name: str, at: float, width: int) -> tuple[float, float]:
    """From where to where an event's name goes: right of its line, or left of it where the picture ends."""
    length = _font(12).getlength(name)
    return (at + 5, at + 5 + length) if at + 5 + length < width - 2 else (at - 5 - length, at - 5)


def _lanes(events: Sequence[tuple[str, float]], first: float, last: float, width: int) -> list[int]:
    """The line of text (0: the highest) on which each event's name has room."""
    taken: list[list[tuple[float, float]]] = []
    lanes = []
    for name, time in events:
        at = _x(time, first, last, width)
        start, end = _name_span(name, at, width)
        start, end = min(start, at) - 8, max(end, at) + 8
        lane = next((i for i, spans in enumerate(taken) if all(end < a or start > b for a, b in spans)), len(taken))
        taken[lane:] = taken[lane:] or [[]]
        taken[lane].append((start, end))
        lanes.append(lane)
    return lanes


def _coloured(difference: np.ndarray, limit: float) -> Image.Image:
    """Blue: darker, white: the same, red: brighter."""
    return Image.fromarray((colormaps["RdBu_r"](0.5 + 0.5 * difference / limit)[..., :3] * 255).round().astype(np.uint8))


def _scale(picture: Image.Image, top: int, limit: float) -> None:
    """The colours' meaning: a bar from -limit to limit, in percent of the range from black to white."""
    width = min(360, picture.width - 2 * _GAP)
    bar = np.linspace(-limit, limit, width)[None].repeat(14, 0)
    picture.paste(_coloured(bar, limit), (_GAP, top))
    draw = ImageDraw.Draw(picture)
    for share, anchor, words in (
        (0.0, "la", f"-{100 * limit:.0f} %  darker"),
        (0.5, "ma", "0"),
        (1.0, "ra", f"brighter  +{100 * limit:.0f} %"),
    ):
        draw.text((_GAP + share * width, top + 18), words, fill=_TEXT, font=_font(12), anchor=anchor)
