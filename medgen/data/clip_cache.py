"""What a training step needs of every echo clip, computed once: latents of all its frames, its ECG, its conditions; one file a clip."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen.data.disk_cache import write_atomically
from medgen.data.latent_cache import Progress, cache_key, wait_for
from medgen.stopping import STOP

Arrays = dict[str, NDArray[Any]]


class ClipCache(torch.utils.data.Dataset[Arrays]):
    """`[i]` gives the arrays of clip i: "mean" and "std" [T,C,h,w] float16 and whatever else was kept of it.

    Built by `ClipCache.build`. Drawing latents is left to the training step: a cached draw would be the same noise in every epoch.
    """

    def __init__(self, folder: Path, ids: Sequence[str]) -> None:
        self.folder, self.ids = folder, list(ids)
        self.fingerprint = cache_key(folder.name, *self.ids)

    @classmethod
    def build(
        cls,
        root: Path,
        ids: Sequence[str],
        load: Callable[[int], tuple[Tensor, Arrays]],
        encode: Callable[[Tensor], tuple[Tensor, Tensor]],
        key: str,
        *,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
    ) -> ClipCache:
        """The cache below `root / key`, with every clip of `ids` in it; what is there already is not computed again.

        load: index → frames [T,1,H,W] in [-1,1] and what else to keep; encode: images [B,1,H,W] on `device` → posterior mean and
        standard deviation [B,C,h,w]; key: from `cache_key`, of the autoencoder's hash, the preprocessing and the manifest's content.
        All processes of a launch fill it together. Raises what `load` raises, and `StopRequested` between clips.
        """
        cache = cls(root / key, ids)
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        missing = [i for i in range(rank, len(cache), world) if not cache.path(i).is_file()]
        progress = Progress(f"encoding {len(missing)} clips into {cache.folder}", len(missing), quiet=rank > 0)
        for index in missing:
            frames, kept = load(index)
            with torch.inference_mode():
                parts = [encode(images.to(device)) for images in frames.split(batch_size)]
            moments = {name: torch.cat([part[i] for part in parts]).float().cpu() for i, name in enumerate(("mean", "std"))}
            if not all(bool(value.isfinite().all()) for value in moments.values()):
                raise ValueError(f"the autoencoder gives latents that are not finite for clip {ids[index]!r}")
            arrays: dict[str, Any] = {**kept, **{name: value.half().numpy() for name, value in moments.items()}}
            write_atomically(cache.path(index), partial(np.savez, allow_pickle=False, **arrays))
            progress.step()
            STOP.check()
        wait_for(lambda: all(cache.path(i).is_file() for i in range(len(cache))), f"the other processes to fill {cache.folder}")
        return cache

    def path(self, index: int) -> Path:
        """Where clip `index` lies (or would lie); a folder never holds more than a few thousand files."""
        name = cache_key(self.ids[index])
        return self.folder / name[:2] / f"{name[2:]}.npz"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Arrays:
        with np.load(self.path(index), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
