"""Generators whose quality is known, written as the sampler writes: real films of the right day, copies of the last one, blends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medgen.evaluation.progression.patients import Patient, read_patients

Frames = list[NDArray[np.float32]]
Draw = Callable[[dict, Patient, int], Frames]


def generate(cases: Path, reference: Path, out: Path, draw: Draw, purposes: Sequence[str] = (), n: int | None = None) -> Path:
    """Sample every case (of `purposes`, if given) with `draw(case, patient, trajectory)` → its frames; `n` replaces the case's own."""
    patients = {patient.record_id: patient for patient in read_patients(reference, None)}
    out.mkdir(parents=True)
    lines = []
    for case in map(json.loads, cases.read_text().splitlines()):
        if purposes and case["purpose"] not in purposes:
            continue
        for k in range(n or case["n"]):
            name = f"{case['case_id']}_{k:03d}"
            images = [(255 * frame).round().clip(0, 255).astype(np.uint8) for frame in draw(case, patients[case["record_id"]], k)]
            for i, image in enumerate(images):
                Image.fromarray(image).save(out / f"{name}_{i:02d}.png")
            Image.fromarray(np.concatenate(images, 1)).save(out / f"{name}.png")
            frames = [{"file_name": f"{name}_{i:02d}.png", "time": time} for i, time in enumerate(case["times"])]
            lines.append(
                {**case, "file_name": f"{name}.png", "trajectory": k, "frames": frames, "synthetic": True, "model": "known"}
            )
    (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def generate_volumes(cases: Path, reference: Path, out: Path) -> Path:
    """What a prophet makes of cases of volumes: the real NIfTI files of the right days."""
    patients = {patient.record_id: patient for patient in read_patients(reference, None)}
    out.mkdir(parents=True)
    lines = []
    for case in map(json.loads, cases.read_text().splitlines()):
        patient, name, frames = patients[case["record_id"]], f"{case['case_id']}_000", []
        for i, time in enumerate(case["times"]):
            visit = min(patient.series.imaged, key=lambda visit: abs(visit.time - time))
            frames.append({"file_name": f"{name}_{i:02d}.nii.gz", "time": time})
            shutil.copyfile(patient.root / str(visit.image), out / frames[-1]["file_name"])
        lines.append({**case, "file_name": frames[0]["file_name"], "trajectory": 0, "frames": frames, "synthetic": True})
    (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def film(patient: Patient, time: float) -> NDArray[np.float32]:
    """The real film nearest to a time."""
    visit = min(patient.series.imaged, key=lambda visit: abs(visit.time - time))
    return np.asarray(Image.open(patient.root / str(visit.image)), dtype=np.float32) / 255


def prophet(case: dict, patient: Patient, trajectory: int) -> Frames:
    """What really came; between two ends, their blend."""
    if case["purpose"] == "between":
        first, last = (film(patient, case["past"][end]["time"]) for end in (0, -1))
        return [first + share * (last - first) for share in np.linspace(0, 1, len(case["times"]))]
    return [film(patient, time) for time in case["times"]]


def copier(case: dict, patient: Patient, trajectory: int) -> Frames:
    """The last film again, whatever is asked."""
    return [film(patient, case["past"][-1]["time"])] * len(case["times"])
