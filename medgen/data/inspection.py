"""Opening an image once to learn whether it can be used, and which images of a set are the same film."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.fft import dctn
from torch.nn import functional

from medgen.data.images import ImageError, read_grey
from medgen.data.records import CXRRecord, Record

_BITS = 256
_DISTANCE = 7  # of 256 bits: a film saved again differs by a few, another film by dozens


@dataclass(frozen=True)
class Inspection:
    """One image: its file's hash, its look's hash (32 bytes, or empty), its brightest value, and what is wrong with it, if anything."""

    content: str = ""
    look: bytes = b""
    top: float = 1.0
    problem: str = ""


def inspect_image(path: Path, perceptual: bool = True) -> Inspection:
    """Open an image; never raises for an image, its `problem` says what was wrong."""
    try:
        grey = read_grey(path, 64)
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except (ImageError, OSError) as error:
        return Inspection(problem=str(error))
    low, high = float(grey.min()), float(grey.max())
    if high - low < 1e-3:
        return Inspection(problem=f"{path} shows nothing: every pixel is {low:.3g}")
    return Inspection(content, _look(grey) if perceptual else b"", high)


def _look(grey: NDArray[np.float32]) -> bytes:
    """The DCT hash of Zauner (2010), 16 x 16 low frequencies against their median (imagehash would add PyWavelets for these lines)."""
    small = functional.interpolate(torch.from_numpy(grey)[None, None], (64, 64), mode="bilinear", antialias=True)[0, 0].numpy()
    low = dctn(small, norm="ortho")[:16, :16]
    bits = (low > np.median(low)).reshape(32, 8).T  # each band of 32 gets all frequencies: low ones alone are alike in all chests
    return np.packbits(bits).tobytes()


def near_duplicates(films: Sequence[tuple[Record, Inspection]], exact: bool = False) -> dict[str, str]:
    """Record ids to leave out, each with the id of the record that stays (the first by id).

    Two films are the same if their files are identical or their looks differ in at most 7 of 256 bits, and they have the same
    words, or are of different patients (a film cannot be of two). Eight bands of bits find all such pairs in linear time: seven
    differences leave one band untouched.
    """
    ordered = sorted(films, key=lambda film: film[0].record_id)
    buckets: dict[tuple[int | str, bytes | str], list[int]] = {}
    copies: dict[str, str] = {}
    for index, (record, inspection) in enumerate(ordered):
        keys: list[tuple[int | str, bytes | str]] = [("file", inspection.content)]
        if not exact:
            keys += [(band, inspection.look[band * 4 : band * 4 + 4]) for band in range(8)]
        candidates = sorted({other for key in keys for other in buckets.get(key, ())})
        first = next((other for other in candidates if _same(ordered[other], ordered[index], exact)), None)
        if first is not None:
            copies[record.record_id] = ordered[first][0].record_id
            continue
        for key in keys:
            buckets.setdefault(key, []).append(index)
    return copies


def _same(a: tuple[Record, Inspection], b: tuple[Record, Inspection], exact: bool) -> bool:
    looks_alike = a[1].content == b[1].content or (not exact and _distance(a[1].look, b[1].look) <= _DISTANCE)
    if not looks_alike:
        return False
    return a[0].patient_id != b[0].patient_id or _words(a[0]) == _words(b[0])


def _words(record: Record) -> tuple[str, ...]:
    return (record.findings, record.impression) if isinstance(record, CXRRecord) else ()


def _distance(a: bytes, b: bytes) -> int:
    return (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count() if len(a) == len(b) == _BITS // 8 else _BITS
