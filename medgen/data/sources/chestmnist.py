"""ChestMNIST (MedMNIST v2): `chestmnist[_64|_128|_224].npz` with {train,val,test}_{images,labels}, fourteen of NIH's labels.

The set names no patients, so its own split is all that keeps them apart: every image counts as its own patient.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medgen.data.records import SPLITS, CXRRecord, Split
from medgen.data.report_text import labels_to_text
from medgen.data.sources.base import Records, SourceError, SourceOptions, one_file
from medgen.data.sources.chexpert_csv import nih_labels

CLASSES = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation", "Edema",
    "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip


def unpack(root: Path, out: Path) -> Path:
    """Write the npz's images as PNG files, with their labels, below `out`/chestmnist; returns that folder.

    Raises `SourceError` for a damaged archive or arrays of other names or shapes.
    """
    path = (
        root
        if root.suffix == ".npz"
        else one_file(root, "chestmnist_224.npz", "chestmnist_128.npz", "chestmnist_64.npz", "chestmnist.npz")
    )
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: dict[str, NDArray[Any]] = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} is not a readable npz archive of plain arrays: {error}") from None
    folder = out / "chestmnist"
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, list[int]] = {}
    for split in SPLITS:
        images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
        if images is None or labels is None:
            raise SourceError(f"{path} lacks {split}_images or {split}_labels; it has {', '.join(arrays)}")
        if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != (len(images), len(CLASSES)):
            raise SourceError(
                f"{path}: expected {split}_images [N, H, W] uint8 and {split}_labels [N, {len(CLASSES)}], "
                f"not {list(images.shape)} {images.dtype} and {list(labels.shape)}"
            )
        for index, (image, row) in enumerate(zip(images, labels, strict=True)):
            name = f"{split}_{index:06d}"
            Image.fromarray(image).save(folder / f"{name}.png")
            names[name] = np.flatnonzero(row).tolist()
    (folder / "labels.json").write_text(json.dumps(names))
    return folder


def records(root: Path, _options: SourceOptions) -> Records:
    """Every image; NIH's films are PA or AP and the set does not say which, so the view is unknown and never filtered."""
    for name, present in json.loads((root / "labels.json").read_text()).items():
        labels = nih_labels("|".join(CLASSES[index] for index in present))
        yield CXRRecord(
            record_id=name,
            patient_id=name,
            study_id=name,
            image=f"{name}.png",
            view="UNKNOWN",
            findings="",
            impression=labels_to_text(labels),
            split=cast(Split, name.split("_")[0]),
            labels=labels,
            extra={"text": "from labels"},
        )
