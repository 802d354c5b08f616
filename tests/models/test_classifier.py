"""The finding classifier: what its targets mean, that it can tell left from right, and that a saved one is the same one."""

from __future__ import annotations

import pytest
import torch

from medgen.data.records import FindingLabel
from medgen.models.classifier import OUTPUTS, FindingClassifier, finding_targets

TINY = {"image_size": 32, "channels": (8, 16), "feature_channels": 8, "norm_groups": 4}


def targets(*labels: FindingLabel) -> dict[str, float | None]:
    values, known = finding_targets(labels)
    return {name: float(value) if mask else None for name, value, mask in zip(OUTPUTS, values, known, strict=True)}


@pytest.mark.parametrize(
    ("labels", "present", "left", "right"),
    [
        ([], 0, 0, 0),
        ([("absent", None)], 0, 0, 0),
        ([("present", "left")], 1, 1, 0),
        ([("present", "bilateral")], 1, 1, 1),
        ([("present", None)], 1, None, None),
        ([("uncertain", None)], None, None, None),
        ([("uncertain", "left")], None, None, 0),
        ([("present", "right"), ("uncertain", "left")], 1, None, 1),
        ([("present", "right"), ("absent", "left")], 1, 0, 1),
        ([("present", "left"), ("present", None)], 1, 1, None),
    ],
)
def test_targets_say_what_the_report_says_and_mask_what_it_does_not(labels, present, left, right):
    result = targets(*(FindingLabel("pleural_effusion", state, side) for state, side in labels))
    assert (result["pleural_effusion"], result["pleural_effusion_left"], result["pleural_effusion_right"]) == (
        present,
        left,
        right,
    )
    assert result["nodule"] == 0  # not mentioned counts as absent


def test_a_finding_without_a_side_has_one_output():
    assert targets(FindingLabel("cardiomegaly", "present"))["cardiomegaly"] == 1
    assert "cardiomegaly_left" not in OUTPUTS


def test_features_keep_the_side():
    model = FindingClassifier(**TINY).eval()
    image = torch.full((1, 1, 32, 32), -1.0)
    image[..., 10:14, 2:8] = 1.0
    assert not torch.allclose(model.features(image), model.features(image.flip(-1)), atol=1e-4)


def test_a_saved_classifier_is_the_same_one(tmp_path):
    model = FindingClassifier(**TINY, thresholds=[0.3] * len(OUTPUTS), patients="digital chest, seed 7").eval()
    model.save_pretrained(tmp_path)
    loaded = FindingClassifier.from_pretrained(tmp_path)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    assert torch.equal(loaded(images), model(images))
    assert loaded.outputs == OUTPUTS
    assert torch.allclose(loaded.thresholds, torch.tensor(0.3))
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_channels": 4}, "at least 8"),
        ({"channels": (8, 15)}, "multiple of norm_groups"),
        ({"thresholds": [0.5]}, "1 thresholds for"),
    ],
)
def test_impossible_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FindingClassifier(**(TINY | arguments))


def test_a_colour_image_is_refused():
    with pytest.raises(ValueError, match=r"\[B,1,H,W\]"):
        FindingClassifier(**TINY)(torch.zeros(1, 3, 32, 32))
