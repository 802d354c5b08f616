"""Reading and writing video: AVI, MP4 and kin through PyAV, NIfTI sequences and DICOM cines, always as grey uint8 frames with times.

A file that is cut off, empty or without a frame rate is an error, never a shorter or slower video.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import nibabel
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray
from scipy.ndimage import zoom

from medgen.data.dicom import DICOM_SUFFIXES, DicomError, is_dicom

MAX_BYTES = 2**31  # of decoded grey frames; a header that promises more is broken or hostile
_CONTAINERS = {".avi": "avi", ".mp4": "mp4", ".mkv": "matroska"}
VIDEO_SUFFIXES = (*_CONTAINERS, ".mov", ".webm", ".m4v")


class VideoError(ValueError):
    """A video file that cannot be used or written; the message says which and why."""


@dataclass(frozen=True)
class Video:
    """`frames` uint8 `[T, H, W]` (0 black), `times` float64 `[T]` seconds from frame 0, `fps` their mean rate in Hz."""

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    fps: float


def read_video(path: str | Path) -> tuple[NDArray[np.uint8], float]:
    """Grey frames uint8 `[T, H, W]` and frames per second of an AVI, MP4, NIfTI or multi-frame DICOM file. See `load_video`."""
    video = load_video(path)
    return video.frames, video.fps


def load_video(path: str | Path, fps: float | None = None) -> Video:
    """Every frame of a video file with its time; `fps` (Hz) is what is known to be true and overrides what the file says.

    An uneven rhythm that the file records (presentation times, DICOM Frame Time Vector) is kept. Colour becomes its luma. A
    DICOM cine comes cropped to its ultrasound sector (see `medgen.data.ultrasound_dicom`). Raises `VideoError` for a file that is
    missing, cut off, has no frame, or neither knows its frame rate nor is told.
    """
    path = Path(path)
    if fps is not None and not 0 < fps < float("inf"):
        raise VideoError(f"{path}: a frame rate of {fps:g} Hz is none")
    if not path.is_file():
        raise VideoError(f"no video at {path}")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        found = _read_nifti(path)
    elif holds_dicom(path):
        found = _read_cine(path)
    else:
        found = _read_container(path)
    return _timed(path, found, fps)


def holds_dicom(path: Path) -> bool:
    """Whether a file is read as DICOM: by its suffix, or, with none that a video has, by its mark."""
    suffix = path.suffix.lower()
    return suffix in DICOM_SUFFIXES or (suffix not in VIDEO_SUFFIXES and is_dicom(path))


@dataclass(frozen=True)
class _Found:
    """What a file holds: frames, the rate it says (None: it does not), and the frames' times where they are uneven."""

    frames: NDArray[np.uint8]
    fps: float | None
    times: NDArray[np.float64] | None = None


def _timed(path: Path, found: _Found, fps: float | None) -> Video:
    """Times from frame 0, stretched to `fps` where that is known better."""
    frames, times, own = found.frames, found.times, found.fps
    if times is not None:
        times = times - times[0]
        own = (len(times) - 1) / float(times[-1])
    if fps is None and own is None:
        raise VideoError(f"{path} does not say its frame rate; give the record's fps")
    rate = fps or own or 1.0
    if times is None or own is None:
        return Video(frames, np.arange(len(frames)) / rate, rate)
    return Video(frames, times * (own / rate), rate)


def _read_container(path: Path) -> _Found:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the caller's workers are the parallel ones
            frames, stamps, declared = _decode(container, stream, path)
            rate = stream.average_rate
    except (av.FFmpegError, OSError, EOFError) as error:
        raise VideoError(f"{path} cannot be decoded as a video (damaged, cut off or another format): {error}") from error
    if not frames:
        raise VideoError(f"{path} has no frame" + (f", though it says it has {declared}" if declared else ""))
    if len(frames) < declared:
        raise VideoError(f"{path} is cut off: {len(frames)} of the {declared} frames it says it has")
    if len({frame.shape for frame in frames}) > 1:
        raise VideoError(f"{path} changes its size between frames")
    fps = float(rate) if rate is not None and rate > 0 else None
    return _Found(np.stack(frames), fps, None if fps is None else _uneven(stamps, fps))


def _uneven(stamps: list[float | None], fps: float) -> NDArray[np.float64] | None:
    """Presentation times that are no even rhythm; less than half a frame of unevenness is rounding to the container's ticks."""
    times = np.array([np.nan if stamp is None else stamp for stamp in stamps])
    steps = np.diff(times)
    rising = len(steps) > 0 and bool((steps > 0).all())  # NaN is not rising
    return times if rising and np.ptp(steps) > 0.5 / fps else None


def _decode(container: Any, stream: VideoStream, path: Path) -> tuple[list[NDArray[np.uint8]], list[float | None], int]:
    frames: list[NDArray[np.uint8]] = []
    stamps: list[float | None] = []
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise VideoError(f"{path}: frame {len(frames)} is damaged")
        frames.append(frame.to_ndarray(format="gray"))
        stamps.append(frame.time)
        if len(frames) * frames[0].size > MAX_BYTES:
            raise VideoError(f"{path} has more than {MAX_BYTES} bytes of frames; cut it into clips first")
    return frames, stamps, int(stream.frames)


