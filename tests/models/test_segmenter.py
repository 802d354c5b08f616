"""The video segmenter: one frame at a time, at the pixels' own resolution."""

from __future__ import annotations

import pytest
import torch

from medgen.models.segmenter import STRUCTURES, VideoSegmenter


def small() -> VideoSegmenter:
    torch.manual_seed(0)
    return VideoSegmenter(image_size=32, channels=(8, 16), norm_groups=4).eval()


def test_logits_and_features_have_their_shapes():
    logits, features = small().with_features(torch.zeros(3, 1, 32, 32))
    assert logits.shape == (3, len(STRUCTURES), 32, 32)
    assert features.shape == (3, small().feature_dim)


def test_a_frame_is_judged_alone():
    model, frames = small(), torch.randn(4, 1, 32, 32)
    torch.testing.assert_close(model(frames)[2:3], model(frames[2:3]), rtol=1e-4, atol=1e-5)


def test_other_sizes_are_judged_too():
    assert small()(torch.zeros(1, 1, 48, 64)).shape == (1, 4, 48, 64)


def test_it_comes_back_from_disk(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    loaded = VideoSegmenter.from_pretrained(tmp_path)
    frames = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(loaded(frames), model(frames))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="multiple of norm_groups=8"):
        VideoSegmenter(channels=(12,))
    with pytest.raises(ValueError, match="image_size 30 must be a multiple of 16"):
        VideoSegmenter(image_size=30)
    with pytest.raises(ValueError, match=r"\[N,1,H,W\]"):
        small()(torch.zeros(1, 3, 32, 32))
