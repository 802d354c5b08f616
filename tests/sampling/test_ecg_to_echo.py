"""Echo sampling end to end on a tiny pipeline: the same files whatever the batch, shards or interruptions; hostile inputs named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from medgen.data.ecg import ECG, cut, read_ecg, write_wfdb
from medgen.data.video import read_video, write_video
from medgen.sampling.case_files import EXAMPLES, example_ecgs
from medgen.sampling.cases import Case, CaseError
from medgen.sampling.ecg_to_echo import sample
from medgen.sampling.echo_cases import EchoAsked, beat_frames
from medgen.sampling.output import OutputError
from medgen.sampling.sampler import SamplingError

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    Case("slow", 3, 2, EchoAsked(ecg="sinus-60", ejection_fraction=55), {"pair_id": 1}),
    Case("fast", 3, 1, EchoAsked(ecg="sinus-100", ejection_fraction=55, view="A4C", ecg_start=2.0), {"pair_id": 1}),
    Case("free", 4, 1, EchoAsked(num_frames=12, fps=20)),
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(echo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases sampled in one go, four in flight."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = sample(echo_folder, out, cases=CASES, batch_size=4, progress=False)
    assert (result.new, result.total, result.complete) == (4, 4, True)
    return out


def test_batch_shards_and_order_change_nothing(echo_folder: Path, whole: Path, tmp_path: Path) -> None:
    for shard in ("2/3", "0/3", "1/3"):
        sample(echo_folder, tmp_path / "shards", cases=CASES, batch_size=1, shard=shard, progress=False)
    assert files(tmp_path / "shards") == files(whole)
    sample(echo_folder, tmp_path / "alone", cases=[CASES[1]], progress=False)
    alone = files(tmp_path / "alone")
    assert {name: alone[name] for name in alone if name.startswith("fast")} == {
        name: content for name, content in files(whole).items() if name.startswith("fast")
    }


def test_the_film_has_the_frames_and_both_say_that_they_are_synthetic(whole: Path) -> None:
    frames, fps = read_video(whole / "slow_000.avi")
    film, shown_fps = read_video(whole / "slow_000.mp4")
    assert (frames.shape, fps, shown_fps) == ((8, 32, 32), 10.0, 10.0)
    assert film.shape == (8, 320 + 96, 320)
    enlarged = np.asarray(Image.fromarray(frames[3]).resize((320, 320), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(film[3, :320] - enlarged).mean() < 4, "H.264, but the same picture"
    for name in ("slow_000.avi", "slow_000.mp4"):
        with av.open(str(whole / name)) as video:
            comment = video.metadata.get("comment", "")
            assert "no patient is shown" in comment
            assert str(lines(whole)[0]["noise_seed"]) in comment


def test_the_metadata_say_what_was_asked_and_what_was_heard(whole: Path) -> None:
    slow, other, fast, free = lines(whole)
    assert [row["file_name"] for row in (slow, other, fast, free)] == [
        "slow_000.mp4",
        "slow_001.mp4",
        "fast_000.mp4",
        "free_000.mp4",
    ]
    assert (
        slow["frames_file"] == "slow_000.avi" and slow["synthetic"] is True and slow["model"] == "echo" and slow["pair_id"] == 1
    )
    assert (slow["ejection_fraction"], slow["num_frames"], slow["fps"], slow["ecg_start"]) == (55, 8, 10, 1.0)
    assert slow["heart_rate"] == pytest.approx(60, abs=4) and fast["heart_rate"] == pytest.approx(100, abs=8)
    truth = np.array([0.98, 2.01, 3.08]) - 1.0  # as the simulator knew, from frame 0; near the clip
    assert slow["r_peaks"] == pytest.approx(truth, abs=0.02)
    assert slow["noise_seed"] == fast["noise_seed"] != other["noise_seed"], (
        "another ECG with the same seed starts from the same noise"
    )
    assert (free["ecg"], free["heart_rate"], free["r_peaks"], free["num_frames"], free["fps"]) == (None, None, [], 12, 20)
    assert slow["seams"] == [] and 8 in free["seams"], "of windows of 8 frames, 12 frames need two"
    assert slow["guidance_scale"] == 2.0 and len(slow["ecg_sha256"]) == 64


def test_ecg_ejection_fraction_and_seed_change_the_clip(echo_folder: Path, whole: Path, tmp_path: Path) -> None:
    sample(echo_folder, tmp_path, ecg=EXAMPLES / "sinus-60", ejection_fraction=20, seed=3, progress=False)
    clips = [whole / "slow_000.avi", whole / "slow_001.avi", whole / "fast_000.avi", tmp_path / "clip_000.avi"]
    assert len({read_video(clip)[0].tobytes() for clip in clips}) == 4


def test_the_contact_sheet_shows_every_clip(whole: Path) -> None:
    with Image.open(whole / "contact_sheet.png") as sheet:
        assert sheet.width > 3 * 296 and sheet.text["Synthetic"] == "true"


def test_the_same_command_again_does_nothing_and_lost_frames_are_made_again(
    echo_folder: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    assert "nothing to do" in str(sample(echo_folder, tmp_path / "copy", cases=CASES, progress=False))
    (tmp_path / "copy" / "fast_000.avi").unlink()
    assert sample(echo_folder, tmp_path / "copy", cases=CASES, progress=False).new == 1
    assert files(tmp_path / "copy") == files(whole)


def test_an_ecg_that_was_replaced_is_noticed(echo_folder: Path, tmp_path: Path) -> None:
    ecg = read_ecg(EXAMPLES / "sinus-60")
    write_wfdb(ecg, tmp_path / "mine")
    sample(echo_folder, tmp_path / "out", ecg=tmp_path / "mine.hea", progress=False)
    write_wfdb(replace(ecg, signal=ecg.signal * 0.8), tmp_path / "mine")
    with pytest.raises(OutputError, match="input_files_sha256"):
        sample(echo_folder, tmp_path / "out", ecg=tmp_path / "mine.hea", progress=False)


def test_a_killed_run_continues_to_the_same_files(echo_folder: Path, tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    write_wfdb(read_ecg(EXAMPLES / "pvc"), tmp_path / "ecg" / "mine")
    cases.write_text(json.dumps({"case_id": "a", "ecg": "ecg/mine", "seed": 1, "n": 12}) + "\n")
    sample(echo_folder, tmp_path / "whole", cases=cases, progress=False)
    words = ["--pipeline", str(echo_folder), "--out", str(tmp_path / "out"), "--cases", str(cases), "--batch-size", "1"]
    command = [sys.executable, str(ROOT / "sample" / "ecg_to_echo.py"), *words]
    with contextlib.ExitStack() as running:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        running.callback(process.kill)
        while process.poll() is None and len(list((tmp_path / "out").glob("a_*.mp4"))) < 3:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    left = len(list((tmp_path / "out").glob("a_*.mp4")))
    assert 3 <= left < 12 and not (tmp_path / "out" / "metadata.jsonl").exists()
    result = sample(echo_folder, tmp_path / "out", cases=cases, progress=False)
    assert result.complete and 12 - left <= result.new <= 13 - left
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert [row["file_name"] for row in lines(tmp_path / "out")] == [f"a_{i:03d}.mp4" for i in range(12)]


# What is not as it should be, but can be sampled: flagged.


def ecg_file(folder: Path, change: ECG) -> Path:
    return write_wfdb(change, folder / "ecg")


@pytest.mark.parametrize("name", ["units", "one-lead", "one-flat-lead", "thirty-seconds", "short"])
def test_imperfect_ecgs_are_flagged(echo_folder: Path, tmp_path: Path, name: str) -> None:
    ecg = read_ecg(EXAMPLES / "sinus-60")
    long = np.concatenate([ecg.signal] * 4, axis=1)[:, : 30 * 250]
    flat = ecg.signal.copy()
    flat[ecg.leads.index("V1")] = 0
    changed = {
        "units": replace(ecg, signal=ecg.signal * 1000),
        "one-lead": replace(ecg, signal=ecg.signal[1:2], leads=("II",)),
        "one-flat-lead": replace(ecg, signal=flat),
        "thirty-seconds": replace(ecg, signal=long),
        "short": cut(ecg, 0.0, 1.9),
    }[name]
    start = {"thirty-seconds": 20.5, "short": 1.5}.get(name)
    sample(echo_folder, tmp_path / "out", ecg=ecg_file(tmp_path, changed), ecg_start=start, progress=False)
    line = lines(tmp_path / "out")[0]
    words = {"units": "mV", "one-flat-lead": "V1", "short": "s before the last frame"}.get(name)
    assert words is None or any(words in flag for flag in line["ecg_flags"]), line["ecg_flags"]
    if name != "short":
        assert line["heart_rate"] == pytest.approx(60, abs=8)
    if name == "thirty-seconds":
        assert line["ecg_start"] == 20.5
    assert read_video(tmp_path / "out" / "clip_000.mp4")[0].shape[0] == 8


# What cannot be sampled: named before anything is written.


def nothing(ecg: ECG) -> ECG:
    return replace(ecg, signal=np.zeros_like(ecg.signal))


def saturated(ecg: ECG) -> ECG:
    return replace(
        ecg, signal=np.where(np.arange(ecg.signal.shape[1]) % 500 < 400, 5.0, -5.0).astype(np.float32)[None].repeat(12, 0)
    )


@pytest.mark.parametrize("broken", [nothing, saturated])
def test_unusable_ecgs_are_refused_by_case(echo_folder: Path, tmp_path: Path, broken: object) -> None:
    path = ecg_file(tmp_path, broken(read_ecg(EXAMPLES / "sinus-60")))  # type: ignore[operator]
    with pytest.raises(CaseError, match="case 'clip', field 'ecg'.*no usable lead"):
        sample(echo_folder, tmp_path / "out", ecg=path, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"ecg": None}, CaseError, "either conditions .--ecg"),
        ({"ecg": "nowhere"}, CaseError, "no file nowhere; shipped examples: af, pvc, sinus-100, sinus-60"),
        ({"ecg_start": 60.0}, CaseError, "were not recorded: the ECG runs from 0 to 8 s"),
        ({"ejection_fraction": 0.55}, CaseError, "'ejection_fraction'.*fraction .55 %"),
        ({"ejection_fraction": 120.0}, CaseError, "'ejection_fraction'"),
        ({"view": "A5C"}, CaseError, "'view': expected one of a4c, a2c"),
        ({"num_frames": 0}, CaseError, "'num_frames'"),
        ({"fps": float("inf")}, CaseError, "'fps'"),
        ({"first_frame": Path(__file__)}, CaseError, "field 'first_frame'.*cannot be decoded"),
        ({"ecg": None, "ecg_start": 1.0}, CaseError, "there is an ecg_start"),
        ({"guidance": {"ecg": -1.0}}, SamplingError, "ecg must be between 0 and 1000"),
        ({"steps": 0}, SamplingError, "steps"),
    ],
)
def test_a_wrong_request_is_named_before_anything_is_written(
    echo_folder: Path, tmp_path: Path, options: dict, error: type[ValueError], words: str
) -> None:
    with pytest.raises(error, match=words):
        sample(echo_folder, tmp_path / "out", **{"ecg": "sinus-60", "progress": False, **options})
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_another_task_is_refused(own_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match="holds a TextToCXRPipeline, which makes no echo clips"):
        sample(own_folder, tmp_path / "out", ecg="sinus-60", progress=False)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "link"])
def test_a_cases_file_reaches_no_file_above_its_folder(echo_folder: Path, tmp_path: Path, name: str) -> None:
    write_wfdb(read_ecg(EXAMPLES / "af"), tmp_path / "outside")
    inside = tmp_path / "cases"
    inside.mkdir()
    (inside / "link.hea").symlink_to(tmp_path / "outside.hea")
    (inside / "cases.jsonl").write_text(json.dumps({"case_id": "a", "ecg": name, "seed": 1}) + "\n")
    with pytest.raises(CaseError, match="leads out of"):
        sample(echo_folder, tmp_path / "out", cases=inside / "cases.jsonl", progress=False)
    (inside / "cases.jsonl").write_text(json.dumps({"case_id": "a", "ecg": "outside.hea", "seed": 1}) + "\n")
    assert sample(echo_folder, tmp_path / "out", cases=inside / "cases.jsonl", root=tmp_path, progress=False).complete


def test_a_first_frame_comes_from_an_image_or_from_a_video_of_one_frame(echo_folder: Path, tmp_path: Path) -> None:
    still = np.random.default_rng(0).integers(0, 255, (40, 32), dtype=np.uint8)
    Image.fromarray(still).save(tmp_path / "still.png")
    write_video(tmp_path / "still.avi", still[None], 25)
    for kind in ("png", "avi"):
        sample(echo_folder, tmp_path / kind, first_frame=tmp_path / f"still.{kind}", ecg="af", progress=False)
    assert (tmp_path / "png" / "clip_000.avi").read_bytes()[-2000:] == (tmp_path / "avi" / "clip_000.avi").read_bytes()[-2000:]
    assert len(lines(tmp_path / "png")[0]["first_frame_sha256"]) == 64


def test_the_examples_and_the_frames_of_a_beat() -> None:
    assert example_ecgs() == ["af", "pvc", "sinus-100", "sinus-60"]
    assert sum(path.stat().st_size for path in EXAMPLES.iterdir()) < 200_000
    assert beat_frames([-0.4, 0.21, 1.1], [-0.1, 0.52, None], 32, 20.0) == (4, 10)
    assert beat_frames([], [], 32, 20.0) == (0, 16)
