"""Gated sampling: what a gate rejects is drawn again or goes missing, the same whatever the batch, the shards or a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from torch import Tensor

from medgen.data.images import load_image
from medgen.models.siamese import load_siamese
from medgen.sampling.cases import Case, TextConditions
from medgen.sampling.gates import GateError, Verdict
from medgen.sampling.output import OutputError
from medgen.sampling.privacy_gate import Index, PrivacyGate
from medgen.sampling.sampler import SamplingError
from medgen.sampling.text_to_cxr import sample
from tests.privacy_films import write_network

ROOT = Path(__file__).resolve().parents[2]

CASES = [
    Case("left", 3, 3, TextConditions(prompt="small left effusion"), {"pair_id": 1}),
    Case("right", 3, 2, TextConditions(prompt="small right effusion")),
    Case("none", 4, 2, TextConditions(prompt="no effusion")),
]
OPTIONS: dict[str, Any] = {"cases": CASES, "steps": 2, "bit_depth": 16, "progress": False}


class NotThese:
    """A gate that knows some films and lets none of them through again."""

    name, validated = "not-these", False

    def __init__(self, films: Sequence[Path], rms: float = 1e-3) -> None:
        values = np.stack([np.asarray(Image.open(path), dtype=np.float32) / 65535 for path in films])
        self.films, self.rms = torch.from_numpy(values) * 2 - 1, rms

    def describe(self) -> dict[str, Any]:
        return {"films": len(self.films), "threshold": self.rms}

    def check(self, images: Tensor, cases: Sequence[Case[Any]]) -> list[Verdict]:
        nearest = (images - self.films).square().mean((2, 3)).sqrt().amin(1)
        return [Verdict(rms > self.rms, rms, f"a known film lies at RMS {rms:.3f}") for rms in nearest.tolist()]


class Nothing(NotThese):
    """Lets nothing of one case through."""

    def __init__(self, case_id: str) -> None:
        self.case_id = case_id

    def describe(self) -> dict[str, Any]:
        return {"case": self.case_id, "threshold": 0.0}

    def check(self, images: Tensor, cases: Sequence[Case[Any]]) -> list[Verdict]:
        return [Verdict(case.case_id != self.case_id, 0.0, f"no {self.case_id}") for case in cases]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder: Path, name: str = "metadata.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def ungated(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ungated") / "out"
    sample(pipeline_folder, out, dicom=True, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def gate(ungated: Path) -> NotThese:
    """Knows two of the seven films that the pipeline draws first."""
    return NotThese([ungated / "left_001.png", ungated / "none_000.png"])


@pytest.fixture(scope="module")
def gated(pipeline_folder: Path, gate: NotThese, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gated") / "out"
    result = sample(pipeline_folder, out, dicom=True, gates=[gate], **OPTIONS)
    assert result.complete and (result.new, result.rejected, result.missing) == (7, 2, ())
    assert "not-these (not validated): 2 attempts rejected" in str(result)
    return out


def test_what_is_rejected_is_drawn_again_from_other_noise_and_the_rest_is_as_it_was(ungated: Path, gated: Path) -> None:
    before, after = ({line["file_name"]: line for line in lines(folder)} for folder in (ungated, gated))
    assert [name for name, line in after.items() if line["attempt"] == 1] == ["left_001.png", "none_000.png"]
    for name, line in after.items():
        same = np.array_equal(*(np.asarray(Image.open(folder / name)) for folder in (ungated, gated)))
        assert same == (line["attempt"] == 0) == (line["noise_seed"] == before[name]["noise_seed"])
        assert line["gates"]["not-these"]["threshold"] == 1e-3 and line["gates"]["not-these"]["validated"] is False
        assert line["gates"]["not-these"]["score"] > 1e-3
        assert before[name].keys() & {"attempt", "gates"} == set()
    again = pydicom.dcmread(gated / "left_001.dcm")
    assert again.SOPInstanceUID != pydicom.dcmread(ungated / "left_001.dcm").SOPInstanceUID, "another image is another instance"
    with Image.open(gated / "left_000.png") as image:
        assert image.text["Passed gates"] == "not-these (not validated)"


def test_every_rejected_attempt_is_one_line_and_no_image(gated: Path) -> None:
    rejected = lines(gated, "rejected.jsonl")
    assert [(line["file_name"], line["attempt"]) for line in rejected] == [("left_001.png", 0), ("none_000.png", 0)]
    assert rejected[0]["gates"]["not-these"]["reason"] == "a known film lies at RMS 0.000"
    assert rejected[0]["gates"]["not-these"]["validated"] is False and rejected[0]["noise_seed"] > 0
    assert len(list(gated.glob("*.png"))) == 8  # seven images and the contact sheet


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_and_shards_change_nothing(
    pipeline_folder: Path, gate: NotThese, gated: Path, tmp_path: Path, batch_size: int
) -> None:
    for shard in ("2/3", "0/3", "1/3"):
        result = sample(pipeline_folder, tmp_path, dicom=True, gates=[gate], batch_size=batch_size, shard=shard, **OPTIONS)
    assert result.complete and files(tmp_path) == files(gated)


def test_a_trajectory_that_never_passes_is_missing_named_and_not_tried_again(
    pipeline_folder: Path, gate: NotThese, tmp_path: Path
) -> None:
    nothing = Nothing("right")
    result = sample(pipeline_folder, tmp_path, gates=[nothing], retries=1, **OPTIONS)
    assert result.complete and (result.new, result.rejected, result.missing) == (5, 4, ("right_000", "right_001"))
    assert "MISSING 2 of 7 images, every attempt rejected: right_000, right_001" in str(result)
    assert [line["file_name"] for line in lines(tmp_path)] == [f"{name}.png" for name in
            ("left_000", "left_001", "left_002", "none_000", "none_001")]  # fmt: skip
    before = files(tmp_path)
    again = sample(pipeline_folder, tmp_path, gates=[nothing], retries=1, **OPTIONS)
    assert again.new == 0 and again.missing == result.missing and files(tmp_path) == before


def test_a_run_that_keeps_nothing_still_completes(pipeline_folder: Path, tmp_path: Path) -> None:
    result = sample(pipeline_folder, tmp_path, prompt="effusion", steps=1, gates=[Nothing("prompt")], retries=0, progress=False)
    assert result.complete and result.missing == ("prompt_000",)
    assert lines(tmp_path) == [] and len(lines(tmp_path, "rejected.jsonl")) == 1


def test_an_interrupted_run_repeats_no_line(pipeline_folder: Path, gate: NotThese, gated: Path, tmp_path: Path) -> None:
    """As a kill leaves it: the rejection of `left_001` is written, its second attempt's image is not, the last line is cut."""
    sample(pipeline_folder, tmp_path, dicom=True, gates=[gate], shard="0/2", **OPTIONS)
    sample(pipeline_folder, tmp_path, dicom=True, gates=[gate], shard="1/2", **OPTIONS)
    for name in ("left_001.png", "left_001.dcm"):
        (tmp_path / name).unlink()
    (tmp_path / "metadata.jsonl").rename(tmp_path / ".metadata-0-of-1.jsonl")
    (tmp_path / "rejected.jsonl").rename(tmp_path / ".rejected-0-of-1.jsonl")
    with (tmp_path / ".rejected-0-of-1.jsonl").open("ab") as stream:
        stream.write(b'{"file_name": "left')
    result = sample(pipeline_folder, tmp_path, dicom=True, gates=[gate], **OPTIONS)
    assert result.new == 1 and result.rejected == 2 and files(tmp_path) == files(gated)


