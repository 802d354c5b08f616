"""An echo clip as DICOM Ultrasound Multi-frame (PS3.3 A.7): frames as they are, and regions in cm only if a pixel's size is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import UltrasoundMultiFrameImageStorage

from medgen.data.dicom_marks import Origin, Place, code, encoded, synthetic

_VIEWS = {  # PS3.16 CID 12226
    "A4C": ("399214001", "Apical four chamber"),
    "A2C": ("399232001", "Apical two chamber"),
    "PLAX": ("399139001", "Parasternal long axis"),
    "PSAX": ("399306005", "Parasternal short axis"),
}


def clip_file(
    frames: NDArray[np.uint8], fps: float, origin: Origin, place: Place, line: Mapping[str, Any], pixel_mm: float | None
) -> bytes:
    """The DICOM file of `frames` [T,H,W] at `fps` Hz; `line` is the clip's metadata (view, heart_rate, r_peaks in s from frame 0)."""
    dataset = synthetic(
        UltrasoundMultiFrameImageStorage, "US", origin, place, ("DERIVED", "PRIMARY", "TTE", "0001")
    )  # transthoracic, 2D
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.UltrasoundColorDataPresent = 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.WindowCenterWidthExplanation = 128, 256, "FULL"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.FrameIncrementPointer = Tag("FrameTime")
    dataset.FrameTime = f"{1000 / fps:.10g}"
    dataset.CineRate = dataset.RecommendedDisplayFrameRate = max(1, round(fps))
    dataset.StartTrim, dataset.StopTrim = 1, len(frames)
    dataset.EffectiveDuration = f"{len(frames) / fps:.10g}"
    dataset.PatientOrientation = ""
    dataset.BodyPartExamined = "HEART"
    dataset.AnatomicRegionSequence = [code("80891009", "SCT", "Heart")]
    if line.get("view") in _VIEWS:
        value, meaning = _VIEWS[line["view"]]
        dataset.ViewCodeSequence = [code(value, "SCT", meaning)]
    if line.get("heart_rate"):
        dataset.HeartRate = round(line["heart_rate"])
    beats = [second for second in line.get("r_peaks") or () if 0 <= second < len(frames) / fps]
    if beats:
        dataset.RWaveTimeVector = [1000 * second for second in beats]
    if pixel_mm is not None:
        dataset.SequenceOfUltrasoundRegions = [_region(frames.shape[1:], pixel_mm)]
    content = np.ascontiguousarray(frames).tobytes()
    dataset.add_new("PixelData", "OB", content + b"\0" * (len(content) % 2))
    return encoded(dataset)


def _region(shape: tuple[int, ...], pixel_mm: float) -> Dataset:
    """The whole picture as one 2D tissue region (PS3.3 C.8.5.5)."""
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = 1, 1, 2
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 0, 0
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = shape[1] - 1, shape[0] - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3  # cm
    region.PhysicalDeltaX = region.PhysicalDeltaY = pixel_mm / 10
    return region
