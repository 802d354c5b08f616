"""Severity edits as files: strips, frames, provenance; the same whatever the batch or the shards; refusals before anything is edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medgen.sampling.cases import CaseError
from medgen.sampling.sampler import SamplingError
from medgen.sampling.severity import sample

QUICK: dict[str, Any] = {"rounds": 2, "steps": 4, "refinements": 1, "progress": False}


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "given"
    folder.mkdir()
    for name in ("one", "two"):
        Image.fromarray(rng.integers(0, 256, (48, 40), dtype=np.uint8)).save(folder / f"{name}.png")
    region = np.zeros((48, 40), np.uint8)
    region[24:40, 8:24] = 1
    Image.fromarray(region).save(folder / "roi.png")
    lines = [
        {"case_id": "grows", "seed": 0, "n": 1, "image": "one.png", "roi": "roi.png", "report": "Small left pleural effusion.",
         "target": "large left pleural effusion", "patient_id": "P1"},
        {"case_id": "goes", "seed": 1, "n": 1, "image": "two.png", "target": "no pleural effusion"},
        {"case_id": "own", "seed": 2, "n": 1, "image": "two.png", "report": "Left effusion.", "stages": ["Large effusion."]},
    ]  # fmt: skip
    (folder / "cases.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "cases.jsonl"


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_an_edit_is_a_strip_its_frames_and_a_line(own_folder: Path, cases: Path, tmp_path: Path) -> None:
    done = sample(own_folder, tmp_path / "out", cases=cases, **QUICK)
    assert (done.new, done.total, done.complete) == (3, 3, True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    first, second, own = lines
    assert [frame["prompt"] for frame in first["frames"]] == [
        "Small left pleural effusion.", "Moderate left pleural effusion.", "Large left pleural effusion."]  # fmt: skip
    assert [frame["synthetic"] for frame in first["frames"]] == [False, True, True]
    assert first["task"] == "severity editing: no time, not a forecast" and first["synthetic"] is True and "times" not in first
    assert (first["finding"], first["side"], first["direction"], first["stages_by"]) == ("pleural_effusion", "left", 1, "rules")
    assert (first["inversion"], first["patient_id"], first["recaptioner"]) == ("flow", "P1", "rules")
    assert second["source_prompt"] == "Large pleural effusion." and second["direction"] == -1 and second["roi_file"] is None
    assert own["stages_by"] == "given" and own["finding"] is None and len(own["frames"]) == 2
    for line in lines:
        assert all((tmp_path / "out" / name).is_file() for name in [line["file_name"], *line["files"]])
    source, last = (grey(tmp_path / "out" / first["frames"][i]["file_name"]) for i in (0, 2))
    outside = grey(tmp_path / "out" / first["roi_file"]) == 0
    assert outside.any() and not outside.all()
    assert (source[outside] == last[outside]).all() and (source[~outside] != last[~outside]).any()
    with Image.open(tmp_path / "out" / first["file_name"]) as strip:
        assert strip.text["Synthetic"] == "true" and "not a forecast" in strip.text["Comment"]
    with Image.open(tmp_path / "out" / first["frames"][2]["file_name"]) as frame:
        assert frame.text["Severity"] == "round 2: Large left pleural effusion." and frame.text["Synthetic"] == "true"
    with Image.open(tmp_path / "out" / first["frames"][0]["file_name"]) as frame:
        assert "Synthetic" not in frame.text
    again = sample(own_folder, tmp_path / "out", cases=cases, **QUICK)
    assert again.new == 0


def test_shards_and_batches_change_nothing(own_folder: Path, cases: Path, tmp_path: Path) -> None:
    sample(own_folder, tmp_path / "whole", cases=cases, batch_size=3, **QUICK)
    for index in (1, 0):
        part = sample(own_folder, tmp_path / "parts", cases=cases, batch_size=1, shard=f"{index}/2", **QUICK)
    assert part.complete and files(tmp_path / "parts") == files(tmp_path / "whole")


def test_a_diffusers_pipeline_by_ddim_and_noise(pipeline_folder: Path, cases: Path, tmp_path: Path) -> None:
    film, roi = cases.parent / "one.png", cases.parent / "roi.png"
    options = {"image": film, "roi": roi, "target": "severe cardiomegaly", **QUICK}
    sample(pipeline_folder, tmp_path / "ddim", **options)
    line = json.loads((tmp_path / "ddim" / "metadata.jsonl").read_text())
    assert line["inversion"] == "ddim" and line["side"] is None
    sample(pipeline_folder, tmp_path / "noise", inversion="noise", n=2, **options)
    first, second = (grey(tmp_path / "noise" / f"edit_00{i}_02.png") for i in (0, 1))
    assert (first != second).any()


def test_what_cannot_be_edited_is_refused_first(own_folder: Path, cases: Path, tmp_path: Path) -> None:
    film = cases.parent / "one.png"
    for options, message in (
        ({"target": "large left pleural effusion", "n": 2}, "draws nothing"),
        ({"target": "sicker"}, "expected one finding"),
        ({"target": "large left pleural effusion", "stages": ("Worse.",)}, "either a target"),
        ({"stages": ("Worse.",)}, "need the report too"),
        ({"target": "severe cardiomegaly", "report": "No pneumothorax. " * 20}, "tokens"),
    ):
        with pytest.raises(CaseError, match=message):
            sample(own_folder, tmp_path / "out", image=film, **options, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(SamplingError, match="strength"):
        sample(own_folder, tmp_path / "out", image=film, target="severe cardiomegaly", strength=1.5, **QUICK)
    with pytest.raises(SamplingError, match="takes 'flow' or 'noise'"):
        sample(own_folder, tmp_path / "out", image=film, target="severe cardiomegaly", inversion="ddim", **QUICK)
    black = tmp_path / "black.png"
    Image.fromarray(np.zeros((48, 40), np.uint8)).save(black)
    with pytest.raises(CaseError, match="'roi'.*marks nothing"):
        sample(own_folder, tmp_path / "out", image=film, roi=black, target="severe cardiomegaly", **QUICK)
    (cases.parent / "bad.jsonl").write_text(
        json.dumps({"case_id": "x", "seed": 0, "n": 1, "image": "../black.png", "target": "severe cardiomegaly"}) + "\n"
    )
    with pytest.raises(CaseError, match="leads out of"):
        sample(own_folder, tmp_path / "out", cases=cases.parent / "bad.jsonl", **QUICK)
    assert not (tmp_path / "out").exists()
