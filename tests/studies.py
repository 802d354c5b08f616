"""Material of reader studies small enough for tests: manifests of films, clips and visits, and folders as samplers write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from follow_ups import write_follow_ups
from PIL import Image
from scipy.ndimage import gaussian_filter

from medgen.data.ecg_files import write_wfdb
from medgen.data.ecg_leads import ECG
from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, FindingLabel, read_manifest, write_manifest
from medgen.data.video import write_video
from medgen.data.visit_records import Visit, VisitSeries
from medgen.sampling.output import OutputFolder
from medgen.sampling.pictures import png_bytes

SIDE = 32
TEXT = {"present": "Small left pleural effusion. No pneumothorax.", "absent": "No pleural effusion. No pneumothorax."}


def film(number: int, blurred: bool = False, side: int = SIDE) -> np.ndarray:
    """[side,side] in [0,1]: two dark lungs that differ from film to film, noisy as real ones are, or smooth."""
    draws = np.random.default_rng(number)
    rows, columns = np.mgrid[:side, :side] / side
    left, right, depth = draws.uniform(0.25, 0.35), draws.uniform(0.65, 0.75), draws.uniform(0.7, 0.9)
    lungs = sum(np.exp(-(((columns - x) / 0.12) ** 2 + ((rows - 0.5) / 0.3) ** 2)) for x in (left, right))
    grey = 0.85 - depth * 0.7 * lungs + 0.05 * draws.standard_normal((side, side))
    return np.clip(gaussian_filter(grey, 1.5) if blurred else grey, 0, 1)


def write_films(root: Path, patients: int, source: str = "test", split: str = "test", side: int = SIDE, extra=None) -> Path:
    """A manifest of one film each, every second patient a woman, every third with an effusion."""
    (root / "images").mkdir(parents=True)
    records = []
    for p in range(patients):
        Image.fromarray(np.rint(film(p, side=side) * 255).astype(np.uint8)).save(root / f"images/p{p:04d}.png")
        state = "present" if p % 3 == 0 else "absent"
        labels = (FindingLabel("pleural_effusion", state),)
        records.append(
            CXRRecord(
                f"film-{p:04d}", f"patient-{p:04d}", f"study-{p:04d}", f"images/p{p:04d}.png", "PA", TEXT[state], TEXT[state], split,
                labels, sex="FM"[p % 2], extra=extra or {},
            )
        )  # fmt: skip
    return write_manifest(records, root / "manifest.parquet", name="films", source=source)


def write_samples(root: Path, cases: int, first: int = 1000, side: int = SIDE, **more) -> Path:
    """A folder of smooth synthetic films, written as `medgen sample text-to-cxr` writes them."""
    folder = OutputFolder(root)
    folder.claim({"model": "test_model"}, "")
    for i in range(first, first + cases):
        line = {
            "file_name": f"case-{i}_000.png", "case_id": f"case-{i}", "trajectory": 0, "seed": 700_000_000 + i, "noise_seed": 9000 + i,
            "prompt": TEXT["present" if i % 3 == 0 else "absent"], "synthetic": True, "model": "test_model", "sex": "FM"[i % 2], **more,
        }  # fmt: skip
        notes = {"Synthetic": "true", "seed": str(line["seed"]), "case_id": line["case_id"]}
        folder.write({line["file_name"]: png_bytes(film(i, blurred=True, side=side), 8, notes)}, line)
    assert folder.merge([f"case-{i}_000.png" for i in range(first, first + cases)], lambda lines: {})
    return root


def write_clips(root: Path, patients: int, fps: float = 25.0, frames: int = 12) -> Path:
    """A manifest of clips whose wall moves, each with an ECG and an ejection fraction."""
    records = []
    for p in range(patients):
        moving = np.stack([film(500 + p, side=SIDE) * (0.8 + 0.2 * np.cos(t / 3)) for t in range(frames)])
        write_video(root / f"videos/{p}.avi", np.rint(moving * 255).astype(np.uint8), fps)
        beat = np.tile(np.sin(np.linspace(0, 12, 1000)), (12, 1)).astype(np.float32)
        leads = ("I", "II", "III", "aVR", "aVL", "aVF", *(f"V{i}" for i in range(1, 7)))
        write_wfdb(ECG(beat, leads, 500.0), root / f"ecg/e{p}")
        records.append(
            EchoRecord(
                f"clip-{p:04d}", f"heart-{p:04d}", f"echo-{p:04d}", f"videos/{p}.avi", "A4C", fps, frames, "test",
                ejection_fraction=30.0 + p, ecg=f"ecg/e{p}", pairing="beat_synchronous", sex="FM"[p % 2],
            )
        )  # fmt: skip
    return write_manifest(records, root / "manifest.parquet", name="clips", source="test")


def write_clip_samples(root: Path, manifest: Path, fps: float = 20.0, frames: int = 16) -> Path:
    """A synthetic clip of every record of `manifest`, as `medgen sample ecg-to-echo` names them."""
    lines = []
    for i, record in enumerate(read_manifest(manifest, record=EchoRecord).records):
        moving = np.stack([film(900 + i, True) * (0.8 + 0.2 * np.cos(t / 3)) for t in range(frames)])
        write_video(root / f"{record.record_id}_000.avi", np.rint(moving * 255).astype(np.uint8), fps)
        line = {
            "file_name": f"{record.record_id}_000.mp4",
            "frames_file": f"{record.record_id}_000.avi",
            "fps": fps,
            "seed": 7000 + i,
        }
        asked = {"ecg": record.ecg, "ecg_start": 0.5, "ejection_fraction": record.ejection_fraction}
        lines.append({**line, "case_id": record.record_id, "record_id": record.record_id, **asked, "synthetic": True})
    return _metadata(root, lines)


def write_visits(root: Path, patients: int = 16) -> Path:
    """Follow-ups of five visits, the last few patients in the test split."""
    return write_follow_ups(root, patients, visits=5)


def write_futures(root: Path, manifest: Path) -> Path:
    """Two generated visits for every series after its first two, as `medgen sample progression --no-pictures` names them."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, series in enumerate(read_manifest(manifest, record=VisitSeries).records):
        frames = []
        for k, visit in enumerate(series.visits[2:5]):
            name = f"{series.record_id}_000_{k:02d}.png"
            (root / name).write_bytes(png_bytes(film(2000 + 10 * i + k, True), 8, {"Synthetic": "true"}))
            frames.append({"file_name": name, "time": visit.time + 0.5, "date": None})
        past = [{"time": visit.time, "image": visit.image} for visit in series.visits[:2]]
        line = {
            "file_name": frames[0]["file_name"],
            "frames": frames,
            "case_id": series.record_id,
            "seed": 7000 + i,
            "past": past,
        }
        lines.append({**line, "time_unit": "days", "synthetic": True, "covariates": series.covariates})
    return _metadata(root, lines)


