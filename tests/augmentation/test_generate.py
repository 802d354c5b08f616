"""From a plan to a manifest of synthetic films, with a tiny pipeline and the shipped judge at the gate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import BertConfig, BertModel

from medgen.augmentation.generate import Generated, generate, summarise
from medgen.augmentation.plan import plan
from medgen.augmentation.planned import PlanError
from medgen.data.records import CXRRecord, read_manifest, write_manifest
from medgen.data.report_labels import label_text
from medgen.digital.chest import draw_study
from medgen.digital.reports import write_report
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.denoiser import SequenceTransformer
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.sampling.cases import Case, TextConditions
from medgen.sampling.output import OutputError
from medgen.tasks.text_encoder import train_tokenizer

N = 10


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A flow model with random weights."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(
        patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, mid_block_attention=False, sample_size=32
    )
    vae, words = (
        build_autoencoder(shape),
        train_tokenizer(["PA chest X-ray. Large left pleural effusion. No pneumothorax."], 300, 128),
    )
    bert = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=256, pad_token_id=words.pad_token_id)  # fmt: skip
    words.model_max_length = 256
    denoiser = SequenceTransformer(vae.config.latent_channels, 16, width=32, depth=2, heads=2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("pipelines") / "own"
    TextToCXRPipeline(vae, denoiser, BertModel(bert, add_pooling_layer=False), words, FlowMatchEulerDiscreteScheduler(),
                      preprocessing={"size": 32}, num_inference_steps=2, guidance_scale=2.0).save_pretrained(str(folder))  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan over 60 digital patients' reports, whose films are grey squares."""
    folder = tmp_path_factory.mktemp("real")
    records = []
    for index in range(60):
        study = draw_study(4, index)
        findings, impression, labels = write_report(study)
        Image.fromarray(np.full((32, 32), 4 * index, np.uint8)).save(folder / f"{index}.png")
        records.append(CXRRecord(f"r{index}", f"p{index}", f"s{index}", f"{index}.png", "PA", findings, impression, "train", labels,
                                 study.patient.age, study.patient.sex))  # fmt: skip
    manifest = write_manifest(records, folder / "manifest.parquet", name="real", source="test")
    plan(manifest, folder / "plan", n=N)
    return folder / "plan"


@pytest.fixture(scope="module")
def films(planned: Path, pipeline: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("films") / "out"
    assert generate(planned, pipeline, out, progress=False) == Generated(out, N, N, True, ())
    return out


def test_synthetic_films_come_back_as_a_manifest(films: Path) -> None:
    manifest = read_manifest(films / "manifest.parquet", "train")
    lines = {Path(line["file_name"]).stem: line for line in map(json.loads, (films / "metadata.jsonl").read_text().splitlines())}
    assert len(manifest) == N and manifest.name == "synthetic-real"
    for record in manifest.records:
        line = lines[record.record_id]
        assert manifest.image_path(record).is_file()
        assert record.patient_id == f"synthetic-{line['case_id']}" and record.view == line["view"]
        assert set(record.labels) == set(label_text(line["prompt"]))
        assert record.sex is None and record.age is None  # the prompt does not say them, so the film cannot show them
        assert record.extra["synthetic"] and record.extra["model_sha256"] and record.extra["noise_seed"] == line["noise_seed"]


def test_a_sheet_beside_real_films_and_a_summary(films: Path) -> None:
    with Image.open(films / "real_and_synthetic.png") as sheet:
        assert sheet.text["Comment"].startswith("LEFT real films, RIGHT SYNTHETIC")
        assert sheet.height > 112
    summary = json.loads((films / "augmentation.json").read_text())
    assert summary["delivered"] == summary["asked"] and summary["attempts"] == N and summary["gates"] == {}


def test_the_same_command_again_changes_nothing_and_another_plan_is_refused(films: Path, planned: Path, pipeline: str) -> None:
    before = {path.name: path.read_bytes() for path in films.iterdir()}
    assert generate(planned, pipeline, films, progress=False).films == N
    assert {path.name: path.read_bytes() for path in films.iterdir()} == before
    plan(planned.parent / "manifest.parquet", planned.parent / "other", n=N, seed=1)
    with pytest.raises(OutputError, match="samples of another request"):
        generate(planned.parent / "other", pipeline, films, progress=False)


def test_shards_write_the_manifest_when_all_are_done(films: Path, planned: Path, pipeline: str, tmp_path: Path) -> None:
    assert not generate(planned, pipeline, tmp_path, shard="1/2", progress=False).complete
    assert not (tmp_path / "manifest.parquet").exists()
    assert generate(planned, pipeline, tmp_path, shard="0/2", progress=False).complete
    assert (tmp_path / "manifest.parquet").read_bytes() == (films / "manifest.parquet").read_bytes()


def test_what_the_judge_rejects_is_counted_and_never_written(planned: Path, pipeline: str, tmp_path: Path) -> None:
    """A generator with random weights shows no findings: only prompts without any get through."""
    result = generate(planned, pipeline, tmp_path, quality="shipped", retries=1, progress=False)
    summary = json.loads((tmp_path / "augmentation.json").read_text())
    rejected = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert 0 < result.films < N and len(summary["missing"]) == N - result.films
    assert len(list(tmp_path.glob("plan-*.png"))) == result.films
    assert summary["gates"]["quality"]["rejected"] == len(rejected) and summary["attempts"] == result.films + len(rejected)
    assert any("films are missing: every attempt was rejected" in note for note in result.notes)
    assert all("quality" in r.extra["gates"] for r in read_manifest(tmp_path / "manifest.parquet").records)


def test_a_gate_that_is_hard_on_one_finding_is_named_with_numbers() -> None:
    def case(number: int, finding: str) -> Case[TextConditions]:
        labels = [{"name": finding, "state": "present", "side": None, "size": None}]
        extra = {"labels": labels, "view": "PA", "sex": "F", "age": 50.0, "person_in_prompt": False, "stratum": finding}
        return Case(f"c{number}", 0, 1, TextConditions(prompt=finding), extra)

    def line(number: int, passed: bool) -> dict:
        return {
            "case_id": f"c{number}",
            "gates": {"quality": {"passed": passed, "validated": False, "reason": "nodule not seen"}},
        }

    cases = [case(i, "nodule" if i < 20 else "edema") for i in range(60)]
    kept, rejected = [line(i, True) for i in range(10, 60)], [line(i, False) for i in range(20)]
    facts = {"manifest": {}, "captions": "written", "target": {}, "notes": []}
    summary = summarise(facts, cases, kept, rejected)
    assert json.loads(json.dumps(summary)) == summary  # nothing of scipy's or NumPy's own in it
    assert summary["gates"]["quality"]["reasons"] == {"nodule not seen": 20}
    assert summary["delivered"]["findings"] == {"nodule": 10, "edema": 40} and len(summary["missing"]) == 10
    assert summary["notes"][0] == "gate quality is not validated"
    (biased,) = [note for note in summary["notes"] if "attempts at" in note]
    assert biased.startswith("gate quality rejected 67% [49%, 81%] of 30 attempts at nodule, and 0% of the others")


def test_a_folder_without_a_plan_is_refused(tmp_path: Path, pipeline: str) -> None:
    with pytest.raises(PlanError, match="is no plan"):
        generate(tmp_path, pipeline, tmp_path / "out")
