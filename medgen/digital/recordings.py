"""Digital recordings: 12-lead ECGs with the pulse wave of the same heart beats, written as WFDB with a manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from medgen.data.ecg import write_wfdb
from medgen.data.ecg_records import ECGRecord
from medgen.data.ppg import write_ppg
from medgen.data.records import write_manifest
from medgen.digital.chest import split_of
from medgen.digital.ecg import simulate_ecg
from medgen.digital.ppg import simulate_ppg
from medgen.digital.rhythm import KINDS, draw_rhythm
from medgen.seeds import stable_seed

KIND_SHARES = (0.6, 0.15, 0.15, 0.1)  # sinus, atrial fibrillation, premature beats, paced
PPG_RATE = 125.0


def write_dataset(out: Path, n: int, seed: int = 0, seconds: float = 10.0, rate: float = 500.0, processes: int = 1) -> Path:
    """Write `n` recordings (one per digital patient) below `out`: ecg/, ppg/ (both WFDB) and manifest.parquet; returns its path.

    Args:
        out: folder to write into.
        n: how many recordings, each of a patient of its own.
        seed: of the population; the recordings of a smaller n are the first of a larger one.
        seconds: length of a recording.
        rate: samples per second of the ECG (the PPG has 125).
        processes: how many cores to use.
    """
    from rich.console import Console
    from rich.progress import track

    if n < 1 or seconds < 2 or rate < 100:
        raise ValueError(f"n must be at least 1 (got {n}), seconds at least 2 (got {seconds}), rate at least 100 Hz (got {rate})")
    for name in ("ecg", "ppg"):
        (out / name).mkdir(parents=True, exist_ok=True)
    tasks = [(seed, index, seconds, rate, str(out)) for index in range(n)]
    stream = track(_written(tasks, processes), total=n, description=f"{n} recordings", console=Console(stderr=True))
    settings = {"n": n, "seed": seed, "seconds": seconds, "rate": rate}
    source = f"medgen digital ecg {json.dumps(settings)}"
    return write_manifest(list(stream), out / "manifest.parquet", name="digital-ecg", source=source)


def _written(tasks: list[tuple[int, int, float, float, str]], processes: int) -> Iterator[ECGRecord]:
    if processes <= 1:
        yield from map(_write, tasks)
        return
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_write, tasks, chunksize=16)


def _write(task: tuple[int, int, float, float, str]) -> ECGRecord:
    seed, index, seconds, rate, out = task
    patient = stable_seed("digital recording", seed, index)
    rng = np.random.default_rng(patient)
    kind = KINDS[int(rng.choice(len(KINDS), p=KIND_SHARES))]
    rhythm = draw_rhythm(patient, kind, float(np.clip(rng.normal(78, 18), 42, 140)), 0.0, seconds, float(rng.uniform(0.01, 0.08)))
    ecg, truth = simulate_ecg(rhythm, patient, rate=rate, start=0.0, end=seconds)
    ppg, feet = simulate_ppg(rhythm, patient, PPG_RATE, 0.0, seconds)
    patient_id = f"rec{seed}-{index:06d}"
    write_wfdb(ecg, Path(out) / f"ecg/{patient_id}")
    write_ppg(ppg, PPG_RATE, Path(out) / f"ppg/{patient_id}")
    facts = {
        "rhythm": kind,
        "heart_rate": round(rhythm.heart_rate, 2),
        "r_peaks": np.round(truth.r_peaks, 4).tolist(),
        "conduction": truth.conduction,
        "pulse_feet": np.round(feet, 4).tolist(),
    }
    return ECGRecord(
        record_id=patient_id,
        patient_id=patient_id,
        study_id=f"{patient_id}-s1",
        ecg=f"ecg/{patient_id}",
        split=split_of(patient_id),
        ppg=f"ppg/{patient_id}",
        truth=facts,
    )
