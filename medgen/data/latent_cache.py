"""What frozen encoders give, computed once: image latents (posterior mean and standard deviation) and text tokens, on disk.

Both caches are memory-mapped, filled by all processes of a launch together, and continue where a stopped build ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medgen.stopping import STOP

_VERSION = 1
_POLL_SECONDS = 0.5
_SAY_SECONDS = 10.0


def module_hash(module: nn.Module) -> str:
    """A hash of a module's weights and configuration: equal exactly where its outputs can be shared."""
    digest = hashlib.sha256(
        json.dumps(dict((getattr(module, "config", None) and _plain(module.config)) or {}), sort_keys=True).encode()
    )
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cache_key(*parts: object) -> str:
    """One key from everything that a cached value depends on."""
    return hashlib.sha256("\x1f".join(map(str, (_VERSION, *parts))).encode()).hexdigest()[:24]


class LatentCache(torch.utils.data.Dataset[dict[str, Any]]):
    """Posterior moments of a data set's images: `[i]` gives {"id", "mean" [C,h,w], "std" [C,h,w]} float32.

    Drawing the latents is left to the training step: a cached draw would be the same noise in every epoch.
    Built by `LatentCache.build`; picklable (worker processes map the files anew).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / "cache.json").read_text())
        self.ids: list[str] = meta["ids"]
        self.fingerprint: str = meta["key"]
        self._chunk: int = meta["chunk"]
        self._open("r")

    @classmethod
    def build(
        cls,
        root: Path,
        images: Any,
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        key: str,
        *,
        ids: Sequence[str],
        batch_size: int = 32,
        dtype: Literal["float16", "float32"] = "float16",
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> LatentCache:
        """The cache of `images` below `root / key`, filled where it is not full yet.

        images: map-style, items {"id", "image" [1,H,W]}; encode: images [B,1,H,W] on `device` → mean and std [B,C,h,w];
        key: from `cache_key`, of the autoencoder's hash, the preprocessing and the manifest's content; ids: the items' ids in order.
        Raises whatever an unreadable image raises (it names the record), and `StopRequested` between batches.
        """
        folder, ids = root / key, list(ids)
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if not len(ids):
            raise ValueError(f"no images to encode into {folder}")
        if rank == 0 and not (folder / "cache.json").exists():
            first, _ = _moments(encode, images[0]["image"][None], device)
            _create(folder, ids, key, tuple(first.shape[1:]), dtype, batch_size)
        wait_for(lambda: (folder / "cache.json").exists(), f"the main process to create {folder}")
        cache = cls(folder)
        cache._open("r+")
        if cache.ids != ids:
            raise ValueError(f"{folder} was built for other records: remove it (its key must name the manifest's content)")
        cache._fill(images, encode, device, workers, rank, world)
        wait_for(cache.complete, f"the other processes to fill {folder}")
        cache._open("r")
        return cache

    def complete(self) -> bool:
        """Whether every image has been encoded."""
        return bool(self._done.all())

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        mean, std = (torch.from_numpy(moments[index].astype(np.float32)) for moments in (self._mean, self._std))
        return {"id": self.ids[index], "mean": mean, "std": std}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def _open(self, mode: Literal["r", "r+"]) -> None:
        names = ("mean", "std", "done")
        self._mean, self._std, self._done = (np.load(self.folder / f"{n}.npy", mmap_mode=mode, allow_pickle=False) for n in names)

    def _fill(
        self, images: Any, encode: Callable[..., Any], device: torch.device | str, workers: int, rank: int, world: int
    ) -> None:
        missing = [chunk for chunk in range(rank, len(self._done), world) if not self._done[chunk]]
        batches = [list(range(c * self._chunk, min((c + 1) * self._chunk, len(self.ids)))) for c in missing]
        loader = DataLoader(images, batch_sampler=batches, collate_fn=_images, num_workers=workers)
        progress = Progress(f"encoding {len(self.ids)} images into {self.folder}", len(missing), quiet=rank > 0)
        for chunk, rows, (found, batch) in zip(missing, batches, loader):
            expected = self.ids[rows[0] : rows[-1] + 1]
            if found != expected:
                raise ValueError(f"the data set gives {found[0]!r} where {expected[0]!r} was expected")
            mean, std = _moments(encode, batch, device)
            for name, moments, target in (("mean", mean, self._mean), ("std", std, self._std)):
                if not bool(moments.isfinite().all()):
                    raise ValueError(f"the autoencoder gives a {name} that is not finite for one of {found}")
                target[rows[0] : rows[-1] + 1] = moments.cpu().numpy()
                target.flush()
            # Marked after its data: a kill between the two costs one batch, never a row of zeros taken for latents.
            self._done[chunk] = 1
            self._done.flush()
            progress.step()
            STOP.check()


def _create(folder: Path, ids: list[str], key: str, shape: tuple[int, ...], dtype: str, chunk: int) -> None:
    """An empty cache, complete or absent; sparse files, so that a large one costs nothing before it is filled."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    arrays = {
        "mean": (dtype, (len(ids), *shape)),
        "std": (dtype, (len(ids), *shape)),
        "done": ("uint8", (-(-len(ids) // chunk),)),
    }
    for name, (kind, size) in arrays.items():
        np.lib.format.open_memmap(temporary / f"{name}.npy", mode="w+", dtype=kind, shape=size).flush()
    (temporary / "cache.json").write_text(json.dumps({"key": key, "chunk": chunk, "ids": ids}))
    try:
        temporary.rename(folder)
    except OSError:  # another run was first
        shutil.rmtree(temporary)


@torch.inference_mode()
def _moments(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    mean, std = encode(images.to(device))
    return mean.float(), std.float()


def _images(items: list[dict[str, Any]]) -> tuple[list[str], Tensor]:
    return [item["id"] for item in items], torch.stack([item["image"] for item in items])


class TokenCache:
    """Tokens of prompts from a frozen text encoder, addressed by content: the same words are encoded once, whatever the manifest.

    `[prompt]` gives its tokens [n,D] float16 without padding; `batch(prompts)` pads them to [B,N,D] float32 with a mask [B,N].
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, tuple[int, int, int]] = {}
        self._parts: list[NDArray[np.float16]] = []
        self._read()

    @classmethod
    def build(
        cls,
        root: Path,
        prompts: Sequence[str],
        encode: Callable[[list[str]], tuple[Tensor, Tensor]],
        key: str,
        *,
        batch_size: int = 64,
    ) -> TokenCache:
        """The cache below `root / key` (key: of the encoder's and tokenizer's hash), with every one of `prompts` in it.

        encode: prompts → tokens [B,N,D] and their mask [B,N] (False is padding). Raises `StopRequested` between batches.
        """
        folder = root / key
        folder.mkdir(parents=True, exist_ok=True)
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        wanted = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))  # like lengths together: little padding
        cache = cls(folder)
        missing = [prompt for prompt in wanted if prompt not in cache][rank::world]
        progress = Progress(f"encoding {len(missing)} prompts into {folder}", -(-len(missing) // batch_size), quiet=rank > 0)
        with _Part(folder, rank) as part:
            for start in range(0, len(missing), batch_size):
                some = missing[start : start + batch_size]
                with torch.inference_mode():
                    tokens, mask = encode(some)
                rows = [t[m].to("cpu", torch.float16).numpy() for t, m in zip(tokens, mask.bool())]
                part.append([_address(prompt) for prompt in some], rows)
                progress.step()
                STOP.check()

        def found() -> bool:
            cache._read()
            return all(prompt in cache for prompt in wanted)

        wait_for(found, f"the other processes to fill {folder}")
        return cache

    def __contains__(self, prompt: str) -> bool:
        return _address(prompt) in self._where

    def __getitem__(self, prompt: str) -> Tensor:
        part, start, length = self._where[_address(prompt)]
        return torch.from_numpy(np.array(self._parts[part][start : start + length]))

    def batch(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B,N,D] float32, zero where padded, and mask [B,N] bool; N is the longest prompt's."""
        return pad_tokens([self[prompt].float() for prompt in prompts])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def _read(self) -> None:
        self._where, self._parts = {}, []
        for index in sorted(self.folder.glob("part-*.jsonl")):
            lines, width, rows = _valid_lines(index)
            if not lines:
                continue
            where = (len(self._parts), lines)
            self._parts.append(np.memmap(index.with_suffix(".f16"), dtype=np.float16, mode="r", shape=(rows, width)))
            self._where |= {line["key"]: (where[0], line["start"], line["length"]) for line in lines}


def pad_tokens(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens [B,N,D], zero where padded, and mask [B,N] bool, of B rows [n,D]; N is the longest row's n."""
    tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return tokens, torch.arange(tokens.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]


class _Part:
    """One process's append-only file of token rows and its index; a line counts only once its rows are written."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def __enter__(self) -> _Part:
        for number in itertools.count():
            path = self._folder / f"part-{self._rank:05d}-{number}.jsonl"
            self._index_file, self._data_file = path.open("a"), path.with_suffix(".f16").open("ab")
            try:
                fcntl.flock(self._index_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:  # another run is writing it
                self.__exit__()
        lines, width, self._rows = _valid_lines(path)
        # What a killed process left half-written behind the last whole entry goes.
        self._index_file.truncate(sum(len(json.dumps(line)) + 1 for line in lines))
        self._data_file.truncate(self._rows * width * 2)
        return self

    def append(self, keys: list[str], rows: list[NDArray[np.float16]]) -> None:
        """Add one entry per key."""
        for array in rows:
            self._data_file.write(array.tobytes())
        self._data_file.flush()
        for key, array in zip(keys, rows):
            line = {"key": key, "start": self._rows, "length": len(array), "width": array.shape[1]}
            self._index_file.write(json.dumps(line) + "\n")
            self._rows += len(array)
        self._index_file.flush()

    def __exit__(self, *error: object) -> None:
        self._index_file.close()
        self._data_file.close()


def _valid_lines(index: Path) -> tuple[list[dict[str, Any]], int, int]:
    """Whole index lines whose rows are in the data file, the tokens' width, and how many rows those lines cover."""
    size = index.with_suffix(".f16").stat().st_size if index.with_suffix(".f16").exists() else 0
    lines: list[dict[str, Any]] = []
    for text in index.read_text().splitlines(keepends=True):
        if not text.endswith("\n"):
            break
        line = json.loads(text)
        if (line["start"] + line["length"]) * line["width"] * 2 > size:
            break
        lines.append(line)
    return (lines, lines[-1]["width"], lines[-1]["start"] + lines[-1]["length"]) if lines else ([], 0, 0)


def _address(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def _plain(config: Any) -> dict[str, Any]:
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    # Names and versions do not change what a model computes, and differ between a hub id and its local copy.
    return {
        k: str(v) for k, v in values.items() if not k.startswith("_") and k not in ("transformers_version", "diffusers_version")
    }


def wait_for(ready: Callable[[], bool], what: str) -> None:
    """Poll until `ready`; a launcher ends this process too if the one it waits for dies."""
    said = time.monotonic()
    while not ready():
        STOP.check()
        time.sleep(_POLL_SECONDS)
        if time.monotonic() - said > 6 * _SAY_SECONDS:
            said = time.monotonic()
            print(f"waiting for {what}", file=sys.stderr, flush=True)


class Progress:
    """A line on stderr now and then, with the time left."""

    def __init__(self, text: str, total: int, quiet: bool) -> None:
        self.text, self.total, self.quiet = text, total, quiet or total == 0
        self.done, self.started = 0, time.monotonic()
        self.said = self.started

    def step(self) -> None:
        """One of `total` is done."""
        self.done += 1
        now = time.monotonic()
        if self.quiet or (now - self.said < _SAY_SECONDS and (self.done < self.total or now - self.started < _SAY_SECONDS)):
            return
        self.said = now
        left = (now - self.started) / self.done * (self.total - self.done)
        print(f"{self.text}: {100 * self.done / self.total:.0f} %, {left:.0f} s left", file=sys.stderr, flush=True)
