"""Ultrasound cines (DICOM US Multi-frame): grey frames cropped to the ultrasound sector, everything burned in around it black.

The sector is where the picture moves: names, dates, scales and logos stand still. Frame times come from the header (PS3.3 C.7.6.5).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_color_lut, iter_pixels
from scipy import ndimage
from scipy.spatial import ConvexHull

from medgen.data.dicom import DicomError, open_dicom

MAX_BYTES = 2**31  # of grey frames; a header that promises more is broken or hostile
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_COLOUR = 48  # channels further apart than this are colour, not a tinted grey map or JPEG's noise
_MOVING = 1.0  # grey levels of standard deviation over time; burned-in text has none
_LIT = 12  # grey levels, for a single frame
_SMALLEST = 0.02  # of the picture: a smaller moving part is an ECG trace or a cursor, not a sector


@dataclass(frozen=True)
class Cine:
    """`frames` uint8 `[T, H, W]` cropped to the sector and 0 outside it, `sector` `[H, W]` bool, `box` (top, left, bottom, right).

    `fps` is the rate the header says (None: it does not), `times` `[T]` seconds where it says that frames are uneven. `colour` is
    the part of the sector that shows colour (Doppler); `r_peaks` are seconds of R waves from frame 0 where the scanner stored them;
    `pixel_mm` is the height of a pixel. `dataset` is the header.
    """

    frames: NDArray[np.uint8]
    sector: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    fps: float | None
    times: NDArray[np.float64] | None
    colour: float
    r_peaks: tuple[float, ...]
    pixel_mm: float | None
    dataset: Dataset


def read_cine(path: str | Path) -> Cine:
    """Read a cine (or a single ultrasound picture: one frame).

    Raises `DicomError` for a file that is not ultrasound, is cut off, cannot be decoded, or shows no sector.
    """
    path = Path(path)
    dataset = open_dicom(path)
    frames, colour = _grey_frames(dataset, path)
    region = _region(dataset, frames.shape[1:])
    sector = find_sector(frames, region)
    if sector is None:
        raise DicomError(f"{path} shows no ultrasound sector: nothing in it moves or is lit")
    rows, columns = np.flatnonzero(sector.any(axis=1)), np.flatnonzero(sector.any(axis=0))
    top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
    inside = sector[top:bottom, left:right]
    kept = frames[:, top:bottom, left:right] * inside
    fps, times = frame_times(dataset, len(frames))
    return Cine(
        frames=kept,
        sector=inside,
        box=(top, left, bottom, right),
        fps=fps,
        times=times,
        colour=float(colour[sector].mean()),
        r_peaks=r_waves(dataset),
        pixel_mm=_pixel_mm(dataset) if region is not None else None,
        dataset=dataset,
    )


def _grey_frames(dataset: FileDataset, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.floating[Any]]]:
    """Luma of every frame `[T, H, W]`, and in which part of the frames each pixel is coloured `[H, W]`."""
    if dataset.get("Modality") not in ("US", "IVUS", None):
        raise DicomError(f"{path} is not ultrasound (modality {dataset.Modality})")
    count, rows, columns = frame_count(dataset), int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if "PixelData" not in dataset or not rows * columns:
        raise DicomError(f"{path} has no pixel data (cut off before it?)")
    if count * rows * columns > MAX_BYTES:
        raise DicomError(f"{path} says it has {count} frames of {rows} x {columns} pixels; that much is refused")
    grey: list[NDArray[np.uint8]] = []
    coloured = np.zeros((rows, columns), dtype=np.float32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for frame in iter_pixels(dataset):  # YBR comes out as RGB
                values = _eight_bit(np.asarray(frame), dataset)
                if values.ndim == 3:
                    coloured += np.ptp(values.astype(np.int16), axis=2) > _COLOUR
                    values = np.rint(values @ _LUMA).astype(np.uint8)
                grey.append(values)
    except Exception as error:  # codecs raise many kinds
        raise DicomError(f"{path}: frame {len(grey)} cannot be decoded (truncated or no decoder): {error}") from error
    if len(grey) != count:
        raise DicomError(f"{path} is cut off: {len(grey)} of the {count} frames it says it has")
    return np.stack(grey), coloured / count


def _eight_bit(frame: NDArray[Any], dataset: Dataset) -> NDArray[np.uint8]:
    photometric = dataset.PhotometricInterpretation
    if photometric == "PALETTE COLOR":
        shown = apply_color_lut(frame, dataset)
        return (shown >> 8 if shown.dtype == np.uint16 else shown).astype(np.uint8)
    bits = int(dataset.BitsStored)
    values = (frame.astype(np.int64) >> (bits - 8) if bits > 8 else frame).astype(np.uint8)
    return 255 - values if photometric == "MONOCHROME1" else values


def find_sector(frames: NDArray[np.uint8], region: tuple[int, int, int, int] | None = None) -> NDArray[np.bool_] | None:
    """Which pixels `[H, W]` belong to the ultrasound sector of `[T, H, W]`: the convex hull of the largest part that moves.

    `region` (top, left, bottom, right) limits the search to what the scanner says is its 2-D tissue picture. A single frame, or a
    cine that stands still, is judged by brightness instead, thin lines and letters left out. None if there is no such part.
    """
    inside = np.zeros(frames.shape[1:], dtype=bool)
    top, left, bottom, right = region or (0, 0, *frames.shape[1:])
    inside[top:bottom, left:right] = True
    moving = frames.std(axis=0, dtype=np.float32) > _MOVING
    lit = frames.max(axis=0) > _LIT
    trace, letters = (max(3, round(part * max(frames.shape[1:]))) | 1 for part in (0.01, 0.02))  # strokes are thinner
    for seen, thin in ((moving, trace), (lit, letters)):
        solid = ndimage.binary_opening(ndimage.binary_closing(seen & inside, np.ones((3, 3))), np.ones((thin, thin)))
        parts, count = ndimage.label(solid)
        if count:
            sizes = np.bincount(parts.ravel())[1:]
            if sizes.max() >= _SMALLEST * inside.sum():
                return _hull(parts == 1 + int(sizes.argmax()))
    return None


def _hull(part: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The convex hull of the pixels of `part`: a sector, a linear or a curved probe's picture is convex, or nearly so."""
    rows = np.flatnonzero(part.any(axis=1))
    first, last = part[rows].argmax(axis=1), part.shape[1] - 1 - part[rows, ::-1].argmax(axis=1)
    points = np.concatenate([np.stack([rows, first], 1), np.stack([rows, last], 1)]).astype(np.float64)
    y, x = np.mgrid[: part.shape[0], : part.shape[1]]
    hull = np.ones(part.shape, dtype=bool)
    for a, b, c in ConvexHull(points).equations:
        hull &= a * y + b * x + c <= 0.5
    return hull


