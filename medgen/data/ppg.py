"""A photoplethysmogram: read from and written to WFDB, band-passed and scaled. Its unit means nothing, its shape and timing do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import wfdb
from numpy.typing import NDArray
from scipy.signal import butter, resample_poly, sosfiltfilt

PPG_NAMES = ("PPG", "PLETH", "PULSE")
BAND = (0.5, 8.0)  # Hz: the pulse and its dicrotic notch, without drift


class PPGError(ValueError):
    """A photoplethysmogram that cannot be used; the message says which file, why, and what would do."""


def read_ppg(path: str | Path) -> tuple[NDArray[np.float32], float]:
    """The PPG channel of a WFDB record (stem or .hea; the first called PPG, PLETH or PULSE...): signal [S] (NaN: gap) and Hz."""
    stem = Path(path).with_suffix("") if Path(path).suffix == ".hea" else Path(path)
    if not stem.with_name(stem.name + ".hea").is_file():
        raise PPGError(f"no WFDB record at {stem}: expected {stem.name}.hea")
    try:
        header = wfdb.rdheader(str(stem))
        channel = next((i for i, name in enumerate(header.sig_name or ()) if name.upper().startswith(PPG_NAMES)), None)
        if channel is None:
            raise PPGError(
                f"{stem} has no PPG: its signals are {', '.join(header.sig_name or ())}; expected {', '.join(PPG_NAMES)}"
            )
        record = wfdb.rdrecord(str(stem), channels=[channel])
    except PPGError:
        raise
    except Exception as error:  # wfdb raises whatever its parsing meets
        raise PPGError(f"{stem} is not a readable WFDB record: {error}") from None
    return record.p_signal[:, 0].astype(np.float32), float(record.fs)


def write_ppg(signal: NDArray[np.floating], rate: float, path: str | Path) -> Path:
    """Write `signal` [S] at `rate` Hz as the WFDB record `path` (a stem, 16 bit); returns the header's path."""
    stem = Path(path)
    # said rather than left to wfdb, whose own choice overflows by one for some signals
    gain = 30_000 / max(float(np.nanmax(np.abs(signal))), 1e-6)
    wfdb.wrsamp(
        stem.name,
        fs=rate,
        units=["NU"],
        sig_name=["PPG"],
        p_signal=np.asarray(signal, np.float64)[:, None],
        fmt=["16"],
        adc_gain=[gain],
        baseline=[0],
        write_dir=str(stem.parent),
    )
    return stem.with_name(stem.name + ".hea")


def prepare_ppg(
    signal: NDArray[np.floating], rate: float, target_rate: float, band: tuple[float, float] = BAND
) -> NDArray[np.float32]:
    """`signal` [S] at `rate` Hz, resampled to `target_rate`, band-passed (zero phase) and divided by its robust spread.

    Raises `PPGError` where it is flat, shorter than a second or not finite: a pulse cannot be made up.
    """
    if len(signal) < rate:
        raise PPGError(f"a PPG of {len(signal) / rate:.2f} s: at least 1 s is needed")
    if not np.isfinite(signal).all():
        raise PPGError(
            f"{int((~np.isfinite(signal)).sum())} of {len(signal)} samples of the PPG are not finite: cut the gaps out"
        )
    values = np.asarray(signal, np.float64)
    if rate != target_rate:
        values = resample_poly(values - values.mean(), round(target_rate * 1000), round(rate * 1000))
    values = sosfiltfilt(butter(2, band, "bandpass", fs=target_rate, output="sos"), values - values.mean())
    spread = float(np.quantile(np.abs(values), 0.9))
    if spread < 1e-6 * max(float(np.abs(signal).max()), 1e-12):
        raise PPGError("the PPG is flat: the sensor was off the finger")
    return np.clip(values / spread, -5, 5).astype(np.float32)
