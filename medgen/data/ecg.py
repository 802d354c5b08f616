"""Electrocardiograms made ready: named leads, mV, one rate, band-passed, quality told, beats found, and the phase of any moment."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.signal import butter, resample_poly, sosfiltfilt

from medgen.config import Config
from medgen.data.ecg_beats import find_r_peaks, find_t_ends
from medgen.data.ecg_files import SIMULATED, read_ecg, write_wfdb
from medgen.data.ecg_leads import ECG, LEADS, LIMB, ECGError, cut, derive_limb_leads, lead_name
from medgen.data.ecg_quality import constant_stretches, find_unit, judge_lead

__all__ = [
    "ECG",
    "LEADS",
    "SIMULATED",
    "ECGError",
    "ECGPreparation",
    "PreparedECG",
    "cut",
    "derive_limb_leads",
    "filter_ecg",
    "frame_phase",
    "lead_name",
    "prepare_ecg",
    "read_ecg",
    "write_wfdb",
]

SHORTEST = 1.5  # seconds; less holds no beat that could be told from noise
_GAP = 0.1  # seconds of missing samples that are bridged by a line


class ECGPreparation(Config):
    """How every ECG is made ready, before training as before sampling."""

    rate: float = Field(250.0, ge=80, le=2000, description="samples per second")
    band: tuple[float, float] = Field((0.5, 40.0), description="band-pass, Hz (Butterworth, no phase shift)")
    derive: bool = Field(True, description="compute limb leads that are missing where two others determine them exactly")
    units: bool = Field(True, description="look for µV, V or ADC counts taken for mV, and put them right")

    @model_validator(mode="after")
    def _band_fits(self) -> ECGPreparation:
        low, high = self.band
        if not 0 < low < high < self.rate / 2:
            raise ValueError(f"band {low:g}-{high:g} Hz: expected 0 < low < high < half the rate ({self.rate / 2:g} Hz)")
        return self


@dataclass(frozen=True)
class PreparedECG:
    """`signal` [L,S] float32 mV of the usable leads only, in LEADS' order (NaN where nothing was recorded), `rate` Hz, `start` s.

    `quality` has every lead that was given or derived: good, scaled (its unit was put right), derived (by Einthoven's law), and those
    left out of `signal`: flat, saturated, noisy, absent. `r_peaks` [K], `t_ends` [K] (NaN: not found) in seconds of the same
    clock. `flags` says in words whatever was not as it should be.
    """

    signal: NDArray[np.float32]
    leads: tuple[str, ...]
    rate: float
    start: float
    quality: dict[str, str]
    r_peaks: NDArray[np.float64]
    t_ends: NDArray[np.float64]
    flags: tuple[str, ...]

    @property
    def times(self) -> NDArray[np.float64]:
        """Second of each sample, [S]."""
        return self.start + np.arange(self.signal.shape[1]) / self.rate

    @property
    def sample_mask(self) -> NDArray[np.bool_]:
        """Which samples [S] were recorded in every usable lead."""
        return np.asarray(np.isfinite(self.signal).all(0))

    @property
    def heart_rate(self) -> float:
        """Beats per minute from the median RR interval; NaN with fewer than two beats."""
        return 60 / float(np.median(np.diff(self.r_peaks))) if len(self.r_peaks) > 1 else float("nan")


def prepare_ecg(ecg: ECG, preparation: ECGPreparation = ECGPreparation()) -> PreparedECG:  # noqa: B008 (frozen)
    """Check, filter and resample `ecg` and find its beats.

    Raises `ECGError` if it is too short, sampled too slowly for the band, has no lead of LEADS, or none that is usable.
    """
    return _with_beats(*filter_ecg(ecg, preparation))


def filter_ecg(ecg: ECG, preparation: ECGPreparation) -> tuple[ECG, dict[str, str], list[str]]:
    """`prepare_ecg` without the search for beats (most of its time): the usable leads, every lead's quality, and flags."""
    flags: list[str] = []
    ecg = _known_leads(ecg, flags)
    if ecg.seconds < SHORTEST:
        raise ECGError(f"an ECG of {ecg.seconds:.2f} s is too short: at least {SHORTEST} s are needed")
    if ecg.rate < 2.5 * preparation.band[1]:
        raise ECGError(f"{ecg.rate:g} samples per second are too few for the band up to {preparation.band[1]:g} Hz; lower it")
    signal, recorded = _bridged(ecg, flags)
    unit, factor = find_unit(signal) if preparation.units else ("mV", 1.0)
    if factor != 1.0:
        flags.append(f"units: {unit} were taken for mV; multiplied by {factor:g}")
    signal *= factor
    quality = {name: judge_lead(row, there, ecg.rate) for name, row, there in zip(ecg.leads, signal, recorded)}
    usable = [i for i, name in enumerate(ecg.leads) if quality[name] == "good"]
    for kind in ("flat", "saturated", "noisy", "absent"):
        if names := [name for name in ecg.leads if quality[name] == kind]:
            flags.append(f"{kind}, left out: {', '.join(names)}")
    if not usable:
        raise ECGError(f"no usable lead: {', '.join(f'{name} is {kind}' for name, kind in quality.items())}")
    quality |= {ecg.leads[i]: "scaled" for i in usable if factor != 1.0}
    signal, recorded = signal[usable], recorded[usable]
    if (still := constant_stretches(signal, ecg.rate)).any():
        recorded &= ~still
        flags.append("stretches without any change, zero padding perhaps, left out")
    filtered = sosfiltfilt(_bandpass(preparation.band, ecg.rate), signal, axis=1)
    filtered, there = _resampled(filtered, recorded, ecg.rate, preparation.rate)
    filtered[~there] = np.nan
    ready = ECG(filtered.astype(np.float32), tuple(ecg.leads[i] for i in usable), preparation.rate, ecg.start)
    if preparation.derive:
        ready, derived = derive_limb_leads(ready)
        quality |= dict.fromkeys(derived, "derived")
        if derived:
            flags.append(f"derived from the other limb leads: {', '.join(derived)}")
    _check_limb_leads(ready, flags)
    return ready, quality, flags


def _known_leads(ecg: ECG, flags: list[str]) -> ECG:
    """The leads that are among LEADS, in that order."""
    names = {lead_name(name): i for i, name in reversed(list(enumerate(ecg.leads)))}
    known = [name for name in LEADS if name in names]
    if not known:
        raise ECGError(f"none of the leads {', '.join(ecg.leads) or '(none)'} is one of {', '.join(LEADS)}")
    if unknown := [name for name in ecg.leads if lead_name(name) is None]:
        flags.append(f"unknown leads left out: {', '.join(unknown)}")
    return replace(ecg, signal=ecg.signal[[names[name] for name in known]], leads=tuple(known))


def _bridged(ecg: ECG, flags: list[str]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The signal [L,S] with missing samples bridged by lines (a filter cannot skip them), and what counts as recorded [L,S].

    Gaps of up to 0.1 s count as recorded.
    """
    signal, recorded = ecg.signal.astype(np.float64), np.isfinite(ecg.signal)
    if recorded.all():
        return signal, recorded
    samples, longest = np.arange(signal.shape[1]), int(_GAP * ecg.rate)
    for row, there in zip(signal, recorded):
        if not there.any():
            row[:] = 0.0
            continue
        row[~there] = np.interp(samples[~there], samples[there], row[there])
        edges = np.flatnonzero(np.diff(np.concatenate([[True], there, [True]]).astype(np.int8)))
        for first, last in zip(edges[::2], edges[1::2]):
            if last - first <= longest:
                there[first:last] = True
    flags.append("missing samples: up to 0.1 s bridged, longer stretches left out")
    return signal, recorded


def _bandpass(band: tuple[float, float], rate: float) -> NDArray[np.float64]:
    return np.asarray(butter(3, band, "bandpass", fs=rate, output="sos"))


def _resampled(
    signal: NDArray[np.float64], recorded: NDArray[np.bool_], rate: float, wanted: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Signal and mask at the rate `wanted`, sample 0 at the same moment."""
    ratio = Fraction(wanted / rate).limit_denominator(1000)
    if ratio == 1:
        return signal, recorded
    signal = resample_poly(signal, ratio.numerator, ratio.denominator, axis=1, padtype="line")
    nearest = np.minimum(np.round(np.arange(signal.shape[1]) * rate / wanted).astype(int), recorded.shape[1] - 1)
    return signal, recorded[:, nearest]


def _check_limb_leads(ecg: ECG, flags: list[str]) -> None:
    """Flag limb leads that contradict each other: two names swapped, or a sign turned."""
    there = {name: ecg.signal[ecg.leads.index(name)] for name in LIMB if name in ecg.leads}
    if not {"I", "II"} < set(there):
        return
    for name, row in there.items():
        expected = LIMB[name][0] * there["I"] + LIMB[name][1] * there["II"]
        apart, size = np.nanstd(row - expected), max(np.nanstd(row), np.nanstd(expected))
        if name not in ("I", "II") and apart > 0.5 * size and apart > 0.03:
            flags.append(f"{name} contradicts I and II (Einthoven): is it named and wired right?")


def _with_beats(ecg: ECG, quality: dict[str, str], flags: list[str]) -> PreparedECG:
    order = [ecg.leads.index(name) for name in LEADS if name in ecg.leads]
    signal = ecg.signal[order]
    solid = np.nan_to_num(signal)
    peaks = find_r_peaks(solid, ecg.rate)
    peaks = peaks[np.isfinite(signal[:, peaks]).any(0)]
    if len(peaks) < 2:
        flags.append(f"{len(peaks)} R peaks found: no heart rate, no phase")
    ends = find_t_ends(solid, ecg.rate, peaks)
    leads = tuple(ecg.leads[i] for i in order)
    return PreparedECG(signal, leads, ecg.rate, ecg.start, quality, ecg.start + peaks / ecg.rate, ecg.start + ends, tuple(flags))


def frame_phase(r_peaks: NDArray[np.float64], t_ends: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.float32]:
    """The cardiac cycle at `times` [T] seconds: columns sin φ, cos φ, seconds since R, RR in seconds; [T,4] float32.

    φ rises linearly from 0 at R to π at the T end and to 2π at the next R. A T end that is NaN is put where the other beats' QT
    (by the power law of RR) leads to expect it. Before the first and after the last R peak one interval is extrapolated;
    beyond that, and with fewer than two R peaks, rows are NaN.
    """
    times = np.asarray(times, dtype=np.float64)
    out = np.full((len(times), 4), np.nan, dtype=np.float32)
    if len(r_peaks) < 2:
        return out
    rr = np.diff(r_peaks)
    if not (rr > 0).all():
        raise ECGError("R peaks must be in rising order")
    r = np.concatenate([[r_peaks[0] - rr[0]], r_peaks, [r_peaks[-1] + rr[-1]]])
    rr = np.diff(r)
    systole = np.concatenate([[np.nan], np.asarray(t_ends, dtype=np.float64) - r_peaks])
    typical = systole / rr**0.42
    usual = float(np.nanmedian(typical)) if np.isfinite(typical).any() else 0.37
    systole = np.where(np.isfinite(systole), systole, usual * rr**0.42)
    systole = np.clip(systole, 0.05 * rr, 0.95 * rr)
    beat = np.searchsorted(r, times, side="right") - 1
    inside = (beat >= 0) & (beat < len(rr))
    beat, since = beat[inside], times[inside] - r[beat[inside]]
    s, whole = systole[beat], rr[beat]
    phase = np.where(since < s, np.pi * since / s, np.pi * (1 + (since - s) / (whole - s)))
    out[inside] = np.stack([np.sin(phase), np.cos(phase), since, whole], axis=1)
    return out
