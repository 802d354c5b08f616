"""The digital heart's ECG: its laws hold, its waves are where the truth says, and patients differ."""

from __future__ import annotations

import numpy as np
import pytest

from medgen.data.ecg import LEADS
from medgen.digital.ecg import QUIET, Noise, simulate_ecg
from medgen.digital.rhythm import RhythmError, draw_rhythm
from medgen.digital.vcg import draw_heart


def by_lead(seed: int, kind: str = "sinus", **options: object) -> tuple[dict[str, np.ndarray], object]:
    ecg, truth = simulate_ecg(draw_rhythm(seed, kind, 70, 0, 8), seed, start=0, end=8, **options)  # type: ignore[arg-type]
    assert ecg.leads == LEADS and ecg.rate == 500 and ecg.signal.dtype == np.float32
    return dict(zip(ecg.leads, ecg.signal)), truth


def around(signal: np.ndarray, second: float, seconds: float = 0.06) -> np.ndarray:
    return signal[round((second - seconds) * 500) : round((second + seconds) * 500)]


@pytest.mark.parametrize("kind", ["sinus", "af", "pvc", "paced"])
@pytest.mark.parametrize("noise", [QUIET, Noise()])
def test_einthovens_and_goldbergers_laws_hold(kind: str, noise: Noise) -> None:
    leads, _ = by_lead(1, kind, noise=noise)
    i, ii = leads["I"], leads["II"]
    expected = {"III": ii - i, "aVR": -(i + ii) / 2, "aVL": i - ii / 2, "aVF": ii - i / 2}
    for name, row in expected.items():
        np.testing.assert_allclose(leads[name], row, atol=2e-6)


@pytest.mark.parametrize("kind", ["sinus", "af", "pvc", "paced"])
def test_the_qrs_is_largest_at_the_r_peak(kind: str) -> None:
    leads, truth = by_lead(2, kind, noise=QUIET)
    size = np.sqrt(sum(row.astype(float) ** 2 for row in leads.values()))
    for r in truth.r_peaks[1:-1]:
        found = round((r - 0.06) * 500) + int(np.argmax(around(size, r)))
        assert found / 500 == pytest.approx(r, abs=0.03 if kind in ("pvc", "paced") else 0.012)


@pytest.mark.parametrize("seed", range(4))
def test_the_t_wave_is_over_soon_after_its_end(seed: int) -> None:
    leads, truth = by_lead(seed, noise=QUIET, conduction="normal")
    t = np.sqrt(sum(row.astype(float) ** 2 for row in leads.values()))
    for r, end in zip(truth.r_peaks[1:-1], truth.t_ends[1:-1]):
        wave = t[round((r + 0.15) * 500) : round(end * 500)]
        assert wave[-1] > 0.05 * wave.max()  # it is not over yet
        assert t[round((end + 0.04) * 500)] < 0.1 * wave.max()


def test_without_p_waves_the_atria_fibrillate() -> None:
    def before_qrs(kind: str) -> np.ndarray:
        """V1 in the 0.25 s before each QRS, its slow course taken off; the average over the beats."""
        leads, truth = by_lead(3, kind, noise=QUIET)
        return np.stack([leads["V1"][round((r - 0.27) * 500) : round((r - 0.05) * 500)] for r in truth.r_peaks if 0.3 < r < 7.9])

    sinus, fibrillating = before_qrs("sinus"), before_qrs("af")
    assert np.ptp(sinus.mean(0)) > 0.05 and sinus.std(0).mean() < 0.02  # the same P wave before every beat
    assert fibrillating.std(0).mean() > 2 * sinus.std(0).mean()  # no two beats alike


def test_a_premature_beat_is_wide_and_its_t_wave_opposes_it() -> None:
    rhythm = draw_rhythm(5, "pvc", 65, 0, 8)
    ecg, truth = simulate_ecg(rhythm, 5, start=0, end=8, noise=QUIET, conduction="normal")
    r, end = next((r, e) for r, e, k in zip(truth.r_peaks, truth.t_ends, truth.kinds) if k == "pvc" and 0.5 < r < 7)
    normal = next(r for r, k in zip(truth.r_peaks, truth.kinds) if k == "sinus" and 0.5 < r < 7)
    lead = max(range(12), key=lambda i: np.ptp(around(ecg.signal[i], r, 0.1)))

    def width(second: float) -> int:
        qrs = np.abs(around(ecg.signal[lead], second, 0.1))
        return int((qrs > 0.3 * qrs.max()).sum())

    assert width(r) > 1.5 * width(normal)
    qrs_sign = np.sign(ecg.signal[lead][round(r * 500)])
    t_wave = ecg.signal[lead][round((r + 0.16) * 500) : round(end * 500)]
    assert np.sign(t_wave[np.abs(t_wave).argmax()]) == -qrs_sign


def test_pacing_leaves_a_spike_of_a_sample_or_two() -> None:
    leads, truth = by_lead(6, "paced", noise=QUIET)
    second = np.abs(np.diff(leads["II"], 2))
    spikes = np.flatnonzero(second > 0.4 * second.max())
    first = spikes[np.diff(spikes, prepend=-100) > 50] / 500
    assert len(first) == pytest.approx(len(truth.r_peaks), abs=1)
    for spike in first[1:-1]:
        assert 0.02 < (truth.r_peaks[truth.r_peaks > spike][0] - spike) < 0.14


def test_t_wave_alternans_alternates() -> None:
    plain, truth = by_lead(7, noise=QUIET)
    alternating, _ = by_lead(7, noise=QUIET, twa_mv=0.2)
    change = alternating["V3"] - plain["V3"]
    at_t = [change[round((e - 0.23 * (e - r)) * 500)] for r, e in zip(truth.r_peaks[1:-1], truth.t_ends[1:-1])]
    assert (np.sign(at_t[1:]) == -np.sign(at_t[:-1])).all() and 0.02 < np.abs(at_t).mean() < 0.2


def test_three_leads_do_not_determine_the_chest_leads_across_patients() -> None:
    """A population's best linear map from I, II, V2 leaves a residue: torsos and near fields differ."""
    parts = [by_lead(seed, noise=QUIET)[0] for seed in range(6)]
    known = np.concatenate([np.stack([p["I"], p["II"], p["V2"]]) for p in parts], 1)
    wanted = np.concatenate([p["V5"] for p in parts])
    rest = wanted - np.linalg.lstsq(known.T, wanted, rcond=None)[0] @ known
    assert 0.1 < rest.std() / wanted.std() < 0.8


def test_the_patient_stays_the_same_whatever_the_rhythm_and_seeds_differ() -> None:
    heart, other = draw_heart(8), draw_heart(9)
    assert np.array_equal(heart.t, draw_heart(8).t) and not np.array_equal(heart.t, other.t)
    a, _ = by_lead(8)
    b, _ = by_lead(8)
    assert all(np.array_equal(a[name], b[name]) for name in LEADS)


def test_a_rhythm_that_does_not_cover_the_interval_is_refused() -> None:
    with pytest.raises(RhythmError, match="do not cover"):
        simulate_ecg(draw_rhythm(1, "sinus", 60, 0, 2), 1, start=0, end=20)
