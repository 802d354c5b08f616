"""Sampling for a study: as many cases as its sections ask for, from the right patients, resumable, whatever the shards."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data.echo_fixture import write_echo_set
from follow_ups import write_follow_ups
from PIL import Image
from sampling.conftest import echo_folder, own_folder, progression_folder  # noqa: F401

from medgen.data.records import CXRRecord, read_manifest, write_manifest
from medgen.sampling.output import OutputError
from medgen.study.draw import draw
from medgen.study.material import read_pools
from medgen.study.protocol import ProtocolError, read_protocol
from medgen.study.sampling import sample
from medgen.study.sampling_cases import arm_cases

ROOT = Path(__file__).resolve().parents[2]
FILMS = """
study_id: tiny
title: Tiny films
seed: 4
hypotheses: none
margin: 0.1
readers: 2
material: {{kind: chest, patients: {patients}, steps: 1}}
arms:
  - {{name: model, source: synthetic, pipeline: "{pipeline}", splits: [train, test]}}
  - {{name: patients, source: real, splits: [train, test]}}
sections:
  - {{name: origin, task: real_or_synthetic, cases: 8, training: 2, balance: sex}}
  - {{name: text, task: text_alignment, cases: 4}}
"""
FORECASTS = """
study_id: tiny-courses
title: Tiny courses
hypotheses: none
margin: 0.1
readers: 2
arms:
  - {{name: forecasts, source: synthetic, kind: progression, pipeline: "{pipeline}", splits: [train, val, test]}}
  - {{name: patients, source: real, kind: progression, splits: [train, val, test]}}
sections:
  - {{name: order, task: progression_order, cases: 6}}
  - {{name: course, task: plausible_course, cases: 6, paired: true}}
"""
CLIPS = """
study_id: tiny-clips
title: Tiny clips
hypotheses: none
margin: 0.1
readers: 2
arms:
  - {{name: clips, source: synthetic, kind: echo, pipeline: "{pipeline}", splits: [train, val, test]}}
  - {{name: hearts, source: real, kind: echo, splits: [train, val, test]}}
sections:
  - {{name: ef, task: ejection_fraction, cases: 4}}
"""


def write(folder: Path, text: str, **given: object) -> Path:
    path = folder / "protocol.yaml"
    path.write_text(text.format(**{"patients": 2, **given}))
    return path


def films(folder: Path, patients: int = 20) -> Path:
    """Noise with short reports: of every patient two films, the second without findings."""
    (folder / "images").mkdir(parents=True)
    records = []
    for p in range(patients):
        for n, (report, view) in enumerate([("Large left pleural effusion.", "PA"), ("No pneumothorax.", "AP")]):
            name = f"images/{p}-{n}.png"
            Image.fromarray(np.random.default_rng(p).integers(0, 255, (32, 32), dtype=np.uint8)).save(folder / name)
            records.append(
                CXRRecord(f"r{p}-{n}", f"p{p}", f"s{p}", name, view, report, "", "test", sex="M" if p < patients // 3 else "F")  # type: ignore[arg-type]
            )
    return write_manifest(records, folder / "manifest.parquet", name="noise", source="test")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return films(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory, own_folder: Path) -> Path:  # noqa: F811
    return write(tmp_path_factory.mktemp("protocol"), FILMS, pipeline=own_folder)


@pytest.fixture(scope="module")
def whole(protocol: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    result = sample(protocol, out, reference, progress=False)
    assert result.complete
    assert result.command.endswith(f"--generated {out} --reference {reference} --out {out}-pack")
    return out


def test_an_arm_gets_what_its_sections_ask_for(whole: Path, protocol: Path, reference: Path) -> None:
    found = lines(whole / "model")
    assert Counter(line["section"] for line in found) == {"origin": 4 + 2, "text": 2}
    assert len({line["patient_id"] for line in found}) == 8, "nobody twice"
    assert Counter(line["sex"] for line in found if line["section"] == "origin") == {"F": 3, "M": 3}
    by_id = {record.record_id: record for record in read_manifest(reference).records}
    for line in found:
        assert line["synthetic"] is True and line["num_inference_steps"] == 1
        assert line["prompt"] == by_id[line["record_id"]].findings and line["case_id"] == line["record_id"]


def test_the_builder_finds_enough(whole: Path, protocol: Path, reference: Path) -> None:
    study = read_protocol(protocol)
    drafts = draw(study, read_pools(study, whole, reference))
    shown = [draft for draft in drafts if draft.arm.name == "model"]
    assert len(shown) == 4 + 1 + 2 and len({draft.main.patient for draft in shown}) == 7


def test_the_same_command_again_loads_no_pipeline(whole: Path, protocol: Path, reference: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    code = (
        "import sys; from pathlib import Path; from medgen.study.sampling import sample; "
        "print(sample(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))); assert 'torch' not in sys.modules"
    )
    again = subprocess.run([sys.executable, "-c", code, protocol, whole, reference], capture_output=True, text=True, check=True)
    assert "model: all 8 were already there" in again.stdout and "next: medgen study build" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_two_shards_make_the_same_files(whole: Path, protocol: Path, reference: Path, tmp_path: Path) -> None:
    first = sample(protocol, tmp_path, reference, shard="1/2", progress=False)
    assert not first.complete and "the rest is up to the other shards" in str(first)
    assert sample(protocol, tmp_path, reference, shard="0/2", progress=False).complete
    assert files(tmp_path) == files(whole)


def test_a_killed_run_goes_on_under_torchrun_on_two_processes(
    whole: Path, protocol: Path, reference: Path, tmp_path: Path
) -> None:
    """By torchrun's own agent. Forks of this process, all of them: two interpreters that import torch anew take half a minute."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    given = (protocol, tmp_path / "out", reference, None, None, "float32", 1, False)
    running = multiprocessing.get_context("fork").Process(target=sample, args=given)
    running.start()
    while running.is_alive() and len(list((tmp_path / "out" / "model").glob("*.png"))) < 2:
        time.sleep(0.002)
    running.kill()
    running.join()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "model").glob("*_000.png")}

    here = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "study"}  # as torchrun --standalone
    two = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", monitor_interval=0.1, **here)
    ended = elastic_launch(two, sample)(*given)
    assert set(ended) == {0, 1} and any(said.complete for said in ended.values())
    assert files(tmp_path / "out") == files(whole)
    assert sum((tmp_path / "out" / "model" / name).stat().st_mtime_ns == at for name, at in kept.items()) >= len(kept) - 1


