"""The re-identification network's task on toy patients: from two films each to a folder that knows a patient again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.config import ConfigError
from medgen.data.images import load_image
from medgen.models.siamese import SiameseNetwork, load_siamese
from medgen.tasks.re_identification import (
    CopyAugmentation,
    ReIdentificationRecipe,
    ReIdentificationTask,
    augment,
    contrastive,
    verification,
)
from medgen.training.loop import train
from tests.privacy_films import SIZE, write_patients


def recipe(root: Path, **options: object) -> ReIdentificationRecipe:
    values = {
        "out": root / "run", "steps": 40, "batch_size": 12, "learning_rate": 5e-3, "warmup_steps": 2, "schedule": "cosine", "ema": None,
        "mixed_precision": "no", "cpu": True, "tensorboard": False, "validate_every": 20, "validation_batches": 1, "preview_every": 0,
    }  # fmt: skip
    return ReIdentificationRecipe.model_validate(
        {
            "data": {"manifest": root / "manifest.parquet", "preprocessing": {"size": SIZE}},
            "model": {"channels": (8, 16), "dim": 16},
            "augmentation": {"zoom": 0.1, "shift": 0.02, "noise": 0.05},
            "train": values | options,
        }
    )


def test_it_learns_to_know_patients_again(tmp_path: Path) -> None:
    write_patients(tmp_path, {"train": 24, "val": 10, "test": 10})
    task = recipe(tmp_path)
    train(ReIdentificationTask(task), task.train, task)
    export = tmp_path / "run" / "export"
    facts = json.loads((export / "validation.json").read_text())
    assert facts["test"]["patients"] == 10 and facts["test"]["auroc"] > 0.9
    model = load_siamese(export, "cpu")
    assert model.config["patients"].startswith("toy patients (") and model.config["threshold"] == facts["val"]["threshold"]
    same, other, stranger = (load_image(tmp_path / "images" / f"p{name}.png", SIZE)[None] for name in ("30-0", "30-1", "31-0"))
    vectors = model(torch.cat([same, other, stranger]))
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    assert (vectors[0] - vectors[1]).norm() < (vectors[0] - vectors[2]).norm()
    assert "Never use it to identify a person" in (export / "README.md").read_text()


def test_brightness_and_contrast_of_a_film_do_not_matter() -> None:
    model = SiameseNetwork(image_size=SIZE, channels=(8, 16), dim=8).eval()
    film = torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) - 0.5
    torch.testing.assert_close(model(film), model(film * 0.6 + 0.2), atol=1e-5, rtol=1e-4)
    straight, mirrored = model.both_ways(film)
    torch.testing.assert_close(mirrored, model(film.flip(-1)))
    torch.testing.assert_close(straight, model(film))


def test_the_published_shape_is_there_for_real_films() -> None:
    model = SiameseNetwork(image_size=64, backbone="resnet50", dim=128).eval()
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 128)


def test_the_contrastive_loss_wants_films_of_one_patient_together() -> None:
    patient = torch.tensor([0, 0, 1, 1, 2])
    together = torch.eye(3)[patient]
    apart = torch.eye(5)
    (good, right), (bad, _) = (contrastive(vectors, patient, 0.1) for vectors in (together, apart))
    assert good < 0.01 < bad and right == 1


def test_augmentation_mirrors_both_films_of_a_patient_or_none_and_keeps_to_the_range() -> None:
    films = (torch.rand(8, 1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9).expand(-1, 2, -1, -1, -1)
    only_flip = CopyAugmentation(zoom=0, shift=0, rotation=0, gamma=0, noise=0)
    changed = augment(films, only_flip, torch.Generator().manual_seed(1))
    as_they_were, mirrored = ((changed - way).abs().amax((1, 2, 3, 4)) < 1e-5 for way in (films, films.flip(-1)))
    assert (as_they_were ^ mirrored).all() and 0 < mirrored.sum() < 8
    everything = augment(films, CopyAugmentation(), torch.Generator().manual_seed(1))
    assert everything.abs().max() <= 1 and not torch.equal(everything[:, 0], everything[:, 1])


def test_verification_of_perfect_and_of_useless_vectors() -> None:
    patients = [f"p{i // 2}" for i in range(40)]
    perfect = verification(torch.eye(20).repeat_interleave(2, 0), patients)
    assert perfect["auroc"] == 1 and perfect["rank_1"] == 1
    useless = verification(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), patients)
    assert 0.3 < useless["auroc"] < 0.7


def test_manifests_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    write_patients(tmp_path, {"train": 1, "val": 2})
    with pytest.raises(ConfigError, match="train split is of 1 patient"):
        ReIdentificationTask(recipe(tmp_path))
    with pytest.raises(ConfigError, match="more than one patient"):
        verification(torch.eye(2), ["a", "a"])


def test_which_two_films_of_a_patient_come_depends_on_the_epoch_only(tmp_path: Path) -> None:
    write_patients(tmp_path, {"train": 6})
    data = ReIdentificationTask(recipe(tmp_path)).dataset("train")
    orders = set()
    for epoch in range(8):
        data.set_epoch(epoch)
        first, again = data[2]["films"], data[2]["films"]
        assert torch.equal(first, again) and first.shape == (2, 1, SIZE, SIZE)
        orders.add(first.numpy().tobytes())
    assert len(orders) == 2 and np.isfinite(first.numpy()).all()
