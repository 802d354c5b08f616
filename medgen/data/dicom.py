"""DICOM chest radiographs (DX, CR): pixels as they are meant to be seen, and writing synthetic DX images that say so.

Reading follows the grey-scale pipeline of PS3.3 C.11: modality LUT or rescale, then VOI LUT or window, then photometric
interpretation. Writing makes a DX Image For Presentation (PS3.3 A.26) that `dciodvfy` accepts.
"""

from __future__ import annotations

import os
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from medgen import __version__

MAX_PIXELS = 200_000_000  # no radiograph is near; a header that says more is broken or hostile
_NAMESPACE = uuid.UUID("4d4c8f5e-6f0e-5c6b-9a53-6d656467656e")


class DicomError(ValueError):
    """A DICOM file that holds no usable radiograph; the message says which file and why."""


def read_header(path: str | Path) -> FileDataset:
    """The data set without its pixels. Raises `DicomError` if the file is not DICOM."""
    return open_dicom(Path(path), stop_before_pixels=True)


def read_dicom(path: str | Path) -> tuple[NDArray[np.float32], FileDataset]:
    """Display values `[H, W]` in [0, 1] (0 black, as MONOCHROME2) and the data set.

    Without a VOI LUT or a usable window the darkest and brightest pixel become 0 and 1. Pixel padding becomes black. Raises
    `DicomError` for a file that is truncated, has no pixels, several frames, colour, or a transfer syntax without decoder.
    """
    path = Path(path)
    dataset = open_dicom(path)
    stored = _stored_values(dataset, path)
    padding = _padding(dataset, stored)
    try:
        values = np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
        if not np.isfinite(values).all():
            raise DicomError(f"{path}: pixels are not finite after rescale slope and intercept")
        shown = _voi(values, dataset, ~padding)
    except DicomError:
        raise
    except Exception as error:  # pydicom raises many kinds for malformed LUTs
        raise DicomError(f"{path}: its modality or VOI LUT cannot be applied: {error}") from error
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1.0 - shown
    shown[padding] = 0.0
    return shown.astype(np.float32), dataset


