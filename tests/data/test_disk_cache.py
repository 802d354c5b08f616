"""The disk cache: made once, read afterwards, made again when it is damaged, whole or not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medgen.data import disk_cache


def test_arrays_are_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"a": np.arange(3), "words": np.array('{"x": 1}')}

    where = disk_cache.entry(tmp_path, ".npz", "ecg", 1, 2.5)
    first, again = disk_cache.arrays(where, make), disk_cache.arrays(where, make)
    assert len(calls) == 1 and np.array_equal(first["a"], again["a"]) and str(again["words"]) == '{"x": 1}'
    where.write_bytes(where.read_bytes()[:50])
    assert np.array_equal(disk_cache.arrays(where, make)["a"], np.arange(3)) and len(calls) == 2
    assert disk_cache.entry(tmp_path, ".npz", "ecg", 1, 2.6) != where


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        disk_cache.write_atomically(tmp_path / "x" / "y.npz", fail)
    assert not list((tmp_path / "x").iterdir())


def test_a_changed_file_has_another_state(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("1")
    before = disk_cache.file_state(path)
    path.write_text("22")
    assert disk_cache.file_state(path) != before
