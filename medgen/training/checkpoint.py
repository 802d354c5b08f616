"""Checkpoints that are complete or absent: temporary folder, fsync, hashes, rename, prune afterwards.

Tensors are safetensors, the rest is JSON and YAML; nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged, or of a kind that is not opened."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after optimiser step `step`."""
    return f"step-{step:08d}"


def checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders below `root`, oldest first; unfinished and set-aside ones are not listed."""
    found = [(int(match[1]), path) for path in root.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def write_checkpoint(root: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Let `write` fill a temporary folder, make it durable, rename it to `step-...`, then prune to the newest `keep`."""
    final = root / checkpoint_name(step)
    if final.exists():
        return final
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    entries = {path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (temporary / MANIFEST).write_text(json.dumps({"version": 1, "step": step, "files": entries}, indent=1))
    for path in (*files, temporary / MANIFEST, *(p for p in temporary.rglob("*") if p.is_dir()), temporary):
        fsync(path)
    temporary.rename(final)
    fsync(root)
    for old in checkpoints(root)[:-keep]:
        # Renamed first, so that a kill during the removal leaves no half-empty folder under a checkpoint's name.
        doomed = old.rename(root / f".{old.name}.old.tmp")
        shutil.rmtree(doomed)
    return final


def verify(folder: Path) -> None:
    """Raise `CheckpointError` unless every file that the manifest names is there, whole, and nothing else is."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        refuse_pickles(folder)
        raise CheckpointError(f"{folder} has no {MANIFEST}: it was not written by medgen or is incomplete") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise CheckpointError(f"{folder / MANIFEST} is damaged") from None
    refuse_pickles(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MANIFEST}
    if present != set(entries):
        raise CheckpointError(f"{folder}: missing or unexpected files {sorted(present ^ set(entries))}")
    for name, entry in entries.items():
        path = folder / name
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} differs from its hash in {MANIFEST}: the file is damaged")


class PickleRefused(CheckpointError):
    """A pickle where safetensors are expected; opening it could run code, so it is never opened."""


def refuse_pickles(folder: Path) -> None:
    """Raise `PickleRefused` if any file below `folder` is a pickle by its suffix."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICKLES:
            raise PickleRefused(
                f"{path} is a pickle, which can run code when opened: medgen reads only safetensors. "
                "Convert it on a machine you trust (safetensors.torch.save_file), or remove it"
            )


def newest(root: Path) -> Path | None:
    """The newest sound checkpoint. Damaged ones are renamed to `*.corrupt` with a warning; a pickle is an error."""
    for stale in root.glob(".*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    for folder in reversed(checkpoints(root)):
        try:
            verify(folder)
        except PickleRefused:
            raise
        except CheckpointError as error:
            logger.warning("%s; set aside, falling back to the checkpoint before it", error)
            aside = folder.with_name(folder.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        else:
            return folder
    return None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Save `tensors` as safetensors (copied to the CPU, contiguous)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Load a safetensors file onto the CPU; anything else, a pickle by any name included, is a `CheckpointError`."""
    refuse_pickles(path.parent)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Load a JSON object of a checkpoint."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    return value


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
