"""Shards give back what was written, in an order that is complete, split by rank, shuffled, and the same from any position on."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from medgen.data.order import loader
from medgen.data.shards import ShardDataset, ShardError, write_shards
from medgen.stopping import STOP, StopRequested


class Latents:
    """23 latents with an id and a prompt."""

    fingerprint = "of the cache"

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> dict[str, Any]:
        mean = torch.full((4, 2, 2), i / 4)
        return {"id": f"film.{i}", "mean": mean, "label": torch.tensor(i), "prompt": f"prompt {i}"}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(Latents(), tmp_path / "shards", samples_per_shard=4).parent


def test_what_was_written_is_read(shards: Path) -> None:
    data = ShardDataset(shards)
    assert len(data) == 23 and len(list(shards.glob("*.tar"))) == 6
    for i in (0, 3, 4, 22):
        item, expected = data[i], Latents()[i]
        assert item["id"] == expected["id"] and item["prompt"] == expected["prompt"]
        assert torch.equal(item["mean"], expected["mean"]) and torch.equal(item["label"], expected["label"])


def test_webdataset_itself_reads_them(shards: Path) -> None:
    samples = list(webdataset.WebDataset(str(shards / "shard-000005.tar"), shardshuffle=False).decode())
    assert [sample["json"]["id"] for sample in samples] == ["film.20", "film.21", "film.22"]
    assert samples[0]["mean.npy"].mean() == 5.0


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_every_epoch_without_overlap(shards: Path, world: int) -> None:
    data = ShardDataset(shards, mix=2)
    streams = [[item for batch in islice(data.order(0, 3, 0, rank, world), 40) for item in batch] for rank in range(world)]
    for epoch in (0, 1):
        parts = [[index for e, index in stream if e == epoch] for stream in streams]
        assert sorted(index for part in parts for index in part) == list(range(23))
        assert parts[0] != sorted(parts[0])


@pytest.mark.parametrize("start", [0, 12, 48, 600])
def test_a_stream_can_begin_anywhere(shards: Path, start: int) -> None:
    data = ShardDataset(shards)
    whole = list(islice(data.order(5, 3, 0, 1, 2), start // 6 + 4))
    assert list(islice(data.order(5, 3, start, 1, 2), 4)) == whole[-4:]


def test_worker_processes_give_the_same_batches(shards: Path) -> None:
    data = ShardDataset(shards)
    runs = [
        list(islice(loader(data, data.order(0, 3), lambda items: [item["id"] for item in items], workers, False), 12))
        for workers in (0, 2)
    ]
    assert runs[0] == runs[1]


def test_a_stopped_writer_continues(tmp_path: Path) -> None:
    STOP.requested = True
    try:
        with pytest.raises(StopRequested):
            write_shards(Latents(), tmp_path, samples_per_shard=4)
    finally:
        STOP.requested = False
    with pytest.raises(ShardError, match="not complete"):
        ShardDataset(tmp_path)
    first = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    write_shards(Latents(), tmp_path, samples_per_shard=4)
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == first
    assert ShardDataset(tmp_path)[22]["id"] == "film.22"
    with pytest.raises(ShardError, match=r"other data or settings \(samples_per_shard\)"):
        write_shards(Latents(), tmp_path, samples_per_shard=5)


def test_remote_shards_come_through_a_bounded_cache(shards: Path, tmp_path: Path) -> None:
    data = ShardDataset(f"file://{shards}", cache=tmp_path / "cache", cache_gb=3e-5)
    for i in range(23):
        assert data[i]["id"] == f"film.{i}"
    kept = [path.name for path in (tmp_path / "cache").rglob("*.tar")]
    assert 0 < len(kept) < 6
    with pytest.raises(ShardError, match="cache folder"):
        ShardDataset("https://example.org/shards")


def test_hostile_shards_are_refused(shards: Path) -> None:
    index = json.loads((shards / "shards.json").read_text())
    tar = shards / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(ShardError, match="cut off"):
        ShardDataset(shards)[7]
    with tarfile.open(tar, "w") as archive:  # a pickled array in place of numbers
        data = io.BytesIO()
        import numpy

        numpy.save(data, numpy.array([object()], dtype=object), allow_pickle=True)
        member = tarfile.TarInfo("000000004.mean.npy")
        member.size = len(data.getvalue())
        data.seek(0)
        archive.addfile(member, data)
    (shards / "shard-000001.json").write_text(json.dumps({"mean.npy": [[512, member.size]] * 4}))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        ShardDataset(shards)[4]
    index["shards"][0]["name"] = "../elsewhere.tar"
    (shards / "shards.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match="outside its folder"):
        ShardDataset(shards)


def test_more_processes_than_shards_is_an_error(shards: Path) -> None:
    with pytest.raises(ShardError, match="smaller shards"):
        ShardDataset(shards).order(0, 3, 0, 0, 7)
