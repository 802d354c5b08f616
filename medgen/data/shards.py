"""Data sets larger than a disk: WebDataset tar shards with an index, read by place, split by rank, resumed at any sample.

Any WebDataset reader can read the shards too. Nothing in them is unpickled, and no member is ever extracted to a path of its own.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec
import numpy as np
import torch
import webdataset
from torch import Tensor

from medgen.data.order import SampleOrder
from medgen.seeds import generator
from medgen.stopping import STOP

INDEX = "shards.json"
_SETTINGS = "settings.json"
_OPEN_SHARDS = 8


class ShardError(ValueError):
    """Shards that cannot be used; the message says which and why."""


def write_shards(
    items: Any,
    folder: Path,
    *,
    samples_per_shard: int = 1000,
    dtype: Literal["float16", "float32"] = "float16",
    made_with: Mapping[str, str] | None = None,
) -> Path:
    """Write a map-style data set (records' images, or a `LatentCache`) as shards below `folder`; continues where it was stopped.

    Tensors of an item become `ID.NAME.npy` (floats as `dtype`), everything else `ID.json`. `made_with` (hashes of the models whose
    outputs the items hold) is kept in the index for whoever reads the shards. Returns the index's path.
    Raises `ShardError` if the folder's shards were begun with other ones, `StopRequested` between shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _begin(folder, {"samples_per_shard": samples_per_shard, "dtype": dtype, "made_with": dict(made_with or {}),
                    "fingerprint": str(getattr(items, "fingerprint", ""))})  # fmt: skip
    shards = []
    for number, start in enumerate(range(0, len(items), samples_per_shard)):
        path = folder / f"shard-{number:06d}.tar"
        rows = range(start, min(start + samples_per_shard, len(items)))
        members = path.with_suffix(".json")
        if not (path.exists() and members.exists()):
            _write_shard(path, members, items, rows, dtype)
        shards.append({"name": path.name, "samples": len(rows), "bytes": path.stat().st_size})
        STOP.check()
    content = hashlib.sha256(json.dumps(shards).encode())
    content.update(str(getattr(items, "fingerprint", "")).encode())
    index = folder / INDEX
    temporary = folder / f".{INDEX}.tmp"
    content.update(json.dumps(dict(made_with or {}), sort_keys=True).encode())
    facts = {"version": 1, "fingerprint": content.hexdigest()[:24], "made_with": dict(made_with or {}), "shards": shards}
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.replace(index)
    return index


def _begin(folder: Path, settings: dict[str, Any]) -> None:
    """Note what the shards of `folder` are made of, before the first; a stopped writer must go on with the same."""
    path = folder / _SETTINGS
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1))
    elif (before := json.loads(path.read_text())) != settings:
        differing = ", ".join(sorted(key for key in settings if settings[key] != before.get(key)))
        raise ShardError(f"{folder} holds shards of other data or settings ({differing}): use another folder, or empty this one")


