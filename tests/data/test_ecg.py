"""Preparing an ECG: what is found in it, and what happens when it is not as it should be."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from pydicom.data import get_testdata_file

from medgen.data.ecg import ECG, LEADS, ECGError, ECGPreparation, PreparedECG, cut, frame_phase, prepare_ecg, read_ecg
from medgen.digital.ecg import ECGTruth, simulate_ecg
from medgen.digital.rhythm import draw_rhythm


def digital(
    seed: int = 1, kind: str = "sinus", heart_rate: float = 70, seconds: float = 8.0, rate: float = 500.0
) -> tuple[ECG, ECGTruth]:
    rhythm = draw_rhythm(seed, kind, heart_rate, 0, seconds)  # type: ignore[arg-type]
    return simulate_ecg(rhythm, seed, start=0, end=seconds, rate=rate)


def only(ecg: ECG, *leads: str) -> ECG:
    return replace(ecg, signal=ecg.signal[[ecg.leads.index(name) for name in leads]], leads=leads)


def missed_and_invented(prepared: PreparedECG, truth: ECGTruth, seconds: float = 8.0) -> tuple[int, int]:
    """Beats without an R peak within 0.1 s, and R peaks without a beat, ends of the recording aside."""
    inside = [r for r in truth.r_peaks if 0.15 < r < seconds - 0.15]
    found = [r for r in prepared.r_peaks if 0.15 < r < seconds - 0.15]
    near = [[abs(r - f) < 0.1 for f in found] for r in inside]
    return sum(not any(row) for row in near), sum(not any(column) for column in zip(*near))


@pytest.mark.parametrize("kind", ["sinus", "af", "pvc", "paced"])
@pytest.mark.parametrize("heart_rate", [40, 80, 140])
def test_beats_are_found_in_every_rhythm(kind: str, heart_rate: float) -> None:
    ecg, truth = digital(11, kind, heart_rate)
    prepared = prepare_ecg(ecg)
    missed, invented = missed_and_invented(prepared, truth)
    assert missed <= (1 if heart_rate == 140 and kind == "pvc" else 0) and invented == 0
    nearest = np.array([np.abs(prepared.r_peaks - r).min() for r in truth.r_peaks[1:-1]])
    assert np.median(nearest) < 0.012
    ends = np.array([np.nanmin(np.abs(prepared.t_ends - end)) for end in truth.t_ends[1:-1]])
    assert np.median(ends) < 0.03


def test_a_prepared_ecg_is_in_order_filtered_and_at_the_asked_rate() -> None:
    ecg, _ = digital(2)
    shuffled = only(ecg, "aVF", "V3", "aVL", "I", "V1")  # MIMIC-IV-ECG writes aVF before aVL
    prepared = prepare_ecg(shuffled, ECGPreparation(rate=200, band=(0.7, 35.0), derive=False))
    assert prepared.leads == ("I", "aVL", "aVF", "V1", "V3") and prepared.rate == 200
    assert prepared.signal.shape == (5, 1600) and prepared.signal.dtype == np.float32
    assert abs(prepared.signal.mean(1)).max() < 0.02  # no baseline
    spectrum = np.abs(np.fft.rfft(prepared.signal, axis=1))
    frequencies = np.fft.rfftfreq(1600, 1 / 200)
    assert spectrum[:, frequencies > 60].mean() < 0.02 * spectrum[:, (frequencies > 2) & (frequencies < 20)].mean()
    assert prepared.quality == dict.fromkeys(prepared.leads, "good") and prepared.flags == ()


@pytest.mark.parametrize("rate", [100.0, 257.0, 360.0, 1000.0])
def test_any_sampling_rate_gives_the_same_beats(rate: float) -> None:
    ecg, truth = digital(3, rate=rate)
    prepared = prepare_ecg(ecg)
    assert prepared.rate == 250 and prepared.signal.shape[1] == pytest.approx(2000, abs=1)
    assert missed_and_invented(prepared, truth) == (0, 0)
    assert np.median([np.abs(prepared.r_peaks - r).min() for r in truth.r_peaks[1:-1]]) < 0.012


def test_the_clock_is_the_recordings_own() -> None:
    ecg, _ = digital(4)
    later = prepare_ecg(replace(ecg, start=100.0))
    np.testing.assert_allclose(later.r_peaks - 100, prepare_ecg(ecg).r_peaks)
    assert later.times[0] == 100 and later.heart_rate == pytest.approx(70, abs=6)


def test_a_real_twelve_lead_ecg() -> None:
    prepared = prepare_ecg(read_ecg(str(get_testdata_file("waveform_ecg.dcm", download=False))))
    assert prepared.leads == LEADS and set(prepared.quality.values()) == {"good"} and prepared.flags == ()
    rr, qt = np.diff(prepared.r_peaks), prepared.t_ends - prepared.r_peaks
    assert 40 < prepared.heart_rate < 110 and rr.std() < 0.15 * rr.mean()
    assert np.isfinite(qt).mean() > 0.8 and 0.2 < np.nanmedian(qt) < 0.5 and np.nanstd(qt) < 0.02


def test_limb_leads_that_follow_exactly_are_derived_and_said_to_be() -> None:
    ecg, _ = digital(5)
    prepared = prepare_ecg(only(ecg, "I", "II", "V2"))
    assert prepared.leads == ("I", "II", "III", "aVR", "aVL", "aVF", "V2")
    assert prepared.quality["aVF"] == "derived" and "derived from the other limb leads: III, aVR, aVL, aVF" in prepared.flags
    whole = prepare_ecg(ecg)
    np.testing.assert_allclose(prepared.signal[:6], whole.signal[:6], atol=1e-4)
    assert prepare_ecg(only(ecg, "II", "V2")).leads == ("II", "V2")  # nothing is invented


@pytest.mark.parametrize("lead", ["I", "II", "V1", "V5"])
def test_one_lead_is_enough_to_find_the_beats(lead: str) -> None:
    ecg, truth = digital(6)
    prepared = prepare_ecg(only(ecg, lead))
    assert prepared.leads == (lead,)
    assert missed_and_invented(prepared, truth) == (0, 0)


@pytest.mark.parametrize(("factor", "unit"), [(1000.0, "uV"), (0.001, "V"), (200.0, "ADC counts of 5 uV")])
def test_wrong_units_are_put_right_and_flagged(factor: float, unit: str) -> None:
    ecg, truth = digital(7)
    prepared = prepare_ecg(replace(ecg, signal=ecg.signal * np.float32(factor)))
    np.testing.assert_allclose(prepared.signal, prepare_ecg(ecg).signal, atol=2e-3)
    assert set(prepared.quality.values()) == {"scaled"}
    assert any(flag.startswith(f"units: {unit} were taken for mV") for flag in prepared.flags)
    assert missed_and_invented(prepared, truth) == (0, 0)


def test_units_are_left_alone_when_that_is_asked() -> None:
    ecg, _ = digital(7)
    with pytest.raises(ECGError, match="saturated"):
        prepare_ecg(replace(ecg, signal=ecg.signal * np.float32(1000)), ECGPreparation(units=False))


def spoilt(ecg: ECG, lead: str, how: str) -> ECG:
    signal, row, rng = ecg.signal.copy(), ecg.leads.index(lead), np.random.default_rng(0)
    samples = signal.shape[1]
    if how == "flat":
        signal[row] = 0.3
    elif how == "open":  # the electrode is off: a few µV of noise
        signal[row] = rng.normal(0, 0.002, samples)
    elif how == "saturated":
        signal[row] = np.clip(signal[row] * 4 + 1, -1.5, 1.5)
    elif how == "noisy":
        signal[row] += rng.normal(0, 2.0, samples)
    elif how == "absent":
        signal[row, : samples * 3 // 4] = np.nan
    return replace(ecg, signal=signal)


@pytest.mark.parametrize(
    ("how", "kind"), [("flat", "flat"), ("open", "flat"), ("saturated", "saturated"), ("noisy", "noisy"), ("absent", "absent")]
)
def test_a_spoilt_lead_is_left_out_and_named(how: str, kind: str) -> None:
    ecg, truth = digital(8)
    prepared = prepare_ecg(spoilt(ecg, "V4", how))
    assert "V4" not in prepared.leads and len(prepared.leads) == 11
    assert prepared.quality["V4"] == kind and f"{kind}, left out: V4" in prepared.flags
    assert missed_and_invented(prepared, truth) == (0, 0)


def test_a_spoilt_limb_lead_comes_back_from_the_others() -> None:
    ecg, _ = digital(8)
    prepared = prepare_ecg(spoilt(ecg, "aVL", "flat"))
    assert prepared.leads == LEADS and prepared.quality["aVL"] == "derived" and "flat, left out: aVL" in prepared.flags


@pytest.mark.parametrize("how", ["flat", "open", "saturated", "noisy"])
def test_an_ecg_without_a_usable_lead_is_an_error(how: str) -> None:
    ecg = only(digital(8)[0], "II")
    with pytest.raises(ECGError, match="no usable lead: II is"):
        prepare_ecg(spoilt(ecg, "II", how))


def test_missing_samples_stay_missing_and_short_gaps_are_bridged() -> None:
    ecg, truth = digital(9)
    ecg.signal[:, 1010:1030] = np.nan  # 40 ms
    ecg.signal[:, 2000:2500] = np.nan  # 1 s
    prepared = prepare_ecg(ecg)
    absent = ~prepared.sample_mask
    assert absent[1000:1250].all() and absent.sum() == pytest.approx(250, abs=4)
    assert any(flag.startswith("missing samples") for flag in prepared.flags)
    assert not ((prepared.r_peaks > 4.05) & (prepared.r_peaks < 4.95)).any()
    for r in truth.r_peaks[(truth.r_peaks < 3.8) & (truth.r_peaks > 0.2)]:
        assert np.abs(prepared.r_peaks - r).min() < 0.05


def test_zero_padding_is_not_taken_for_data() -> None:
    ecg, truth = digital(9)
    ecg.signal[:, 3000:] = 0.0  # two of eight seconds
    prepared = prepare_ecg(ecg)
    assert not prepared.sample_mask[1505:].any() and prepared.sample_mask[:1495].all()
    assert any("zero padding" in flag for flag in prepared.flags)
    assert len(prepared.r_peaks) == pytest.approx((truth.r_peaks < 6).sum(), abs=1) and prepared.r_peaks.max() < 6.02


def test_thirty_seconds_are_no_other_than_two() -> None:
    ecg, truth = digital(10, seconds=30.0)
    whole, part = prepare_ecg(ecg), prepare_ecg(cut(ecg, 10.0, 4.0))
    assert missed_and_invented(whole, truth, 30.0) == (0, 0)
    for r in part.r_peaks[(part.r_peaks > 10.3) & (part.r_peaks < 13.7)]:
        assert np.abs(whole.r_peaks - r).min() < 0.009


@pytest.mark.parametrize(("seconds", "rate", "said"), [(1.0, 500.0, "too short"), (8.0, 60.0, "samples per second")])
def test_too_little_to_go_by(seconds: float, rate: float, said: str) -> None:
    with pytest.raises(ECGError, match=said):
        prepare_ecg(ECG(np.zeros((1, round(seconds * rate)), np.float32), ("II",), rate))


def test_leads_nobody_knows() -> None:
    ecg = digital(1)[0]
    with pytest.raises(ECGError, match="none of the leads X1, X2"):
        prepare_ecg(ECG(ecg.signal[:2], ("X1", "X2"), 500.0))
    prepared = prepare_ecg(ECG(ecg.signal[:2], ("PLETH", "ii"), 500.0))
    assert prepared.leads == ("II",) and prepared.flags == ("unknown leads left out: PLETH",)


def test_swapped_limb_leads_are_noticed() -> None:
    ecg, _ = digital(12)
    swapped = replace(ecg, leads=("I", "II", "III", "aVR", "aVF", "aVL", *LEADS[6:]))  # the names do not fit the signals
    assert any("aVF contradicts I and II" in flag for flag in prepare_ecg(swapped).flags)


def test_noise_alone_has_no_heart_rate() -> None:
    signal = np.full((1, 2000), 0.1, np.float32)
    signal[0, 1000:1010] = 1.0
    signal += 0.02 * np.sin(np.arange(2000) / 40)
    prepared = prepare_ecg(ECG(signal.astype(np.float32), ("II",), 500.0))
    assert len(prepared.r_peaks) < 2 and math.isnan(prepared.heart_rate)
    assert any("no heart rate, no phase" in flag for flag in prepared.flags)


def test_a_band_that_does_not_fit_the_rate_is_refused() -> None:
    with pytest.raises(ValidationError, match="half the rate"):
        ECGPreparation(rate=100, band=(0.5, 60.0))


# ---------------------------------------------------------------- phase

R, T = np.array([1.0, 2.0, 3.0]), np.array([1.4, 2.4, 3.4])


def test_phase_is_zero_at_r_pi_at_the_t_end_and_linear_between() -> None:
    phase = frame_phase(R, T, np.array([1.0, 1.2, 1.4, 1.7, 2.0]))
    angle = np.arctan2(phase[:, 0], phase[:, 1]) % (2 * np.pi)
    np.testing.assert_allclose(angle[:4], [0, np.pi / 2, np.pi, 1.5 * np.pi], atol=1e-5)
    np.testing.assert_allclose(phase[:, 2], [0, 0.2, 0.4, 0.7, 0], atol=1e-6)
    np.testing.assert_allclose(phase[:, 3], 1.0)


def test_phase_is_extrapolated_by_one_interval_and_no_further() -> None:
    phase = frame_phase(R, T, np.array([-0.1, 0.1, 0.4, 3.4, 3.9, 4.1]))
    assert np.isnan(phase[[0, 5]]).all() and np.isfinite(phase[1:5]).all()
    np.testing.assert_allclose(phase[3, :2], [0, -1], atol=1e-6)


def test_a_missing_t_end_is_put_where_the_others_lead_to_expect_it() -> None:
    phase = frame_phase(R, np.array([1.4, np.nan, 3.4]), np.array([2.4]))
    np.testing.assert_allclose(phase[0, :2], [0, -1], atol=1e-5)
    alone = frame_phase(R, np.full(3, np.nan), np.array([2.37]))
    np.testing.assert_allclose(alone[0, :2], [0, -1], atol=1e-5)


def test_fewer_than_two_beats_have_no_phase() -> None:
    assert np.isnan(frame_phase(np.array([1.0]), np.array([1.4]), np.linspace(0, 2, 5))).all()


def test_five_seconds_of_twelve_leads_are_prepared_in_150_ms_of_one_core() -> None:
    ecg = digital(14, seconds=5.0)[0]
    prepare_ecg(ecg)  # imports
    seconds = []
    for _ in range(3):
        began = time.process_time()
        prepare_ecg(ecg)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.15


def test_preparing_the_same_file_twice_gives_the_same(tmp_path: Path) -> None:
    ecg, _ = digital(13)
    a, b = prepare_ecg(ecg), prepare_ecg(ecg)
    assert np.array_equal(a.signal, b.signal) and np.array_equal(a.t_ends, b.t_ends, equal_nan=True)
