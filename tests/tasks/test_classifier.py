"""The classifier task from a manifest on disk to a folder that judges: it learns sides, skips doubt and never mirrors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.config import ConfigError, load_config
from medgen.data.records import FINDINGS, CXRRecord, FindingLabel, write_manifest
from medgen.models.classifier import OUTPUTS, FindingClassifier
from medgen.tasks.classifier import (
    ClassifierRecipe,
    ClassifierTask,
    JudgeAugmentation,
    _output_result,
    augment,
    place_loss,
    positive_weights,
    read_places,
)
from medgen.training.loop import train

SIZE = 32


def disc(row: float, column: float, radius: float = 5.0, seed: int = 0) -> np.ndarray:
    """A dark film with one bright disc; a column above the middle is the patient's left, as on any frontal film."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    noise = np.random.default_rng(seed).normal(0, 6, (SIZE, SIZE))
    return np.clip(50 + noise + 150 * (np.hypot(rows - row, columns - column) < radius), 0, 255).astype(np.uint8)


def write_discs(root: Path, per_split: dict[str, int]) -> Path:
    records = []
    for split, count in per_split.items():
        for i in range(count):
            side = ("left", "right", None)[i % 3]
            film = disc(10 + i % 12, {"left": 24, "right": 7, None: -99}[side], seed=i)
            name = f"{split}-{i}"
            (root / "images").mkdir(exist_ok=True, parents=True)
            Image.fromarray(film).save(root / f"images/{name}.png")
            labels = (FindingLabel("nodule", "present", side),) if side else (FindingLabel("nodule", "absent"),)
            words = f"Nodule in the {side} lung." if side else "No nodule."
            records.append(CXRRecord(name, name, name, f"images/{name}.png", "PA", words, words, split, labels))
    return write_manifest(records, root / "manifest.parquet", name="discs", source="test")


def recipe(root: Path, **overrides: object) -> ClassifierRecipe:
    values = {
        "data": {"manifest": root / "manifest.parquet", "preprocessing": {"size": SIZE}},
        "model": {"channels": (16, 32), "stem_stride": 2, "feature_channels": 8, "norm_groups": 4},
        "train": {
            "out": root / "run", "steps": 100, "batch_size": 24, "learning_rate": 4e-3, "warmup_steps": 5, "schedule": "cosine",
            "mixed_precision": "no", "cpu": True, "ema": None, "tensorboard": False, "validate_every": 0, "preview_every": 0,
        },
    }  # fmt: skip
    return ClassifierRecipe.model_validate(values | overrides)


def test_it_learns_which_side_a_disc_is_on(tmp_path):
    write_discs(tmp_path, {"train": 96, "val": 30})
    task = recipe(tmp_path)
    train(ClassifierTask(task), task.train, task)
    export = tmp_path / "run" / "export"
    results = json.loads((export / "validation.json").read_text())["outputs"]
    for output in ("nodule", "nodule_left", "nodule_right"):
        assert results[output]["auroc"] > 0.95, (output, results[output])
    assert results["edema"]["auroc"] is None  # no film shows it: said, not invented
    judge = FindingClassifier.from_pretrained(export, dtype=torch.float32).eval()
    assert judge.thresholds[OUTPUTS.index("nodule")].item() == pytest.approx(results["nodule"]["threshold"])
    assert judge.config["patients"].startswith("discs")
    film = torch.from_numpy(disc(15, 24, seed=999)).float()[None, None] / 127.5 - 1
    left, right = (judge.outputs.index(f"nodule_{side}") for side in ("left", "right"))
    scores, mirrored = judge(film)[0].detach(), judge(film.flip(-1))[0].detach()
    assert scores[left] > scores[right]
    assert mirrored[right] > mirrored[left]
    assert "nodule_left" in (export / "README.md").read_text()


