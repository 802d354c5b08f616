"""Digital recordings: 12-lead ECGs with the pulse wave of the same heart beats, written as WFDB with a manifest."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from medgen.data.ecg import SIMULATED, write_wfdb
from medgen.data.ecg_records import ECGRecord
from medgen.data.ppg import write_ppg
from medgen.digital.ecg import simulate_ecg
from medgen.digital.ppg import simulate_ppg
from medgen.digital.rhythm import KINDS, draw_rhythm
from medgen.digital.writing import split_of, write_patients
from medgen.seeds import stable_seed

KIND_SHARES = (0.6, 0.15, 0.15, 0.1)  # sinus, atrial fibrillation, premature beats, paced
PPG_RATE = 125.0


def write_dataset(
    out: Path, n: int, seed: int = 0, seconds: float = 10.0, rate: float = 500.0, processes: int | None = None
) -> Path:
    """Write `n` recordings (one per digital patient) below `out`: ecg/, ppg/ (both WFDB) and manifest.parquet; returns its path.

    The same command again goes on where it stopped.

    Args:
        out: folder to write into.
        n: how many recordings, each of a patient of its own.
        seed: of the population; the recordings of a smaller n are the first of a larger one.
        seconds: length of a recording.
        rate: samples per second of the ECG (the PPG has 125).
        processes: how many cores to use; default: all there are.
    """
    if n < 1 or seconds < 2 or rate < 100:
        raise ValueError(f"n must be at least 1 (got {n}), seconds at least 2 (got {seconds}), rate at least 100 Hz (got {rate})")
    for name in ("ecg", "ppg"):
        (out / name).mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "seconds": seconds, "rate": rate}
    work = partial(_write, out, seed, seconds, rate)
    write_patients(out, n, work, ECGRecord, settings, name="digital-ecg", what="recordings", processes=processes)
    return out / "manifest.parquet"


def _write(out: Path, seed: int, seconds: float, rate: float, index: int) -> list[ECGRecord]:
    patient = stable_seed("digital recording", seed, index)
    rng = np.random.default_rng(patient)
    kind = KINDS[int(rng.choice(len(KINDS), p=KIND_SHARES))]
    rhythm = draw_rhythm(patient, kind, float(np.clip(rng.normal(78, 18), 42, 140)), 0.0, seconds, float(rng.uniform(0.01, 0.08)))
    ecg, truth = simulate_ecg(rhythm, patient, rate=rate, start=0.0, end=seconds)
    ppg, feet = simulate_ppg(rhythm, patient, PPG_RATE, 0.0, seconds)
    patient_id = f"rec{seed}-{index:06d}"
    write_wfdb(ecg, out / f"ecg/{patient_id}", [SIMULATED])
    write_ppg(ppg, PPG_RATE, out / f"ppg/{patient_id}")
    facts = {
        "rhythm": kind,
        "heart_rate": round(rhythm.heart_rate, 2),
        "r_peaks": np.round(truth.r_peaks, 4).tolist(),
        "conduction": truth.conduction,
        "pulse_feet": np.round(feet, 4).tolist(),
    }
    record = ECGRecord(
        record_id=patient_id,
        patient_id=patient_id,
        study_id=f"{patient_id}-s1",
        ecg=f"ecg/{patient_id}",
        split=split_of(patient_id),
        ppg=f"ppg/{patient_id}",
        truth=facts,
    )
    return [record]
