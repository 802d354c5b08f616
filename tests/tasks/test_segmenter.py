"""The segmenter's task on pulsating ellipses: from clips with masks on disk to a folder that measures them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.config import ConfigError, load_config
from medgen.data.echo_records import EchoRecord
from medgen.data.records import write_manifest
from medgen.data.video import write_video
from medgen.evaluation.echo.measure import load_judge, volume_curve
from medgen.tasks.segmenter import MachineAugmentation, SegmenterRecipe, SegmenterTask, augment, dice, square_masks
from medgen.training.loop import train

SIZE = 32


def pulse(seed: int, frames: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """A dark, shrinking ellipse in a bright wall above a dark disc, uint8 [T,32,32], and its masks."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    size = 1 - 0.25 * (1 - np.cos(np.linspace(0, 2 * np.pi, frames)))[:, None, None] / 2
    radius = np.hypot((rows - 13) / (9 * size), (columns - 16 - rng.integers(-2, 3)) / (5 * size))
    masks = np.where(radius < 1, 1, np.where(radius < 1.5, 2, 0)).astype(np.uint8)
    masks[:, np.hypot(rows - 27, columns - 16) < 4] = 3
    grey = np.choose(masks, [80, 15, 190, 15]) + rng.normal(0, 8, masks.shape)
    return grey.clip(0, 255).astype(np.uint8), masks


def write_pulses(root: Path, per_split: dict[str, int]) -> Path:
    records = []
    for split, count in per_split.items():
        for i in range(count):
            name = f"{split}-{i}"
            frames, masks = pulse(1000 * len(split) + i)
            write_video(root / f"{name}.avi", frames, 20.0)
            np.savez(root / f"{name}.npz", masks=masks)
            records.append(
                EchoRecord(name, name, name, f"{name}.avi", "A4C", 20.0, len(frames), split, annotations=f"{name}.npz")
            )
    return write_manifest(records, root / "manifest.parquet", name="pulses", source="test")


def recipe(root: Path, **train_options: object) -> SegmenterRecipe:
    options = {
        "out": root / "run", "steps": 60, "batch_size": 6, "learning_rate": 5e-3, "warmup_steps": 5, "schedule": "cosine", "ema": None,
        "mixed_precision": "no", "cpu": True, "tensorboard": False, "validate_every": 0, "preview_every": 0,
    }  # fmt: skip
    values = {
        "data": {"manifest": root / "manifest.parquet", "size": SIZE, "frames_per_clip": 4},
        "model": {"patch_size": 2, "channels": (16, 16), "norm_groups": 4},
        "train": options | train_options,
    }
    return SegmenterRecipe.model_validate(values)


def test_it_learns_to_measure_how_an_ellipse_shrinks(tmp_path):
    write_pulses(tmp_path, {"train": 24, "val": 6})
    task = recipe(tmp_path)
    train(SegmenterTask(task), task.train, task)
    export = tmp_path / "run" / "export"
    scores = json.loads((export / "validation.json").read_text())["dice"]
    assert min(scores.values()) > 0.85, scores
    assert "pulses" in (export / "README.md").read_text()
    assert json.loads((export / "config.json").read_text())["patients"].startswith("pulses (")
    frames, masks = pulse(77)
    volume = volume_curve(load_judge(export, "cpu"), frames / 255, np.arange(len(frames)) / 20)
    area = (masks == 1).sum((1, 2))
    assert np.corrcoef(volume, area**1.5)[0, 1] > 0.97
    assert volume.min() / volume.max() == pytest.approx((area.min() / area.max()) ** 1.5, abs=0.08)


def test_frames_are_drawn_anew_in_every_epoch_and_the_same_again(tmp_path):
    write_pulses(tmp_path, {"train": 2, "val": 1})
    data = SegmenterTask(recipe(tmp_path)).dataset("train")
    first = data[0]["frames"]
    assert first.shape == (4, 1, SIZE, SIZE)
    assert torch.equal(first, data[0]["frames"])
    data.set_epoch(1)
    assert not torch.equal(first, data[0]["frames"])
    held = SegmenterTask(recipe(tmp_path)).dataset("val")
    before = held[0]["frames"]
    held.set_epoch(1)
    assert torch.equal(before, held[0]["frames"])


def test_masks_that_do_not_fit_their_video_are_refused(tmp_path):
    write_pulses(tmp_path, {"train": 1})
    np.savez(tmp_path / "train-0.npz", masks=np.zeros((3, SIZE, SIZE), np.uint8))
    with pytest.raises(ConfigError, match=r"train-0: .* masks \[3, 32, 32\].* expected masks \[10, 32, 32\]"):
        SegmenterTask(recipe(tmp_path)).dataset("train")[0]


def test_a_manifest_without_annotations_says_so(tmp_path):
    frames, _ = pulse(0)
    write_video(tmp_path / "a.avi", frames, 20.0)
    write_manifest(
        [EchoRecord("a", "a", "a", "a.avi", "A4C", 20.0, 10, "train")], tmp_path / "manifest.parquet", name="x", source="test"
    )
    with pytest.raises(ConfigError, match="none of its 1 records has annotations"):
        SegmenterTask(recipe(tmp_path)).dataset("train")


def test_masks_follow_their_frames_to_a_square():
    masks = np.zeros((1, 10, 20), np.uint8)
    masks[0, :, 15:] = 3
    square = square_masks(masks, 40)
    assert square.shape == (1, 40, 40)
    assert square.unique().tolist() == [0, 3]
    assert (square[0, 10:30, 30:] == 3).all()
    assert (square[0, :10] == 0).all()


def test_augmentation_changes_the_machine_and_not_the_place():
    frames = torch.from_numpy(pulse(1)[0]).float()[:, None] / 127.5 - 1
    changed = augment(frames, MachineAugmentation(), torch.Generator().manual_seed(1))
    assert torch.equal(changed, augment(frames, MachineAugmentation(), torch.Generator().manual_seed(1)))
    assert changed.abs().max() <= 1
    pairs = torch.stack([frames.flatten(1), changed.flatten(1)], 1)
    assert min(torch.corrcoef(pair)[0, 1] for pair in pairs) > 0.8
    off = MachineAugmentation(contrast=0, brightness=0, noise=0, blur=0)
    torch.testing.assert_close(augment(frames, off, torch.Generator()), frames)


def test_dice_counts_each_structure():
    true = torch.tensor([[[1, 1], [2, 3]]])
    assert dice(true, true).tolist() == [1, 1, 1]
    seen = torch.tensor([[[1, 0], [2, 0]]])
    assert dice(seen, true).tolist() == pytest.approx([2 / 3, 1, 0])


def test_the_shipped_recipe_is_valid():
    path = Path(__file__).parents[2] / "configs/segmenter/digital_echo.yaml"
    assert load_config(SegmenterRecipe, path).train.mixed_precision == "no"
