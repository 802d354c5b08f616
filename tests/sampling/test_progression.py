"""Progression sampling end to end on a tiny pipeline: the same files whatever the batch, shards or interruptions; hostile inputs named."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import nibabel
import numpy as np
import pytest
import torch
from follow_ups import SIZE, disc, write_follow_ups
from PIL import Image

from medgen.cli import main
from medgen.data.visit_images import VisitPreprocessing
from medgen.data.visit_records import BIOMARKERS
from medgen.data.volumes import load_volume, write_volume
from medgen.models.film_meter import FilmMeter
from medgen.sampling.cases import CaseError, read_cases
from medgen.sampling.output import OutputError
from medgen.sampling.progression import sample
from medgen.sampling.progression_cases import ProgressionAsked, Reads, inspect
from medgen.sampling.sampler import SamplingError

ROOT = Path(__file__).resolve().parents[2]
READS = Reads(VisitPreprocessing(size=SIZE), "days", ("drainage",), {"age": None, "sex": ("F", "M")}, False, 3)


def past(*times: float, **more: Any) -> list[dict[str, Any]]:
    return [{"time": t, "image": f"images/p1-{i}.png", **more} for i, t in enumerate(times)]


def case(case_id: str, **more: Any) -> dict[str, Any]:
    return {"case_id": case_id, "seed": 3, "n": 1, "past": past(0, 20), "times": [20, 50.5], **more}


CASES = [
    case("plain", n=2, covariates={"age": 60, "sex": "F"}, pair_id=1),
    case("between", times=[10], mode="autoregressive"),
    case(
        "treated",
        past=past(0, 20, date="2101-03-05")[:1] + past(0, 20)[1:],
        events=[{"name": "drainage", "time": 25}],
        counterfactual={"events": []},
    ),
]


@pytest.fixture(scope="module")
def follow_ups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Visits of discs with their manifest, and `cases.jsonl` beside it."""
    manifest = write_follow_ups(tmp_path_factory.mktemp("visits"), patients=6)
    (manifest.parent / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CASES))
    return manifest


@pytest.fixture(scope="module")
def whole(progression_folder: Path, follow_ups: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases sampled in one go, three in flight."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = sample(progression_folder, out, cases=follow_ups.parent / "cases.jsonl", batch_size=3, progress=False)
    assert (result.new, result.total, result.complete) == (4, 4, True)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, dtype=float)


def test_batch_shards_and_neighbours_change_nothing(
    progression_folder: Path, follow_ups: Path, whole: Path, tmp_path: Path
) -> None:
    cases = follow_ups.parent / "cases.jsonl"
    for shard in ("2/3", "0/3", "1/3"):
        sample(progression_folder, tmp_path / "shards", cases=cases, batch_size=1, shard=shard, progress=False)
    assert files(tmp_path / "shards") == files(whole)
    alone = [one for one in read_cases(cases, ProgressionAsked) if one.case_id == "treated"]
    sample(progression_folder, tmp_path / "alone", cases=alone, root=cases.parent, progress=False)
    there = files(tmp_path / "alone")
    assert {name: there[name] for name in there if name.startswith("treated")} == {
        name: content for name, content in files(whole).items() if name.startswith("treated")
    }


def test_frames_have_their_times_dates_and_say_that_they_are_synthetic(whole: Path) -> None:
    plain, other, between, treated = lines(whole)
    assert [frame["file_name"] for frame in plain["frames"]] == ["plain_000_00.png", "plain_000_01.png"]
    assert [frame["time"] for frame in plain["frames"]] == plain["times"] == [20, 50.5]
    assert plain["past"][1]["image"] == "images/p1-1.png" and len(plain["past"][1]["image_sha256"]) == 64
    assert (plain["pair_id"], plain["synthetic"], plain["mode"], plain["time_unit"]) == (1, True, "joint", "days")
    assert (plain["model"], plain["guidance_scale"], between["mode"]) == ("progression", 2.0, "autoregressive")
    assert plain["noise_seed"] == treated["noise_seed"] != other["noise_seed"]
    assert [frame["date"] for frame in treated["frames"]] == ["2101-03-25", "2101-04-24"] and plain["dates"] == [None, None]
    for line in lines(whole):
        assert {line["file_name"], *line["files"]} <= {path.name for path in whole.iterdir()}
        for frame in line["frames"]:
            with Image.open(whole / frame["file_name"]) as image:
                assert image.size == (SIZE, SIZE) and image.mode == "L"
                assert image.text["Synthetic"] == "true" and image.text["noise_seed"] == str(line["noise_seed"])  # type: ignore[attr-defined]
        with av.open(str(whole / line["video"])) as video:
            assert "not an image of a patient" in video.metadata["comment"]
            seconds = video.streams.video[0].frames / float(video.streams.video[0].average_rate or 0)
            assert seconds == len(line["past"]) + len(line["frames"])


