"""What a linear probe reads from a text encoder: nothing from one that is blind to words, no gain against itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.augmentation.text_probe import load_encoder, pool, randomly, text_probe
from medgen.config import ConfigError
from medgen.data.records import CXRRecord, write_manifest
from medgen.digital.chest import draw_study
from medgen.digital.reports import write_report

SHIPPED = str(Path(__file__).parents[2] / "medgen" / "pretrained" / "digital_chest")


def reports(path: Path, count: int = 160) -> Path:
    """Reports of digital patients, without films: a third to test on."""
    records = []
    for i in range(count):
        study = draw_study(7034, i)
        findings, impression, labels = write_report(study)
        split = "test" if i % 3 == 0 else "train"
        for view in ("PA", "AP"):
            records.append(
                CXRRecord(
                    f"{study.study_id}-{view}", study.patient.patient_id, study.study_id, f"{view}.png", view, findings, impression,
                    split, labels,
                )  # type: ignore[arg-type]
            )  # fmt: skip
    return write_manifest(records, path / "manifest.parquet", name="reports", source="test")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reports(tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The shipped encoder, to which all words are one word: nothing but a report's length is left of it."""
    folder, there = tmp_path_factory.mktemp("blind"), load_encoder(SHIPPED)
    words = there.encoder.get_input_embeddings().weight.data
    words[:] = words.mean(0)
    there.encoder.save_pretrained(folder)
    there.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("order", ["gain", "loss"])
def test_encoder_that_tells_words_apart_is_read_better_than_one_that_does_not(
    manifest: Path, blind: str, tmp_path: Path, order: str
):
    before, after = (blind, SHIPPED) if order == "gain" else (SHIPPED, blind)
    page = text_probe(before, after, manifest, tmp_path, resamples=100)
    told = json.loads((tmp_path / "text_probe.json").read_text())
    values = [told["macro"][name]["value"] for name in ("before", "after")]
    assert max(values) > 0.93 and min(values) < 0.75
    assert (told["macro"]["gain"]["low"] > 0) if order == "gain" else (told["macro"]["gain"]["high"] < 0)
    assert ("reads more" if order == "gain" else "reads less") in told["sentences"][0]
    assert told["texts"] == {"train": 106, "test": 54}  # both films of a study share one report
    assert all(sentence in page.read_text() for sentence in told["sentences"])
    assert blind not in page.read_text() and SHIPPED not in page.read_text()


def test_encoder_against_itself_shows_no_difference(manifest: Path, tmp_path: Path):
    text_probe(SHIPPED, SHIPPED, manifest, tmp_path, train_reports=60, resamples=100)
    told = json.loads((tmp_path / "text_probe.json").read_text())
    assert told["macro"]["gain"]["value"] == 0
    assert "not evidence that there is none" in told["sentences"][0]


def test_mean_of_tokens_does_not_depend_on_neighbours():
    encoder = load_encoder(SHIPPED)
    texts = ["No acute abnormality.", "Large left pleural effusion with compressive atelectasis of the left lower lobe."]
    assert pool(encoder, texts)[0] == pytest.approx(pool(encoder, texts[:1])[0], abs=1e-5)


def test_random_weights_are_the_architecture_untrained():
    trained, fresh = load_encoder(SHIPPED), randomly(SHIPPED, seed=3)
    assert type(trained.encoder) is type(fresh.encoder)
    assert fresh.max_tokens == trained.max_tokens
    ours, theirs = (e.encoder.get_input_embeddings().weight for e in (trained, fresh))
    assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
    assert np.array_equal(pool(fresh, ["Clear."]), pool(randomly(SHIPPED, seed=3), ["Clear."]))


def test_manifest_without_test_reports_is_refused(manifest: Path, tmp_path: Path):
    from medgen.data.records import read_manifest

    only = write_manifest(read_manifest(manifest, "train").records, tmp_path / "manifest.parquet", name="reports", source="test")
    with pytest.raises(ConfigError, match="no reports in the split 'test'"):
        text_probe(SHIPPED, SHIPPED, only, tmp_path / "out")
