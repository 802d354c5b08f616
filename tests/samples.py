"""Sampled folders of every kind, written with the samplers' own writers, small: what an export reads. Ids and dates in them are 'real'."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.data.ecg_files import SIMULATED, read_ecg, write_wfdb
from medgen.data.ecg_leads import ECG, LEADS
from medgen.data.video import write_video
from medgen.sampling.output import OutputFolder
from medgen.sampling.pictures import png_bytes

# What no released file may hold: whose case it was, when, and what was written of them.
PERSONAL = ("p10000032", "s50414267", "2180-05-06", "21800506", "OLD-REPORT", "visit_of_jane")
MODEL = {"model": "tiny", "model_sha256": "ab" * 32, "num_inference_steps": 3, "guidance_scale": 2.0, "scheduler": "Euler",
         "medgen": "0.1.0", "torch": "2", "dtype": "float32", "device": "cpu"}  # fmt: skip
RAS = np.array([[2.0, 0, 0, -20], [0, 2.5, 0, -30], [0, 0, 3.0, 100], [0, 0, 0, 1]])


def film(number: int, size: int = 24) -> NDArray[np.float64]:
    """[size,size+1] in [0,1]; an odd number of pixels in all, as DICOM pads them."""
    return np.random.default_rng(number).random((size + 1, size + 1))


def line(case_id: str, trajectory: int = 0, **more: Any) -> dict[str, Any]:
    seeds = {"trajectory": trajectory, "seed": 3, "noise_seed": 6956303495351503884 + trajectory}
    return {"file_name": f"{case_id}_{trajectory:03d}.png", "case_id": case_id, **seeds, **more, "synthetic": True, **MODEL}


def notes(one: Mapping[str, Any]) -> dict[str, str]:
    keys = ("model", "model_sha256", "case_id", "trajectory", "seed", "noise_seed")
    return {"Synthetic": "true", **{key: str(one[key]) for key in keys}}


def write(out: Path, samples: Sequence[tuple[dict[str, Any], dict[str, bytes]]]) -> Path:
    """A finished folder, as `medgen sample` leaves it."""
    folder = OutputFolder(out)
    folder.claim({"steps": 3}, '{"case_id": "a"}\n')
    for one, files in samples:
        folder.write(files, one)
    assert folder.merge([one["file_name"] for one, _ in samples], lambda lines: {"contact_sheet.png": b"sheet"})
    return out


def write_films(out: Path, bits: int = 8, count: int = 2) -> Path:
    samples = []
    for i in range(count):
        one = line(
            f"p10000032-{i}", prompt="Small left effusion.", view="AP" if i else None, age=93.0, sex="F", patient_id="p10000032"
        )
        samples.append((one, {one["file_name"]: png_bytes(film(i), bits, notes(one))}))  # type: ignore[arg-type]
    return write(out, samples)


def write_visits(out: Path) -> Path:
    """Two futures of three visits; the strip and the movie show the known visits too, and are not to be released."""
    samples = []
    past = [
        {
            "time": 0.0,
            "image": "visit_of_jane.png",
            "date": "2180-05-06",
            "report": "OLD-REPORT",
            "view": "AP",
            "image_sha256": "cd" * 32,
        }
    ]
    for trajectory in range(2):
        one = line("p10000032", trajectory, past=past, times=[10.0, 45.5, 400.0], time_unit="days", covariates={"age": 61.0, "sex": "M"},
                   events=[{"name": "drainage", "time": 3.0}], dates=["2180-05-16"] * 3)  # fmt: skip
        one["frames"] = [{"file_name": f"p10000032_{trajectory:03d}_{i:02d}.png", "time": t, "date": "2180-05-16"} for i, t in
                         enumerate(one["times"])]  # fmt: skip
        one["counterfactual_frames"] = [{**f, "file_name": f["file_name"].replace(".png", "_cf.png")} for f in one["frames"][:1]]
        frames = [frame["file_name"] for frame in (*one["frames"], *one["counterfactual_frames"])]
        files = {name: png_bytes(film(10 * trajectory + i), 8, notes(one)) for i, name in enumerate(frames)}
        samples.append((one, {**files, one["file_name"]: png_bytes(film(99), 8, {"Comment": "strip with the known visits"})}))
    return write(out, samples)


def write_edits(out: Path) -> Path:
    """A severity edit of two rounds; round 0 is the source: a patient's film."""
    one = line(
        "p10000032", image="visit_of_jane.png", report="OLD-REPORT", source_prompt="OLD-REPORT", finding="pleural_effusion"
    )
    prompts = ["OLD-REPORT", "small left pleural effusion", "large left pleural effusion"]
    one["frames"] = [{"file_name": f"p10000032_000_{i:02d}.png", "round": i, "prompt": text, "way": 1.0, "synthetic": i > 0}
                     for i, text in enumerate(prompts)]  # fmt: skip
    marks = [{"Comment": "The source film"}, notes(one), notes(one)]
    files = {
        frame["file_name"]: png_bytes(film(i), 8, said) for i, (frame, said) in enumerate(zip(one["frames"], marks, strict=True))
    }
    return write(out, [(one, {**files, one["file_name"]: png_bytes(film(9), 8, notes(one))})])


