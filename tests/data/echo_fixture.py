"""A small echo set on disk for tests: moving discs as AVI, an ECG with known beats as WFDB, a manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.ecg import ECG, write_wfdb
from medgen.data.echo_records import EchoRecord
from medgen.data.records import write_manifest
from medgen.data.video import write_video


def beats(start: float, seconds: float, rr: float = 0.8, first: float = 0.25, rate: float = 500.0) -> tuple[ECG, np.ndarray]:
    """Leads II and V1 with R peaks (and T waves 0.28 s later) every `rr` seconds; the R peaks on the same clock."""
    times = start + np.arange(round(seconds * rate)) / rate
    r_peaks = np.arange(first - 5 * rr, start + seconds, rr)
    signal = np.zeros_like(times)
    for r in r_peaks:
        signal += 1.2 * np.exp(-((times - r) ** 2) / (2 * 0.012**2)) - 0.25 * np.exp(-((times - r - 0.03) ** 2) / (2 * 0.012**2))
        signal += 0.3 * np.exp(-((times - r - 0.28) ** 2) / (2 * 0.04**2)) + 0.12 * np.exp(
            -((times - r + 0.16) ** 2) / (2 * 0.02**2)
        )
    signal += 0.005 * np.random.default_rng(0).standard_normal(len(times))
    inside = (r_peaks > start + 0.05) & (r_peaks < start + seconds - 0.05)
    return ECG(np.stack([signal, -0.6 * signal]).astype(np.float32), ("II", "V1"), rate, start), r_peaks[inside]


def pulsing(count: int, fps: float, rr: float = 0.8, first: float = 0.25, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """A disc that is largest at every R peak."""
    y, x = np.mgrid[: size[0], : size[1]]
    phase = 2 * np.pi * (np.arange(count) / fps - first) / rr
    radius = 10 + 4 * np.cos(phase)
    speckle = np.random.default_rng(1).integers(40, 120, (count, *size))
    distance = np.hypot(x - size[1] / 2, y - size[0] / 2)
    return np.where(distance[None] < radius[:, None, None], 10, speckle).astype(np.uint8)


def write_echo_set(root: Path, **changes: Any) -> Path:
    """Four clips: beat-synchronous at 30 fps, without an ECG at 20 fps, with another recording's ECG, and a short one."""
    offset, count = 1.5, 60
    ecg, _ = beats(0.0, 5.0, first=offset + 0.25)  # the recorder's own clock: frame 0 is at second 1.5
    write_wfdb(ecg, root / "ecg" / "a")
    write_wfdb(beats(0.0, 10.0, rr=1.0)[0], root / "ecg" / "b")
    first = EchoRecord(
        record_id="a", patient_id="pa", study_id="sa", video="videos/a.avi", view="A4C", fps=30.0, frames=count, split="train",
        ejection_fraction=55.0, edv_ml=120.0, esv_ml=54.0, ecg="ecg/a", ecg_offset=offset, pairing="beat_synchronous",
        age=61.0, sex="F", truth={"heart_rate": 75.0}, extra={"note": "ä"},
    )  # fmt: skip
    bare = replace(first, record_id="b", patient_id="pb", video="videos/b.avi", view="PLAX", fps=20.0, frames=50, ecg=None,
                   ecg_offset=0.0, pairing="none", ejection_fraction=None, edv_ml=None, esv_ml=None)  # fmt: skip
    paired = replace(first, record_id="c", patient_id="pc", video="videos/c.avi", view="UNKNOWN", ecg="ecg/b", ecg_offset=0.0,
                     pairing="patient", split="val")  # fmt: skip
    short = replace(first, record_id="d", patient_id="pd", video="videos/d.avi", frames=9, split="test")
    for record in (first, bare, paired, short):
        write_video(root / record.video, pulsing(record.frames, record.fps), record.fps)
    records = [replace(record, **changes.get(record.record_id, {})) for record in (first, bare, paired, short)]
    return write_manifest(records, root / "manifest.parquet", name="discs", source="test")