def test_the_frames_of_a_future_differ_and_futures_do(whole: Path) -> None:
    assert not np.array_equal(grey(whole / "plain_000_01.png"), grey(whole / "plain_001_01.png"))
    assert not np.array_equal(grey(whole / "plain_000_00.png"), grey(whole / "plain_000_01.png"))


def test_the_counterfactual_is_the_same_draw_with_one_change(
    progression_folder: Path, follow_ups: Path, whole: Path, tmp_path: Path
) -> None:
    treated = lines(whole)[-1]
    assert treated["change"] == "without drainage (day 25)"
    assert treated["change_means"] == "model response, not a causal effect"
    assert [frame["file_name"] for frame in treated["counterfactual_frames"]] == [
        "treated_000_cf_00.png",
        "treated_000_cf_01.png",
    ]
    with Image.open(whole / treated["difference"]) as image:
        assert "not a causal effect" in image.text["Change"]  # type: ignore[attr-defined]
    untreated = case("untreated", past=CASES[2]["past"])
    (follow_ups.parent / "untreated.jsonl").write_text(json.dumps(untreated) + "\n")
    sample(progression_folder, tmp_path / "out", cases=follow_ups.parent / "untreated.jsonl", progress=False)
    for i in range(2):
        assert np.array_equal(grey(tmp_path / "out" / f"untreated_000_0{i}.png"), grey(whole / f"treated_000_cf_0{i}.png"))
    assert not np.array_equal(grey(whole / "treated_000_01.png"), grey(whole / "treated_000_cf_01.png"))


def test_the_same_command_again_does_nothing_and_a_lost_frame_is_made_again(
    progression_folder: Path, follow_ups: Path, whole: Path, tmp_path: Path
) -> None:
    cases = follow_ups.parent / "cases.jsonl"
    shutil.copytree(whole, tmp_path / "copy")
    assert "nothing to do" in str(sample(progression_folder, tmp_path / "copy", cases=cases, progress=False))
    (tmp_path / "copy" / "plain_001_01.png").unlink()
    assert sample(progression_folder, tmp_path / "copy", cases=cases, progress=False).new == 1
    assert files(tmp_path / "copy") == files(whole)


def test_without_pictures_the_frames_are_the_same(
    progression_folder: Path, follow_ups: Path, whole: Path, tmp_path: Path
) -> None:
    out, cases = tmp_path / "out", follow_ups.parent / "cases.jsonl"
    assert sample(progression_folder, out, cases=cases, pictures=False, progress=False).complete
    names = {name for line in lines(out) for name in line["files"]}
    assert {path.name for path in out.iterdir()} == names | {
        "metadata.jsonl",
        "cases.jsonl",
        "sampling.json",
        "contact_sheet.png",
    }
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
    assert "nothing to do" in str(sample(progression_folder, out, cases=cases, pictures=False, progress=False))


def test_an_image_that_was_replaced_is_noticed(progression_folder: Path, tmp_path: Path) -> None:
    Image.fromarray(disc(5, 3)).save(tmp_path / "a.png")
    words: dict[str, Any] = {"past": (f"0={tmp_path / 'a.png'}",), "times": ("+30",), "progress": False}
    sample(progression_folder, tmp_path / "out", **words)
    Image.fromarray(disc(6, 3)).save(tmp_path / "a.png")
    with pytest.raises(OutputError, match="input_files_sha256"):
        sample(progression_folder, tmp_path / "out", **words)