def write_volumes(root: Path, patients: int = 4) -> Path:
    """Follow-ups of two CT volumes each; the right lung is the darker one, and air lies in front."""
    from medgen.data.volumes import write_volume  # with torch: slow to import

    series = []
    for p in range(patients):
        visits = []
        for v in range(2):
            x, y, z = np.mgrid[:24, :24, :16].astype(np.float32)
            hu = 40 - 800 * np.exp(-((x - 17) ** 2 + (y - 12) ** 2) / 16) - 400 * np.exp(-((x - 7) ** 2 + (y - 12) ** 2) / 16)
            hu = np.where(y > 20, -1000, hu) + 5 * p + z  # x grows to the right, y to the front, z to the head (RAS)
            write_volume(root / f"v{p}-{v}.nii.gz", hu.transpose(2, 1, 0), np.diag([2.0, 2, 3, 1]))
            visits.append(Visit(f"v{p}-{v}", 10.0 * v, f"v{p}-{v}.nii.gz"))
        series.append(VisitSeries(f"ct-{p}", f"body-{p}", f"ct-{p}", tuple(visits), "ct", 3, "days", "test"))
    return write_manifest(series, root / "manifest.parquet", name="volumes", source="test")


def _metadata(root: Path, lines: list[dict]) -> Path:
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


PROTOCOL = """
study_id: small
title: A small study
seed: {seed}
hypotheses: Readers stay within 50 % ± the margin.
margin: 0.1
readers: {readers}
sessions: {sessions}
arms:
  - {{name: maker, source: synthetic}}
  - {{name: clinic, source: real}}
  - {{name: copied, source: copy}}
sections: {sections}
"""
ORIGIN = "[{name: origin, task: real_or_synthetic, cases: 9}]"


def write_protocol(
    path: Path, sections: str = ORIGIN, seed: int = 1, readers: int | str = 2, sessions: int = 1, more: str = ""
) -> Path:
    """A protocol of three arms of films in YAML."""
    path.write_text(PROTOCOL.format(sections=sections, seed=seed, readers=readers, sessions=sessions) + more)
    return path
