"""A sheet to look at: for every stratum of a plan, real films on the left and synthetic ones on the right."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from medgen.data.images import load_image
from medgen.seeds import stable_seed

SHEET = "real_and_synthetic.png"
NOTICE = "LEFT real films, RIGHT SYNTHETIC ones of no patient. Holds real films: keep it where the data are."
_GAP, _LINE, _LABEL = 6, 14, 120


def compare_sheet(
    real: Mapping[str, Sequence[Path]], synthetic: Mapping[str, Sequence[Path]], each: int = 4, width: int = 112
) -> bytes:
    """PNG with one row a stratum: `each` films of `real` and of `synthetic`, `width` pixels each, drawn at random but always the same."""
    names = sorted(synthetic)
    font = ImageFont.load_default(11)
    row = width + _GAP
    middle = _LABEL + each * row + 2 * _GAP
    sheet = Image.new("L", (middle + each * row, len(names) * row + 2 * _LINE), 255)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, 4), NOTICE, fill=0, font=font)
    for number, name in enumerate(names):
        top = 2 * _LINE + number * row
        lines = [*name.replace("_", " ").split(", "), f"{len(real.get(name, ()))} | {len(synthetic[name])} films"]
        draw.multiline_text((_GAP, top + width // 3), "\n".join(lines), fill=0, font=font)
        for left, films in ((_LABEL, real.get(name, ())), (middle, synthetic[name])):
            for place, path in enumerate(_some(films, each, name)):
                sheet.paste(_tile(path, width), (left + place * row, top))
    draw.line([(middle - _GAP - 1, _LINE), (middle - _GAP - 1, sheet.height)], fill=0)
    mark = PngImagePlugin.PngInfo()
    mark.add_text("Comment", NOTICE)
    with io.BytesIO() as stream:
        sheet.save(stream, "PNG", pnginfo=mark)
        return stream.getvalue()


def by_stratum(films: Sequence[tuple[str, Path]]) -> dict[str, list[Path]]:
    """Paths by stratum."""
    found: dict[str, list[Path]] = defaultdict(list)
    for name, path in films:
        found[name].append(path)
    return dict(found)


def _some(films: Sequence[Path], count: int, name: str) -> list[Path]:
    order = np.random.default_rng(stable_seed("contact sheet", name)).permutation(len(films))
    return [films[i] for i in order[:count]]


def _tile(path: Path, width: int) -> Image.Image:
    values = torch.round((load_image(path, width)[0] + 1) * 127.5).to(torch.uint8)
    return Image.fromarray(values.numpy())
