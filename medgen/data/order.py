"""The order of the data: a pure function of (seed, epoch), read from any position, split by rank.

Nothing of it is saved but the number of samples consumed; a resumed run starts its loader at that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from medgen.seeds import generator


class SampleOrder(Sampler[list[tuple[int, int]]]):
    """An endless stream of micro batches of (epoch, index) for one rank.

    Sample p of the whole run is item `permutation(seed, p // n)[p % n]`; a micro batch of all ranks covers
    `world * batch_size` consecutive samples. Epochs follow each other without dropping or repeating an item.
    """

    def __init__(self, n: int, seed: int, batch_size: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        if n < 1:
            raise ValueError("the training set is empty: nothing to order")
        self.n, self.seed, self.batch_size, self.start, self.rank, self.world = n, seed, batch_size, start, rank, world
        self._permutations: dict[int, torch.Tensor] = {}

    def position(self, start: int) -> int:
        """Where in `item` this rank's part of the micro batch begins whose first sample, over all ranks, is `start`."""
        return start + self.rank * self.batch_size

    def item(self, position: int) -> tuple[int, int]:
        """(epoch, index) of sample `position` of the run."""
        epoch, offset = divmod(position, self.n)
        if epoch not in self._permutations:
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = torch.randperm(self.n, generator=generator("order", self.seed, epoch))
        return epoch, int(self._permutations[epoch][offset])

    def batch(self, start: int) -> list[tuple[int, int]]:
        """This rank's part of the micro batch whose first sample, over all ranks, is `start`."""
        first = self.position(start)
        return [self.item(first + i) for i in range(self.batch_size)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        position = self.start
        while True:
            yield self.batch(position)
            position += self.world * self.batch_size


class EpochView(Dataset[dict[str, Any]]):
    """A data set indexed by (epoch, index), so that worker processes know the epoch without being told."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.epoch: int | None = None

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        if epoch != self.epoch and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self.epoch = epoch
        item: dict[str, Any] = self.dataset[index]
        return item


def loader(
    dataset: Any, order: SampleOrder, collate: Callable[[list[dict[str, Any]]], Any], workers: int, pin: bool
) -> DataLoader[Any]:
    """An endless loader over `order`. Its own generator keeps worker seeding away from the global one."""
    return DataLoader(
        EpochView(dataset),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
    )


def move(value: Any, device: torch.device) -> Any:
    """`value` with every tensor (or object with `.to`) inside dicts and lists on `device`."""
    if isinstance(value, dict):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if hasattr(value, "to") else value
