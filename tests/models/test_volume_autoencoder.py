"""The autoencoder of volumes: shapes, normalised latents, MONAI's own network inside, and that a saved one is the same model."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

from medgen.config import ConfigError
from medgen.models import autoencoder
from medgen.models.autoencoder import (
    AutoencoderConfig,
    build_autoencoder,
    decode,
    downsampling,
    encode_moments,
    encoder_parts,
    load_autoencoder,
    set_latent_statistics,
    spatial_dims_of,
)
from medgen.models.volume_autoencoder import VolumeAutoencoderKL


def tiny(patch_size: int = 2, stages: int = 2, **options: Any) -> VolumeAutoencoderKL:
    torch.manual_seed(0)
    shape = {"block_out_channels": (8,) * stages, "norm_num_groups": 4, "latent_channels": 3, "mid_block_attention": False}
    config = AutoencoderConfig.model_validate({"patch_size": patch_size, "sample_size": 16, **shape, **options})
    model = build_autoencoder(config, 3)
    assert isinstance(model, VolumeAutoencoderKL)
    return model.eval()


def volumes(batch: int = 2, sides: tuple[int, int, int] = (16, 16, 16)) -> torch.Tensor:
    return torch.rand(batch, 1, *sides, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("patch_size", "stages", "factor"), [(1, 1, 1), (1, 3, 4), (2, 2, 4), (4, 2, 8), (8, 1, 8)])
def test_shapes(patch_size: int, stages: int, factor: int) -> None:
    model, images = tiny(patch_size, stages), volumes(sides=(8, 16, 24))
    mean, std = encode_moments(model, images)
    assert downsampling(model) == factor and spatial_dims_of(model) == 3
    assert mean.shape == std.shape == (2, 3, 8 // factor, 16 // factor, 24 // factor)
    assert (std > 0).all()
    assert decode(model, mean).shape == images.shape
    assert model(images)[0].shape == images.shape


def test_statistics_normalise_the_latents_and_survive_saving(tmp_path: Path) -> None:
    model, images = tiny(), volumes(16)
    raw = model.encode(images).latent_dist
    mean, second = raw.mean.mean((0, 2, 3, 4)), (raw.mean**2 + raw.var).mean((0, 2, 3, 4))
    set_latent_statistics(model, mean.detach(), (second - mean**2).sqrt().detach())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = load_autoencoder(tmp_path)
    mean, std = encode_moments(loaded, images)
    drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert drawn.mean((0, 2, 3, 4)).abs().max() < 0.05
    assert (drawn.std((0, 2, 3, 4)) - 1).abs().max() < 0.05
    assert torch.equal(decode(loaded, mean), decode(model, mean))
    assert torch.equal(encode_moments(loaded, images)[0], mean)  # nothing is drawn
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_without_folding_it_is_monais_own_network() -> None:
    model, images = tiny(patch_size=1), volumes()
    mean, sigma = model.network.encode(images)
    posterior = model.encode(images).latent_dist
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(posterior.std, sigma)
    torch.testing.assert_close(model.decode(mean).sample, model.network.decode(mean))


def test_folding_keeps_neighbours_together() -> None:
    """A change of one voxel reaches the latents around it alone: fold and unfold agree on places."""
    model = tiny(patch_size=4, stages=1)
    images = volumes(1, (16, 16, 64))
    changed = images.clone()
    changed[..., 62] += 1
    difference = (encode_moments(model, changed)[0] - encode_moments(model, images)[0]).abs().amax((0, 1, 2, 3))
    assert difference.argmax() >= 14


def test_sampling_the_posterior_follows_its_generator() -> None:
    model, images = tiny(), volumes(1)
    first, second = (model(images, torch.Generator().manual_seed(s))[0] for s in (1, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, model(images, torch.Generator().manual_seed(2))[0])
    assert torch.equal(model(images, sample=False)[0], model(images, sample=False)[0])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(volumes(), torch.Generator().manual_seed(0))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_encoder_is_what_the_posterior_needs() -> None:
    model = tiny()
    for part in encoder_parts(model):
        part.requires_grad_(False)
    assert not model.encode(volumes()).latent_dist.parameters.requires_grad
    assert model(volumes())[0].requires_grad


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        encode_moments(tiny(), volumes(sides=(14, 16, 16)))
    with pytest.raises(ConfigError, match=r"block_out_channels.*norm_num_groups=4"):
        build_autoencoder(AutoencoderConfig(block_out_channels=(6,), norm_num_groups=4), 3)
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"init_from.*3D.*2D"):
        build_autoencoder(AutoencoderConfig(init_from=str(tmp_path)))
    assert spatial_dims_of(build_autoencoder(AutoencoderConfig(init_from=str(tmp_path)), 3)) == 3
    with pytest.raises(ConfigError, match=r"sample_size.*one number"):
        build_autoencoder(AutoencoderConfig(block_out_channels=(8,), norm_num_groups=4, sample_size=(8, 16, 16)))


def test_images_do_not_wait_for_monai() -> None:
    """Importing MONAI's networks takes seconds, half a minute on a cold machine: only volumes pay for it."""
    top = ast.parse(Path(autoencoder.__file__).read_text()).body
    names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in top if isinstance(node, ast.ImportFrom)]
    assert names and not any("monai" in name or "volume" in name for name in names)