def open_dicom(path: Path, stop_before_pixels: bool = False) -> FileDataset:
    """The data set of a file. Raises `DicomError` if it is not DICOM."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values that do not matter here
            return pydicom.dcmread(path, stop_before_pixels=stop_before_pixels)
    except FileNotFoundError:
        raise DicomError(f"no file at {path}") from None
    except Exception as error:  # a damaged file fails in any way it likes
        raise DicomError(f"{path} is not a readable DICOM file (damaged or another format): {error}") from error


def _stored_values(dataset: FileDataset, path: Path) -> NDArray[Any]:
    frames, photometric = int(dataset.get("NumberOfFrames") or 1), dataset.get("PhotometricInterpretation")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DicomError(f"{path} has no pixel data (modality {dataset.get('Modality', 'unknown')}, or cut off before it)")
    if frames != 1:
        raise DicomError(f"{path} has {frames} frames; a radiograph has one: split it first")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DicomError(f"{path} is {photometric}; expected MONOCHROME1 or MONOCHROME2")
    if int(dataset.get("Rows") or 0) * int(dataset.get("Columns") or 0) > MAX_PIXELS:
        raise DicomError(f"{path} says it has {dataset.Rows} x {dataset.Columns} pixels; more than {MAX_PIXELS} is refused")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(dataset.pixel_array)
    except Exception as error:  # codecs raise many kinds
        name = syntax.name if isinstance(syntax, UID) else "unknown"
        raise DicomError(
            f"{path}: pixels cannot be decoded (transfer syntax {name}; truncated or no decoder): {error}"
        ) from error


def _padding(dataset: Dataset, stored: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels outside the exposed field (PS3.3 C.7.5.1.1.2): never part of the range, shown black."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if not isinstance(value, int):
        return np.zeros(stored.shape, dtype=bool)
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    padding = (stored >= low) & (stored <= high)
    return np.zeros_like(padding) if padding.all() else padding


def _voi(values: NDArray[np.float64], dataset: Dataset, field: NDArray[np.bool_]) -> NDArray[np.float64]:
    """VOI LUT (preferred, as viewers do), else window, else the range inside `field`; to [0, 1]."""
    if dataset.get("VOILUTSequence"):
        entries, first, _ = dataset.VOILUTSequence[0].LUTDescriptor
        entries = int(entries) or 2**16
        if dataset.PixelRepresentation and first >= 2**15:  # a signed first value read with the unsigned VR
            first -= 2**16
        table: NDArray[np.float64] = apply_voi(np.arange(first, first + entries), dataset).astype(np.float64)
        # Vendors say 16 bits for 12-bit entries: the table's own top is display white.
        shown: NDArray[np.float64] = np.take(table / max(table.max(), 1.0), np.rint(values).astype(np.int64) - first, mode="clip")
        return shown
    window = _window(dataset)
    if window is None:
        low, high = float(values[field].min()), float(values[field].max())
        return np.clip((values - low) / max(high - low, 1e-12), 0.0, 1.0)
    centre, width, function = window
    if function == "SIGMOID":  # PS3.3 C.11.2.1.3.1
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -60.0, 60.0)))
    if function != "LINEAR_EXACT":  # PS3.3 C.11.2.1.2.1
        centre, width = centre - 0.5, max(width - 1.0, 1e-6)
    return np.clip((values - centre) / width + 0.5, 0.0, 1.0)


def _window(dataset: Dataset) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window, or None if it is absent or empty (width 0 occurs)."""
    first: list[float] = []
    for name in ("WindowCenter", "WindowWidth"):
        value = dataset.get(name)
        value = value[0] if isinstance(value, pydicom.multival.MultiValue) and len(value) else value
        try:
            first.append(float(value))
        except (TypeError, ValueError):
            return None
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    valid = np.isfinite(first).all() and first[1] > 0 and (function != "LINEAR" or first[1] >= 1)
    return (first[0], first[1], function) if valid else None


@dataclass(frozen=True)
class _Origin:
    """What a synthetic image comes from: the part of its header and all of its UIDs that say so."""

    model: str
    model_hash: str
    seed: int
    study_id: str
    record_id: str

    def uid(self, *kind: str) -> UID:
        """A UUID-derived UID (PS3.5 B.2): the same for the same origin, and no registered root needed."""
        name = "\x1f".join((self.model, self.model_hash, str(self.seed), *kind))
        return UID(f"2.25.{uuid.uuid5(_NAMESPACE, name).int}")


