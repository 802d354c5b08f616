"""Latents and tokens are computed once, survive a kill between any two batches, and are the same in one process or three."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medgen.data.latent_cache import LatentCache, TokenCache, cache_key, module_hash
from medgen.stopping import STOP, StopRequested


class Films(torch.utils.data.Dataset):
    """Ten 8x8 images; film-3 may hold a NaN."""

    def __init__(self, nan: bool = False) -> None:
        self.images = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        if nan:
            self.images[3] = torch.nan

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"id": f"film-{i}", "image": self.images[i]}


IDS = [f"film-{i}" for i in range(10)]


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.avg_pool2d(images, 4), nn.functional.avg_pool2d(images.abs(), 4)


def test_a_latent_is_the_posterior_of_its_image(tmp_path: Path) -> None:
    cache = LatentCache.build(tmp_path, Films(), moments, "key", ids=IDS, batch_size=4, dtype="float32")
    mean, std = moments(Films().images)
    assert len(cache) == 10 and cache[7]["id"] == "film-7"
    assert torch.equal(torch.stack([cache[i]["mean"] for i in range(10)]), mean)
    assert torch.equal(torch.stack([cache[i]["std"] for i in range(10)]), std)
    copy = pickle.loads(pickle.dumps(cache))  # what a loader's worker process gets
    assert torch.equal(copy[9]["mean"], cache[9]["mean"])


def test_a_stopped_build_continues_where_it_was(tmp_path: Path) -> None:
    seen: list[int] = []

    def encode_and_stop(images: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(images))
        STOP.requested = sum(seen) >= 9
        return moments(images)

    try:
        with pytest.raises(StopRequested):
            LatentCache.build(tmp_path, Films(), encode_and_stop, "key", ids=IDS, batch_size=4)
    finally:
        STOP.requested = False
    assert seen == [1, 4, 4]  # one image tells the shape
    assert not LatentCache(tmp_path / "key").complete()
    done: list[int] = []
    cache = LatentCache.build(tmp_path, Films(), lambda x: (done.append(len(x)), moments(x))[1], "key", ids=IDS, batch_size=4)
    assert done == [2] and cache.complete()
    LatentCache.build(tmp_path, Films(), lambda x: pytest.fail("encoded again"), "key", ids=IDS)


def test_a_second_rank_fills_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medgen.data.latent_cache.wait_for", lambda ready, what: None)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        cache = LatentCache.build(tmp_path, Films(), moments, "key", ids=IDS, batch_size=3)
        assert cache.complete() == (rank == 1)


def test_nan_latents_are_an_error_that_names_the_films(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="film-3"):
        LatentCache.build(tmp_path, Films(nan=True), moments, "key", ids=IDS, batch_size=2)


def test_the_key_changes_with_weights_and_with_every_part() -> None:
    torch.manual_seed(0)
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    assert module_hash(one) == module_hash(pickle.loads(pickle.dumps(one))) != module_hash(other)
    assert cache_key("a", "b") != cache_key("a", "c") != cache_key("ab", "")


def embed(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """One token per letter, padded to the longest."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor([[ord(c), 1.0] for c in p]) for p in prompts], batch_first=True)
    return tokens, tokens[..., 1] > 0


def test_tokens_are_addressed_by_their_words(tmp_path: Path) -> None:
    cache = TokenCache.build(tmp_path, ["no effusion", "edema", "edema"], embed, "key", batch_size=1)
    tokens, mask = cache.batch(["edema", "no effusion"])
    assert tokens.shape == (2, 11, 2) and mask.sum(1).tolist() == [5, 11] and not tokens[0, 5:].any()
    assert torch.equal(tokens[1], embed(["no effusion"])[0][0])
    asked: list[str] = []
    TokenCache.build(tmp_path, ["edema", "nodule"], lambda p: (asked.extend(p), embed(p))[1], "key")
    assert asked == ["nodule"]


def test_a_half_written_entry_is_written_again(tmp_path: Path) -> None:
    TokenCache.build(tmp_path, ["edema", "nodule"], embed, "key")
    index = tmp_path / "key/part-00000-0.jsonl"
    index.write_text(index.read_text()[:-9])  # a kill in the middle of a line
    cache = TokenCache.build(tmp_path, ["edema", "nodule"], embed, "key")
    assert torch.equal(cache["nodule"], embed(["nodule"])[0][0].half()) and torch.equal(
        cache["edema"], embed(["edema"])[0][0].half()
    )