def _write_shard(path: Path, members: Path, items: Any, rows: range, dtype: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
        for i in rows:
            item = items[i]
            arrays = {f"{name}.npy": _npy(value, dtype) for name, value in item.items() if isinstance(value, Tensor)}
            rest = {name: value for name, value in item.items() if not isinstance(value, Tensor)}
            # WebDataset cuts names at the first dot, so the key must have none; the id itself is in the JSON.
            tar.write({"__key__": f"{i:09d}", **arrays, "json": json.dumps(rest).encode()})
    places: dict[str, list[list[int]]] = {}
    with tarfile.open(temporary) as archive:
        for member in archive:
            places.setdefault(member.name.partition(".")[2], []).append([member.offset_data, member.size])
    half = members.with_name(f".{members.name}.tmp")
    half.write_text(json.dumps(places))
    half.replace(members)
    temporary.replace(path)  # last: a shard that is there is whole


def _npy(value: Tensor, dtype: str) -> bytes:
    array = value.numpy()
    buffer = io.BytesIO()
    np.save(buffer, array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array, allow_pickle=False)
    return buffer.getvalue()


class ShardDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Map-style view of shards at a path or any fsspec address (s3://, gs://, https://, ...): `[i]` gives the item that was written.

    Remote shards are fetched whole into `cache`, shared by the processes of a machine, of which the least recently used go when it
    exceeds `cache_gb`. `mix`: how many shards are shuffled together.
    """

    def __init__(self, root: str | Path, cache: Path | None = None, cache_gb: float = 100.0, mix: int = 4) -> None:
        self.root, self.cache, self.cache_gb, self.mix = str(root).rstrip("/"), cache, cache_gb, mix
        self.remote = "://" in self.root
        if self.remote and cache is None:
            raise ShardError(f"{self.root} is not on this machine: name a cache folder for its shards")
        try:
            with fsspec.open(f"{self.root}/{INDEX}", "rb") as file:
                index = json.load(file)
            self.names = [str(shard["name"]) for shard in index["shards"]]
            self.sizes = [int(shard["samples"]) for shard in index["shards"]]
            self.fingerprint: str = index["fingerprint"]
            self.made_with: dict[str, str] = dict(index.get("made_with", {}))
        except FileNotFoundError:
            raise ShardError(f"no {INDEX} at {self.root}: its shards are not complete, or it is not a folder of shards") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ShardError(f"{self.root}/{INDEX} is damaged ({error})") from None
        if wrong := [name for name in self.names if "/" in name or name.startswith(".")]:
            raise ShardError(f"{self.root}/{INDEX} names shards outside its folder: {wrong[:3]}")
        self.starts = [0, *accumulate(self.sizes)]
        self._open: OrderedDict[int, tuple[BinaryIO, dict[str, list[list[int]]]]] = OrderedDict()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self.starts, index) - 1
        file, places = self._shard(shard)
        item: dict[str, Any] = {}
        for name, entries in places.items():
            offset, size = entries[index - self.starts[shard]]
            data = os.pread(file.fileno(), size, offset)  # a forked worker shares the file's position, so there must be none
            if len(data) != size:
                raise ShardError(f"{self.root}/{self.names[shard]} is cut off: copy it again")
            if name == "json":
                item |= json.loads(data)
            else:
                array = np.load(io.BytesIO(data), allow_pickle=False)
                item[name.removesuffix(".npy")] = torch.from_numpy(
                    array.astype(np.float32) if array.dtype == np.float16 else array
                )
        return item

    def order(self, seed: int, batch_size: int, start: int = 0, rank: int = 0, world: int = 1) -> ShardOrder:
        """The training order: shards shuffled and dealt to ranks, samples shuffled within `mix` shards."""
        return ShardOrder(self.sizes, self.mix, seed, batch_size, start, rank, world)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def _shard(self, number: int) -> tuple[BinaryIO, dict[str, list[list[int]]]]:
        if number not in self._open:
            name = self.names[number]
            file = self._local(name).open("rb")  # at once: the next fetch may evict it
            places = json.loads(self._local(name.removesuffix(".tar") + ".json").read_text())
            self._open[number] = (file, places)
            if len(self._open) > max(_OPEN_SHARDS, self.mix):
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(number)
        return self._open[number]

    def _local(self, name: str) -> Path:
        if not self.remote:
            return Path(self.root) / name
        assert self.cache is not None
        path = self.cache / hashlib.sha256(self.root.encode()).hexdigest()[:16] / name
        if path.exists():
            os.utime(path)  # the least recently used goes first
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        with fsspec.open(f"{self.root}/{name}", "rb") as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
        temporary.replace(path)
        self._evict(path)
        return path

    def _evict(self, newest: Path) -> None:
        files = sorted(newest.parent.glob("shard-*"), key=lambda file: file.stat().st_mtime)
        total = sum(file.stat().st_size for file in files)
        for file in files:
            if total <= self.cache_gb * 1e9 or file == newest:
                return
            total -= file.stat().st_size
            file.unlink(missing_ok=True)  # a process that has it open keeps reading it


class ShardOrder(SampleOrder):
    """Like `SampleOrder`, but each rank reads only its own shards of an epoch, one group of `mix` after the other.

    A rank that ends its shards goes on with its next epoch's, so ranks may be a few batches apart; no sample of a rank's shards is
    dropped. A pure function of (sizes, seed, rank, world), read from any position.
    """

    def __init__(
        self, sizes: list[int], mix: int, seed: int, batch_size: int, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(sum(sizes), seed, batch_size, start, rank, world)
        if len(sizes) < world:
            raise ShardError(f"{len(sizes)} shard(s) cannot be split over {world} processes: write smaller shards")
        self.sizes, self.mix = sizes, mix
        self.starts = [0, *accumulate(sizes)]
        self._ends: list[int] = []  # this rank's positions at which its epochs end
        self._group: tuple[tuple[int, int], torch.Tensor] = ((-1, -1), torch.empty(0))

    def position(self, start: int) -> int:
        """Places are counted per rank here."""
        return start // self.world

    def item(self, position: int) -> tuple[int, int]:
        """(epoch, index) of this rank's sample `position`."""
        while not self._ends or self._ends[-1] <= position:
            own = sum(self.sizes[shard] for shard in self._shards(len(self._ends)))
            self._ends.append((self._ends[-1] if self._ends else 0) + own)
        epoch = bisect.bisect_right(self._ends, position)
        offset = position - (self._ends[epoch - 1] if epoch else 0)
        shards = self._shards(epoch)
        for first in range(0, len(shards), self.mix):
            group = shards[first : first + self.mix]
            count = sum(self.sizes[shard] for shard in group)
            if offset < count:
                return epoch, int(self._mixed(epoch, first, group)[offset])
            offset -= count
        raise AssertionError("the position lies in the epoch")

    def _shards(self, epoch: int) -> list[int]:
        order: list[int] = torch.randperm(len(self.sizes), generator=generator("shards", self.seed, epoch)).tolist()
        return order[self.rank :: self.world]

    def _mixed(self, epoch: int, first: int, group: list[int]) -> torch.Tensor:
        if self._group[0] != (epoch, first):
            indices = torch.cat([torch.arange(self.starts[shard], self.starts[shard + 1]) for shard in group])
            draws = generator("mix", self.seed, epoch, self.rank, first)
            self._group = ((epoch, first), indices[torch.randperm(len(indices), generator=draws)])
        return self._group[1]
