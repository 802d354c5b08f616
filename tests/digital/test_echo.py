"""Digital echo clips: truth that agrees with the pixels, files that any reader opens, the same bytes from the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from medgen.data.ecg import LEADS, read_ecg
from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest
from medgen.data.video import read_video
from medgen.digital.echo import frame_truth, record_echo, write_dataset
from medgen.digital.echo_view import CAVITY, MYOCARDIUM, Anatomy
from medgen.digital.heart import draw_heart


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("echo")
    write_dataset(out, n=3, seed=11, frames=12, processes=1)
    return out


def area_length_ml(mask: np.ndarray, pixel_mm: float) -> float:
    """ASE 2015, from a mask alone: its area and its longest extent."""
    points = np.argwhere(mask).astype(float)
    centred = points - points.mean(0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    length = (np.ptp(centred @ axis) + 1) * pixel_mm
    return 8 * (mask.sum() * pixel_mm**2) ** 2 / (3 * np.pi * length) / 1000


@pytest.mark.parametrize("view", ["A4C", "A2C"])
def test_masks_hold_the_volume_that_the_truth_states(view: str) -> None:
    heart = replace(draw_heart(4, 2, "sinus"), ejection_fraction=60.0)
    echo = record_echo(heart, frames=20, view=view)
    measured = np.array([area_length_ml(mask == CAVITY, echo.clip.pixel_mm) for mask in echo.clip.masks])
    assert np.corrcoef(measured, echo.motion.volume_ml)[0, 1] > 0.99
    np.testing.assert_allclose(measured, echo.motion.volume_ml, rtol=0.12)


def test_blood_is_dark_and_muscle_bright() -> None:
    clip = record_echo(draw_heart(4, 1), frames=4).clip
    assert clip.frames[clip.masks == MYOCARDIUM].mean() > 2 * clip.frames[clip.masks == CAVITY].mean()


def test_speckle_moves_with_the_muscle() -> None:
    """Followed to where the tissue has moved over systole, the muscle's pixels are alike; at the same place of the image less so."""
    heart = replace(draw_heart(4, 3, "sinus"), ejection_fraction=65.0, heart_rate=60.0)
    echo = record_echo(heart, frames=20)
    first = int(frame_truth(echo)["ed_frames"][0])
    pair = slice(first, first + 5, 4)
    axis = (np.arange(112) + 0.5) * echo.clip.pixel_mm
    x, z = (torch.as_tensor(v, dtype=torch.float32) for v in np.meshgrid(axis - 56 * echo.clip.pixel_mm, axis))
    place = Anatomy(heart, echo.window, echo.motion[pair], echo.rhythm.respiration(echo.times)[pair]).locate(x, z)
    before, after = echo.clip.frames[pair]
    muscle_before, muscle_after = echo.clip.masks[pair] == MYOCARDIUM
    tissue = torch.stack([place.along, place.across], -1).numpy()
    apart, where = cKDTree(tissue[1][muscle_after]).query(tissue[0][muscle_before])
    found = apart < 0.8
    followed = np.corrcoef(before[muscle_before][found], after[muscle_after][where[found]])[0, 1]
    both = muscle_before & muscle_after
    at_one_place = np.corrcoef(before[both], after[both])[0, 1]
    assert found.mean() > 0.5
    assert followed > at_one_place + 0.1


def test_the_manifest_names_readable_files_on_one_clock(folder: Path) -> None:
    manifest = read_manifest(folder / "manifest.parquet", record=EchoRecord)
    assert len(manifest) == 3
    for record in manifest.records:
        frames, fps = read_video(folder / record.video)
        assert frames.shape == (12, 112, 112) and fps == pytest.approx(20)
        ecg = read_ecg(folder / str(record.ecg))
        assert ecg.leads == LEADS and ecg.rate == 500
        assert len(ecg.signal[0]) / 500 == pytest.approx(1.5 + 11 / 20 + 1.5, abs=0.01)
        with np.load(folder / str(record.annotations)) as truth:
            assert truth["masks"].shape == frames.shape
            peaks = truth["r_peaks"] + record.ecg_offset
        # the QRS complex is where the truth says: the signal's steepest moments are near an R peak
        steep = np.abs(np.gradient(ecg.signal, axis=1)).sum(0)
        inside = peaks[(peaks > 0.1) & (peaks < len(steep) / 500 - 0.1)]
        assert min(abs(inside - steep.argmax() / 500)) < 0.1  # a wide QRS is steepest before its peak


def test_a_smaller_population_is_the_beginning_of_a_larger_one(folder: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, n=2, seed=11, frames=12, processes=1)
    names = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "videos" / name).read_bytes() == (folder / "videos" / name).read_bytes()


def test_an_interrupted_run_continues_and_ends_the_same(folder: Path, tmp_path: Path) -> None:
    settings = '{"seed": 11, "size": 112, "frames": 12, "fps": 20.0, "rhythm": null, "twa_mv": 0.0}\n'
    (tmp_path / "progress.jsonl").write_text(settings + '[{"record_id": "half')
    write_dataset(tmp_path, n=3, seed=11, frames=12, processes=1)
    again, whole = (read_manifest(d / "manifest.parquet", record=EchoRecord).records for d in (tmp_path, folder))
    assert again == whole
    (tmp_path / "progress.jsonl").write_text('{"seed": 9}\n')
    with pytest.raises(ValueError, match="begun with other settings"):
        write_dataset(tmp_path, n=3, seed=11, frames=12, processes=1)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"n": 1, "frames": 1}, {"n": 1, "fps": 0.0}, {"n": 1, "size": 8}])
def test_impossible_clips_are_refused(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n must be"):
        write_dataset(tmp_path, **wrong)
