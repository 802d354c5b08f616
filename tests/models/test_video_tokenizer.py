"""The video tokenizer: shapes, causality in both directions, gradients through the rounding, and a codebook that stays alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from medgen.config import ConfigError
from medgen.models.video_tokenizer import (
    CosineQuantizer,
    VideoTokenizer,
    VideoTokenizerConfig,
    build_video_tokenizer,
    load_video_tokenizer,
)


def tiny(**options: Any) -> VideoTokenizer:
    """Away from its start, where every block is the identity."""
    torch.manual_seed(0)
    shape = {"patch_size": 8, "width": 16, "depth": 2, "heads": 2, "code_dim": 4, "codebook_size": 32, "memory": 2,
             "codes_per_place": 2}  # fmt: skip
    model = VideoTokenizer(**{**shape, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def videos(batch: int = 2, frames: int = 9, side: int = 16) -> torch.Tensor:
    return torch.rand(batch, frames, 1, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("frames", "token_frames"), [(1, 1), (2, 2), (3, 2), (8, 5), (9, 5), (32, 17)])
def test_every_length_has_codes_and_comes_back_at_its_own_length(frames: int, token_frames: int) -> None:
    model, clip = tiny(), videos(frames=frames)
    codes = model.encode(clip)
    assert codes.shape == (2, token_frames, 2, 2, 2) and codes.dtype == torch.int64
    assert model.token_frames(frames) == token_frames and model.frames(token_frames) in (frames, frames + 1)
    assert model.decode(codes, frames).shape == clip.shape
    assert model(clip).video.shape == clip.shape


def test_any_frame_size_and_any_number_of_frames_per_token() -> None:
    model = tiny(frames_per_token=4)
    clip = torch.zeros(1, 6, 1, 24, 40)
    assert model.encode(clip).shape == (1, 3, 3, 5, 2)
    assert model.decode(model.encode(clip), 6).shape == clip.shape


def test_later_frames_do_not_change_earlier_codes() -> None:
    model, clip = tiny(), videos()
    other = clip.clone()
    other[:, 5:] = -other[:, 5:]
    codes, changed = model.encode(clip), model.encode(other)
    assert torch.equal(codes[:, :3], changed[:, :3])  # frame 0, 1-2, 3-4
    assert not torch.equal(codes[:, 3:], changed[:, 3:])
    assert torch.equal(model.encode(clip[:, :1]), codes[:, :1])  # an image has the codes that it has as a video's first frame


def test_later_codes_do_not_change_earlier_pixels() -> None:
    model = tiny()
    codes = model.encode(videos())
    other = codes.clone()
    other[:, 3:] = (other[:, 3:] + 1) % 32
    whole, changed = model.decode(codes), model.decode(other)
    torch.testing.assert_close(whole[:, :5], changed[:, :5], rtol=0, atol=1e-6)
    assert (whole[:, 5:] - changed[:, 5:]).abs().max() > 1e-4


def test_attention_in_time_forgets_what_lies_beyond_its_memory() -> None:
    """Two blocks that see two token frames each: the fourth token frame is out of reach of the first."""
    model, clip = tiny(), videos()
    other = clip.clone()
    other[:, 0] = -other[:, 0]
    before, after = model._directions(clip), model._directions(other)
    torch.testing.assert_close(before[:, 3:], after[:, 3:], rtol=0, atol=1e-6)
    assert (before[:, 2] - after[:, 2]).abs().max() > 1e-5


def test_the_gradient_goes_through_the_rounding() -> None:
    model, clip = tiny(), videos()
    functional.mse_loss(model(clip).video, clip).backward()
    assert model.embed_first.weight.grad is not None and model.embed_first.weight.grad.abs().max() > 0
    assert model.to_code.weight.grad is not None and model.to_code.weight.grad.abs().max() > 0


def test_evaluation_leaves_the_codebook_alone_and_training_moves_it() -> None:
    model, clip = tiny(), videos()
    before = model.quantizer.codebook.clone()
    model(clip)
    assert torch.equal(model.quantizer.codebook, before)
    model.train()(clip)
    assert not torch.equal(model.quantizer.codebook, before)
    torch.testing.assert_close(model.quantizer.codebook.norm(dim=-1), torch.ones(2, 32))


def test_codes_settle_on_the_clusters_and_the_dead_come_back_to_life() -> None:
    """Eight clusters of directions, codes that all start far from most of them: in the end every cluster has its own code."""
    torch.manual_seed(0)
    centres = functional.normalize(torch.randn(8, 6), dim=-1)
    quantizer = CosineQuantizer(1, 16, 6, decay=0.8, revive_below=0.1)
    quantizer.codebook.copy_(centres[:1].expand(1, 16, -1))
    for _ in range(60):
        which = torch.randint(8, (256,))
        vectors = functional.normalize(centres[which] + 0.02 * torch.randn(256, 6), dim=-1)[:, None]
        quantizer.learn(vectors, quantizer.nearest(vectors))
    found = quantizer.nearest(centres[:, None])
    assert (quantizer.vectors(found)[:, 0] * centres).sum(-1).min() > 0.99
    assert len(found.unique()) == 8
    assert quantizer.perplexity(quantizer.nearest(vectors)) > 7


def test_perplexity_counts_codes_in_use() -> None:
    quantizer = CosineQuantizer(2, 16, 4, 0.9, 0.0)
    assert float(quantizer.perplexity(torch.zeros(50, 2, dtype=torch.long))) == pytest.approx(1)
    assert float(quantizer.perplexity(torch.arange(8).repeat(3)[:, None].expand(-1, 2))) == pytest.approx(8)


def test_it_is_saved_and_loaded_with_its_codebook(tmp_path: Path) -> None:
    model = tiny().train()
    model(videos())
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    loaded = load_video_tokenizer(tmp_path)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    again = build_video_tokenizer(VideoTokenizerConfig(init_from=str(tmp_path)))
    assert torch.equal(again.encode(videos()), loaded.encode(videos()))


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\[B, T, 1, H, W\] with sides that are multiples of 8"):
        tiny().encode(torch.zeros(1, 3, 1, 20, 16))
    with pytest.raises(ConfigError, match="tokenizer: width 18"):
        build_video_tokenizer(VideoTokenizerConfig(width=18, heads=3))


def test_it_starts_as_principal_components_and_a_linear_code() -> None:
    """Videos that move along four directions: a tokenizer that has seen some reconstructs others before any training."""
    torch.manual_seed(0)
    shapes, draws = torch.randn(4, 64), torch.randn(6, 5, 4, 4)
    patches = 0.2 + 0.1 * draws @ shapes  # [B,T,4 places,64 pixels]
    clips = functional.pixel_shuffle(patches.transpose(2, 3).unflatten(3, (2, 2)), 8)
    model = VideoTokenizer(patch_size=8, width=16, depth=1, heads=2, code_dim=5, codes_per_place=2, codebook_size=256)
    model.start_from(clips[:4])
    error = functional.mse_loss(model._decode(model._directions(clips[4:]), 5), clips[4:])
    assert error < 0.15 * clips[4:].var()
    model.train()(clips)
    assert functional.mse_loss(model.eval()(clips).video, clips) < 0.3 * clips.var()
