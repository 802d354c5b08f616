"""Echo items: windows at real times, resampled honestly, with the ECG that belongs to them and the phase of every frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from echo_fixture import beats, pulsing, write_echo_set
from pydicom.data import get_testdata_file

from medgen.data.clips import VideoPreprocessing, load_clip, resampled
from medgen.data.ecg import LEADS, ECGPreparation
from medgen.data.echo_dataset import EchoDataError, EchoDataset
from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest, write_manifest
from medgen.data.video import write_video

SMALL = VideoPreprocessing(size=32, frames=16, fps=20)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("echo")
    write_echo_set(folder)
    return folder


def dataset(root: Path, **options: object) -> EchoDataset:
    manifest = read_manifest(root / "manifest.parquet", record=EchoRecord)
    return EchoDataset(manifest, SMALL, ECGPreparation(), **options)  # type: ignore[arg-type]


def test_an_item(root: Path) -> None:
    item = dataset(root)[0]
    assert item["id"] == "a" and item["video"].shape == (16, 1, 32, 32) and item["video"].dtype == torch.float32
    assert -1 <= item["video"].min() < item["video"].max() <= 1
    assert item["times"][0] == 0 and torch.allclose(item["times"], torch.arange(16) / 20, atol=1 / 60 + 1e-6)
    assert (item["ejection_fraction"], item["view"], item["fps"]) == (55.0, 0, 20.0)
    window = item["ecg"]
    assert window.signal.shape == (12, round((15 / 20 + 2) * 250)) and window.start == pytest.approx(-1, abs=0.002)
    assert [lead for lead, there in zip(LEADS, window.lead_mask, strict=True) if there] == ["II", "V1"]
    assert not np.asarray(window.signal)[0].any(), "a lead that was not recorded holds nothing"


def test_phase_follows_the_beats(root: Path) -> None:
    data = dataset(root)
    _, r_peaks = beats(0.0, 5.0, first=1.75)
    item, clip = data[0], data.clip(0)
    starts = [
        s for s in range(len(clip.frames) - 15) if np.allclose(clip.times[s : s + 16] - clip.times[s], item["times"], atol=1e-5)
    ]
    video = [s for s in starts if torch.equal(clip.video(s, 16), item["video"])]
    times = clip.times[video[0] : video[0] + 16] + 1.5
    since = np.array([t - r_peaks[r_peaks <= t].max() for t in times])
    assert np.allclose(item["phase"][:, 2], since, atol=0.012)
    assert np.allclose(item["phase"][:, 3], 0.8, atol=0.02)
    assert np.allclose(np.hypot(item["phase"][:, 0], item["phase"][:, 1]), 1, atol=1e-5)


def test_the_disc_is_largest_at_the_r_peak(root: Path) -> None:
    """Video and ECG share the clock that the record says: the picture's own beats are the ECG's."""
    data = dataset(root)
    clip, prepared = data.clip(0), data.prepared_ecg(0)
    assert prepared is not None
    size = (clip.frames < 30).mean(axis=(1, 2))
    since = np.array([(t - prepared.r_peaks)[np.abs(t - prepared.r_peaks).argmin()] for t in clip.times])
    agreement = [np.corrcoef(size, np.cos(2 * np.pi * (since - shift) / 0.8))[0, 1] for shift in (0.0, 0.2, 0.4)]
    assert agreement[0] > 0.95 > 0.3 > agreement[1] > agreement[2]


def test_without_an_ecg(root: Path) -> None:
    item = dataset(root)[1]
    assert item["ecg"] is None and torch.isnan(item["phase"]).all() and item["phase"].shape == (16, 4)
    assert np.isnan(item["ejection_fraction"]) and item["view"] == 2


def test_a_patient_pair_is_given_only_if_asked_for_and_has_no_phase(root: Path) -> None:
    item = dataset(root)[2]
    assert item["ecg"] is None and item["view"] == -1
    item = dataset(root, pairings=("beat_synchronous", "patient"))[2]
    assert np.asarray(item["ecg"].sample_mask).all() and torch.isnan(item["phase"]).all()


def test_a_short_clip_stays_short_and_its_ecg_goes_on(root: Path) -> None:
    item = dataset(root)[3]
    assert len(item["video"]) == len(item["times"]) == 6, "9 frames at 30 Hz are 0.27 s: 6 at 20 Hz"
    assert np.asarray(item["ecg"].signal).shape[1] == round((5 / 20 + 2) * 250)


def test_windows_depend_on_seed_epoch_and_record_alone(root: Path) -> None:
    data, again = dataset(root, seed=3), dataset(root, seed=3)
    starts = []
    for epoch in range(6):
        data.set_epoch(epoch)
        again.set_epoch(epoch)
        first = data[0]
        assert torch.equal(again[0]["video"], first["video"]) and torch.equal(again[0]["phase"], first["phase"])
        starts.append(first["video"].sum().item())
    assert len(set(starts)) > 2, "another epoch shows another part"


def test_the_cache_changes_nothing(root: Path, tmp_path: Path) -> None:
    plain, cached = dataset(root), dataset(root, cache=tmp_path)
    for _ in range(2):
        for index in (0, 1, 3):
            a, b = plain[index], cached[index]
            assert torch.equal(a["video"], b["video"]) and torch.equal(a["times"], b["times"])
            assert torch.equal(a["phase"].nan_to_num(9), b["phase"].nan_to_num(9))
            assert (a["ecg"] is None) == (b["ecg"] is None)
            if a["ecg"] is not None:
                assert np.array_equal(np.asarray(a["ecg"].signal), np.asarray(b["ecg"].signal))
    prepared, first = cached.prepared_ecg(0), plain.prepared_ecg(0)
    assert prepared is not None and first is not None
    assert (prepared.leads, prepared.quality, prepared.flags) == (first.leads, first.quality, first.flags)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 4 and all(p.suffix == ".npz" for p in files), "three clips and one ECG (a and d share it)"
    files[0].write_bytes(b"cut off")
    assert torch.equal(cached[0]["video"], plain[0]["video"])


def test_a_faster_file_gives_real_frames_and_a_slower_one_is_interpolated() -> None:
    frames = np.arange(0, 60, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8) * 4
    clip = resampled(frames, np.arange(60) / 50, 20)
    assert np.array_equal(clip.frames, frames[clip.source]) and np.allclose(clip.times, clip.source / 50)
    assert np.abs(clip.times - np.arange(len(clip.times)) / 20).max() <= 0.5 / 50 + 1e-9
    slow = resampled(frames, np.arange(60) / 10, 20)
    assert np.allclose(np.diff(slow.times), 0.05) and slow.frames[1, 0, 0] == 2
    uneven = np.cumsum([0.02, 0.03] * 30)
    assert np.allclose(resampled(frames, uneven, 20).times, uneven[resampled(frames, uneven, 20).source])
    nearly = resampled(frames, np.arange(60) / 19.8, 20)
    assert len(set(nearly.source)) == len(nearly.source), "no frame twice"


def test_size_pads_or_crops(root: Path) -> None:
    path = root / "videos" / "a.avi"
    padded, cropped = (load_clip(path, VideoPreprocessing(size=28, fps=30, pad=pad), 30) for pad in (True, False))
    assert padded.frames.shape == cropped.frames.shape == (60, 28, 28)
    assert not padded.frames[:, 0].any() and cropped.frames[:, 0].any()


def test_a_broken_video_or_ecg_names_the_record(root: Path, tmp_path: Path) -> None:
    path = write_echo_set(tmp_path)
    (tmp_path / "videos" / "a.avi").write_bytes((tmp_path / "videos" / "a.avi").read_bytes()[:3000])
    (tmp_path / "ecg" / "a.dat").write_bytes(b"")
    data = EchoDataset(read_manifest(path, record=EchoRecord), SMALL, ECGPreparation())
    with pytest.raises(EchoDataError, match=r"record 'a' of discs: .*a\.avi"):
        data[0]
    with pytest.raises(EchoDataError, match=r"record 'd' of discs: .*ecg/a"):
        data[3]


def test_a_real_cine_with_a_real_ecg(tmp_path: Path) -> None:
    """Pydicom's own echo cine (JPEG, 30 Hz) and 12-lead ECG (DICOM waveform), as two recordings of one patient."""
    for name in ("examples_ybr_color.dcm", "waveform_ecg.dcm"):
        source = get_testdata_file(name, download=False)
        assert source is not None
        (tmp_path / name).write_bytes(Path(source).read_bytes())
    record = EchoRecord(
        "real", "p", "s", "examples_ybr_color.dcm", "A4C", 30.0, 30, "train", ecg="waveform_ecg.dcm", pairing="patient"
    )
    manifest = read_manifest(write_manifest([record], tmp_path / "m.jsonl", name="real", source="test"), record=EchoRecord)
    item = EchoDataset(manifest, SMALL, ECGPreparation(), pairings=("patient",))[0]
    assert item["video"].shape == (16, 1, 32, 32) and item["video"].std() > 0.1
    assert item["ecg"].lead_mask.all() and item["ecg"].sample_mask.all() and 0.2 < np.abs(item["ecg"].signal).max() < 5
    assert torch.isnan(item["phase"]).all(), "other beats than those on the film"


def test_a_video_of_one_frame(tmp_path: Path) -> None:
    path = write_echo_set(tmp_path, a={"frames": 1})
    write_video(tmp_path / "videos" / "a.avi", pulsing(1, 30), 30)
    item = EchoDataset(read_manifest(path, record=EchoRecord), SMALL, ECGPreparation())[0]
    assert item["video"].shape == (1, 1, 32, 32) and item["times"].tolist() == [0.0]
    assert item["ecg"].signal.shape == (12, 500) and torch.isfinite(item["phase"]).all(), "one second before it, and one after"
