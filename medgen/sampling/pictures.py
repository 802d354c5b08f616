"""Sampled frames as files: PNG of 8 or 16 bits that say they are synthetic, and a contact sheet with the prompts."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

BitDepth = Literal[8, 16]


def quantise(frame: np.ndarray, bit_depth: BitDepth) -> np.ndarray:
    """[H,W] in [0,1] (clipped) -> [H,W] uint8 or uint16 over the full range."""
    top = 2**bit_depth - 1
    return np.rint(np.clip(frame.astype(np.float64), 0, 1) * top).astype(np.uint8 if bit_depth == 8 else np.uint16)


def png_bytes(frame: np.ndarray, bit_depth: BitDepth, notes: Mapping[str, str]) -> bytes:
    """A grey PNG of `frame` [H,W] in [0,1], with `notes` as text chunks. The bytes depend on the arguments only (no date)."""
    return stored_png(quantise(frame, bit_depth), notes)


def stored_png(values: np.ndarray, notes: Mapping[str, str]) -> bytes:
    """The same of `values` [H,W] uint8 or uint16, as they are."""
    text = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        text.add_itxt(key, value)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG", pnginfo=text)
    return stream.getvalue()


def contact_sheet(
    pictures: Sequence[tuple[Path, str]],
    opened: Callable[[Path], Image.Image] | None = None,
    columns: int = 6,
    width: int = 192,
    most: int = 60,
) -> bytes:
    """A PNG of the first `most` files, each with its caption underneath, `columns` a row and `width` pixels each.

    `opened` makes a file a grey picture; a grey PNG if not given.
    """
    font, gap, line_height, characters = ImageFont.load_default(11), 8, 14, width // 6
    shown = list(pictures[:most])
    columns = min(columns, len(shown))
    captions = [textwrap.wrap(caption, characters, max_lines=6, placeholder=" …") for _, caption in shown]
    tiles = [_tile((opened or _open_png)(path), width) for path, _ in shown]
    rows = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    heights = [max(tiles[i].height + line_height * len(captions[i]) for i in row) + 2 * gap for row in rows]
    sheet = Image.new("L", (columns * (width + gap) + gap, sum(heights) + gap + line_height), 255)
    draw = ImageDraw.Draw(sheet)
    left_out = f"; {len(pictures) - most} more not shown" if len(pictures) > most else ""
    draw.text((gap, 2), f"SYNTHETIC images: no patient is shown{left_out}", fill=0, font=font)
    top = gap + line_height
    for row, height in zip(rows, heights):
        for column, i in enumerate(row):
            left = gap + column * (width + gap)
            sheet.paste(tiles[i], (left, top))
            for number, line in enumerate(captions[i]):
                draw.text((left, top + tiles[i].height + 2 + number * line_height), line, fill=0, font=font)
        top += height
    stream = io.BytesIO()
    sheet.save(stream, "PNG", pnginfo=_synthetic_mark())
    return stream.getvalue()


def _open_png(path: Path) -> Image.Image:
    with Image.open(path) as image:
        values = np.asarray(image)
    return Image.fromarray((values / (257 if values.dtype == np.uint16 else 1)).astype(np.uint8))


def _tile(grey: Image.Image, width: int) -> Image.Image:
    return grey.resize((width, round(width * grey.height / grey.width)), Image.Resampling.BICUBIC)


def _synthetic_mark() -> PngImagePlugin.PngInfo:
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Synthetic", "true")
    return mark
