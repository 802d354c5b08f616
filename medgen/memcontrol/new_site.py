"""The digital test piece of MemControl: `python -m medgen.memcontrol.new_site OUT` makes the films of a hospital that is new to a pipeline.

Fine-tuning must have something to gain, or the best mask is the empty one: site B's films look different from those that the shipped
pipeline knows, and there are few of them, so that it gains quality and memorises at once.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from medgen.data.records import Split, read_manifest, write_manifest
from medgen.digital.chest import write_dataset

TRAIN, VALIDATION, TEST = 96, 64, 32  # patients, one film each


def make_new_site(out: Path, seed: int = 7041, size: int = 128, processes: int | None = None) -> Path:
    """Films of 192 digital patients of site B below `out`: 96 to train on, 64 to validate, 32 never seen. Returns the manifest.

    Sites are digital patients' hospitals; B is otherwise a test set. These patients are nobody else's: the seed is their population.
    """
    path = write_dataset(out, TRAIN + VALIDATION + TEST, seed, size, site="B", processes=processes)
    manifest = read_manifest(path)
    splits: list[tuple[Split, int]] = [("train", TRAIN), ("val", VALIDATION), ("test", TEST)]
    names = [name for name, count in splits for _ in range(count)]
    records = [replace(record, split=name) for record, name in zip(manifest.records, names, strict=True)]
    return write_manifest(records, path, name="new-site", source=f"{manifest.source}; split anew for memcontrol")


if __name__ == "__main__":
    print(make_new_site(Path(sys.argv[1])))
