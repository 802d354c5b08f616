"""Clips are encoded once, whatever their length; a build that was cut off goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from medgen.data.clip_cache import Arrays, ClipCache

IDS = ["a", "b", "c"]


class Clips:
    """Three clips of 3, 4 and 5 frames; counts how often each is opened."""

    def __init__(self) -> None:
        self.opened: list[int] = []

    def __call__(self, index: int) -> tuple[Tensor, Arrays]:
        self.opened.append(index)
        frames = torch.full((3 + index, 1, 8, 8), float(index))
        return frames, {"times": torch.arange(len(frames)).numpy() / 20}


def encode(images: Tensor) -> tuple[Tensor, Tensor]:
    assert len(images) <= 2
    return images[..., ::4, ::4] + 0.5, torch.ones(len(images), 1, 2, 2)


def test_each_clip_is_opened_once_and_comes_back_whole(tmp_path: Path) -> None:
    clips = Clips()
    for _ in range(2):
        cache = ClipCache.build(tmp_path, IDS, clips, encode, "key", batch_size=2)
    assert clips.opened == [0, 1, 2]
    arrays = cache[2]
    assert arrays["mean"].shape == (5, 1, 2, 2) and (arrays["mean"] == 2.5).all() and arrays["mean"].dtype == "float16"
    assert arrays["times"].tolist() == [0, 0.05, 0.1, 0.15, 0.2]


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    cache = ClipCache.build(tmp_path, IDS, Clips(), encode, "key", batch_size=2)
    cache.path(1).unlink()
    again = Clips()
    ClipCache.build(tmp_path, IDS, again, encode, "key", batch_size=2)
    assert again.opened == [1]
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_content_is_another_cache(tmp_path: Path) -> None:
    first = ClipCache.build(tmp_path, IDS, Clips(), encode, "key", batch_size=2)
    assert first.fingerprint != ClipCache.build(tmp_path, IDS, Clips(), encode, "other key", batch_size=2).fingerprint
    assert first.fingerprint != ClipCache.build(tmp_path, IDS[:2], Clips(), encode, "key", batch_size=2).fingerprint


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite for clip 'a'"):
        ClipCache.build(tmp_path, IDS, Clips(), lambda x: (x / 0, x), "key")