def _region(dataset: Dataset, shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """The largest 2-D tissue region the scanner declares, if it lies in the picture; an export at another size keeps old numbers."""
    boxes = []
    for item in dataset.get("SequenceOfUltrasoundRegions") or []:
        if item.get("RegionSpatialFormat") == 1 and item.get("RegionDataType") in (1, 2):
            left, top, right, bottom = (
                int(item.get(f"RegionLocation{name}") or 0) for name in ("MinX0", "MinY0", "MaxX1", "MaxY1")
            )
            if 0 <= top < bottom <= shape[0] and 0 <= left < right <= shape[1]:
                boxes.append((top, left, bottom, right))
    return max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), default=None)


def _pixel_mm(dataset: Dataset) -> float | None:
    for item in dataset.get("SequenceOfUltrasoundRegions") or []:
        if item.get("PhysicalUnitsYDirection") == 3 and float(item.get("PhysicalDeltaY") or 0) > 0:  # cm
            return 10 * float(item.PhysicalDeltaY)
    return None


def r_waves(dataset: Dataset) -> tuple[float, ...]:
    """Seconds of the R waves from frame 0 (R Wave Time Vector, ms), where the scanner stored them."""
    return tuple(value / 1000 for value in _numbers(dataset, "RWaveTimeVector"))


def frame_count(dataset: Dataset) -> int:
    """How many frames the header says there are; 1 if it does not, or says nonsense."""
    return max(1, int(next(iter(_numbers(dataset, "NumberOfFrames")), 1)))


def frame_times(dataset: Dataset, count: int) -> tuple[float | None, NDArray[np.float64] | None]:
    """Frames per second, and the seconds of every frame where the header gives each its own step (Frame Time Vector).

    The order of trust: Frame Time Vector, Frame Time, Actual Frame Duration (all ms), Cine Rate, Recommended Display Frame Rate.
    """
    steps = _numbers(dataset, "FrameTimeVector")
    if len(steps) == count > 1 and min(steps[1:]) > 0:  # the first step leads to frame 0 and is 0, or means nothing
        times = np.concatenate([[0.0], np.cumsum(steps[1:])]) / 1000
        even = np.ptp(steps[1:]) < 1e-3 * float(np.mean(steps[1:]))
        return (count - 1) / float(times[-1]), None if even else times
    for name, factor in (("FrameTime", 1000), ("ActualFrameDuration", 1000), ("CineRate", 0), ("RecommendedDisplayFrameRate", 0)):
        value = next(iter(_numbers(dataset, name)), 0.0)
        if value > 0:
            return (factor / value if factor else value), None
    return None, None


def _numbers(dataset: Dataset, name: str) -> list[float]:
    """The values of an element as floats; nothing if it is absent or malformed."""
    try:
        value = dataset.get(name)  # pydicom converts, and may refuse, only now
        found = [float(item) for item in (value if isinstance(value, MultiValue | list) else [value])]
    except (TypeError, ValueError, OverflowError):
        return []
    return found if np.isfinite(found).all() else []
