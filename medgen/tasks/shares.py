"""Shares of a data set: patients and records stand in rows that a seed shuffles, and every share is the beginning of its row.

So a smaller share lies inside every larger one, and what is drawn depends on the seed and the names alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from medgen.config import ConfigError
from medgen.data.records import Record
from medgen.seeds import stable_seed

R = TypeVar("R", bound=Record)


def shuffled(names: Iterable[str], purpose: str, seed: int) -> list[str]:
    """`names` in the row of `seed`; another purpose, another row."""
    return sorted(names, key=lambda name: stable_seed(purpose, seed, name))


def first_patients(records: Sequence[R], fraction: float, seed: int, purpose: str = "patients") -> list[R]:
    """The records of the first `fraction` of the patients, of one at least."""
    patients = shuffled({record.patient_id for record in records}, purpose, seed)
    kept = set(patients[: max(round(fraction * len(patients)), 1)])
    return [record for record in records if record.patient_id in kept]


def first_records(records: Sequence[R], count: int | None, seed: int, items: str, where: Path) -> list[R]:
    """The first `count` records (all: None) of the row; `items` is what a reader calls them. Raises `ConfigError` if there are fewer."""
    if count is not None and count > len(records):
        raise ConfigError(f"{where}: {count} {items} are asked for, its training split has {len(records)}")
    by_id = {record.record_id: record for record in records}
    return [by_id[name] for name in shuffled(by_id, items, seed)[:count]]
