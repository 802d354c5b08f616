"""Films that are in a data set more than once: repeated images are what diffusion models memorise first (Carlini et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from medgen.data.images import ImagePreprocessing, to_grid
from medgen.data.records import Manifest, read_manifest, write_manifest

SIDE = 32
SIMILAR = 0.995
"""Correlation of two films at 32 x 32: copies that were scaled, compressed or brightened are above .998; the two nearest of 300
digital patients' 600 films are at .982."""


@dataclass(frozen=True)
class Deduplicated:
    """What `deduplicate` wrote: `removed` maps the record ids that went to the one that stayed for them."""

    manifest: Path
    kept: int
    removed: dict[str, str]

    def __str__(self) -> str:
        shown = "".join(f"\n  {gone} is {kept}" for gone, kept in list(self.removed.items())[:20])
        more = f"\n  and {len(self.removed) - 20} more" if len(self.removed) > 20 else ""
        return f"{self.manifest}: {self.kept} films, {len(self.removed)} duplicates removed{shown}{more}"


def thumbnails(paths: Sequence[Path]) -> NDArray[np.float32]:
    """Films as unit vectors [N,1024] of their 32 x 32 grey values, brightness and contrast taken out."""
    small = ImagePreprocessing(size=SIDE)
    flat = np.stack([to_grid(path, small).astype(np.float32).ravel() for path in paths])
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True).clip(min=1e-6)


def first_of_each(vectors: NDArray[np.float32], similar: float = SIMILAR, chunk: int = 1024) -> NDArray[np.intp]:
    """For each of N unit vectors [N,D] the index of the first one that is the same film (its own, where there is none before)."""
    pairs = []
    for start in range(0, len(vectors), chunk):
        rows, columns = np.nonzero(vectors[start : start + chunk] @ vectors.T >= similar)
        pairs.append(np.stack([rows + start, columns]))
    rows, columns = np.concatenate(pairs, axis=1)
    graph = coo_matrix((np.ones(len(rows), dtype=np.int8), (rows, columns)), shape=(len(vectors),) * 2)
    _, member = connected_components(graph, directed=False)
    _, first = np.unique(member, return_index=True)
    return first[member]


def without_duplicates(manifest: Manifest, similar: float = SIMILAR) -> tuple[Manifest, dict[str, str]]:
    """The manifest with the first film of every group of copies, and what went: {record id removed: record id kept}.

    Copies of different patients are copies too: one of them has the wrong name.
    """
    first = first_of_each(thumbnails([manifest.image_path(record) for record in manifest.records]), similar)
    kept = tuple(record for i, record in enumerate(manifest.records) if first[i] == i)
    removed = {r.record_id: manifest.records[first[i]].record_id for i, r in enumerate(manifest.records) if first[i] != i}
    return replace(manifest, records=kept), removed


def deduplicate(manifest: Path, out: Path | None = None, similar: float = SIMILAR) -> Deduplicated:
    """Write a manifest without films that are another one's copy.

    Args:
        manifest: the films.
        out: the manifest to write, in the same folder (its films stay where they are); NAME.unique.parquet if not given.
        similar: correlation at 32 x 32 pixels from which two films are one.
    """
    out = out or manifest.with_name(f"{manifest.stem}.unique.parquet")
    if out.resolve().parent != manifest.resolve().parent:
        raise ValueError(f"{out}: write it beside {manifest}, whose folder its films are named from")
    kept, removed = without_duplicates(read_manifest(manifest), similar)
    write_manifest(kept.records, out, name=kept.name, source=f"{kept.source}; {len(removed)} duplicates removed")
    return Deduplicated(out, len(kept), removed)