def test_a_killed_run_continues_to_the_same_files(progression_folder: Path, follow_ups: Path, tmp_path: Path) -> None:
    cases = follow_ups.parent / "many.jsonl"
    cases.write_text(json.dumps(case("a", n=12)) + "\n")
    sample(progression_folder, tmp_path / "whole", cases=cases, progress=False)
    words = ["--pipeline", str(progression_folder), "--out", str(tmp_path / "out"), "--cases", str(cases), "--batch-size", "1"]
    command = [sys.executable, str(ROOT / "sample" / "progression.py"), *words]
    with contextlib.ExitStack() as running:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        running.callback(process.kill)
        while process.poll() is None and len(list((tmp_path / "out").glob("a_*.mp4"))) < 3:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    result = sample(progression_folder, tmp_path / "out", cases=cases, progress=False)
    assert result.complete and 0 < result.new < 12
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# The words of a command line.


def test_a_record_of_a_manifest_is_continued(progression_folder: Path, follow_ups: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample(progression_folder, out, follow_ups, "p1", times=("+0", "+30", "400"), n=2, without_event="drainage", progress=False)
    line = lines(out)[0]
    last = line["past"][-1]["time"]
    assert len(line["past"]) == 4 and line["times"] == [last, last + 30, 400]
    assert (line["covariates"], line["events"][0]["name"]) == ({"sex": "M", "age": 41.0, "weight_kg": 70.0}, "drainage")
    assert line["change"].startswith("without drainage") and line["patient_id"] == "p1"
    sample(progression_folder, tmp_path / "early", follow_ups, "p1", until=last - 1, times=(str(last),), progress=False)
    assert len(lines(tmp_path / "early")[0]["past"]) == 3


def test_on_the_command_line_a_plus_counts_from_the_last_visit(
    progression_folder: Path, follow_ups: Path, tmp_path: Path
) -> None:
    words = f"--pipeline {progression_folder} --out {tmp_path / 'out'} --reference {follow_ups} --record p1 --times +30 500 --no-progress"
    assert main(["sample", "progression", *words.split()]) == 0
    line = lines(tmp_path / "out")[0]
    assert line["times"] == [line["past"][-1]["time"] + 30, 500]


def test_images_with_their_times_treatments_and_covariates(progression_folder: Path, follow_ups: Path, tmp_path: Path) -> None:
    images = follow_ups.parent / "images"
    sample(
        progression_folder,
        tmp_path / "out",
        past=(f"0={images / 'p0-0.png'}", f"40={images / 'p0-1.png'}"),
        times=(20.0, "+30"),
        events=("drainage@+5", "surgery@3=2"),
        covariates=("age=63", "sex=X"),
        with_covariate="age=unknown",
        mode="autoregressive",
        bit_depth=16,
        progress=False,
    )
    line = lines(tmp_path / "out")[0]
    assert line["times"] == [20, 70] and line["mode"] == "autoregressive" and line["change"] == "age unknown instead of 63"
    assert line["events"] == [{"name": "drainage", "time": 45, "value": None}, {"name": "surgery", "time": 3, "value": 2}]
    assert any("'surgery' is not known" in flag for flag in line["flags"])
    assert any("'X' is none of F, M: counts as unknown" in flag for flag in line["flags"])
    assert grey(tmp_path / "out" / "patient_000_01.png").max() > 255


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"record": None}, CaseError, "give the --record ID: .* has 6, for example p0"),
        ({"record": "p77"}, CaseError, "no record 'p77'"),
        ({"reference": None, "record": None}, CaseError, "give --cases FILE, or --reference"),
        ({"times": ()}, CaseError, "give the wanted --times"),
        ({"times": ("soon",)}, CaseError, "time 'soon': expected a number"),
        ({"times": ("+30", "+10")}, CaseError, "'times': expected times that increase"),
        ({"times": ("nan",)}, CaseError, "'times.0'"),
        ({"until": -5.0}, CaseError, "'p1' has no image up to day -5"),
        ({"events": ("drainage",)}, CaseError, "expected NAME@TIME"),
        ({"covariates": ("age",)}, CaseError, "expected NAME=VALUE"),
        ({"without_event": "surgery"}, CaseError, "no such event; this patient's are: drainage"),
        ({"without_event": "drainage", "with_event": "drainage@3"}, CaseError, "give one of --without-event"),
        ({"cases": Path("cases.jsonl")}, CaseError, "either a file of cases"),
        ({"steps": 0}, SamplingError, "steps"),
        ({"context_noise": -1.0}, SamplingError, "context_noise"),
        ({"judge": "nobody"}, SamplingError, "judge 'nobody'"),
    ],
)
def test_a_wrong_request_is_named_before_anything_is_written(
    progression_folder: Path, follow_ups: Path, tmp_path: Path, options: dict, error: type[ValueError], words: str
) -> None:
    with pytest.raises(error, match=words):
        sample(progression_folder, tmp_path / "out",
               **{"reference": follow_ups, "record": "p1", "times": ("+30",), "progress": False, **options})  # fmt: skip
    assert not (tmp_path / "out").exists()


