"""Opening an echo or ECG record once to learn whether its video, its signal and its annotations can be used."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medgen.data.dicom import DicomError
from medgen.data.ecg import ECG, ECGError, ECGPreparation, filter_ecg, read_ecg
from medgen.data.ecg_records import ECGRecord
from medgen.data.echo_records import EchoRecord
from medgen.data.inspection import Inspection
from medgen.data.ultrasound_dicom import read_cine
from medgen.data.video import VideoError, holds_dicom, load_video

_COLOUR = 0.02  # part of the sector: more is a colour Doppler box
_APART = 1.0  # seconds that an ECG said to be beat-synchronous may lack at either end of its clip


def inspect_clip(record: EchoRecord, root: Path) -> Inspection:
    """Open a record's files; never raises for them, the result's `problem` says what was wrong."""
    path = root / record.video
    try:
        if path.is_file() and holds_dicom(path):
            cine = read_cine(path)
            frames, colour = cine.frames, cine.colour
        else:
            frames, colour = load_video(path, record.fps).frames, 0.0
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        problem = (
            _picture_problem(record, frames, colour, path) or _ecg_problem(record, root) or _annotation_problem(record, root)
        )
    except (VideoError, DicomError, ECGError, OSError) as error:
        return Inspection(problem=str(error))
    return Inspection(content, problem=problem)


def _picture_problem(record: EchoRecord, frames: NDArray[np.uint8], colour: float, path: Path) -> str:
    count = len(frames)
    if count != record.frames:
        return f"{path} has {count} frames, its record says {record.frames}"
    if int(np.ptp(frames[0])) < 8:
        return f"{path} shows nothing: its first frame is one grey"
    if count > 1 and (frames == frames[0]).all():
        return f"{path} stands still: all its {count} frames are equal"
    if colour > _COLOUR:
        return f"{path} shows colour Doppler over {100 * colour:.0f} % of the sector"
    return ""


def _ecg_problem(record: EchoRecord, root: Path) -> str:
    """What keeps an ECG from being used: unreadable, no usable lead, or not there while the clip runs."""
    if record.ecg is None:
        return ""
    path = root / record.ecg
    ecg = _usable(path)
    last = record.ecg_offset + (record.frames - 1) / record.fps
    if record.pairing == "beat_synchronous" and not (-_APART <= record.ecg_offset and last <= ecg.seconds + _APART):
        return (
            f"{path} runs from 0 to {ecg.seconds:.1f} s, its clip from {record.ecg_offset:.1f} to {last:.1f} s of the same clock"
        )
    return ""


def inspect_ecg(record: ECGRecord, root: Path) -> Inspection:
    """Open a record's signal; never raises for it, the result's `problem` says what was wrong."""
    path = root / record.ecg
    try:
        _usable(path)
        signal = next(
            file for file in (path, path.with_name(path.name + ".dat"), path.with_name(path.name + ".hea")) if file.is_file()
        )
        return Inspection(hashlib.sha256(signal.read_bytes()).hexdigest())
    except (ECGError, OSError) as error:
        return Inspection(problem=str(error))


def _usable(path: Path) -> ECG:
    """The ECG at `path`, once it is known to have a usable lead. Raises `ECGError` naming the file."""
    ecg = read_ecg(path)
    try:
        filter_ecg(ecg, ECGPreparation())
    except ECGError as error:
        raise ECGError(f"{path}: {error}") from error
    return ecg


def _annotation_problem(record: EchoRecord, root: Path) -> str:
    if record.annotations is None:
        return ""
    path = root / record.annotations
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return f"no annotations at {path}"
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        return f"{path} is not a readable npz of plain arrays: {error}"
    masks = arrays.get("masks")
    listed = arrays.get("mask_frames", np.arange(record.frames))
    if masks is not None and (len(masks) != len(listed) or listed.min() < 0 or listed.max() >= record.frames):
        return f"{path} has {len(masks)} masks for frames {listed.tolist()[:4]}... of {record.frames}"
    return ""
