"""DICOM chest radiographs (DX, CR): pixels as they are meant to be seen, and writing synthetic DX images that say so.

Reading follows the grey-scale pipeline of PS3.3 C.11: modality LUT or rescale, then VOI LUT or window, then photometric
interpretation. Writing makes a DX Image For Presentation (PS3.3 A.26) that `dciodvfy` accepts.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels import apply_modality_lut, apply_voi
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation

from medgen.data.dicom_marks import Origin, Place, code, encoded, synthetic
from medgen.data.disk_cache import write_atomically

MAX_PIXELS = 200_000_000  # no radiograph is near; a header that says more is broken or hostile
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
View = Literal["PA", "AP"]
_FIELD_MM = 350.0  # of a chest film, where its pixel size is not known
_VIEW_CODES: dict[View | None, tuple[str, str, str]] = {  # PS3.16 CID 4010
    "PA": ("272479007", "SCT", "postero-anterior"),
    "AP": ("399348003", "SCT", "antero-posterior"),
    None: ("399033003", "SCT", "frontal"),
}


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


def is_dicom(path: Path) -> bool:
    """Whether the file carries DICOM's mark after its 128-byte preamble."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


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


def write_dx(
    path: str | Path,
    image: NDArray[np.uint8] | NDArray[np.uint16],
    *,
    patient_id: str,
    study_id: str,
    record_id: str,
    model: str,
    seed: int,
    model_hash: str = "unknown",
    view: View | None = "PA",
    age: float | None = None,
    sex: Literal["F", "M"] | None = None,
    pixel_spacing_mm: float | None = None,
    description: str = "",
) -> Path:
    """Write `image` `[H, W]` uint16 or uint8 (0 black, full range) as a DX Image For Presentation marked synthetic.

    `model` is the generator's name, `model_hash` that of its weights or code. UIDs and bytes follow from the arguments alone;
    equal `study_id` under the same model and seed is one DICOM study. The patient's right is at the image's left, as in every
    medgen image. `pixel_spacing_mm` is the spacing at the detector; unknown, a 350 mm field is assumed, because the attribute is
    required, and Derivation Description says so. `description` (free text, e.g. the prompt) goes to Image Comments. Raises
    `DicomError` for other pixels.
    """
    path = Path(path)
    place = Place(
        patient_id, study_id, f"{study_id}\x1f{view}", record_id, age=age, sex=sex, comments=description,
        study_description="Synthetic chest radiograph", series_description=f"Synthetic {view or 'frontal'} chest",
    )  # fmt: skip
    try:
        content = encoded(dx_dataset(image, Origin(model, model_hash, seed), place, view, pixel_spacing_mm))
    except DicomError as error:
        raise DicomError(f"{path}: {error}") from None
    write_atomically(path, lambda file: file.write(content))
    return path


def dx_dataset(
    image: NDArray[Any], origin: Origin, place: Place, view: View | None = "PA", pixel_spacing_mm: float | None = None
) -> Dataset:
    """The data set of a synthetic film; see `write_dx`. `view` None: frontal, and not known which."""
    if image.dtype not in (np.uint8, np.uint16) or image.ndim != 2:
        raise DicomError(f"a DX image needs [H, W] uint16 or uint8, not {list(image.shape)} {image.dtype}")
    dataset = synthetic(DigitalXRayImageStorageForPresentation, "DX", origin, place, ("DERIVED", "PRIMARY"))
    if pixel_spacing_mm is None:  # not into Image Comments: those are read as the report
        dataset.DerivationDescription += f"; pixel size not known: a field of {_FIELD_MM:g} mm is assumed, do not measure"
    dataset.PresentationIntentType = "FOR PRESENTATION"
    dataset.PatientOrientation = ["L", "F"]
    dataset.ImageLaterality, dataset.BodyPartExamined = "U", "CHEST"
    dataset.AnatomicRegionSequence = [code("51185008", "SCT", "Chest")]
    if view is not None:
        dataset.ViewPosition = view
    dataset.ViewCodeSequence = [code(*_VIEW_CODES[view])]
    dataset.ViewCodeSequence[0].ViewModifierCodeSequence = []
    dataset.AcquisitionContextSequence = []
    dataset.PositionerType = dataset.DetectorType = ""
    _pixels(dataset, image, pixel_spacing_mm or round(_FIELD_MM / max(image.shape), 6))
    return dataset


def _pixels(dataset: Dataset, image: NDArray[Any], spacing_mm: float) -> None:
    bits = 8 * image.dtype.itemsize
    dataset.Rows, dataset.Columns = image.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = bits, bits, bits - 1, 0
    dataset.ImagerPixelSpacing = [f"{spacing_mm:.6g}"] * 2
    dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = "LOG", -1
    dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = 0, 1, "US"
    dataset.PresentationLUTShape = "IDENTITY"
    dataset.WindowCenter, dataset.WindowWidth, dataset.WindowCenterWidthExplanation = 2 ** (bits - 1), 2**bits, "FULL"
    content = image.astype(image.dtype.newbyteorder("<")).tobytes()
    dataset.add_new("PixelData", "OW" if bits > 8 else "OB", content + b"\0" * (len(content) % 2))
