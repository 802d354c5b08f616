"""Digital hearts in, ejection fraction out: what the network learns, which clips count, and who may not be on both sides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.config import ConfigError, load_config
from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest, write_manifest
from medgen.models.ejection_fraction import EjectionFractionRegressor
from medgen.tasks.ejection_fraction import (
    ClipAugmentation,
    ClipSource,
    EjectionFractionRecipe,
    EjectionFractionTask,
    agreement,
    augment,
    drawn,
)
from medgen.training.loop import train

CONFIGS = Path(__file__).parents[2] / "configs"


def recipe(hearts: Path, out: Path, **train_overrides: object) -> EjectionFractionRecipe:
    train_config = {
        "out": out, "steps": 12, "batch_size": 4, "learning_rate": 3e-3, "warmup_steps": 2, "schedule": "constant_with_warmup",
        "mixed_precision": "no", "cpu": True, "ema": None, "tensorboard": False, "validate_every": 0, "preview_every": 0,
        "preflight": False, "log_every": 1,
    }  # fmt: skip
    return EjectionFractionRecipe.model_validate({
        "data": {"sources": [{"manifest": hearts}], "validation": hearts, "preprocessing": {"size": 32, "frames": 6, "fps": 20}},
        "model": {"width": 8}, "augmentation": {"shift": 0, "contrast": 0, "brightness": 0}, "windows": 2,
        "train": train_config | train_overrides,
    })  # fmt: skip


def test_it_learns_four_hearts_by_heart_and_loads_again(hearts, tmp_path):
    settings = recipe(hearts, tmp_path / "run")
    task = EjectionFractionTask(settings)
    train(task, settings.train, settings)
    errors = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    errors = [line["loss"] for line in errors if line["kind"] == "train"]
    assert min(errors[-3:]) < 0.5 * errors[0]
    facts = json.loads((tmp_path / "run/export/validation.json").read_text())
    assert facts["clips"] == 2
    assert facts["mae"] > 0
    model = EjectionFractionRegressor.from_pretrained(tmp_path / "run/export").eval()
    assert model.config["mean"] == pytest.approx(task.training.fractions.mean(), abs=1e-3)
    item = task.dataset("val")[0]
    with torch.no_grad():
        assert 0 < model(item["video"][None]).item() < 100


def test_short_clips_stand_still_and_unmeasured_ones_are_left_out(hearts, tmp_path):
    manifest = read_manifest(hearts, record=EchoRecord)
    records = [replace(r, ejection_fraction=None) if i == 0 else r for i, r in enumerate(manifest.records)]
    partly = write_manifest(records, hearts.parent / "partly.parquet", name="partly", source="test")
    settings = recipe(partly, tmp_path / "run")
    settings = settings.model_copy(
        update={
            "data": settings.data.model_copy(
                update={"preprocessing": settings.data.preprocessing.model_copy(update={"frames": 12})}
            )
        }
    )
    clips = EjectionFractionTask(settings).dataset("train")
    assert len(clips) == 3
    video = clips[0]["video"]
    assert video.shape == (12, 1, 32, 32)
    assert torch.equal(video[-1], video[8])  # the file has nine frames
    assert not torch.equal(video[8], video[7])


def test_shares_are_nested_and_patients_stay_on_one_side(hearts, tmp_path):
    half, whole = ({r.patient_id for r in drawn(ClipSource(manifest=hearts, fraction=f), 1).records} for f in (0.5, 1.0))
    assert (len(half), len(whole)) == (2, 4)
    assert half < whole
    records = [replace(r, split="train") for r in read_manifest(hearts, record=EchoRecord).records]
    everyone = write_manifest(records, hearts.parent / "everyone.parquet", name="everyone", source="test")
    settings = recipe(hearts, tmp_path / "run")
    both = settings.data.model_copy(update={"sources": (ClipSource(manifest=everyone),)})
    with pytest.raises(ConfigError, match="2 patients are among the training and the validation clips: H"):
        EjectionFractionTask(settings.model_copy(update={"data": both}))


def test_augmentation_treats_all_frames_of_a_clip_alike():
    clips = torch.rand(3, 5, 1, 16, 16) * 2 - 1
    still = clips[:, :1].expand(-1, 5, -1, -1, -1)
    changed = augment(still, ClipAugmentation(), torch.Generator().manual_seed(0))
    torch.testing.assert_close(changed, changed[:, :1].expand_as(changed))
    assert not torch.equal(changed[0, 0], still[0, 0])
    nothing = ClipAugmentation(shift=0, contrast=0, brightness=0)
    torch.testing.assert_close(augment(clips, nothing, torch.Generator()), clips)


def test_agreement_is_that_of_the_textbook():
    true = np.array([30.0, 50.0, 70.0])
    assert agreement(true + 2, true) == pytest.approx(
        {"mae": 2, "rmse": 2, "r2": 1 - 4 / (800 / 3), "r": 1, "mae_of_the_mean": 40 / 3}
    )
    assert agreement(np.array([50.0]), np.array([50.0]))["r"] is None


def test_the_network_tells_time_and_refuses_other_shapes():
    model = EjectionFractionRegressor(width=8, mean=55, std=10).eval()
    clip = torch.rand(1, 6, 1, 32, 32)
    with torch.no_grad():
        assert model(clip).shape == (1,)
        assert abs(model(clip).item() - 55) < 10
        assert model(clip) != model(clip[:, torch.tensor([3, 0, 5, 1, 4, 2])])
    with pytest.raises(ValueError, match=r"clips must be \[B,T,1,H,W\]"):
        model(clip[:, :, 0])


@pytest.mark.parametrize("path", sorted((CONFIGS / "ejection_fraction").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_valid(path):
    assert load_config(EjectionFractionRecipe, path).train.ema is None
