"""Where a component lies: in a folder of its own, or as one part of a saved pipeline."""

from __future__ import annotations

from pathlib import Path


def component(path: str | Path, name: str) -> str:
    """`path/name` if `path` is a local pipeline folder that has this component, else `path` itself (a folder or a hub id)."""
    folder = Path(path)
    return str(folder / name) if (folder / "model_index.json").is_file() and (folder / name).is_dir() else str(path)
