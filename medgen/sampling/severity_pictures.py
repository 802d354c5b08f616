"""Severity edits as a person looks at them: source, rounds, difference. No dates and no axis: there is no time in it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

NOT_A_FORECAST = "SEVERITY EDITING: no time, not a forecast. Rounds are synthetic."
_PAPER, _TEXT, _DIM, _MARK = (14, 17, 22), (222, 228, 234), (140, 150, 160), (255, 168, 72)
_WIDTH, _GAP, _LINE, _BORDER = 256, 10, 15, 3
_SHEET = 24  # cases that a sheet shows


def severity_strip(frames: np.ndarray, region: np.ndarray | None, prompts: Sequence[str], title: str) -> Image.Image:
    """frames [R+1,H,W] in [0,1] (source, rounds) with their prompts; last the signed difference, the ROI [H,W] outlined on it."""
    size = (_WIDTH, round(_WIDTH * frames.shape[1] / frames.shape[2]))
    tiles = [_grey(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    change = frames[-1].astype(np.float64) - frames[0]
    limit = max(0.05, float(np.quantile(np.abs(change), 0.999)))
    tiles.append(_difference(change, limit, region, size))
    names = ["SOURCE FILM", *(f"ROUND {number}  SYNTHETIC" for number in range(1, len(frames))), "LAST ROUND - SOURCE"]
    scale = f"red brighter, blue darker, full colour {limit:.2f} of the grey range" + ("" if region is None else "; line: ROI")
    words = [textwrap.wrap(text, 42, max_lines=5, placeholder=" …") for text in (*prompts, scale)]
    height = size[1] + 2 * _LINE + _LINE * max(map(len, words)) + 4 * _LINE
    strip = Image.new("RGB", (len(tiles) * (_WIDTH + _GAP) + _GAP, height), _PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((_GAP, 6), title, fill=_TEXT, font=ImageFont.load_default(14))
    draw.text((_GAP, 6 + _LINE + 4), NOT_A_FORECAST, fill=_MARK, font=ImageFont.load_default(13))
    top = 4 * _LINE
    for number, (tile, name, lines) in enumerate(zip(tiles, names, words)):
        left, synthetic = _GAP + number * (_WIDTH + _GAP), 0 < number < len(frames)
        draw.text((left, top - _LINE - 2), name, fill=_MARK if synthetic else _DIM, font=ImageFont.load_default(12))
        if synthetic:
            box = (left - _BORDER, top - _BORDER, left + _WIDTH + _BORDER - 1, top + size[1] + _BORDER - 1)
            draw.rectangle(box, outline=_MARK, width=_BORDER)
        strip.paste(tile, (left, top))
        for line, text in enumerate(lines):
            draw.text((left, top + size[1] + 6 + line * _LINE), text, fill=_TEXT, font=ImageFont.load_default(12))
    return strip


def severity_sheet(strips: Sequence[Path]) -> Image.Image:
    """The first strips below each other, at half their size."""
    halves = []
    for path in strips[:_SHEET]:
        with Image.open(path) as strip:
            halves.append(strip.resize((strip.width // 2, strip.height // 2), Image.Resampling.LANCZOS))
    left_out = f"; {len(strips) - _SHEET} more not shown" if len(strips) > _SHEET else ""
    sheet = Image.new("RGB", (max(h.width for h in halves), 2 * _LINE + sum(h.height for h in halves)), _PAPER)
    ImageDraw.Draw(sheet).text((_GAP, 8), NOT_A_FORECAST + left_out, fill=_MARK, font=ImageFont.load_default(14))
    top = 2 * _LINE
    for half in halves:
        sheet.paste(half, (0, top))
        top += half.height
    return sheet


def picture_bytes(picture: Image.Image, notes: Mapping[str, str]) -> bytes:
    """The PNG of `picture` with `notes` as text chunks; the bytes depend on the arguments only."""
    text = PngImagePlugin.PngInfo()
    for key, value in notes.items():
        text.add_itxt(key, value)
    stream = io.BytesIO()
    picture.save(stream, "PNG", pnginfo=text)
    return stream.getvalue()


def _grey(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(frame, 0, 1) * 255).astype(np.uint8)).convert("RGB")


def _difference(change: np.ndarray, limit: float, region: np.ndarray | None, size: tuple[int, int]) -> Image.Image:
    colours = colormaps["RdBu_r"](np.clip(0.5 + change / (2 * limit), 0, 1))[..., :3]
    tile = Image.fromarray(np.rint(colours * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    if region is None:
        return tile
    mask = np.asarray(Image.fromarray(region.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 0
    inner = mask.copy()
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    pixels = np.array(tile)
    pixels[mask & ~inner] = (30, 30, 30)
    return Image.fromarray(pixels)
