"""What every synthetic DICOM object says of itself, whatever its class: redundant marks, so that no single stripped tag hides them.

Synthetic Data (0008,001C), Synthesizing Equipment, ImageType DERIVED, the model with its hash and seed, a patient who does not exist.
"""

from __future__ import annotations

import io
import uuid
from dataclasses import dataclass
from typing import Literal

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from medgen import __version__

_NAMESPACE = uuid.UUID("4d4c8f5e-6f0e-5c6b-9a53-6d656467656e")
_OLDEST = 90  # years: an age above 89 counts as identifying (HIPAA, 45 CFR 164.514), also that of whom a forecast was made from


@dataclass(frozen=True)
class Origin:
    """What a synthetic object comes from: the part of its header and all of its UIDs that say so."""

    model: str
    model_hash: str
    seed: int

    def uid(self, *kind: str) -> UID:
        """A UUID-derived UID (PS3.5 B.2): the same for the same origin, and no registered root needed."""
        name = "\x1f".join((self.model, self.model_hash, str(self.seed), *kind))
        return UID(f"2.25.{uuid.uuid5(_NAMESPACE, name).int}")


@dataclass(frozen=True)
class Place:
    """Where an object stands: patient, study, series and instance (ids are hashed to UIDs), and what is said of them.

    `date` (DICOM's DA, "" unknown) is the study's; `made_up_date` that it belongs to no calendar.
    """

    patient_id: str
    study_id: str
    series_id: str
    record_id: str
    number: int = 1
    series_number: int = 1
    study_number: str = ""
    date: str = ""
    made_up_date: bool = False
    age: float | None = None
    sex: Literal["F", "M"] | None = None
    study_description: str = "Synthetic study"
    series_description: str = "Synthetic series"
    comments: str = ""

    @property
    def time(self) -> str:
        """Noon, where there is a date: some modules want a time, and none was ever taken."""
        return "120000" if self.date else ""


def synthetic(sop_class: UID, modality: str, origin: Origin, place: Place, image_type: tuple[str, ...] = ()) -> Dataset:
    """A data set of `sop_class` with patient, study, series, equipment and all marks, but no pixels or samples yet.

    `image_type`: the values of ImageType (for images; its first is DERIVED).
    """
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, origin.uid("instance", place.record_id)
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SyntheticData = "YES"  # PS3.3 C.12.1
    _patient_and_study(dataset, origin, place)
    dataset.Modality = modality
    dataset.SeriesInstanceUID = origin.uid("series", place.series_id)
    dataset.SeriesNumber, dataset.SeriesDescription = place.series_number, place.series_description[:64]
    dataset.InstanceNumber, dataset.ContentDate, dataset.ContentTime = place.number, place.date, place.time
    _equipment(dataset, origin)
    if image_type:
        dataset.ImageType = list(image_type)
        said = f"Synthetic image: model {origin.model}, hash {origin.model_hash}, seed {origin.seed}"
        dataset.DerivationDescription = said[:1024]
        dataset.AcquisitionDate, dataset.AcquisitionTime = place.date, place.time
        dataset.ImageComments = f"SYNTHETIC. {place.comments}".strip()[:10240]
        dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"
    return dataset


def encoded(dataset: Dataset) -> bytes:
    """The file of `dataset`; the bytes follow from it alone."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(f"2.25.{_NAMESPACE.int}")
    meta.ImplementationVersionName = "MEDGEN"
    stream = io.BytesIO()
    FileDataset(stream, dataset, preamble=b"\0" * 128, file_meta=meta).save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """One item of a code sequence."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def _patient_and_study(dataset: Dataset, origin: Origin, place: Place) -> None:
    given = place.patient_id
    dataset.PatientName = f"SYNTHETIC^{given[:50]}"
    dataset.PatientID = given if given.upper().startswith("SYN") else f"SYN-{given}"
    dataset.PatientBirthDate, dataset.PatientSex = "", place.sex or ""
    dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "Synthetic image: no patient exists"
    if place.age is not None:
        dataset.PatientAge = f"{min(int(place.age), _OLDEST):03d}Y"
    if place.made_up_date:
        dataset.LongitudinalTemporalInformationModified = "MODIFIED"
    dataset.StudyInstanceUID = origin.uid("study", place.study_id)
    dataset.StudyDate, dataset.StudyTime = place.date, place.time
    dataset.ReferringPhysicianName = dataset.AccessionNumber = ""
    dataset.StudyID = place.study_number
    dataset.StudyDescription = place.study_description[:64]


def _equipment(dataset: Dataset, origin: Origin) -> None:
    dataset.Manufacturer, dataset.ManufacturerModelName = "medgen", origin.model[:64]
    dataset.DeviceSerialNumber, dataset.SoftwareVersions = origin.model_hash[:64], f"medgen {__version__}"
    equipment = Dataset()
    equipment.Manufacturer, equipment.ManufacturerModelName = "medgen", origin.model[:64]
    equipment.SoftwareVersions = dataset.SoftwareVersions
    equipment.ContributionDescription = "Generated what is shown: synthetic data"
    equipment.PurposeOfReferenceCodeSequence = [code("109100", "DCM", "Synthesizing Equipment")]
    dataset.ContributingEquipmentSequence = [equipment]
