"""What the samplers write is what the exporters read: every kind of folder, made by its own sampler, becomes DICOM."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from medgen.data.video import read_video
from medgen.data.volumes import write_volume
from medgen.export import dicom, wfdb
from medgen.export.source import KINDS, read_generated
from medgen.sampling import ecg_to_echo, progression, severity, text_to_cxr


def exported(folder: Path) -> list[pydicom.FileDataset]:
    """The release's DICOM files; every sample's hash is in its line, and was checked."""
    assert all(set(one.files) <= set(one.line["sha256"]) for one in read_generated(folder))
    dicom.export(folder, folder.with_name("release"), progress=False)
    return [pydicom.dcmread(path) for path in sorted(folder.with_name("release").rglob("*.dcm"))]


def kind_of(folder: Path) -> str:
    return KINDS[read_generated(folder)[0].kind]


def test_films_from_text(own_folder: Path, tmp_path: Path) -> None:
    text_to_cxr.sample(
        own_folder, tmp_path / "s", prompt="Large left pleural effusion.", n=2, steps=2, bit_depth=16, progress=False
    )
    films = exported(tmp_path / "s")
    assert kind_of(tmp_path / "s") == "films from text" and len(films) == 2
    sampled = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "s").glob("prompt_*.png"))]
    assert sorted(d.pixel_array.tobytes() for d in films) == sorted(values.astype(np.uint16).tobytes() for values in sampled)


def test_severity_edits_without_their_source(own_folder: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "film.png")
    severity.sample(own_folder, tmp_path / "s", image=tmp_path / "film.png", target="large left pleural effusion", rounds=2, steps=3,
                    progress=False)  # fmt: skip
    assert kind_of(tmp_path / "s") == "severity edits"
    rounds = exported(tmp_path / "s")
    assert len(rounds) == 2 and not any(np.array_equal(d.pixel_array, values) for d in rounds)


def test_clips_with_the_shipped_recordings(echo_folder: Path, tmp_path: Path) -> None:
    ecg_to_echo.sample(echo_folder, tmp_path / "s", ecg="af", steps=1, progress=False)
    assert kind_of(tmp_path / "s") == "echo clips"
    ecg, clip = exported(tmp_path / "s")
    assert np.array_equal(clip.pixel_array, read_video(tmp_path / "s/clip_000.avi")[0])
    assert (ecg.Modality, ecg.WaveformSequence[0].NumberOfWaveformChannels) == ("ECG", 12)
    wfdb.export(tmp_path / "s", tmp_path / "records", progress=False)
    assert len(list((tmp_path / "records").glob("*.hea"))) == 1


def test_future_volumes_without_the_known_ones(progression_folder_3d: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (8, 8, 8))
    write_volume(tmp_path / "0.nii.gz", values, np.diag([2.0, 2.0, 2.0, 1.0]))
    progression.sample(progression_folder_3d, tmp_path / "s", past=(f"0={tmp_path / '0.nii.gz'}",), times=("+20", "+90"),
                       with_covariate="age=80", progress=False)  # fmt: skip
    (line,) = map(json.loads, (tmp_path / "s/metadata.jsonl").read_text().splitlines())
    slices = exported(tmp_path / "s")
    assert kind_of(tmp_path / "s") == "forecast volumes" and len(slices) == 16 * (
        len(line["frames"]) + len(line["counterfactual_frames"])
    )
    assert {d.Modality for d in slices} == {"CT"} and len({d.StudyInstanceUID for d in slices}) == 4


@pytest.mark.parametrize("pictures", [True, False])
def test_future_films(progression_folder: Path, pictures: bool, tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save(tmp_path / "0.png")
    past = (f"0={tmp_path / '0.png'}",)
    progression.sample(progression_folder, tmp_path / "s", past=past, times=("+9",), n=2, pictures=pictures, progress=False)
    films = exported(tmp_path / "s")
    assert kind_of(tmp_path / "s") == "forecast films" and len({d.PatientID for d in films}) == len(films) == 2
