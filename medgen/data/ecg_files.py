"""Electrocardiograms on disk: WFDB records and DICOM waveforms in, WFDB out."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.data.ecg_leads import ECG, ECGError, lead_name

_TO_MV = {"mv": 1.0, "uv": 1e-3, "v": 1e3, "nv": 1e-6}  # of one unit, as WFDB and DICOM (UCUM) spell it, in lower case
SIMULATED = "SYNTHETIC: simulated recording of a digital patient, of no person"
_MAX_SAMPLES = 200_000_000  # all leads together; a header that says more is broken or hostile
# The last number of SCP-ECG's and IEEE 11073's (MDC) lead codes, as DICOM's context group 3001 lists them.
_LEAD_CODES = {
    "1": "I",
    "2": "II",
    "61": "III",
    "62": "aVR",
    "63": "aVL",
    "64": "aVF",
    **{str(n): f"V{n - 2}" for n in range(3, 9)},
}


def read_ecg(path: str | Path, names: Mapping[str, str] | None = None) -> ECG:
    """The leads of a WFDB record (its .hea, .dat or stem) or of a DICOM waveform, in mV as far as the file knows its unit.

    Its clock starts with its first sample (`start` = 0). `names` renames channels ({"ECG": "II"}) before they are looked up;
    channels that are no ECG lead are left out. Raises `ECGError` for a file that is missing, cut short, or has no ECG lead.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".hea", ".dat", ".mat") else path
    if stem.with_name(stem.name + ".hea").is_file():
        return _read_wfdb(stem, names or {})
    if not path.is_file():
        raise ECGError(f"no ECG at {path}: expected a DICOM file or a WFDB record with its header {stem.name}.hea")
    return _read_dicom(path, names or {})


def write_wfdb(ecg: ECG, path: str | Path, comments: Sequence[str] = ()) -> Path:
    """Write `ecg` as a WFDB record (`path`.hea and `path`.dat, 16 bit, 1 µV steps or coarser if it is larger than 32 mV).

    `comments` are lines of the header; a simulated or generated recording must say so there (`SIMULATED`): only such are released.
    Returns the header's path. The record's own clock begins with its first sample: `ecg.start` is not stored. Raises `ECGError`
    for a name that WFDB does not allow.
    """
    import wfdb

    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".hea", ".dat") else path
    if not re.fullmatch(r"[A-Za-z0-9_-]+", stem.name):
        raise ECGError(f"{stem.name!r} cannot be a WFDB record's name: letters, digits, _ and - only")
    largest = float(np.nanmax(np.abs(ecg.signal), initial=0.0, where=np.isfinite(ecg.signal)))
    gain = 1000.0 if largest < 32 else 32000.0 / largest
    stem.parent.mkdir(parents=True, exist_ok=True)
    count = len(ecg.leads)
    wfdb.wrsamp(
        stem.name,
        fs=ecg.rate,
        units=["mV"] * count,
        sig_name=list(ecg.leads),
        p_signal=np.where(np.isfinite(ecg.signal), ecg.signal, np.nan).T.astype(np.float64),
        fmt=["16"] * count,
        adc_gain=[gain] * count,
        baseline=[0] * count,
        comments=list(comments),
        write_dir=str(stem.parent),
    )
    return stem.with_name(stem.name + ".hea")