# Cases.


def checked(folder: Path, **changes: Any) -> tuple[str, ...]:
    """The flags of a case."""
    path = folder / "one.jsonl"
    path.write_text(json.dumps({**case("a"), **changes}) + "\n")
    return inspect(read_cases(path, ProgressionAsked)[0], folder, READS).flags


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"past": []}, "'past'"),
        ({"past": past(20, 0)}, "'past': expected times that increase, but 0 .number 2. follows 20"),
        ({"past": past(0, 0)}, "'past': expected times that increase"),
        ({"past": [{"time": 0}]}, "'past.0.image': missing"),
        ({"past": past(0, date="yesterday")}, "'past.0.date'"),
        ({"past": past(0) + [{"time": 9, "image": "none.png"}]}, "case 'a', field 'past.1.image': there is no image none.png"),
        ({"past": [{"time": 0, "image": "volume.nii.gz"}]}, "'past.0.image': .*is a volume"),
        ({"past": [{"time": 0, "image": "one.jsonl"}]}, "'past.0.image'"),
        ({"times": []}, "'times'"),
        ({"times": [30, 30]}, "'times': expected times that increase"),
        ({"times": [str(30)]}, "'times.0'"),
        ({"times": list(range(101))}, "'times'"),
        ({"events": [{"name": "drainage"}]}, "'events.0.time': missing"),
        ({"covariates": {"age": None}}, "'covariates.age"),
        ({"counterfactual": {}}, "either events or covariates"),
        ({"counterfactual": {"events": [], "covariates": {"age": 3}}}, "either events or covariates"),
        ({"mode": "parallel"}, "'mode'"),
        ({"time_unit": "phase"}, "'time_unit': 'phase', but this pipeline counts time in 'days'"),
        ({"evnts": []}, "did you mean 'events'"),
    ],
)  # fmt: skip
def test_a_case_that_cannot_be_sampled_names_its_field(follow_ups: Path, changes: dict, words: str) -> None:
    write_volume(follow_ups.parent / "volume.nii.gz", np.random.default_rng(0).random((4, 4, 4)) * 99, np.eye(4))
    with pytest.raises(CaseError, match=words):
        checked(follow_ups.parent, **changes)