def write_dx(
    path: str | Path,
    image: NDArray[np.uint16],
    *,
    patient_id: str,
    study_id: str,
    record_id: str,
    model: str,
    seed: int,
    model_hash: str = "unknown",
    view: Literal["PA", "AP"] = "PA",
    age: float | None = None,
    sex: Literal["F", "M"] | None = None,
    pixel_spacing_mm: float | None = None,
    description: str = "",
) -> Path:
    """Write `image` `[H, W]` uint16 (0 black, full range) as a DX Image For Presentation marked synthetic.

    `model` is the generator's name, `model_hash` that of its weights or code. UIDs and bytes follow from the arguments alone;
    equal `study_id` under the same model and seed is one DICOM study. The patient's right is at the image's left, as in every
    medgen image. `pixel_spacing_mm` is the spacing at the detector; unknown, a 350 mm field is assumed, because the attribute is
    required. `description` (free text, e.g. the prompt) goes to Image Comments. Raises `DicomError` for other pixels.
    """
    path = Path(path)
    if image.dtype != np.uint16 or image.ndim != 2:
        raise DicomError(f"{path}: write_dx needs [H, W] uint16, not {list(image.shape)} {image.dtype}")
    origin = _Origin(model, model_hash, seed, study_id, record_id)
    dataset = Dataset()
    _patient_and_study(dataset, origin, patient_id, age, sex)
    _series_and_equipment(dataset, origin, view)
    _image_module(dataset, origin, view, description)
    _pixels(dataset, image, pixel_spacing_mm)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(f"2.25.{_NAMESPACE.int}")
    meta.ImplementationVersionName = "MEDGEN"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    file = FileDataset(str(path), dataset, preamble=b"\0" * 128, file_meta=meta)
    try:
        file.save_as(temporary, enforce_file_format=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _patient_and_study(dataset: Dataset, origin: _Origin, patient_id: str, age: float | None, sex: str | None) -> None:
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = f"SYNTHETIC^{patient_id[:50]}"
    dataset.PatientID = patient_id if patient_id.upper().startswith("SYN") else f"SYN-{patient_id}"
    dataset.PatientBirthDate, dataset.PatientSex = "", sex or ""
    dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "Synthetic image: no patient exists"
    if age is not None:
        dataset.PatientAge = f"{int(age):03d}Y"
    dataset.StudyInstanceUID = origin.uid("study", origin.study_id)
    dataset.StudyDate = dataset.StudyTime = dataset.ReferringPhysicianName = dataset.StudyID = dataset.AccessionNumber = ""
    dataset.StudyDescription = "Synthetic chest radiograph"


def _series_and_equipment(dataset: Dataset, origin: _Origin, view: str) -> None:
    dataset.Modality, dataset.PresentationIntentType = "DX", "FOR PRESENTATION"
    dataset.SeriesInstanceUID = origin.uid("series", origin.study_id, view)
    dataset.SeriesNumber, dataset.SeriesDescription = 1, f"Synthetic {view} chest"
    dataset.Manufacturer, dataset.ManufacturerModelName = "medgen", origin.model[:64]
    dataset.DeviceSerialNumber, dataset.SoftwareVersions = origin.model_hash[:64], f"medgen {__version__}"
    equipment = Dataset()
    equipment.Manufacturer, equipment.ManufacturerModelName = "medgen", origin.model[:64]
    equipment.SoftwareVersions = dataset.SoftwareVersions
    equipment.ContributionDescription = "Generated the image"
    equipment.PurposeOfReferenceCodeSequence = [_code("109102", "DCM", "Processing Equipment")]
    dataset.ContributingEquipmentSequence = [equipment]


def _image_module(dataset: Dataset, origin: _Origin, view: str, description: str) -> None:
    dataset.SOPClassUID, dataset.SOPInstanceUID = DigitalXRayImageStorageForPresentation, origin.uid("instance", origin.record_id)
    dataset.SyntheticData = "YES"  # (0008,001C), PS3.3 C.12.1
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    dataset.DerivationDescription = f"Synthetic image: model {origin.model}, hash {origin.model_hash}, seed {origin.seed}"[:1024]
    dataset.InstanceNumber, dataset.ContentDate, dataset.ContentTime = 1, "", ""
    dataset.AcquisitionDate = dataset.AcquisitionTime = ""
    dataset.ImageComments = f"SYNTHETIC. {description}".strip()[:10240]
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    dataset.PatientOrientation = ["L", "F"]
    dataset.ImageLaterality, dataset.BodyPartExamined, dataset.ViewPosition = "U", "CHEST", view
    dataset.AnatomicRegionSequence = [_code("51185008", "SCT", "Chest")]
    view_code = _code("399348003", "SCT", "antero-posterior") if view == "AP" else _code("272479007", "SCT", "postero-anterior")
    view_code.ViewModifierCodeSequence = []
    dataset.ViewCodeSequence = [view_code]
    dataset.AcquisitionContextSequence = []
    dataset.PositionerType = dataset.DetectorType = ""


def _pixels(dataset: Dataset, image: NDArray[np.uint16], spacing_mm: float | None) -> None:
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    spacing = spacing_mm if spacing_mm is not None else round(350.0 / max(image.shape), 6)
    dataset.ImagerPixelSpacing = [f"{spacing:.6g}"] * 2
    dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = "LOG", -1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, 1, "US"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.WindowCenter, dataset.WindowWidth, dataset.WindowCenterWidthExplanation = 32768, 65536, "FULL"
    dataset.PixelData = image.astype("<u2").tobytes()


def _code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item
