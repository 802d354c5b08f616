"""Answers as tables: items down, readers across, which is what every measure of a section starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.evaluation.statistics import Floats
from medgen.study.responses import Pack

Bools = NDArray[np.bool_]
Key = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Table:
    """One question of one section as a table: `value`, `confidence`, `ms`, `position` [N items,J readers], NaN where not answered.

    `signal`: what the key says is a signal; `repeat_of` [N]: the item's first showing, or -1. `asked` [N,J]: the reader was to answer it.
    """

    items: tuple[str, ...]
    readers: tuple[str, ...]
    arms: tuple[str, ...]
    sources: tuple[str, ...]
    value: Floats
    confidence: Floats
    ms: Floats
    position: Floats
    asked: Bools
    repeat_of: NDArray[np.intp]

    def where(self, rows: Bools) -> Table:
        """Some items only (repeats lose their original if it is not among them)."""
        new = np.cumsum(rows) - 1
        kept = [new[r] if r >= 0 and rows[r] else -1 for r in self.repeat_of[rows]]
        pick = np.flatnonzero(rows)
        return Table(
            tuple(self.items[i] for i in pick), self.readers, tuple(self.arms[i] for i in pick), tuple(self.sources[i] for i in pick),
            self.value[rows], self.confidence[rows], self.ms[rows], self.position[rows], self.asked[rows], np.array(kept, dtype=np.intp),
        )  # fmt: skip

    @property
    def first(self) -> Table:
        """Without hidden repeats: every case once."""
        return self.where(self.repeat_of < 0)


@dataclass(frozen=True)
class Cell:
    """One reader's answer to one item, as a number (several questions of one item are made one before)."""

    item: str
    reader: str
    value: float
    confidence: float
    ms: float
    position: int


def table(pack: Pack, key: Key, cells: Sequence[Cell], items: Sequence[str], readers: Sequence[str]) -> Table:
    """The table of `cells` over `items` and `readers`."""
    row, column = {item: i for i, item in enumerate(items)}, {reader: j for j, reader in enumerate(readers)}
    numbers = np.full((4, len(items), len(readers)), np.nan)
    for cell in cells:
        numbers[:, row[cell.item], column[cell.reader]] = cell.value, cell.confidence, cell.ms, cell.position
    orders = {reader: set(pack.orders[reader]) for reader in readers}
    asked = np.array([[item in orders[reader] for reader in readers] for item in items], dtype=bool)
    return Table(
        tuple(items),
        tuple(readers),
        tuple(str(key[item].get("arm", "")) for item in items),
        tuple(str(key[item].get("source", "")) for item in items),
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        asked.reshape(len(items), len(readers)),
        np.array([row.get(str(key[item].get("repeat_of")), -1) for item in items], dtype=np.intp),
    )


def ratings_of(one: Table) -> Floats:
    """How sure of "signal" [N,J]: confidence with the sign of the decision; the decision alone where no confidence was asked."""
    sure = np.where(np.isnan(one.confidence), 1.0, one.confidence)
    return np.where(one.value == 1, sure, -sure) + 0 * one.value
