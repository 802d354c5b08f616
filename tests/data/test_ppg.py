"""A pulse wave on disk and made ready: WFDB out and in, gaps and flat lines refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import wfdb

from medgen.data.ppg import PPGError, prepare_ppg, read_ppg, write_ppg

WAVE = np.sin(2 * np.pi * 1.2 * np.arange(625) / 125).astype(np.float32)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert write_ppg(WAVE, 125.0, tmp_path / "pulse").name == "pulse.hea"
    signal, rate = read_ppg(tmp_path / "pulse")
    assert rate == 125.0
    np.testing.assert_allclose(signal, WAVE, atol=1e-3)
    assert np.array_equal(read_ppg(tmp_path / "pulse.hea")[0], signal)


def test_a_monitors_record_gives_its_pleth_channel(tmp_path: Path) -> None:
    both = np.stack([np.zeros(625), WAVE], axis=1)
    wfdb.wrsamp("icu", 125, ["mV", "NU"], ["II", "Pleth"], both, fmt=["16", "16"], write_dir=str(tmp_path))
    np.testing.assert_allclose(read_ppg(tmp_path / "icu")[0], WAVE, atol=1e-3)


def test_a_record_without_a_pulse_wave_says_what_it_has(tmp_path: Path) -> None:
    wfdb.wrsamp("ecg", 125, ["mV"], ["II"], WAVE[:, None].astype(np.float64), fmt=["16"], write_dir=str(tmp_path))
    with pytest.raises(PPGError, match="no PPG: its signals are II"):
        read_ppg(tmp_path / "ecg")
    with pytest.raises(PPGError, match="no WFDB record"):
        read_ppg(tmp_path / "nothing")


def test_unit_and_drift_do_not_matter_shape_does() -> None:
    drifting = 40 + 3000 * WAVE + np.linspace(0, 2000, len(WAVE), dtype=np.float32)
    one, other = prepare_ppg(WAVE, 125, 125), prepare_ppg(drifting, 125, 125)
    middle = slice(125, -125)
    assert np.corrcoef(one[middle], other[middle])[0, 1] > 0.99
    assert 0.5 < one.std() < 1.5
    assert len(prepare_ppg(WAVE, 125, 250)) == 2 * len(WAVE)


@pytest.mark.parametrize(
    ("signal", "message"),
    [(np.zeros(625), "flat"), (np.r_[WAVE, np.nan], "not finite"), (WAVE[:50], "at least 1 s")],
)
def test_refusals(signal: np.ndarray, message: str) -> None:
    with pytest.raises(PPGError, match=message):
        prepare_ppg(signal, 125, 125)