def _read_wfdb(stem: Path, names: Mapping[str, str]) -> ECG:
    import wfdb

    try:
        header = wfdb.rdheader(str(stem))
        for part in (*(getattr(header, "file_name", None) or ()), *(getattr(header, "seg_name", None) or ())):
            if part and Path(part).name != part:
                raise ECGError(f"{stem}.hea names the file {part!r}, which is not beside it")
        if (header.sig_len or 0) * max(header.n_sig or 0, 1) > _MAX_SAMPLES:
            raise ECGError(f"{stem}.hea promises {header.n_sig} x {header.sig_len} samples: not an ECG")
        record = wfdb.rdrecord(str(stem))
    except ECGError:
        raise
    except FileNotFoundError as error:
        raise ECGError(f"{stem}.hea: its signal file {Path(str(error.filename)).name} is missing") from None
    except Exception as error:  # wfdb raises many kinds for a damaged record
        raise ECGError(f"{stem}: not a readable WFDB record (cut short?): {error}") from None
    if record.p_signal is None or not record.p_signal.size:
        raise ECGError(f"{stem}: the record holds no signal")
    channels = [(name, unit, row) for name, unit, row in zip(record.sig_name, record.units, record.p_signal.T, strict=True)]
    return _ecg(channels, float(record.fs), stem, names)


def _read_dicom(path: Path, names: Mapping[str, str]) -> ECG:
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path)
    except Exception as error:
        raise ECGError(f"{path}: neither a WFDB record nor a DICOM file: {error}") from None
    groups = dataset.get("WaveformSequence") or []
    if not groups:
        raise ECGError(f"{path}: a DICOM file without a waveform ({dataset.get('Modality', 'unknown modality')})")
    # A rhythm strip and averaged beats may lie side by side: the group with most leads, then the longest, is the recording.
    found = [[_channel_name(c) for c in group.ChannelDefinitionSequence] for group in groups]
    counts = [sum(lead_name(names.get(n, n)) is not None for n in group) for group in found]
    index = max(range(len(groups)), key=lambda i: (counts[i], int(groups[i].NumberOfWaveformSamples)))
    group = groups[index]
    if int(group.NumberOfWaveformSamples) * int(group.NumberOfWaveformChannels) > _MAX_SAMPLES:
        raise ECGError(f"{path}: promises {group.NumberOfWaveformChannels} x {group.NumberOfWaveformSamples} samples: not an ECG")
    try:
        signal = np.asarray(dataset.waveform_array(index), dtype=np.float64).T
    except Exception as error:  # pydicom raises many kinds for malformed waveforms
        raise ECGError(f"{path}: its waveform cannot be read (cut short?): {error}") from None
    units = [_channel_unit(channel) for channel in group.ChannelDefinitionSequence]
    return _ecg(list(zip(found[index], units, signal, strict=True)), float(group.SamplingFrequency), path, names)


def _channel_name(channel: Any) -> str:
    """A lead's name from its code (SCP-ECG, MDC), or else from its words."""
    source = (channel.get("ChannelSourceSequence") or [{}])[0]
    words, code = str(source.get("CodeMeaning", "")), str(source.get("CodeValue", ""))
    scheme = str(source.get("CodingSchemeDesignator", "")).upper()
    coded = _LEAD_CODES.get(re.split(r"[-:]", code)[-1]) if scheme in ("SCPECG", "MDC") else None
    return coded or words or str(channel.get("ChannelLabel", ""))


def _channel_unit(channel: Any) -> str:
    units = channel.get("ChannelSensitivityUnitsSequence") or [{}]
    return str(units[0].get("CodeValue", ""))


def _ecg(channels: list[tuple[str, str, NDArray[np.float64]]], rate: float, path: Path, names: Mapping[str, str]) -> ECG:
    """The channels that are leads, in mV. A unit that is no voltage stays as it is: `prepare_ecg` looks at the size."""
    leads: dict[str, NDArray[np.float64]] = {}
    for name, unit, samples in channels:
        lead = lead_name(names.get(name, name))
        if lead is not None and lead not in leads:  # the first of two alike
            leads[lead] = samples * _TO_MV.get((unit or "").strip().lower().replace("µ", "u").replace("μ", "u"), 1.0)
    if not leads:
        there = ", ".join(repr(name) for name, *_ in channels)
        raise ECGError(f"{path}: none of its channels ({there}) is an ECG lead; `names` can say which is which")
    return ECG(np.stack(list(leads.values())).astype(np.float32), tuple(leads), rate)