def test_another_gate_or_none_is_another_request(pipeline_folder: Path, gated: Path, ungated: Path, gate: NotThese) -> None:
    with pytest.raises(OutputError, match="gates"):
        sample(pipeline_folder, gated, dicom=True, **OPTIONS)
    with pytest.raises(OutputError, match="gates: None there"):
        sample(pipeline_folder, ungated, dicom=True, gates=[gate], **OPTIONS)
    with pytest.raises(OutputError, match="retries: 3 there, 5 now"):
        sample(pipeline_folder, gated, dicom=True, gates=[gate], retries=5, **OPTIONS)


def test_gates_that_cannot_be_used_are_named(pipeline_folder: Path, gate: NotThese, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="no gate 'gatee': neither a folder with a gate.json"):
        sample(pipeline_folder, tmp_path, prompt="x", gates=["gatee"])
    (tmp_path / "gate.json").write_text('{"gate": "hen"}')
    with pytest.raises(GateError, match="unknown kind 'hen'"):
        sample(pipeline_folder, tmp_path, prompt="x", gates=[tmp_path])
    with pytest.raises(GateError, match="two gates are named 'not-these'"):
        sample(pipeline_folder, tmp_path, prompt="x", gates=[gate, gate])
    with pytest.raises(SamplingError, match="retries must be 0 or more"):
        sample(pipeline_folder, tmp_path / "out", prompt="x", steps=1, gates=[gate], retries=-1, progress=False)


def test_a_killed_and_a_sharded_gated_run_end_as_an_undisturbed_one(pipeline_folder: Path, tmp_path: Path) -> None:
    """The privacy gate through the command line: its index holds the films that the pipeline draws first for every third trajectory."""
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps({"case_id": "a", "prompt": "left effusion", "seed": 1, "n": 12}) + "\n")
    options: dict[str, Any] = {"cases": cases, "steps": 6, "batch_size": 2, "progress": False}
    sample(pipeline_folder, tmp_path / "ungated", **options)
    known = [f"a_{i:03d}.png" for i in range(0, 12, 3)]
    films = torch.stack([load_image(tmp_path / "ungated" / name) for name in known])
    network = load_siamese(write_network(tmp_path / "network"), "cpu")
    PrivacyGate(network, Index.of([films], known, network), threshold=0.999).save(tmp_path / "gate", {})
    whole = sample(pipeline_folder, tmp_path / "whole", gates=[tmp_path / "gate"], **options)
    assert whole.complete and {line["file_name"] for line in lines(tmp_path / "whole", "rejected.jsonl")} == set(known)
    words = ["--pipeline", str(pipeline_folder), "--out", str(tmp_path / "out"), "--cases", str(cases), "--steps", "6"]
    command = [sys.executable, str(ROOT / "sample" / "text_to_cxr.py"), *words, "--gates", str(tmp_path / "gate")]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # as torchrun sets it
    with subprocess.Popen([*command, "--batch-size", "2"], env=environment) as shard:
        while shard.poll() is None and not list((tmp_path / "out").glob("a_*.png")):
            time.sleep(0.002)
        shard.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    for part in ("1/2", "0/2"):
        result = sample(pipeline_folder, tmp_path / "out", gates=[tmp_path / "gate"], shard=part, **options)
    assert result.complete and files(tmp_path / "out") == files(tmp_path / "whole")
