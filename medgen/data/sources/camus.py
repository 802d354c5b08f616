"""CAMUS (Leclerc et al., IEEE TMI 2019), the NIfTI edition: 500 patients, 2- and 4-chamber half beats with every frame segmented.

```
ROOT/[database_nifti/]patient0001/patient0001_4CH_half_sequence[_gt].nii.gz     2CH likewise
ROOT/[database_nifti/]patient0001/Info_4CH.cfg     "ED: 1", "ES: 18", "NbFrame: 18", "EF: 55", "FrameRate: 57.5", "Sex: F", "Age: 56" ...
ROOT/[database_split/]subgroup_{training,validation,testing}.txt
```
"""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from medgen.data.echo_records import EchoRecord, EchoView
from medgen.data.records import Split
from medgen.data.sources.base import (
    Annotated,
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_age,
    as_number,
    as_sex,
    hashed_split,
    read_info,
)
from medgen.data.video import VideoError, square_pixels

_SPLITS: dict[str, Split] = {"training": "train", "validation": "val", "testing": "test"}
_VIEWS: dict[str, EchoView] = {"2CH": "A2C", "4CH": "A4C"}


def records(root: Path, options: SourceOptions) -> Records:
    """Both views of every patient with masks of every frame; the official split where its lists are there, otherwise by hash."""
    home = root / "database_nifti" if (root / "database_nifti").is_dir() else root
    patients = sorted(path for path in home.iterdir() if path.is_dir() and path.name.lower().startswith("patient"))
    if not patients:
        raise SourceError(f"{root} holds no folder patient0001 (nor below database_nifti/); is this CAMUS?")
    splits = _splits(root)
    for folder in patients:
        split = splits.get(folder.name.lower()) if splits else hashed_split(folder.name, options)
        for name, view in _VIEWS.items():
            if view in options.views:
                record_id = f"{folder.name}_{name}"
                yield (
                    _record(folder, name, folder.relative_to(root).as_posix(), split)
                    if split
                    else Quarantined(record_id, f"{folder.name} is in none of the subgroup lists")
                )


def _record(folder: Path, name: str, below: str, split: Split) -> EchoRecord | Annotated | Quarantined:
    record_id = f"{folder.name}_{name}"
    path = folder / f"{record_id}_half_sequence.nii.gz"
    info = read_info(folder / f"Info_{name}.cfg")
    if not path.is_file():
        return Quarantined(record_id, f"no video at {below}/{path.name}")
    if (fps := as_number(info.get("framerate"))) is None or fps <= 0:
        return Quarantined(record_id, f"Info_{name}.cfg of {folder.name} says no FrameRate (the NIfTI edition's does)")
    try:
        image = nibabel.load(path)
        frames, zooms = int(image.shape[-1]), [float(zoom) for zoom in image.header.get_zooms()[:2]]
        masks = _masks(folder / f"{record_id}_half_sequence_gt.nii.gz", image.shape)
    except (VideoError, OSError, EOFError, ValueError, ImageFileError) as error:
        return Quarantined(record_id, f"{path.name} cannot be decoded: {error}")
    ends = {key: int(as_number(info.get(key)) or 0) - 1 for key in ("ed", "es")}  # the file counts from 1
    record = EchoRecord(
        record_id=record_id,
        patient_id=folder.name,
        study_id=folder.name,
        video=f"{below}/{path.name}",
        view=_VIEWS[name],
        fps=fps,
        frames=frames,
        split=split,
        ejection_fraction=as_number(info.get("ef") or info.get("lvef")),
        edv_ml=as_number(info.get("lvedv")),
        esv_ml=as_number(info.get("lvesv")),
        age=as_age(info.get("age", "")),
        sex=as_sex(info.get("sex", "")),
        extra={"image_quality": info.get("imagequality", ""), "pixel_mm": min(zooms)},
    )
    arrays: dict[str, NDArray[np.generic]] = {
        f"{key}_frames": np.array([frame]) for key, frame in ends.items() if 0 <= frame < frames
    }
    if masks is not None:
        arrays |= {"masks": masks, "mask_frames": np.arange(frames)}
    return Annotated(record, arrays) if arrays else record


def _masks(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """`[T, H, W]` with CAMUS's own labels, which are ours: 1 LV cavity, 2 myocardium, 3 left atrium."""
    if not path.is_file():
        return None
    image = nibabel.load(path)
    if image.shape != shape:
        raise VideoError(f"{path.name} has the shape {list(image.shape)}, its video {list(shape)}")
    values = np.asarray(image.dataobj).reshape(*shape[:2], -1)
    return square_pixels(np.transpose(values, (2, 1, 0)).astype(np.uint8), image.header.get_zooms(), order=0)


def _splits(root: Path) -> dict[str, Split]:
    """Patient → split from the subgroup lists, wherever they lie; nothing if there are none."""
    found: dict[str, Split] = {}
    for word, split in _SPLITS.items():
        for table in sorted(root.glob(f"**/subgroup_{word}.txt")):
            for name in table.read_text(encoding="utf-8").split():
                if found.setdefault(name.lower(), split) != split:
                    raise SourceError(f"{table}: {name} is also in {found[name.lower()]}; split by patient")
    return found
