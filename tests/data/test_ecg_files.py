"""ECG files as hospitals and PhysioNet have them, and as they arrive when something went wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
import wfdb
from pydicom.data import get_testdata_file

from medgen.data.ecg import ECG, LEADS, ECGError, cut, derive_limb_leads, lead_name, read_ecg, write_wfdb


def some_ecg(leads: tuple[str, ...] = LEADS, seconds: float = 4.0, rate: float = 500.0) -> ECG:
    rng = np.random.default_rng(0)
    return ECG(rng.normal(0, 0.5, (len(leads), round(seconds * rate))).astype(np.float32), leads, rate)


def real_dicom() -> Path:
    path = get_testdata_file("waveform_ecg.dcm", download=False)
    assert path is not None
    return Path(str(path))


def test_wfdb_keeps_the_signal_to_half_a_microvolt_and_missing_samples_missing(tmp_path: Path) -> None:
    ecg = some_ecg()
    ecg.signal[2, 100:200] = np.nan
    header = write_wfdb(ecg, tmp_path / "ecg" / "p1")
    for path in (header, header.with_suffix(""), header.with_suffix(".dat")):
        again = read_ecg(path)
        assert (again.leads, again.rate, again.start) == (LEADS, 500.0, 0.0)
        np.testing.assert_allclose(again.signal, ecg.signal, atol=0.00051)
    assert wfdb.rdheader(str(header.with_suffix(""))).units == ["mV"] * 12


def test_a_large_signal_is_written_with_coarser_steps_not_clipped(tmp_path: Path) -> None:
    ecg = some_ecg(("II",))
    ecg.signal[0, 7] = 400.0
    assert read_ecg(write_wfdb(ecg, tmp_path / "x")).signal[0, 7] == pytest.approx(400, abs=0.02)


def test_a_real_dicom_ecg_has_its_twelve_leads_in_millivolts() -> None:
    ecg = read_ecg(real_dicom())
    assert ecg.leads == LEADS and ecg.rate == 1000 and ecg.seconds == 10  # the rhythm strip, not the averaged beat beside it
    i, ii, iii = ecg.signal[:3]
    np.testing.assert_allclose(iii, ii - i, atol=1e-6)
    assert 1.0 < np.ptp(ii) < 2.0


@pytest.mark.parametrize("unit", ["uV", "V", "mV"])
def test_units_of_the_header_are_converted(tmp_path: Path, unit: str) -> None:
    factor = {"uV": 1000.0, "V": 0.001, "mV": 1.0}[unit]
    samples = some_ecg(("I", "II")).signal.T.astype(float) * factor
    wfdb.wrsamp("r", fs=100, units=[unit] * 2, sig_name=["i", "MLII"], p_signal=samples, fmt=["32"] * 2, write_dir=str(tmp_path))
    ecg = read_ecg(tmp_path / "r")
    assert ecg.leads == ("I", "II")
    np.testing.assert_allclose(ecg.signal, some_ecg(("I", "II")).signal, atol=1e-4)


def test_channels_that_are_no_lead_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    samples = some_ecg(("I", "II")).signal.T.astype(float)
    wfdb.wrsamp(
        "r", fs=125, units=["mV", "NU"], sig_name=["ECG", "PLETH"], p_signal=samples, fmt=["16"] * 2, write_dir=str(tmp_path)
    )
    with pytest.raises(ECGError, match=r"none of its channels \('ECG', 'PLETH'\)"):
        read_ecg(tmp_path / "r")
    assert read_ecg(tmp_path / "r", names={"ECG": "II"}).leads == ("II",)


def test_a_cut_off_signal_file_is_an_error_that_names_the_record(tmp_path: Path) -> None:
    header = write_wfdb(some_ecg(), tmp_path / "p1")
    data = header.with_suffix(".dat")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ECGError, match=r"p1.*cut short"):
        read_ecg(header)
    data.unlink()
    with pytest.raises(ECGError, match=r"p1\.hea: its signal file p1\.dat is missing"):
        read_ecg(header)


def test_a_header_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    header = write_wfdb(some_ecg(), tmp_path / "inside" / "p1")
    (tmp_path / "secret.dat").write_bytes(header.with_suffix(".dat").read_bytes())
    header.write_text(header.read_text().replace("p1.dat", "../secret.dat"))
    with pytest.raises(ECGError, match="invalid syntax|not beside it"):
        read_ecg(header)


def test_a_header_that_promises_too_much_is_refused_before_it_is_read(tmp_path: Path) -> None:
    header = write_wfdb(some_ecg(), tmp_path / "p1")
    header.write_text(header.read_text().replace("500 2000", "500 2000000000", 1))
    with pytest.raises(ECGError, match="not an ECG"):
        read_ecg(header)


def test_files_that_hold_no_ecg_say_so(tmp_path: Path) -> None:
    with pytest.raises(ECGError, match="no ECG at"):
        read_ecg(tmp_path / "nothing")
    (tmp_path / "text.dcm").write_text("hello")
    with pytest.raises(ECGError, match="neither a WFDB record nor a DICOM file"):
        read_ecg(tmp_path / "text.dcm")
    dataset = pydicom.dcmread(real_dicom())
    del dataset.WaveformSequence
    dataset.save_as(tmp_path / "empty.dcm")
    with pytest.raises(ECGError, match="without a waveform"):
        read_ecg(tmp_path / "empty.dcm")
    dataset = pydicom.dcmread(real_dicom())
    dataset.WaveformSequence[0].WaveformData = dataset.WaveformSequence[0].WaveformData[:999]
    dataset.save_as(tmp_path / "short.dcm")
    with pytest.raises(ECGError, match="cannot be read"):
        read_ecg(tmp_path / "short.dcm")


def test_a_name_that_wfdb_does_not_allow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ECGError, match="letters, digits"):
        write_wfdb(some_ecg(("I",)), tmp_path / "a b")


@pytest.mark.parametrize(
    ("said", "lead"),
    [("avr", "aVR"), ("Lead II", "II"), ("Lead I (Einthoven)", "I"), ("MDC_ECG_LEAD_V3", "V3"), ("MLII", "II"), ("ECG aVF", "aVF"),
     ("V7", None), ("PLETH", None), ("", None), ("ECG", None)],
)  # fmt: skip
def test_lead_names(said: str, lead: str | None) -> None:
    assert lead_name(said) == lead


def test_cut_leaves_absent_what_lies_outside() -> None:
    ecg = ECG(some_ecg().signal, LEADS, 500.0, start=10.0)
    part = cut(ecg, 9.0, 2.0)
    assert (part.start, part.seconds) == (10.0, 1.0)
    np.testing.assert_array_equal(part.signal, ecg.signal[:, :500])
    assert cut(ecg, 13.5, 5.0).seconds == 0.5
    with pytest.raises(ECGError, match="not recorded"):
        cut(ecg, 20.0, 1.0)


@pytest.mark.parametrize("given", [("I", "II"), ("aVL", "aVF"), ("III", "aVR"), ("I", "II", "aVF")])
def test_limb_leads_follow_from_any_two(given: tuple[str, ...]) -> None:
    i, ii = some_ecg(("I", "II")).signal
    truth = {"I": i, "II": ii, "III": ii - i, "aVR": -(i + ii) / 2, "aVL": i - ii / 2, "aVF": ii - i / 2}
    whole, added = derive_limb_leads(ECG(np.stack([truth[name] for name in given]), given, 500.0))
    assert set(added) == set(truth) - set(given)
    for name, row in zip(whole.leads, whole.signal, strict=True):
        np.testing.assert_allclose(row, truth[name], atol=1e-5)


def test_one_limb_lead_determines_no_other() -> None:
    ecg = some_ecg(("II", "V1", "V5"))
    assert derive_limb_leads(ecg) == (ecg, ())


@pytest.mark.parametrize(
    ("leads", "rate", "said"), [(("I", "I"), 500.0, "twice"), (("I",), 500.0, "needs a signal"), (("I", "II"), 0.0, "Hz")]
)
def test_an_ecg_that_contradicts_itself_is_refused(leads: tuple[str, ...], rate: float, said: str) -> None:
    with pytest.raises(ECGError, match=said):
        ECG(np.zeros((2, 10), np.float32), leads, rate)