def _read_cine(path: Path) -> _Found:
    from medgen.data.ultrasound_dicom import read_cine

    try:
        cine = read_cine(path)
    except DicomError as error:
        raise VideoError(str(error)) from error
    return _Found(cine.frames, cine.fps, cine.times)


def _read_nifti(path: Path) -> _Found:
    """A sequence stored `[x, y, t]` (CAMUS) or `[x, y, 1, t]`; its rate only where the header's time unit says so."""
    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj)
    except Exception as error:  # nibabel raises many kinds for damaged files
        raise VideoError(f"{path} is not a readable NIfTI file (damaged or cut off?): {error}") from error
    zooms, unit = image.header.get_zooms(), image.header.get_xyzt_units()[1]
    if values.ndim == 4 and values.shape[2] == 1:
        values = values[:, :, 0]
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.size == 0:
        raise VideoError(f"{path} has the shape {list(values.shape)}; expected [x, y, frames]")
    frames = np.ascontiguousarray(np.transpose(values, (2, 1, 0)))
    if frames.dtype != np.uint8:
        if not np.isfinite(frames).all():
            raise VideoError(f"{path} holds NaN or infinite pixels")
        low, high = float(frames.min()), float(frames.max())
        frames = frames if 0 <= low and high <= 255 else (frames - low) * (255 / max(high - low, 1e-9))
        frames = np.rint(frames).astype(np.uint8)
    seconds = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}.get(unit, 0.0) * float(zooms[-1])
    return _Found(square_pixels(frames, zooms, order=1), 1 / seconds if seconds > 0 else None)


def square_pixels(frames: NDArray[np.uint8], zooms: Sequence[float], order: int) -> NDArray[np.uint8]:
    """Frames `[T, H, W]` whose pixels are `zooms` (x, y, ...) mm in size, with the coarser axis stretched to the finer's spacing.

    `order` is that of the spline: 1 for pictures, 0 for masks. Spacings within 2 % of each other count as equal.
    """
    x, y = float(zooms[0]), float(zooms[1])
    if not (x > 0 and y > 0) or max(x, y) / min(x, y) < 1.02:
        return frames
    finer = min(x, y)
    stretched: NDArray[np.uint8] = zoom(frames, (1, y / finer, x / finer), order=order, mode="nearest", grid_mode=True)
    return stretched


def write_video(
    path: str | Path,
    frames: NDArray[np.uint8],
    fps: float,
    codec: Literal["ffv1", "libx264"] = "ffv1",
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write uint8 `[T, H, W]` or `[T, H, W, 3]` (RGB) at `fps` Hz in one atomic step and return the path.

    "ffv1" (.avi, .mkv) is lossless: `read_video` gives the same frames back. "libx264" (.mp4, .mkv) is H.264 yuv420p that
    starts at once in a browser; an odd height or width gains one repeated line. `notes` go to the container ("title", "comment").
    The same arguments give the same bytes. Raises `VideoError` for other shapes, kinds or suffixes.
    """
    path, frames = Path(path), np.asarray(frames)
    colour = frames.ndim == 4 and frames.shape[-1] == 3
    if frames.dtype != np.uint8 or not (frames.ndim == 3 or colour) or frames.size == 0:
        raise VideoError(f"{path}: expected uint8 [T, H, W] or [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    if not 0 < fps < float("inf"):
        raise VideoError(f"{path}: a frame rate of {fps:g} Hz is none")
    if path.suffix not in _CONTAINERS or (path.suffix != ".mkv" and (codec == "ffv1") != (path.suffix == ".avi")):
        raise VideoError(f"{path}: {codec} goes into {'.avi' if codec == 'ffv1' else '.mp4'} or .mkv")
    if codec == "libx264":
        odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2)] + [(0, 0)] * colour
        frames = np.pad(frames, odd, mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _encode(temporary, _CONTAINERS[path.suffix], frames, fps, codec, dict(notes or {}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _encode(path: Path, container: str, frames: NDArray[np.uint8], fps: float, codec: str, notes: dict[str, str]) -> None:
    colour = frames.ndim == 4
    lossless = "bgr0" if colour else "gray"
    muxing = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if container == "mp4" else {})
    with av.open(str(path), "w", format=container, options=muxing) as output:
        output.metadata.update(notes)
        stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(100_000))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = lossless if codec == "ffv1" else "yuv420p"
        stream.codec_context.thread_count = 1  # more threads cut the picture otherwise: other bytes
        # x264's macroblock tree gives other bytes from one process to the next.
        stream.options = {} if codec == "ffv1" else {"crf": "18", "preset": "medium", "x264-params": "no-mbtree=1"}
        for values in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format="rgb24" if colour else "gray")
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
