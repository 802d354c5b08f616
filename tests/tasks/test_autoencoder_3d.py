"""The autoencoder's task on visits' images: volumes as films, the same losses, statistics and export; and 2D visits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.config import ConfigError, load_config
from medgen.data.records import Split, write_manifest
from medgen.data.visit_images import VisitImages
from medgen.data.visit_records import Visit, VisitSeries
from medgen.data.volumes import write_volume
from medgen.models.autoencoder import decode, encode_moments, load_autoencoder
from medgen.models.volume_autoencoder import VolumeAutoencoderKL
from medgen.tasks.autoencoder import (
    AutoencoderRecipe,
    AutoencoderTask,
    ReconstructionConfig,
    reconstruction_quality,
    visit_preprocessing,
)
from medgen.tasks.base import Task
from medgen.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
SIDE = 16
SPLITS: tuple[Split, ...] = ("train",) * 6 + ("val",) * 2


def written(root: Path, dim: int) -> Path:
    """Eight patients of two visits (the first has but one): a ball of tissue that has grown by the second."""
    axis = torch.linspace(-1, 1, SIDE)
    radius = torch.stack(torch.meshgrid(*(axis,) * dim, indexing="ij")).norm(dim=0)
    records = []
    for index, split in enumerate(SPLITS):
        noise = torch.randn(radius.shape, generator=torch.Generator().manual_seed(index))
        visits = []
        for k in range(1 if index == 0 else 2):
            hu = torch.where(radius < 0.3 + 0.05 * index + 0.1 * k, 50.0, -900.0) + 20 * noise
            name = f"p{index}-{k}.nii.gz" if dim == 3 else f"p{index}-{k}.png"
            if dim == 3:
                write_volume(root / name, hu, np.diag([5.0, 5.0, 5.0, 1.0]))
            else:
                Image.fromarray(((hu + 1000) / 5).clamp(0, 255).byte().numpy()).save(root / name)
            visits.append(Visit(f"p{index}-v{k}", 30.0 * k, name))
        modality = "ct" if dim == 3 else "cxr"
        records.append(VisitSeries(f"p{index}", f"p{index}", f"p{index}", tuple(visits), modality, dim, "days", split))  # type: ignore[arg-type]
    return write_manifest(records, root / "manifest.parquet", name="balls", source="test")


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("balls"), 3)


def recipe(manifest: Path, out: Path, dim: int = 3, size: int = SIDE, **loss: Any) -> AutoencoderRecipe:
    shape = {
        "patch_size": 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "mid_block_attention": False,
        "sample_size": size,
    }
    train_section = {"out": out / "run", "steps": 2, "batch_size": 4, "mixed_precision": "no", "cpu": True, "tensorboard": False,
                     "validate_every": 2, "validation_batches": 1, "preview_every": 2}  # fmt: skip
    data = {"manifest": manifest, "preprocessing": {"dim": dim, "size": size}}
    return AutoencoderRecipe.model_validate({"data": data, "train": train_section, "autoencoder": shape, "loss": loss})


def batch_of(task: AutoencoderTask, count: int = 8) -> dict[str, Any]:
    data = task.dataset("train")
    return task.collate([data[i] for i in range(count)])


def test_a_run_exports_an_autoencoder_of_volumes_with_normalised_latents(balls: Path, tmp_path: Path) -> None:
    config = recipe(balls, tmp_path)
    task = AutoencoderTask(config)
    assert isinstance(task, Task)
    data = task.dataset("train")
    assert isinstance(data, VisitImages) and len(data) == 11  # a patient's only visit is an image, too
    result = train(task, config.train, config)
    assert {"val/psnr", "val/ssim"} <= result.metrics.keys()
    (picture,) = (result.folder / "previews").glob("*.png")
    assert Image.open(picture).size[0] > SIDE
    export = result.folder / "export"
    assert not list(export.glob("*.bin"))
    model = load_autoencoder(export)
    assert isinstance(model, VolumeAutoencoderKL)
    mean, std = encode_moments(model, torch.stack([data[i]["image"] for i in range(len(data))]))
    assert mean.shape == (11, 4, 4, 4, 4)
    assert mean.mean((0, 2, 3, 4)).abs().max() < 1e-4
    spread = (mean.var((0, 2, 3, 4), correction=0) + (std**2).mean((0, 2, 3, 4))).sqrt()
    torch.testing.assert_close(spread, torch.ones(4), atol=1e-4, rtol=0)
    assert visit_preprocessing(export) == config.data.preprocessing


def test_it_learns_to_reconstruct(balls: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = AutoencoderTask(recipe(balls, tmp_path, l2=1.0))
    modules, batch = task.modules(), batch_of(task)
    assert batch["images"].shape == (8, 1, SIDE, SIDE, SIDE)
    optimiser = torch.optim.Adam(modules["model"].parameters(), lr=5e-3)
    losses = []
    for step in range(25):
        loss, _ = task.loss(modules, batch, "model", torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_adversarial_training_of_volumes(balls: Path, tmp_path: Path) -> None:
    task = AutoencoderTask(recipe(balls, tmp_path, size=32, adversarial=0.1, discriminator_channels=4))
    modules, batch = task.modules(), batch_of(task, 2)
    loss, terms = task.loss(modules, batch, "model", torch.Generator().manual_seed(0))
    loss.backward()
    assert terms["adversarial"] > 0 and any(p.grad is not None for p in modules["model"].parameters())
    task.loss(modules, batch, "discriminator", torch.Generator().manual_seed(0))[0].backward()
    assert all(p.grad is not None for p in modules["discriminator"].parameters())


def test_perceptual_loss_on_slices(balls: Path, tmp_path: Path) -> None:
    from torchvision.models import resnet50

    torch.save(resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    task = AutoencoderTask(recipe(balls, tmp_path, perceptual=0.1, perceptual_weights=tmp_path / "resnet50.pth"))
    _, terms = task.loss(task.modules(), batch_of(task, 1), "model", torch.Generator().manual_seed(0))
    assert terms["perceptual"] > 0


def test_a_decoder_learns_alone_and_the_latents_stay(balls: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = recipe(balls, tmp_path)
    first = AutoencoderTask(config)
    folder = tmp_path / "first"
    folder.mkdir()
    first.export(first.modules(), folder)
    start = config.autoencoder.model_copy(update={"init_from": str(folder)})
    config = config.model_copy(update={"decoder_only": True, "autoencoder": start, "loss": ReconstructionConfig()})
    result = train(AutoencoderTask(config), config.train, config)
    before, after = load_autoencoder(folder), load_autoencoder(result.folder / "export")
    images = batch_of(first, 2)["images"]
    latents = encode_moments(before, images)[0]
    assert torch.equal(latents, encode_moments(after, images)[0])
    assert not torch.allclose(decode(before, latents), decode(after, latents), atol=1e-4)


def test_pictures_of_visits(tmp_path: Path) -> None:
    config = recipe(written(tmp_path, 2), tmp_path, dim=2)
    result = train(AutoencoderTask(config), config.train, config)
    model = load_autoencoder(result.folder / "export")
    assert model.config.latents_mean is not None and visit_preprocessing(result.folder / "export") is not None
    assert encode_moments(model, batch_of(AutoencoderTask(config), 2)["images"])[0].shape == (2, 4, 4, 4)


def test_what_does_not_fit_is_refused(balls: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preprocessing\.size.*not a multiple.*4"):
        AutoencoderTask(recipe(balls, tmp_path, size=18)).modules()
    with pytest.raises(ValueError, match=r"preprocessing\.dim=3"):
        AutoencoderTask(recipe(balls, tmp_path, dim=2)).dataset("train")


def test_a_mistake_in_a_section_of_visits_speaks_of_visits_alone(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {manifests: x, preprocessing: {dim: 3, size: 64}}\ntrain: {out: y, steps: 1}\n")
    with pytest.raises(ConfigError) as error:
        load_config(AutoencoderRecipe, path)
    assert len(str(error.value).splitlines()) == 2 and "did you mean 'data.manifest'?" in str(error.value)


def test_quality_of_a_known_error_in_volumes() -> None:
    image = torch.rand(2, 1, 16, 16, 16) - 0.5
    quality = reconstruction_quality(image + 0.02, image)
    assert float(quality["psnr"]) == pytest.approx(40.0, abs=0.01)  # 20 log10(2 / 0.02)
    assert float(reconstruction_quality(image, image)["ssim"]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", ["digital_ct", "acdc"])
def test_the_recipes_are_valid(name: str) -> None:
    config = load_config(AutoencoderRecipe, ROOT / "configs" / "autoencoder" / f"{name}.yaml")
    size = config.data.preprocessing.size
    assert size == config.autoencoder.sample_size and AutoencoderTask(config).dims == 3
