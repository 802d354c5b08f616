"""Encoders by name, features from the cache, and nothing that needs unpickling."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import densenet121
from toy_films import KINDS, film, write_generated
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from medgen.data.records import FINDINGS
from medgen.evaluation.features import JUDGE, extract, fingerprint, load_encoder, pixel_encoder
from medgen.evaluation.images import EvaluationError, read_generated
from medgen.models.classifier import FindingClassifier


@pytest.fixture
def images(tmp_path):
    entries = [{"case_id": f"c{i}", "prompt": "Normal."} for i in range(5)]
    return read_generated(write_generated(tmp_path / "g", entries, [film(*KINDS[i], i) for i in range(5)]))


def test_a_classifier_folder_is_an_encoder(judge, images, tmp_path):
    encoder = load_encoder(str(judge), "cpu")
    features = extract(images, encoder, tmp_path / "cache", batch_size=2)
    assert features.shape == (5, encoder.dim) == (5, 32)
    assert isinstance(features, np.memmap)
    assert np.isfinite(features).all()


def test_the_shipped_judge_is_small_complete_and_says_what_it_reached():
    encoder = load_encoder("digital-chest", "cpu")
    assert (encoder.size, encoder.dim) == (128, 128)
    assert sum(path.stat().st_size for path in JUDGE.iterdir()) < 6e6
    outputs = json.loads((JUDGE / "validation.json").read_text())["outputs"]
    assert sum(outputs[name]["auroc"] for name in FINDINGS) / len(FINDINGS) > 0.95


def test_the_second_time_nothing_is_encoded_and_a_new_image_costs_only_itself(images, tmp_path, monkeypatch):
    monkeypatch.setattr("medgen.evaluation.features.CHUNK", 2)
    seen = []

    def counted(batch):
        seen.extend(batch)
        return batch.flatten(1)

    encoder = dataclasses.replace(pixel_encoder(), encode=counted)
    first = np.array(extract(images.take(range(4)), encoder, tmp_path))
    assert len(seen) == 4
    again = extract(images.take(range(4)), encoder, tmp_path)
    np.testing.assert_array_equal(first, again)
    assert len(seen) == 4
    extract(images, encoder, tmp_path)
    assert len(seen) == 5
    extract(images, dataclasses.replace(encoder, fingerprint="another"), tmp_path)
    assert len(seen) == 10


def test_features_do_not_depend_on_the_batch(judge, images, tmp_path):
    encoder = load_encoder(str(judge), "cpu")
    one, all_ = (extract(images, encoder, tmp_path / str(size), batch_size=size) for size in (1, 5))
    np.testing.assert_allclose(one, all_, atol=1e-5)


def test_the_fingerprint_follows_the_weights(judge):
    model = FindingClassifier.from_pretrained(judge)
    before = fingerprint(model)
    assert before == fingerprint(FindingClassifier.from_pretrained(judge))
    with torch.no_grad():
        model.head.bias[0] += 1
    assert fingerprint(model) != before


def test_a_vision_transformer_folder_gives_its_class_token(images, tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28, mlp_ratio=2)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    BitImageProcessor(
        crop_size={"height": 28, "width": 28}, size={"shortest_edge": 28}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    ).save_pretrained(tmp_path / "dino")
    for name in (f"rad-dino:{tmp_path / 'dino'}", str(tmp_path / "dino")):
        encoder = load_encoder(name, "cpu")
        assert (encoder.size, encoder.dim) == (28, 16)
        batch = torch.rand(2, 1, 28, 28) * 2 - 1
        with torch.no_grad():
            expected = model(((batch + 1) / 2 - 0.5).expand(-1, 3, -1, -1) / 0.25).last_hidden_state[:, 0]
            torch.testing.assert_close(encoder.encode(batch), expected)
    assert extract(images, encoder, tmp_path / "cache").shape == (5, 16)


def test_torchxrayvision_weights_load_into_torchvisions_network(tmp_path):
    reference = densenet121(weights=None)
    reference.features.conv0 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    reference.eval()
    save_file({**reference.state_dict(), "op_threshs": torch.zeros(18)}, tmp_path / "xrv.safetensors")
    encoder = load_encoder(f"xrv:{tmp_path / 'xrv.safetensors'}", "cpu")
    with torch.no_grad():
        assert encoder.encode(torch.rand(1, 1, 64, 64)).shape == (1, 1024) == (1, encoder.dim)


class _Spy:
    def __reduce__(self):
        return (print, ("unpickled!",))


def test_pickled_weights_are_refused(tmp_path, capsys):
    torch.save(_Spy(), tmp_path / "evil.pt")
    with pytest.raises(EvaluationError, match="pickled code"):
        load_encoder(f"xrv:{tmp_path / 'evil.pt'}")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "no encoder 'resnet': use digital-chest"),
        ("xrv", "give a local weights file"),
        ("inception:/nowhere.pth", "nothing is at /nowhere.pth"),
        ("digital-chest:/nowhere", "no finding classifier at /nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_said(name, message):
    with pytest.raises(EvaluationError, match=message):
        load_encoder(name)


def test_features_that_are_not_finite_name_the_image(images, tmp_path):
    encoder = dataclasses.replace(pixel_encoder(), encode=lambda batch: batch.flatten(1) / 0)
    with pytest.raises(EvaluationError, match=r"NaN or infinite features for .*c0_000.png"):
        extract(images, encoder, tmp_path)


def test_a_transformers_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    with pytest.raises(EvaluationError, match="no usable transformers vision model"):
        load_encoder(str(tmp_path))
