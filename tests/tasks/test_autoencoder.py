"""Training an autoencoder: losses, the discriminator as a second module, and statistics in the exported configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medgen.config import ConfigError, load_config
from medgen.models.autoencoder import PatchAutoencoderKL, decode, encode_moments, load_autoencoder
from medgen.tasks.autoencoder import AutoencoderRecipe, AutoencoderTask, ReconstructionConfig, reconstruction_quality
from medgen.tasks.base import Task
from medgen.training.loop import train

ROOT = Path(__file__).resolve().parents[2]


def parsed(recipe: dict[str, Any], **loss: Any) -> AutoencoderRecipe:
    shape = {"patch_size": 2, "block_out_channels": (8, 8), "norm_num_groups": 4, "mid_block_attention": False, "sample_size": 32}
    return AutoencoderRecipe.model_validate(
        {"data": recipe["data"], "train": recipe["train"], "autoencoder": shape, "loss": loss}
    )


def batch_of(task: AutoencoderTask) -> dict[str, Any]:
    data = task.dataset("train")
    return task.collate([data[i] for i in range(8)])


def test_a_run_exports_an_autoencoder_with_normalised_latents(recipe: dict[str, Any]) -> None:
    config = parsed(recipe)
    task = AutoencoderTask(config)
    assert isinstance(task, Task)
    result = train(task, config.train, config)
    assert {"val/psnr", "val/ssim"} <= result.metrics.keys()
    assert list((result.folder / "previews").glob("*.png"))
    model = load_autoencoder(result.folder / "export")
    mean, std = encode_moments(model, torch.stack([task.dataset("train")[i]["image"] for i in range(16)]))
    assert mean.mean((0, 2, 3)).abs().max() < 1e-4
    spread = (mean.var((0, 2, 3), correction=0) + (std**2).mean((0, 2, 3))).sqrt()
    torch.testing.assert_close(spread, torch.ones(4), atol=1e-4, rtol=0)


def test_it_learns_to_reconstruct(recipe: dict[str, Any]) -> None:
    torch.manual_seed(0)
    task = AutoencoderTask(parsed(recipe, l2=1.0))
    modules, batch = task.modules(), batch_of(task)
    optimiser = torch.optim.Adam(modules["model"].parameters(), lr=5e-3)
    losses = []
    for step in range(30):
        loss, _ = task.loss(modules, batch, "model", torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_adversarial_training_steps_two_modules(recipe: dict[str, Any]) -> None:
    task = AutoencoderTask(parsed(recipe, adversarial=0.1))
    modules, batch = task.modules(), batch_of(task)
    assert list(modules) == ["model", "discriminator"]
    loss, terms = task.loss(modules, batch, "model", torch.Generator().manual_seed(0))
    loss.backward()
    assert terms["adversarial"] > 0
    assert any(p.grad is not None for p in modules["model"].parameters())
    for module in modules.values():
        module.zero_grad()
    task.loss(modules, batch, "discriminator", torch.Generator().manual_seed(0))[0].backward()
    assert all(p.grad is None for p in modules["model"].parameters())
    assert all(p.grad is not None for p in modules["discriminator"].parameters())


def test_a_later_run_starts_from_an_earlier_export(recipe: dict[str, Any], autoencoder_folder: Path) -> None:
    config = parsed(recipe)
    again = config.model_copy(
        update={"autoencoder": config.autoencoder.model_copy(update={"init_from": str(autoencoder_folder)})}
    )
    model = AutoencoderTask(again).modules()["model"]
    assert isinstance(model, PatchAutoencoderKL)
    saved = load_autoencoder(autoencoder_folder).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_decoder_learns_alone_and_the_latents_stay(recipe: dict[str, Any], autoencoder_folder: Path) -> None:
    config = parsed(recipe)
    with pytest.raises(ConfigError, match="decoder_only"):
        AutoencoderTask(config.model_copy(update={"decoder_only": True})).modules()
    start = config.autoencoder.model_copy(update={"init_from": str(autoencoder_folder)})
    config = config.model_copy(update={"decoder_only": True, "autoencoder": start, "loss": ReconstructionConfig(adversarial=0.1)})
    task = AutoencoderTask(config)
    result = train(task, config.train, config)
    before, after = load_autoencoder(autoencoder_folder), load_autoencoder(result.folder / "export")
    images = torch.stack([task.dataset("train")[i]["image"] for i in range(4)])
    for one, other in zip(encode_moments(before, images), encode_moments(after, images), strict=True):
        assert torch.equal(one, other)
    latents = encode_moments(before, images)[0]
    assert not torch.allclose(decode(before, latents), decode(after, latents), atol=1e-4)


def test_perceptual_loss_needs_local_weights(recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"loss\.perceptual_weights"):
        AutoencoderTask(parsed(recipe, perceptual=0.1))


def test_perceptual_loss_from_a_local_state_dict(recipe: dict[str, Any], tmp_path: Path) -> None:
    from torchvision.models import resnet50

    torch.save(resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    task = AutoencoderTask(parsed(recipe, perceptual=0.1, perceptual_weights=tmp_path / "resnet50.pth"))
    data = task.dataset("train")
    _, terms = task.loss(task.modules(), task.collate([data[0]]), "model", torch.Generator().manual_seed(0))
    assert terms["perceptual"] > 0


def test_quality_of_a_known_error() -> None:
    image = torch.rand(2, 1, 32, 32) - 0.5
    quality = reconstruction_quality(image + 0.02, image)
    assert float(quality["psnr"]) == pytest.approx(40.0, abs=0.01)  # 20 log10(2 / 0.02)
    assert float(reconstruction_quality(image, image)["ssim"]) == pytest.approx(1.0, abs=1e-4)


def test_frames_of_echo_clips(recipe: dict[str, Any], hearts: Path) -> None:
    """Two frames of each clip in a batch of two clips; other frames in the next epoch; the export is an autoencoder as any."""
    data = {"manifest": hearts, "preprocessing": {"size": 32}, "frames_per_clip": 2}
    config = parsed({**recipe, "data": data, "train": {**recipe["train"], "batch_size": 2}})
    task = AutoencoderTask(config)
    clips = task.dataset("train")
    batch = task.collate([clips[0], clips[1]])
    assert batch["images"].shape == (4, 1, 32, 32) and len(batch["ids"]) == 2 and batch["images"].abs().max() <= 1
    assert torch.equal(clips[0]["image"], clips[0]["image"])
    first = clips[0]["image"]
    clips.set_epoch(1)
    assert not torch.equal(first, clips[0]["image"])
    result = train(task, config.train, config)
    assert {"val/psnr", "val/ssim"} <= result.metrics.keys()
    assert load_autoencoder(result.folder / "export").config.latents_mean is not None


def test_a_mistake_in_a_section_of_frames_speaks_of_frames_alone(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {frames_per_clip: 2, manifests: x}\ntrain: {out: y, steps: 1}\n")
    with pytest.raises(ConfigError) as error:
        load_config(AutoencoderRecipe, path)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and lines[0].startswith("data.manifest is missing in")
    assert lines[1].startswith("unknown key 'data.manifests'") and "did you mean 'data.manifest'?" in lines[1]


@pytest.mark.parametrize("name", ["digital_chest", "sd_kl_512"])
def test_the_recipes_are_valid(name: str) -> None:
    config = load_config(AutoencoderRecipe, ROOT / "configs" / "autoencoder" / f"{name}.yaml")
    assert config.data.preprocessing.size == config.autoencoder.sample_size
