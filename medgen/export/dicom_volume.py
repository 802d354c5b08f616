"""A volume as a classic CT or MR image series: slices hung as a radiologist expects, placed by the affine, values as stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, MRImageStorage

from medgen.data.dicom_marks import Origin, Place, encoded, synthetic
from medgen.export.source import ExportError

Modality = Literal["CT", "MR"]
_THICK = 1.5  # slices this much further apart than pixels were acquired (short-axis cine); otherwise axial ones are shown
_LEAN = 1e-3  # cosine between rows and columns that DICOM's direction cosines can carry
_LPS = np.diag([-1.0, -1.0, 1.0])
_WINDOWS = {"CT": ([40, -600], [400, 1500], ["SOFT TISSUE", "LUNG"])}


@dataclass(frozen=True)
class Slices:
    """`pixels` [N,rows,columns] as stored; `directions` of a row and of a column and `positions` [N,3] mm in LPS.

    `spacing` in mm: between rows, between columns; `between`: between slices.
    """

    pixels: NDArray[Any]
    directions: tuple[NDArray[np.float64], NDArray[np.float64]]
    positions: NDArray[np.float64]
    spacing: tuple[float, float]
    between: float


def read_stored(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """A volume `[x,y,z]` in the type it is stored in, and its affine to RAS mm. Raises `ExportError`."""
    from medgen.data.volumes import VolumeError, read_volume

    try:
        values, affine = read_volume(path)
    except VolumeError as error:
        raise ExportError(str(error)) from None
    stored = nibabel.load(path).get_data_dtype()
    if np.issubdtype(stored, np.integer):
        if np.any(values != values.astype(stored)) or abs(values).max() > 32767:
            raise ExportError(f"{path} holds {stored} values that 16 bits do not")
        return values.astype(np.int16), affine
    return values, affine


def modality_of(values: NDArray[Any]) -> Modality:
    """Whole numbers are HU (a pipeline with a window knows its scale); the others lost their scale, as MR does."""
    return "CT" if np.issubdtype(values.dtype, np.integer) else "MR"


def slices_of(values: NDArray[Any], affine: NDArray[np.float64]) -> Slices:
    """`values` [x,y,z] as slices: axial (coronal, sagittal where they are the thick ones), right on the left, front or head up."""
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    body = [int(axis) for axis in nibabel.io_orientation(affine)[:, 0]]  # 0: left-right, 1: back-front, 2: feet-head
    thick = int(steps.argmax())
    rest = np.delete(steps, thick)
    across = thick if steps[thick] > _THICK * rest.max() else body.index(2)
    columns, rows = sorted((axis for axis in range(3) if axis != across), key=lambda axis: body[axis])
    values, matrix = values.transpose(columns, rows, across), affine[:3, [columns, rows, across]]
    origin = affine[:3, 3].copy()
    normal = np.cross(_LPS @ matrix[:, 0], _LPS @ matrix[:, 1])
    for axis in range(3):
        # In the plane towards left, back and feet (L, P, I); slices along their normal.
        wanted = -matrix[body[[columns, rows, across][axis]], axis] > 0 if axis < 2 else (_LPS @ matrix[:, 2]) @ normal > 0
        if not wanted:
            origin = origin + matrix[:, axis] * (values.shape[axis] - 1)
            matrix = matrix * np.where(np.arange(3) == axis, -1.0, 1.0)
            values = np.flip(values, axis)
            normal = np.cross(_LPS @ matrix[:, 0], _LPS @ matrix[:, 1])
    right, down, through = (_LPS @ matrix).T
    lengths = np.linalg.norm(right), np.linalg.norm(down)
    if abs(right @ down) > _LEAN * lengths[0] * lengths[1]:
        raise ExportError("its rows and columns are not at right angles, which a DICOM series cannot say: resample it first")
    positions = _LPS @ origin + np.arange(values.shape[2])[:, None] * through
    unit = normal / np.linalg.norm(normal)
    return Slices(
        np.ascontiguousarray(values.transpose(2, 1, 0)), (right / lengths[0], down / lengths[1]), positions,
        (float(lengths[1]), float(lengths[0])), float(abs(through @ unit)),
    )  # fmt: skip


def series_files(
    values: NDArray[Any], affine: NDArray[np.float64], modality: Modality, origin: Origin, place: Place, frame_of_reference: str
) -> Iterator[bytes]:
    """One DICOM file a slice, in the order of their positions along the normal."""
    pixels, slope = _whole_numbers(values)
    found = slices_of(pixels, affine)
    window = _WINDOWS.get(modality) or _range(pixels)
    for number, (picture, position) in enumerate(zip(found.pixels, found.positions, strict=True), 1):
        one = replace(place, number=number, record_id=f"{place.record_id}/{number}")
        kind = CTImageStorage if modality == "CT" else MRImageStorage
        dataset = synthetic(kind, modality, origin, one, ("DERIVED", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"))
        dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = origin.uid("frame of reference", frame_of_reference), ""
        dataset.PatientPosition = dataset.Laterality = ""  # not known: required, and empty
        dataset.ImageOrientationPatient = [_decimal(value) for direction in found.directions for value in direction]
        dataset.ImagePositionPatient = [_decimal(value) for value in position]
        dataset.PixelSpacing = [_decimal(value) for value in found.spacing]
        dataset.SliceThickness = dataset.SpacingBetweenSlices = _decimal(found.between)
        dataset.AcquisitionNumber = 1
        _ct(dataset) if modality == "CT" else _mr(dataset, slope)
        dataset.WindowCenter, dataset.WindowWidth, dataset.WindowCenterWidthExplanation = window
        _pixels(dataset, picture)
        yield encoded(dataset)


def _whole_numbers(values: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """16-bit pixels, and what one step of them is worth: 1 for whole numbers, 1/65535 for values in [0, 1]."""
    if np.issubdtype(values.dtype, np.integer):
        return values, 1.0
    if values.min() < 0 or values.max() > 1:
        raise ExportError(
            f"it holds values from {values.min():g} to {values.max():g}, where a pipeline without a window writes 0 to 1"
        )
    return np.rint(values.astype(np.float64) * 65535).astype(np.uint16), 1 / 65535


def _range(pixels: NDArray[Any]) -> tuple[float, float, str]:
    low, high = int(pixels.min()), int(pixels.max())
    return (low + high + 1) / 2, max(1, high - low + 1), "FULL"


def _ct(dataset: Dataset) -> None:
    dataset.KVP = ""
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, 1, "HU"


def _mr(dataset: Dataset, slope: float) -> None:
    dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "RM", "NONE", ""  # RM: research mode
    dataset.MRAcquisitionType = dataset.EchoTime = dataset.RepetitionTime = dataset.EchoTrainLength = ""
    if slope != 1:
        dataset.ImageComments += f" Stored value x {slope:.6g}: share of the range from black to white."


def _pixels(dataset: Dataset, picture: NDArray[Any]) -> None:
    dataset.Rows, dataset.Columns = picture.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = int(np.issubdtype(picture.dtype, np.signedinteger))
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.add_new("PixelData", "OW", picture.astype(picture.dtype.newbyteorder("<")).tobytes())


def _decimal(value: float) -> str:
    """DICOM's DS: at most 16 letters."""
    return f"{value + 0.0:.9g}"
