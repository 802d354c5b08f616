"""Ultrasound DICOM: a real echo cine (pydicom ships it) and written ones; the sector stays, what is burned in around it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

from medgen.data.dicom import DicomError
from medgen.data.ultrasound_dicom import find_sector, frame_times, read_cine
from medgen.data.video import VideoError, load_video


def sector_frames(count: int = 12, height: int = 120, width: int = 160) -> np.ndarray:
    """Moving speckle in a sector that points up, letters that stand still, and a small ECG trace that moves below."""
    y, x = np.mgrid[:height, :width]
    angle, depth = np.arctan2(x - width / 2, y - 8), np.hypot(x - width / 2, y - 8)
    inside = (np.abs(angle) < 0.6) & (depth < 90) & (depth > 4)
    rng = np.random.default_rng(0)
    frames = np.where(inside, rng.integers(20, 160, (count, height, width)), 0).astype(np.uint8)
    frames[:, 4:10, 2:30] = 220 * (rng.random((6, 28)) > 0.5)  # a name, burned in
    for t in range(count):
        frames[t, 112 + t % 3, 100:150] = 255  # an ECG trace
    return frames


def write_cine(path: Path, frames: np.ndarray | None = None, **changes: Any) -> Path:
    """A US Multi-frame file of `frames` [T, H, W] or [T, H, W, 3]."""
    frames = sector_frames() if frames is None else frames
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = UltrasoundMultiFrameImageStorage, generate_uid(entropy_srcs=[path.name])
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=["study", path.parent.name])
    dataset.Modality, dataset.PatientID, dataset.PatientName = "US", "P1", "DOE^JANE"
    dataset.PatientAge, dataset.PatientSex = "061Y", "F"
    dataset.Rows, dataset.Columns, dataset.NumberOfFrames = *frames.shape[1:3], len(frames)
    dataset.SamplesPerPixel, dataset.PlanarConfiguration = (3, 0) if frames.ndim == 4 else (1, 0)
    dataset.PhotometricInterpretation = "RGB" if frames.ndim == 4 else "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation = 7, 0
    dataset.FrameTime, dataset.FrameIncrementPointer = 25.0, 0x00181063
    for name, value in changes.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.PixelData = frames.astype(np.uint8).tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def region(left: int, top: int, right: int, bottom: int) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = 1, 1
    item.RegionLocationMinX0, item.RegionLocationMinY0 = left, top
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = right, bottom
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX = item.PhysicalDeltaY = 0.05
    return item


def test_a_real_cine_keeps_its_sector_and_loses_the_name_burned_in() -> None:
    """A transthoracic JPEG cine whose declared region belongs to a picture of twice the size, as exports do it."""
    path = get_testdata_file("examples_ybr_color.dcm", download=False)
    assert path is not None
    cine = read_cine(path)
    top, left, bottom, right = cine.box
    assert cine.frames.shape == (30, bottom - top, right - left) and cine.fps == pytest.approx(30, rel=1e-4)
    assert 10 < top < 25 and 195 < bottom < 215 and 30 < left < 60 and 290 < right <= 305
    assert cine.colour < 0.001 and cine.pixel_mm is None, "the declared spacing is that of the larger picture"
    assert not cine.frames[:, ~cine.sector].any()
    whole = pydicom.pixels.pixel_array(path).max(axis=(0, 3))
    assert whole[:14].max() > 100, "the film says PLA at its top left"
    assert cine.frames.std(axis=0)[cine.sector].mean() > 3, "what is kept moves"


def test_text_and_trace_are_outside_the_sector(tmp_path: Path) -> None:
    cine = read_cine(write_cine(tmp_path / "a.dcm"))
    top, left, bottom, right = cine.box
    assert top >= 9 and bottom <= 102, "neither the letters above nor the trace below"
    assert 0.5 < cine.sector.mean() < 0.9 and not cine.frames[:, ~cine.sector].any()
    assert np.array_equal(cine.frames[:, cine.sector], sector_frames()[:, top:bottom, left:right][:, cine.sector])


def test_a_declared_region_that_fits_limits_the_sector(tmp_path: Path) -> None:
    inside = read_cine(write_cine(tmp_path / "a.dcm", SequenceOfUltrasoundRegions=[region(80, 0, 160, 105)]))
    assert inside.box[1] >= 80 and inside.pixel_mm == 0.5
    beyond = read_cine(write_cine(tmp_path / "b.dcm", SequenceOfUltrasoundRegions=[region(80, 0, 640, 480)]))
    assert beyond.box[1] < 80 and beyond.pixel_mm is None


def test_a_single_picture_is_judged_by_brightness(tmp_path: Path) -> None:
    cine = read_cine(write_cine(tmp_path / "a.dcm", sector_frames(1)))
    assert cine.frames.shape[0] == 1 and cine.box[0] >= 9 and cine.box[2] <= 104


def test_colour_doppler_is_measured(tmp_path: Path) -> None:
    grey = sector_frames()
    frames = np.repeat(grey[..., None], 3, -1)
    frames[:, 40:70, 70:90] = [220, 30, 20]
    cine = read_cine(write_cine(tmp_path / "a.dcm", frames))
    assert 0.05 < cine.colour < 0.4
    assert read_cine(write_cine(tmp_path / "b.dcm", np.repeat(grey[..., None], 3, -1))).colour == 0


@pytest.mark.parametrize(
    ("header", "fps", "even"),
    [
        ({"FrameTime": 20.0}, 50.0, True),
        ({"FrameTimeVector": [0.0, 20.0, 20.0, 20.0], "FrameTime": 33.0}, 50.0, True),
        ({"FrameTimeVector": [0.0, 20.0, 60.0, 20.0]}, 30.0, False),
        ({"FrameTimeVector": [0.0, 20.0], "CineRate": 40}, 40.0, True),
        ({"FrameTime": 0.0, "RecommendedDisplayFrameRate": 25}, 25.0, True),
        ({}, None, True),
    ],
)
def test_frame_times(header: dict[str, Any], fps: float | None, even: bool) -> None:
    dataset = Dataset()
    for name, value in header.items():
        setattr(dataset, name, value)
    found, times = frame_times(dataset, 4)
    assert found == (None if fps is None else pytest.approx(fps)) and (times is None) == even


def test_a_cine_is_a_video_with_its_own_uneven_times(tmp_path: Path) -> None:
    steps = [0.0] + [20.0] * 5 + [80.0] + [20.0] * 5
    path = write_cine(tmp_path / "noext", FrameTime=None, FrameTimeVector=steps, FrameIncrementPointer=0x00181065)
    video = load_video(path)
    assert np.allclose(np.diff(video.times) * 1000, steps[1:]) and video.fps == pytest.approx(11 / 0.28)
    with pytest.raises(VideoError, match="frame rate"):
        load_video(write_cine(tmp_path / "b.dcm", FrameTime=None, FrameIncrementPointer=None))


def test_hostile_files(tmp_path: Path) -> None:
    path = write_cine(tmp_path / "a.dcm")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DicomError, match="cannot be decoded"):
        read_cine(path)
    with pytest.raises(DicomError, match="not ultrasound"):
        read_cine(write_cine(tmp_path / "b.dcm", Modality="XA"))
    with pytest.raises(DicomError, match="no ultrasound sector"):
        read_cine(write_cine(tmp_path / "c.dcm", np.zeros((4, 60, 80), np.uint8)))
    with pytest.raises(DicomError, match="that much is refused"):
        read_cine(write_cine(tmp_path / "d.dcm", Rows=60000, Columns=60000))
    assert find_sector(np.full((3, 40, 40), 5, np.uint8)) is None