def test_what_is_odd_but_possible_is_flagged(follow_ups: Path) -> None:
    folder = follow_ups.parent
    assert checked(folder) == checked(folder, times=[0, 10, 20]) == ()
    assert "looks at the 3 nearest" in checked(folder, past=past(0, 1, 2, 3))[0]
    assert "reads no reports" in checked(folder, past=past(0, report="Small effusion."))[0]
    assert "before every known visit" in checked(folder, times=[-3])[0]
    assert "no number" in checked(folder, covariates={"age": "old"})[0]
    dated = [{**past(0)[0], "date": "2101-03-05"}, {**past(0, 20)[1], "date": "2101-03-09"}]
    assert "20 days apart by their times are 4 by their dates" in checked(folder, past=dated)[0]


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.png", "link.png"])
def test_a_cases_file_reaches_no_file_above_its_folder(progression_folder: Path, tmp_path: Path, name: str) -> None:
    Image.fromarray(disc(5, 3)).save(tmp_path / "outside.png")
    inside = tmp_path / "cases"
    inside.mkdir()
    (inside / "link.png").symlink_to(tmp_path / "outside.png")
    (inside / "cases.jsonl").write_text(json.dumps(case("a", past=[{"time": 0, "image": name}])) + "\n")
    with pytest.raises(CaseError, match="leads out of"):
        sample(progression_folder, tmp_path / "out", cases=inside / "cases.jsonl", progress=False)
    (inside / "cases.jsonl").write_text(json.dumps(case("a", past=[{"time": 0, "image": "outside.png"}])) + "\n")
    assert sample(progression_folder, tmp_path / "out", cases=inside / "cases.jsonl", root=tmp_path, progress=False).complete


def test_a_pipeline_of_another_task_is_refused(echo_folder: Path, follow_ups: Path, tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match="holds a ECGToEchoPipeline, which forecasts no visits"):
        sample(echo_folder, tmp_path / "out", follow_ups, "p1", times=("+3",), progress=False)


# A judge, and volumes.


def test_a_judge_reads_every_film(progression_folder: Path, follow_ups: Path, whole: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    FilmMeter(image_size=SIZE, channels=(8, 8, 8), norm_groups=4).save_pretrained(tmp_path / "judge")
    cases = follow_ups.parent / "cases.jsonl"
    sample(progression_folder, tmp_path / "out", cases=cases, judge=str(tmp_path / "judge"), progress=False)
    treated = lines(tmp_path / "out")[-1]
    for entry in (*treated["past"], *treated["frames"], *treated["counterfactual_frames"]):
        assert set(entry["biomarkers"]) == set(BIOMARKERS)
    assert treated["past"][0]["biomarkers"] != treated["past"][1]["biomarkers"]
    assert treated["judge"] == "judge" and len(treated["judge_sha256"]) == 64
    assert (tmp_path / "out" / "treated_000_01.png").read_bytes() == (whole / "treated_000_01.png").read_bytes()
    assert "biomarkers" not in lines(whole)[0]["frames"][0]


def test_volumes_come_as_nifti_on_the_grid_of_the_last_visit(progression_folder_3d: Path, tmp_path: Path) -> None:
    affine = np.array([[2.0, 0, 0, -20], [0, 2, 0, 5], [0, 0, 3, 7], [0, 0, 0, 1]])
    for i in range(2):
        values = np.full((20, 18, 24), -900.0)
        values[4 + i : 15, 4:14, 4:20] = 40
        write_volume(tmp_path / f"{i}.nii.gz", values, affine)
    words = (f"0={tmp_path / '0.nii.gz'}", f"30={tmp_path / '1.nii.gz'}")
    out = tmp_path / "out"
    sample(progression_folder_3d, out, past=words, times=("+20", "90"), n=2, with_covariate="age=80", progress=False)
    line = lines(out)[0]
    assert [frame["file_name"] for frame in line["frames"]] == ["patient_000_00.nii.gz", "patient_000_01.nii.gz"]
    made: Any = nibabel.load(out / "patient_000_01.nii.gz")
    preprocessing = VisitPreprocessing(dim=3, size=16)
    assert made.shape == (16, 16, 16) and made.get_data_dtype() == np.int16
    assert np.allclose(made.affine, load_volume(tmp_path / "1.nii.gz", 16, preprocessing.volume).affine)
    assert bytes(made.header["descrip"].item()).startswith(b"SYNTHETIC progression_3d ")
    assert -1024 <= made.get_fdata().min() < made.get_fdata().max() <= 600
    assert all((out / name).is_file() for name in (line["file_name"], line["video"], line["difference"], "contact_sheet.png"))
    with pytest.raises(SamplingError, match="makes volumes"):
        sample(progression_folder_3d, tmp_path / "no", past=words, times=("+20",), judge="any", progress=False)