def write_clips(out: Path, root: Path, seconds: float = 4.0, comments: Sequence[str] = (SIMULATED,)) -> Path:
    """Two clips: of a simulated recording (some samples of it lost), and without an ECG. `root`: where the recording goes."""
    signal = np.random.default_rng(0).normal(0, 0.4, (12, int(500 * seconds))).astype(np.float32).round(3)
    signal[3, 10:20] = np.nan
    write_wfdb(ECG(signal, LEADS, 500.0), root / "ecg" / "p10000032", comments)
    digest = read_ecg(root / "ecg" / "p10000032").signal
    samples = []
    for i, ecg in enumerate(("ecg/p10000032", None)):
        one = line(
            f"p10000032-{i}",
            ecg=ecg,
            ecg_start=0.5,
            view="A4C",
            num_frames=9,
            fps=30.0,
            heart_rate=71.0,
            r_peaks=[-0.7, 0.1, 0.2],
        )
        one |= {"ejection_fraction": 55.0, "frames_file": f"p10000032-{i}_000.avi", "file_name": f"p10000032-{i}_000.mp4"}
        one["ecg_sha256"] = sha256(np.ascontiguousarray(digest).tobytes()) if ecg else None
        told = {key: one[key] for key in ("model", "model_sha256", "case_id", "trajectory", "noise_seed")}
        said = {"comment": f"Synthetic video. {json.dumps(told)}"}
        frames = np.random.default_rng(i).integers(0, 256, (9, 25, 33), dtype=np.uint8)
        path = write_video(out.parent / "clip.avi", frames, 30.0, "ffv1", said)
        samples.append((one, {one["frames_file"]: path.read_bytes(), one["file_name"]: b"shown"}))
    return write(out, samples)


def write_volumes(out: Path, values: NDArray[Any], affine: NDArray[np.float64], unit: str = "days") -> Path:
    """One future of two volumes `values` [x,y,z]."""
    from medgen.data.volumes import write_volume

    one = line("p10000032", times=[5.0, 30.0], time_unit=unit, covariates={"sex": "F"}, past=[{"image": "visit_of_jane.nii.gz"}])
    one["frames"] = [{"file_name": f"p10000032_000_{i:02d}.nii.gz", "time": t, "date": None} for i, t in enumerate(one["times"])]
    said = f"SYNTHETIC {one['model']} {one['model_sha256'][:12]} seed {one['noise_seed']}"
    files = {}
    for frame in one["frames"]:
        path = write_volume(out.parent / "v.nii.gz", values.transpose(2, 1, 0), affine, values.dtype, said)
        files[frame["file_name"]] = path.read_bytes()
    one["file_name"] = one["frames"][0]["file_name"]
    return write(out, [(one, files)])


def hounsfield(shape: tuple[int, int, int] = (7, 8, 5)) -> NDArray[np.int16]:
    return np.random.default_rng(1).integers(-1024, 1500, shape).astype(np.int16)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a release by its name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