def test_it_goes_on_from_a_trained_one(tmp_path):
    write_discs(tmp_path, {"train": 24, "val": 6})
    first = recipe(tmp_path, train={**recipe(tmp_path).train.model_dump(), "steps": 2})
    train(ClassifierTask(first), first.train, first)
    export = str(tmp_path / "run" / "export")
    model = ClassifierTask(recipe(tmp_path, model={"init_from": export})).modules()["model"]
    trained = FindingClassifier.from_pretrained(export, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    other = recipe(tmp_path, model={"init_from": export}, data={"manifest": first.data.manifest, "preprocessing": {"size": 64}})
    with pytest.raises(ConfigError, match=r"model.init_from: .* at 32 pixels, this recipe has .* at 64"):
        ClassifierTask(other).modules()


def test_the_batch_carries_masks_and_uncertain_findings_no_gradient(tmp_path):
    manifest = write_discs(tmp_path, {"train": 3})
    assert manifest.is_file()
    task = ClassifierTask(recipe(tmp_path))
    batch = task.collate([task.dataset("train")[i] for i in range(3)])
    assert batch["images"].shape == (3, 1, SIZE, SIZE)
    assert batch["ids"] == ["train-0", "train-1", "train-2"]
    batch["mask"][:, OUTPUTS.index("nodule")] = 0
    modules = task.modules()
    loss, _ = task.loss(modules, batch, "model", torch.Generator().manual_seed(0))
    loss.backward()
    gradient = modules["model"].head.bias.grad
    assert gradient[OUTPUTS.index("nodule")] == 0
    assert gradient[OUTPUTS.index("edema")] != 0


def test_augmentation_is_mild_seeded_and_never_a_mirror():
    film = torch.from_numpy(disc(15, 26)).float()[None, None].repeat(64, 1, 1, 1) / 127.5 - 1
    places = (film > 0).float()
    config = JudgeAugmentation()
    changed, moved = augment(film, places, config, torch.Generator().manual_seed(3))
    assert torch.equal(changed, augment(film, places, config, torch.Generator().manual_seed(3))[0])
    assert not torch.equal(changed[0], changed[1])
    right_half = changed[..., SIZE // 2 :].mean((1, 2, 3))
    assert (right_half > changed[..., : SIZE // 2].mean((1, 2, 3))).all()
    assert ((moved > 0.5) == (changed > 0)).float().mean() > 0.97  # the mask moves with the film
    off = JudgeAugmentation(rotation=0, shift=0, scale=0, contrast=0, brightness=0, noise=0)
    torch.testing.assert_close(augment(film, places, off, torch.Generator())[0], film)
    unknown = torch.full_like(places, -1.0)
    assert torch.equal(augment(film, unknown, config, torch.Generator())[1], unknown)


def test_masks_are_read_by_bit_and_teach_where(tmp_path):
    bits = np.zeros((128, 128), np.uint8)
    bits[8:12, 100:104] = 1 << FINDINGS.index("nodule") | 1 << FINDINGS.index("edema")
    Image.fromarray(bits).save(tmp_path / "mask.png")
    places = read_places(tmp_path / "mask.png")
    assert places.shape == (8, 32, 32)
    assert places.sum() == 2
    assert places[FINDINGS.index("nodule"), 2, 25] == 1
    right = torch.where(torch.nn.functional.adaptive_max_pool2d(places[None], 16) > 0, 9.0, -9.0)
    assert place_loss(right, places[None]) < 0.8  # six findings are nowhere: their Dice term stays
    assert place_loss(-right, places[None]) > 5
    nowhere = torch.full_like(places[None], -1.0)
    assert place_loss(right, nowhere) == 0


def test_rare_findings_weigh_more_up_to_the_ceiling(tmp_path):
    labels = [(FindingLabel("edema", "present"),), (), (), (), ()]
    records = [CXRRecord(f"r{i}", "p", "s", "a.png", "PA", "", "", "train", found) for i, found in enumerate(labels)]
    weights = dict(zip(OUTPUTS, positive_weights(records, 3.0).tolist(), strict=True))
    assert weights["edema"] == pytest.approx(2.0)  # √(4 / 1)
    assert weights["nodule"] == pytest.approx(5**0.5, rel=1e-5)


def test_a_threshold_separates_and_stays_near_the_middle_where_many_do():
    targets = torch.tensor([0.0] * 50 + [1.0] * 50)
    apart = torch.cat([torch.linspace(0.0, 0.1, 50), torch.linspace(0.7, 1.0, 50)])
    result = _output_result(apart, targets, torch.ones(100))
    assert result["auroc"] == 1.0
    assert result["threshold"] == pytest.approx(0.4)
    low = _output_result(apart / 10, targets, torch.ones(100))["threshold"]
    assert low is not None
    assert 0.01 < low < 0.08  # where the scores are low, so is the threshold


def test_export_without_a_validation_split_says_so(tmp_path):
    write_discs(tmp_path, {"train": 3})
    task = ClassifierTask(recipe(tmp_path))
    with pytest.raises(ConfigError, match="no 'val' split"):
        task.export(task.modules(), tmp_path)


def test_the_shipped_recipe_is_valid():
    path = Path(__file__).parents[2] / "configs/classifier/digital_chest.yaml"
    assert load_config(ClassifierRecipe, path).train.mixed_precision == "no"
