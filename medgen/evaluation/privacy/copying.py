"""Are generated films copies of training films? Their nearest training films against their nearest held-out films, in pixels and features.

A film that was not copied has a nearest training film too; only that this is nearer than the nearest of as many unseen films counts.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, PngImagePlugin

from medgen.evaluation.features import extract, load_encoder
from medgen.evaluation.images import EvaluationError, ImageSet, load_square
from medgen.evaluation.memorisation import Memorisation, Neighbour, memorisation
from medgen.evaluation.privacy.galleries import compared, distances_to_patients, equal_galleries, share_closer
from medgen.evaluation.statistics import Estimate
from medgen.sampling.aligned import SIDE, STORED, aligned_correlation, reduced

SPACES = ("pixels", "digital-chest")
CHANCE = 0.5


@dataclass(frozen=True)
class Copying:
    """Nearest-neighbour evidence in every space; `pairs` are the generated films nearest to a training film, in the first one.

    closer_to_train: for each space, the share of generated films whose nearest film, among equally many training and held-out patients,
    is a training patient's; its interval also counts that other patients might have stood there (`Memorisation` counts films only).
    `overlaid`: pixel correlation of each of `pairs` after alignment; 1 is a copy.
    """

    spaces: tuple[Memorisation, ...]
    closer_to_train: tuple[Estimate, ...]
    pairs: tuple[Neighbour, ...]
    overlaid: tuple[float, ...]
    flagged: bool
    criterion: str
    measured: str
    cannot_show: str


def copying(
    generated: ImageSet,
    train: ImageSet,
    heldout: ImageSet,
    cache: Path,
    seed: int = 0,
    spaces: Sequence[str] = SPACES,
    device: torch.device | str | None = None,
) -> Copying:
    """Compare `generated` films with those it may have been copied from and with unseen patients'. Features are kept below `cache`.

    `spaces` are encoders by name (see `load_encoder`). Raises `EvaluationError` for an empty side.
    """
    for images in (generated, train, heldout):
        if not len(images):
            raise EvaluationError(f"{images.name} holds no film: copies cannot be looked for")
    found, closer = [], []
    rows = equal_galleries(train, heldout, seed)
    for name in spaces:
        encoder = load_encoder(name, device)
        features = [extract(images, encoder, cache) for images in (generated, train, heldout)]
        found.append(memorisation(name, features[0], list(generated.groups), features[1], features[2], seed))
        sides = [
            distances_to_patients(features[0], features[1 + side][rows[side]], [images.groups[i] for i in rows[side]])[0]
            for side, images in enumerate((train, heldout))
        ]
        closer += compared(lambda a, b: np.array([share_closer(a, b)]), sides[0], sides[1], generated.groups, [(0.0, 1.0)], seed)
    pairs = found[0].worst
    return Copying(
        tuple(found),
        tuple(closer),
        pairs,
        overlay(generated, train, pairs),
        any(estimate.low > CHANCE for estimate in closer),
        "more than half of the generated films lie nearer to a training patient than to any of as many held-out patients, in some space "
        "(lower end of the 95 % interval above 50 %)",
        "; ".join(_sentence(space, estimate) for space, estimate in zip(found, closer, strict=True)),
        "Copies of a part of a film. The captions are training captions: a film that only follows its caption well lies a little nearer "
        "to that caption's own film too. Smooth films lie near to everything, which the comparison with held-out films cancels.",
    )


def overlay(generated: ImageSet, train: ImageSet, pairs: Sequence[Neighbour]) -> tuple[float, ...]:
    """Pixel correlation of each pair after alignment, mirrored or not, whichever is higher."""
    if not pairs:
        return ()
    size = generated.native or 128
    films = torch.stack([load_square(generated.paths[pair.generated], size) for pair in pairs])
    others = reduced(torch.stack([load_square(train.paths[pair.train], size) for pair in pairs]), STORED)[:, None]
    ways = [aligned_correlation(reduced(way, SIDE), others)[:, 0] for way in (films, films.flip(-1))]
    return tuple(torch.stack(ways).amax(0).tolist())


def pair_sheet(
    generated: ImageSet, train: ImageSet, pairs: Sequence[Neighbour], captions: Sequence[str] = (), width: int = 192
) -> bytes:
    """A PNG with a row per pair: the generated film left, its nearest training film right. It shows patients."""
    strip = 16
    sheet = Image.new("L", (2 * width, strip + len(pairs) * (width + strip)), 255)
    draw = ImageDraw.Draw(sheet)
    draw.text((2, 2), "SYNTHETIC", fill=0)
    draw.text((width + 2, 2), "nearest training film (a patient)", fill=0)
    for row, pair in enumerate(pairs):
        top = strip + row * (width + strip)
        for column, path in enumerate((generated.paths[pair.generated], train.paths[pair.train])):
            pixels = ((load_square(path, width, generated.native)[0] + 1) * 127.5).byte().numpy()
            sheet.paste(Image.fromarray(pixels), (column * width, top))
        draw.text(
            (2, top + width + 1), captions[row] if captions else f"distance {pair.distance:.2f} of unseen films' median", fill=0
        )
    stream, notes = io.BytesIO(), PngImagePlugin.PngInfo()
    notes.add_text("Comment", "left column synthetic, right column real patients")
    sheet.save(stream, "PNG", pnginfo=notes)
    return stream.getvalue()


def _sentence(space: Memorisation, closer: Estimate) -> str:
    return (
        f"{space.space}: {_percent(closer)} of {closer.n} films are nearer to a training patient (50 % without "
        f"copying), distance ratio {space.distance_ratio.value:.2f} ({space.distance_ratio.low:.2f} to {space.distance_ratio.high:.2f}), "
        f"{_percent(space.suspicious)} nearer than 99 % of unseen films are"
    )


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"
