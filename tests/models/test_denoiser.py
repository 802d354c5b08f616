"""The sequence denoiser: one model for an image, visits and a video; what each argument does and does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medgen.config import ConfigError
from medgen.models.attention import Attention, rotate, time_angles, working_backends
from medgen.models.denoiser import DenoiserConfig, SequenceTransformer, build_denoiser


def tiny(**options: Any) -> SequenceTransformer:
    """Away from its zero initialisation, so that everything has an effect."""
    torch.manual_seed(0)
    model = SequenceTransformer(**{"context_dim": 6, "width": 16, "depth": 2, "heads": 2, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def inputs(batch: int = 2, frames: int = 3, words: int = 5) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(batch, frames, 4, 8, 8, generator=g),
        "levels": torch.rand(batch, frames, generator=g),
        "times": torch.rand(batch, frames, generator=g).cumsum(1) * 50,
        "context": torch.randn(batch, words, 6, generator=g),
    }


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 1, 4, 8, 8)),
        ({}, (1, 3, 4, 4, 12)),
        ({"patch_size": 1, "latent_channels": 3}, (2, 1, 3, 4, 4)),
        ({"spatial_dims": 3, "width": 24}, (1, 2, 4, 4, 4, 6)),
        ({"temporal_every": 1}, (2, 3, 4, 8, 8)),
        ({"modulation": "per_block"}, (1, 1, 4, 8, 8)),
    ],
)
def test_shapes(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    frames = shape[:2]
    assert tiny(**options)(torch.randn(shape), torch.rand(frames), torch.zeros(frames)).shape == shape


def test_an_untrained_denoiser_returns_zero() -> None:
    model = SequenceTransformer(context_dim=6, width=16, depth=2, heads=2)
    x = inputs()
    assert (model(x["latents"], x["levels"], x["times"], context=x["context"]) == 0).all()


def test_patches_go_back_where_they_came_from() -> None:
    model, x = tiny(), torch.randn(2, 3, 4, 6, 10)
    tokens, sides = model._patchify(x)
    assert sides == (3, 5) and tokens.shape == (2, 3, 15, 16)
    assert torch.equal(model._unpatchify(tokens, x.shape), x)
    assert torch.equal(tokens[0, 0, 6].view(4, 2, 2), x[0, 0, :, 2:4, 2:4])


@pytest.mark.parametrize("changed", ["levels", "context", "times"])
def test_every_condition_changes_the_output(changed: str) -> None:
    model, x = tiny(temporal_every=1), inputs()
    other = dict(x, **{changed: x[changed] * torch.rand(x[changed].shape) + 0.3})
    assert (model(**x) - model(**other)).abs().max() > 1e-3


def test_only_differences_of_times_matter() -> None:
    model, x = tiny(temporal_every=1), inputs()
    torch.testing.assert_close(model(**x), model(**dict(x, times=x["times"] + 100)), atol=1e-4, rtol=0)


def test_left_is_not_right() -> None:
    model, x = tiny(), inputs(frames=1)
    mirrored = model(**dict(x, latents=x["latents"].flip(-1))).flip(-1)
    assert (mirrored - model(**x)).abs().max() > 1e-3


def test_one_frame_is_the_same_alone_and_beside_others() -> None:
    """Without time blocks a sequence is a batch of images."""
    model, x = tiny(), inputs()
    alone = model(x["latents"][:, :1], x["levels"][:, :1], x["times"][:, :1], context=x["context"])
    torch.testing.assert_close(model(**x)[:, :1], alone, atol=1e-5, rtol=0)


def test_absent_frames_change_nothing() -> None:
    model, x = tiny(temporal_every=1), inputs()
    present = torch.tensor([[True, True, False]] * 2)
    other = dict(x, latents=x["latents"].clone(), times=x["times"].clone())
    other["latents"][:, 2] = 99.0
    other["times"][:, 2] = 1e4
    first, second = model(**x, present=present), model(**other, present=present)
    torch.testing.assert_close(first[:, :2], second[:, :2], atol=1e-5, rtol=0)
    short = model(x["latents"][:, :2], x["levels"][:, :2], x["times"][:, :2], context=x["context"])
    torch.testing.assert_close(first[:, :2], short, atol=1e-5, rtol=0)


def test_padding_of_the_context_changes_nothing() -> None:
    model, x = tiny(), inputs()
    mask = torch.ones(2, 5, dtype=torch.bool)
    padded = dict(x, context=torch.cat([x["context"], torch.full((2, 4, 6), 7.0)], dim=1))
    longer = torch.nn.functional.pad(mask, (0, 4), value=False)
    torch.testing.assert_close(model(**x, context_mask=mask), model(**padded, context_mask=longer), atol=1e-5, rtol=0)


def test_an_empty_context_is_no_context() -> None:
    model, x = tiny(), inputs()
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    context = x.pop("context")
    torch.testing.assert_close(model(**x), model(**x, context=context, context_mask=nothing), atol=1e-5, rtol=0)


def test_context_times_are_relative_to_the_frames() -> None:
    model, x = tiny(), inputs()
    when = torch.arange(5.0).expand(2, 5)
    at = model(**x, context_times=when)
    moved = model(**dict(x, times=x["times"] + 30), context_times=when + 30)
    torch.testing.assert_close(moved, at, atol=1e-4, rtol=0)
    assert (at - model(**x, context_times=when + 7)).abs().max() > 1e-3
    assert model(**x, context_times=torch.where(when > 2, when, torch.nan)).isfinite().all()


def test_features_move_the_frames_that_have_them() -> None:
    """Without attention in time a frame knows only its own features."""
    model, x = tiny(feature_dim=3), inputs()
    features = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[True, False, True]] * 2)
    unknown, known = model(**x), model(**x, features=features, feature_mask=mask)
    moved = (known - unknown).abs().amax((2, 3, 4))
    assert (moved[:, 1] == 0).all() and (moved[:, [0, 2]] > 1e-3).all()
    hidden = torch.where(mask[..., None], features, torch.nan)
    torch.testing.assert_close(model(**x, features=hidden, feature_mask=mask), known)
    with pytest.raises(ValueError, match="built without features"):
        tiny()(**x, features=features)


def test_unknown_features_send_no_nan_back() -> None:
    model, x = tiny(feature_dim=3), inputs()
    features, mask = torch.full((2, 3, 3), torch.nan), torch.zeros(2, 3, dtype=torch.bool)
    model(**x, features=features, feature_mask=mask).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_cross_attention_may_be_left_out_of_some_blocks() -> None:
    every, second = tiny(depth=4), tiny(depth=4, cross_every=2)
    assert [block.cross is not None for block in second.blocks] == [True, False, True, False]
    assert sum(p.numel() for p in second.parameters()) < sum(p.numel() for p in every.parameters())
    x = inputs()
    other = dict(x, context=x["context"].flip(-1))
    assert (second(**x) - second(**other)).abs().max() > 1e-3


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model, x = tiny(temporal_every=2, time_periods=(0.5, 90.0)), inputs()
    model.save_pretrained(tmp_path)
    loaded = SequenceTransformer.from_pretrained(tmp_path).eval()
    assert loaded.config.time_periods == (0.5, 90.0) or loaded.config.time_periods == [0.5, 90.0]
    assert torch.equal(model(**x), loaded(**x))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, x = tiny(temporal_every=1), inputs()
    gradients = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        model(**x).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_every_parameter_is_used() -> None:
    model, x = tiny(temporal_every=1, modulation="per_block"), inputs()
    model(**x, context_times=torch.zeros(2, 5)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 15}, "width 15 / heads 2"),
        ({"width": 12, "heads": 2}, "whole multiple of 4"),
        ({"modulation": "none"}, "modulation 'none'"),
        ({"time_periods": (5.0, 5.0)}, "time_periods"),
    ],
)
def test_shapes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceTransformer(**{"width": 16, "depth": 1, "heads": 2, **options})


@pytest.mark.parametrize("shape", [(1, 1, 4, 8), (1, 1, 3, 8, 8), (1, 1, 4, 7, 8)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\[B, T, 4"):
        tiny()(torch.randn(shape), torch.rand(1, 1), torch.zeros(1, 1))


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="context_dim=6, this recipe has 8"):
        build_denoiser(DenoiserConfig(init_from=str(tmp_path)), 4, 8)


def test_rotation_keeps_lengths_and_depends_on_differences() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8)
    angles = time_angles(torch.tensor([[3.0, 10.0, 103.0, 110.0]]), 8, 1.0, 1000.0)
    at = [rotate(q, angles[:, i : i + 1]) for i in range(4)]
    keys = [rotate(k, angles[:, i : i + 1]) for i in range(4)]
    torch.testing.assert_close(at[0].norm(), q.norm())
    torch.testing.assert_close((at[0] * keys[1]).sum(), (at[2] * keys[3]).sum(), atol=1e-4, rtol=1e-4)


def test_the_backend_can_be_chosen_and_is_otherwise_one_that_works() -> None:
    assert "native" in working_backends("cpu")
    model, x = tiny(), inputs()
    expected = model(**x)
    model.set_attention_backend("_native_math")
    assert {m.backend for m in model.modules() if isinstance(m, Attention)} == {"_native_math"}
    torch.testing.assert_close(model(**x), expected, atol=1e-5, rtol=0)
