"""Prepared data on disk: one file per source file and preparation, written in one atomic step, safe to share by processes."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray


def entry(folder: Path, suffix: str, *key: object) -> Path:
    """Where the entry of `key` (anything printable) lies below `folder`."""
    name = hashlib.sha256("|".join(str(part) for part in key).encode()).hexdigest()
    return folder / name[:2] / f"{name[2:40]}{suffix}"


def file_state(path: Path) -> str:
    """What changes when a file does: its path, length and modification time. Raises `OSError` if it is not there."""
    state = path.stat()
    return f"{path.absolute()}|{state.st_size}|{state.st_mtime_ns}"


def write_atomically(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Let `save` write the file at `path`, which is there whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            save(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def arrays(path: Path, make: Callable[[], dict[str, NDArray]]) -> dict[str, NDArray]:
    """The arrays of the .npz at `path`; where there is none, or it is cut off by a full disk, those of `make`, written there."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        made = make()
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **made))
    return made