def test_another_protocol_does_not_mix_into_the_folder(whole: Path, protocol: Path, reference: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(protocol.read_text().replace("seed: 4", "seed: 5"))
    with pytest.raises(OutputError, match="seed: 4 there, 5 now"):
        sample(other, whole, reference, progress=False)


def test_forecasts_start_from_the_past_and_reach_the_later_visits(progression_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    manifest = write_follow_ups(tmp_path / "reference", patients=8)
    path = write(tmp_path, FORECASTS, pipeline=progression_folder)
    sample(path, tmp_path / "out", manifest, progress=False)
    found = lines(tmp_path / "out" / "forecasts")
    series = {record.record_id: record for record in read_manifest(manifest, record=type_of_visits()).records}
    for line in found:
        visits = series[line["record_id"]].imaged
        cut = {"order": 1, "course": 2}[line["section"]]
        assert [seen["image"] for seen in line["past"]] == [visit.image for visit in visits[:cut]]
        assert [frame["time"] for frame in line["frames"]] == [visit.time for visit in visits[cut:]]
    study = read_protocol(path)
    assert len(draw(study, read_pools(study, tmp_path / "out", manifest))) == 12


def type_of_visits() -> type:
    from medgen.data.visit_records import VisitSeries

    return VisitSeries


def test_clips_follow_a_patients_ecg_and_ejection_fraction(echo_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    manifest = write_echo_set(tmp_path / "reference")
    path = write(tmp_path, CLIPS, pipeline=echo_folder)
    sample(path, tmp_path / "out", manifest, progress=False)
    found = {line["case_id"]: line for line in lines(tmp_path / "out" / "clips")}
    assert len(found) == 2 and "b" not in found, "b has no ECG"
    for line in found.values():
        assert line["ejection_fraction"] == 55.0 and line["ecg"].startswith("ecg/") and line["first_frame"] is None
    study = read_protocol(path)
    pools = read_pools(study, tmp_path / "out", manifest)
    assert all(c.ejection_fraction == 55.0 and c.ecg is not None for c in pools["clips"].candidates)


def test_without_data_digital_patients_are_made_first(own_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    text = FILMS.replace("cases: 8, training: 2, balance: sex", "cases: 2").replace("cases: 4", "cases: 2")
    path = write(tmp_path, text, patients=3, pipeline="digital_chest")
    result = sample(path, tmp_path / "out", progress=False)
    manifest = read_manifest(tmp_path / "out" / "reference" / "manifest.parquet")
    assert len(manifest) == 6 and {record.view for record in manifest.records} == {"PA", "AP"}
    assert result.complete and f"--reference {tmp_path / 'out' / 'reference'}" in result.command
    assert len(lines(tmp_path / "out" / "model")) == 2
    path.write_text(path.read_text().replace("patients: 3", "patients: 4"))
    with pytest.raises(ProtocolError, match="lists 3 digital patients of seed 4, but the protocol asks for 4"):
        sample(path, tmp_path / "out", progress=False)


def test_two_generators_of_a_paired_section_have_the_same_patients_and_noise(
    protocol: Path, reference: Path, tmp_path: Path
) -> None:
    text = protocol.read_text().replace("training: 2, balance: sex", "paired: true")
    arm = next(line for line in text.splitlines() if "name: model" in line)
    path = tmp_path / "two.yaml"
    path.write_text(text.replace(arm, arm + "\n" + arm.replace("name: model", "name: other")))
    study = read_protocol(path)
    cases = arm_cases(study, study.arms[:2], reference)
    one, two = ([line for line in cases[name] if line["section"] == "origin"] for name in ("model", "other"))
    assert one == two
    alone = [[line["patient_id"] for line in cases[name] if line["section"] == "text"] for name in ("model", "other")]
    assert not set(alone[0]) & set(alone[1])


def test_too_few_patients_are_said_before_anything_is_sampled(protocol: Path, tmp_path: Path) -> None:
    small = films(tmp_path / "reference", patients=5)
    with pytest.raises(ProtocolError, match="section 'origin' wants 6 patients for arm 'model'.*only 5 more"):
        sample(protocol, tmp_path / "out", small, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_protocol_without_pipelines_is_refused(protocol: Path, tmp_path: Path) -> None:
    path = tmp_path / "protocol.yaml"
    path.write_text("\n".join(line.replace('pipeline: "', 'generated: "') for line in protocol.read_text().splitlines()))
    with pytest.raises(ProtocolError, match="no synthetic arm names a pipeline"):
        sample(path, tmp_path / "out")
