"""Sampling end to end on a tiny pipeline: the same files whatever the batch, the shards or the interruptions."""

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

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from medgen.data.dicom import read_dicom
from medgen.sampling.cases import Case, CaseError, TextConditions
from medgen.sampling.output import OutputError
from medgen.sampling.sampler import SamplingError
from medgen.sampling.text_to_cxr import sample

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    Case("left", 3, 3, TextConditions(prompt="small left effusion"), {"pair_id": 1}),
    Case("right", 3, 2, TextConditions(prompt="small right effusion"), {"pair_id": 1}),
    Case("none", 4, 2, TextConditions(prompt="no effusion", negative_prompt="effusion")),
]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases sampled in one go at batch 8."""
    out = tmp_path_factory.mktemp("whole") / "out"
    result = sample(pipeline_folder, out, cases=CASES, steps=3, bit_depth=16, dicom=True, batch_size=8, progress=False)
    assert (result.new, result.total, result.complete) == (7, 7, True)
    return out


@pytest.mark.parametrize("threads_of_machine", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_and_cores_change_nothing(
    pipeline_folder: Path, whole: Path, tmp_path: Path, batch_size: int, threads_of_machine: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of_machine)
    try:
        sample(pipeline_folder, tmp_path, cases=CASES, steps=3, bit_depth=16, dicom=True, batch_size=batch_size, progress=False)
        assert torch.get_num_threads() == threads_of_machine
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path) == files(whole)


def test_three_shards_change_nothing(pipeline_folder: Path, whole: Path, tmp_path: Path) -> None:
    results = [
        sample(pipeline_folder, tmp_path, cases=CASES, steps=3, bit_depth=16, dicom=True, shard=f"{i}/3", progress=False)
        for i in (2, 0, 1)
    ]
    assert [result.new for result in results] == [2, 3, 2]
    assert [result.complete for result in results] == [False, False, True]
    assert files(tmp_path) == files(whole)


def test_order_and_neighbours_change_no_image(pipeline_folder: Path, whole: Path, tmp_path: Path) -> None:
    sample(pipeline_folder, tmp_path, cases=[CASES[1]], steps=3, bit_depth=16, dicom=True, progress=False)
    alone = files(tmp_path)
    assert {name: alone[name] for name in alone if name.startswith("right")} == {
        name: content for name, content in files(whole).items() if name.startswith("right")
    }


def test_the_metadata_say_where_each_image_comes_from(whole: Path) -> None:
    rows = lines(whole)
    assert [row["file_name"] for row in rows[:4]] == ["left_000.png", "left_001.png", "left_002.png", "right_000.png"]
    first = rows[0]
    assert first["synthetic"] is True and first["model"] == "tiny" and len(first["model_sha256"]) == 64
    assert (first["case_id"], first["trajectory"], first["seed"], first["pair_id"]) == ("left", 0, 3, 1)
    assert (first["prompt"], first["num_inference_steps"], first["guidance_scale"]) == ("small left effusion", 3, 7.5)
    assert first["noise_seed"] == rows[3]["noise_seed"], "a pair with one word changed shares its noise"
    with Image.open(whole / "left_000.png") as image:
        assert image.text["Synthetic"] == "true" and image.text["noise_seed"] == str(first["noise_seed"])
        assert image.text["model_sha256"] == first["model_sha256"]


def test_sixteen_bits_and_dicom_hold_the_same_values(pipeline_folder: Path, whole: Path, tmp_path: Path) -> None:
    with Image.open(whole / "left_000.png") as image:
        deep = np.asarray(image)
    assert deep.dtype == np.uint16 and len(np.unique(deep)) > 100
    dataset = pydicom.dcmread(whole / "left_000.dcm")
    assert dataset.SyntheticData == "YES" and "small left effusion" in dataset.ImageComments
    assert np.array_equal(dataset.pixel_array, deep)
    np.testing.assert_allclose(read_dicom(whole / "left_000.dcm")[0], deep / 65535, atol=2e-5)
    sample(pipeline_folder, tmp_path, prompt="small left effusion", seed=3, steps=3, progress=False)
    with Image.open(tmp_path / "prompt_000.png") as image:
        np.testing.assert_allclose(np.asarray(image) / 255, deep / 65535, atol=1 / 255)


def test_prompt_seed_and_guidance_change_the_image(pipeline_folder: Path, whole: Path, tmp_path: Path) -> None:
    sample(pipeline_folder, tmp_path, cases=CASES[:1], steps=3, guidance=1.0, bit_depth=16, progress=False)
    pixels = [
        np.asarray(Image.open(folder / name))
        for folder, name in [
            (whole, "left_000.png"),
            (whole, "left_001.png"),
            (whole, "right_000.png"),
            (tmp_path, "left_000.png"),
        ]
    ]
    assert len({image.tobytes() for image in pixels}) == 4


def test_the_contact_sheet_shows_every_image(whole: Path) -> None:
    with Image.open(whole / "contact_sheet.png") as sheet:
        assert sheet.width > 6 * 192 and sheet.height > 2 * 192 and sheet.text["Synthetic"] == "true"


def test_the_same_command_again_does_nothing(pipeline_folder: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    result = sample(pipeline_folder, whole, cases=CASES, steps=3, bit_depth=16, dicom=True, batch_size=1, progress=False)
    assert result.new == 0 and "nothing to do" in str(result)
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_a_lost_image_is_sampled_again(pipeline_folder: Path, whole: Path, tmp_path: Path) -> None:
    options = {"cases": CASES, "steps": 3, "bit_depth": 16, "dicom": True, "progress": False}
    sample(pipeline_folder, tmp_path, **options)
    (tmp_path / "right_001.png").unlink()
    assert sample(pipeline_folder, tmp_path, **options).new == 1
    assert files(tmp_path) == files(whole)


def test_a_killed_run_and_its_sibling_continue_to_the_same_files(pipeline_folder: Path, tmp_path: Path) -> None:
    cases, options = tmp_path / "cases.jsonl", {"steps": 8, "batch_size": 2, "progress": False}
    cases.write_text(json.dumps({"case_id": "a", "prompt": "left effusion", "seed": 1, "n": 24}) + "\n")
    sample(pipeline_folder, tmp_path / "whole", cases=cases, **options)
    words = ["--pipeline", str(pipeline_folder), "--out", str(tmp_path / "out"), "--cases", str(cases), "--steps", "8"]
    command = [sys.executable, str(ROOT / "sample" / "text_to_cxr.py"), *words, "--batch-size", "2"]
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # as torchrun sets it
    with contextlib.ExitStack() as running:
        shards = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in (0, 1)]
        for shard in shards:
            running.callback(shard.kill)
        while shards[0].poll() is None and len(list((tmp_path / "out").glob("a_*[02468].png"))) < 3:
            time.sleep(0.002)
        shards[0].send_signal(signal.SIGKILL)
        assert [shard.wait() for shard in shards] == [-signal.SIGKILL, 0]
    left = len(list((tmp_path / "out").glob("*.png")))
    assert 12 <= left < 24 and not (tmp_path / "out" / "metadata.jsonl").exists()
    result = sample(pipeline_folder, tmp_path / "out", cases=cases, **options)
    assert result.complete and 24 - left <= result.new <= 25 - left  # a kill between image and line costs that one image
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("scheduler", [None, "heun", "dpm++"])
def test_our_own_pipeline_keeps_the_same_promises(own_folder: Path, tmp_path: Path, scheduler: str | None) -> None:
    options = {"cases": CASES, "bit_depth": 16, "scheduler": scheduler, "progress": False}
    sample(own_folder, tmp_path / "eight", batch_size=8, **options)
    for shard in ("0/3", "1/3", "2/3"):
        sample(own_folder, tmp_path / "shards", batch_size=1, shard=shard, **options)
    assert files(tmp_path / "shards") == files(tmp_path / "eight")
    assert lines(tmp_path / "eight")[0]["num_inference_steps"] == 3, "the pipeline's own number of steps"
    images = [(tmp_path / "eight" / f"{name}_000.png").read_bytes() for name in ("left", "right", "none")]
    assert len(set(images)) == 3
    with pytest.raises(ValueError, match="for diffusion models"):
        sample(own_folder, tmp_path / "wrong", prompt="x", scheduler="ddim")


def test_weights_that_give_nan_write_no_image(pipeline_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pipeline_folder, broken)
    weights = load_file(broken / "vae" / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"][:] = float("nan")
    save_file(weights, broken / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(SamplingError, match=r"case 'prompt', trajectory 0: the pipeline returned NaN"):
        sample(broken, tmp_path / "out", prompt="effusion", steps=2, progress=False)
    assert not list((tmp_path / "out").glob("*.png"))


def test_another_request_into_the_same_folder_names_what_differs(pipeline_folder: Path, whole: Path) -> None:
    options = {"steps": 3, "bit_depth": 16, "dicom": True, "progress": False}
    before = files(whole)
    with pytest.raises(OutputError, match="guidance_scale: 7.5 there, 3.0 now"):
        sample(pipeline_folder, whole, cases=CASES, guidance=3.0, **options)
    with pytest.raises(OutputError, match=r"case 3 \('none'\), seed: 4 there, 5 now"):
        sample(pipeline_folder, whole, cases=[*CASES[:2], Case("none", 5, 2, CASES[2].conditions)], **options)
    with pytest.raises(OutputError, match="cases: 3 there, 1 now"):
        sample(pipeline_folder, whole, cases=CASES[:1], **options)
    assert files(whole) == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompt": None}, CaseError, "either a prompt or a file of cases"),
        ({"prompt": "  "}, CaseError, "'prompt'.*empty"),
        ({"prompt": "effusion " * 10_000}, CaseError, "field 'prompt': 80002 tokens.* reads 64"),
        ({"n": 0}, CaseError, "'n'"),
        ({"seed": -1}, CaseError, "'seed'"),
        ({"shard": "3/3"}, SamplingError, "0/3, 1/3 and 2/3"),
        ({"steps": 0}, SamplingError, "steps must be at least 1"),
        ({"guidance": float("nan")}, SamplingError, "guidance"),
        ({"batch_size": 0}, SamplingError, "batch_size must be at least 1"),
        ({"scheduler": "eular"}, ValueError, r"'eular' is unknown \(did you mean 'euler'\?\).*ddim, ddpm"),
        ({"device": "cuda:77"}, SamplingError, "cannot be used here"),
        ({"pipeline": "digital_chess"}, ValueError, "no pipeline 'digital_chess'.*shipped"),
    ],
)
def test_a_wrong_request_is_named_before_anything_is_written(
    pipeline_folder: Path, tmp_path: Path, options: dict, error: type[ValueError], words: str
) -> None:
    request = {"pipeline": pipeline_folder, "prompt": "effusion", "steps": 2, "progress": False, **options}
    with pytest.raises(error, match=words):
        sample(out=tmp_path / "out", **request)
    assert not (tmp_path / "out").exists()
