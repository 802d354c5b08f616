"""The autoencoder: shapes, normalised latents, what is refused, and that a saved one is the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from medgen.config import ConfigError
from medgen.models.autoencoder import (
    AutoencoderConfig,
    PatchAutoencoderKL,
    build_autoencoder,
    decode,
    downsampling,
    encode_moments,
    load_autoencoder,
    set_latent_statistics,
)


def tiny(patch_size: int = 2, stages: int = 2, latent_channels: int = 3) -> PatchAutoencoderKL:
    torch.manual_seed(0)
    return build_autoencoder(
        AutoencoderConfig(
            patch_size=patch_size,
            block_out_channels=(8,) * stages,
            norm_num_groups=4,
            latent_channels=latent_channels,
            mid_block_attention=False,
            sample_size=32,
        )
    ).eval()


@pytest.mark.parametrize(("patch_size", "stages", "factor"), [(1, 1, 1), (1, 3, 4), (2, 2, 4), (4, 2, 8), (8, 1, 8)])
def test_shapes(patch_size: int, stages: int, factor: int) -> None:
    model = tiny(patch_size, stages)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    mean, std = encode_moments(model, images)
    assert downsampling(model) == factor
    assert mean.shape == std.shape == (2, 3, 32 // factor, 32 // factor)
    assert (std > 0).all()
    assert decode(model, mean).shape == images.shape
    assert model(images)[0].shape == images.shape


def test_statistics_normalise_the_latents_and_survive_saving(tmp_path: Path) -> None:
    model, images = tiny(), torch.rand(16, 1, 32, 32) * 2 - 1
    raw = model.encode(images).latent_dist
    moments = raw.mean.mean((0, 2, 3)), (raw.mean.var((0, 2, 3), correction=0) + raw.var.mean((0, 2, 3))).sqrt()
    set_latent_statistics(model, *(m.detach() for m in moments))
    model.save_pretrained(tmp_path)
    loaded = load_autoencoder(tmp_path)
    mean, std = encode_moments(loaded, images)
    drawn = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    assert drawn.mean((0, 2, 3)).abs().max() < 0.05
    assert (drawn.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert torch.equal(decode(loaded, mean), decode(model, mean))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_without_folding_it_is_diffusers_own_autoencoder(tmp_path: Path) -> None:
    model, images = tiny(patch_size=1), torch.rand(1, 1, 32, 32)
    model.save_pretrained(tmp_path)
    plain = AutoencoderKL.from_pretrained(tmp_path)
    torch.testing.assert_close(plain.encode(images).latent_dist.mean, model.encode(images).latent_dist.mean, atol=1e-4, rtol=0)


def test_a_published_three_channel_autoencoder_takes_grey_films(tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16, scaling_factor=0.2).save_pretrained(tmp_path)
    model = load_autoencoder(tmp_path)
    images = torch.rand(2, 1, 16, 16)
    mean, _ = encode_moments(model, images)
    torch.testing.assert_close(mean, 0.2 * model.encode(images.repeat(1, 3, 1, 1)).latent_dist.mean)
    assert decode(model, mean).shape == images.shape


def test_sampling_the_posterior_follows_its_generator() -> None:
    model, images = tiny(), torch.rand(1, 1, 32, 32)
    first, second = (model(images, torch.Generator().manual_seed(s))[0] for s in (1, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, model(images, torch.Generator().manual_seed(2))[0])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        encode_moments(tiny(), torch.rand(1, 1, 30, 32))
    with pytest.raises(ConfigError, match=r"block_out_channels.*norm_num_groups=4"):
        build_autoencoder(AutoencoderConfig(block_out_channels=(6,), norm_num_groups=4))


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(OSError, match="safetensors"):
        load_autoencoder(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        build_autoencoder(AutoencoderConfig(init_from=str(tmp_path)))
