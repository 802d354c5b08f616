"""An ECG as a DICOM waveform: 12-lead ECG where its limits hold (PS3.3 A.34.3), General ECG for a longer one. Samples stay as stored."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, GeneralECGWaveformStorage, TwelveLeadECGWaveformStorage

from medgen.data.dicom_marks import Origin, Place, code, encoded, synthetic
from medgen.export.recordings import MISSING, Recording

MODEL = "simulated recording"
_CODES = {"I": "2:1", "II": "2:2", "III": "2:61", "aVR": "2:62", "aVL": "2:63", "aVF": "2:64"}  # PS3.16 CID 3001
_CODES |= {f"V{n}": f"2:{n + 2}" for n in range(1, 7)}
_MOST_SAMPLES = 16384  # of a 12-lead ECG (PS3.3 A.34.3.4.5)
_RATES = (200, 1000)  # Hz, of both classes


def why_not(recording: Recording) -> str:
    """Why no ECG class of DICOM takes this recording; "" if one does."""
    low, high = _RATES
    return "" if low <= recording.rate <= high else f"{recording.rate:g} Hz, where DICOM takes {low} to {high} Hz"


def ecg_file(recording: Recording, place: Place, study: UID) -> bytes:
    """The DICOM file of a simulated recording in the study `study`, that of the clip it drove."""
    short = len(recording.samples) <= _MOST_SAMPLES
    kind = TwelveLeadECGWaveformStorage if short else GeneralECGWaveformStorage
    origin = Origin(MODEL, recording.sha256, 0)
    told = f"SYNTHETIC {len(recording.leads)}-lead ECG, second {recording.start:g} is frame 0 of the clip"
    dataset = synthetic(kind, "ECG", origin, replace(place, series_description=told))
    dataset.StudyInstanceUID = study
    dataset.AcquisitionDateTime = f"{place.date}{place.time}"  # required; made up like the date
    dataset.AcquisitionContextSequence = []
    dataset.WaveformSequence = [_group(recording)]
    # What an ECG viewer prints on the page, so that a printed one says it too.
    note = Dataset()
    note.UnformattedTextValue = "SYNTHETIC ECG: simulated, no patient"
    note.ReferencedWaveformChannels = [1, 0]
    dataset.WaveformAnnotationSequence = [note]
    return encoded(dataset)


def _group(recording: Recording) -> Dataset:
    group = Dataset()
    group.WaveformOriginality = "DERIVED"
    group.NumberOfWaveformSamples, group.NumberOfWaveformChannels = recording.samples.shape
    group.SamplingFrequency = _decimal(recording.rate)
    group.MultiplexGroupLabel = "SYNTHETIC"
    group.WaveformBitsAllocated, group.WaveformSampleInterpretation = 16, "SS"
    missing = (recording.samples == MISSING).any()
    if missing:
        group.add_new("WaveformPaddingValue", "OW", np.int16(MISSING).tobytes())
    group.ChannelDefinitionSequence = [
        _channel(lead, step) for lead, step in zip(recording.leads, recording.microvolts, strict=True)
    ]
    group.add_new("WaveformData", "OW", recording.samples.astype("<i2").tobytes())
    return group


def _channel(lead: str, step: float) -> Dataset:
    channel = Dataset()
    channel.ChannelLabel = lead
    channel.ChannelSourceSequence = [code(_CODES[lead], "MDC", lead if lead.startswith("a") else f"Lead {lead}")]
    channel.ChannelSensitivity = _decimal(step)
    channel.ChannelSensitivityUnitsSequence = [code("uV", "UCUM", "microvolt")]
    channel.ChannelSensitivityCorrectionFactor, channel.ChannelBaseline = 1, 0
    channel.ChannelSampleSkew = 0
    channel.WaveformBitsStored = 16
    return channel


def _decimal(value: float) -> str:
    """DICOM's DS: at most 16 letters."""
    return f"{value:.10g}"
