"""ACDC (Bernard et al., IEEE TMI 2018): short-axis cine MR of 150 hearts, as SADM reads it: the frames from end-diastole to end-systole.

```
ROOT/[database/]{training,testing}/patient001/Info.cfg
    "ED: 1", "ES: 12", "Group: DCM", "Height: 184.0", "NbFrame: 30", "Weight: 95.0", a line each; frames count from 1
ROOT/[database/]{training,testing}/patient001/patient001_4d.nii.gz  (x, y, slice, frame)
```
SADM zooms every beat to 12 frames (`frames`; 0 keeps those recorded) and every volume to 128x128x32 with min-max intensities: the
latter two are `size: [32, 128, 128]`, `volume: {intensity: minmax, max_anisotropy: 12}` of the training configuration.
The set's own test patients stay the test split.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError

from medgen.data.images import ImageError
from medgen.data.records import Split
from medgen.data.sources.base import (
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    Unwritten,
    as_number,
    hashed_split,
    read_info,
)
from medgen.data.sources.visits import covariates
from medgen.data.visit_records import Visit, VisitSeries
from medgen.data.volumes import read_shape, save_nifti


def records(root: Path, options: SourceOptions) -> Records:
    """One series per patient: phase 0 is end-diastole, 1 end-systole. Frames are written below the manifest's folder."""
    home = next((path for path in (root / "database", root) if any(path.glob("**/patient[0-9]*/Info.cfg"))), None)
    if home is None:
        raise SourceError(f"{root} holds no patient001/Info.cfg (nor below training/, testing/); is this ACDC?")
    for info in sorted(home.glob("**/patient[0-9]*/Info.cfg"), key=lambda path: path.parent.name):
        yield _series(info.parent, options)


def _series(folder: Path, options: SourceOptions) -> Unwritten | Quarantined:
    name, info = folder.name, read_info(folder / "Info.cfg")
    path = next((p for end in (".nii.gz", ".nii") if (p := folder / f"{name}_4d{end}").is_file()), None)
    if path is None:
        return Quarantined(name, f"no image at {folder.parent.name}/{name}/{name}_4d.nii.gz")
    ed, es = (as_number(info.get(key)) for key in ("ed", "es"))
    if ed is None or es is None or ed == es:
        return Quarantined(
            name, f"Info.cfg of {name} says ED {info.get('ed')}, ES {info.get('es')}: two frame numbers are needed"
        )
    try:
        shape = read_shape(path)
    except ImageError as error:
        return Quarantined(name, str(error))
    if len(shape) != 4 or not 1 <= min(ed, es) or max(ed, es) > shape[3]:
        return Quarantined(name, f"Info.cfg of {name} says ED {ed:g}, ES {es:g}, but {path.name} has the shape {list(shape)}")
    last = es - ed if es > ed else es - ed + shape[3]  # the cine is a loop: systole may end after the last frame
    count = options.frames or int(last) + 1
    frames = [float(frame) % shape[3] for frame in np.linspace(ed - 1, ed - 1 + last, count)]
    visits = tuple(
        Visit(
            visit_id=f"{name}_phase{index:02d}",
            time=round(index / (count - 1), 6),
            image=f"acdc_frames_{options.frames}/{name}/phase{index:02d}.nii.gz",
            extra={"frame": round(frame + 1, 4)},  # counted from 1 as in Info.cfg
        )
        for index, frame in enumerate(frames)
    )
    known = covariates({"group": info.get("group"), "height_cm": info.get("height"), "weight_kg": info.get("weight")})
    record = VisitSeries(
        name, name, name, visits, "mr", 3, "phase", _split(folder, options), covariates=known, extra={"frames_in_cycle": shape[3]}
    )
    return Unwritten(record, partial(_write, path, record, frames))


def _split(folder: Path, options: SourceOptions) -> Split:
    above = folder.parent.name.lower()
    if above.startswith("test"):
        return "test"
    split = hashed_split(folder.name, options)
    return "train" if split == "test" and above.startswith("train") else split


def _write(path: Path, record: VisitSeries, frames: list[float], home: Path) -> Mapping[str, str]:
    """Each frame as a 3D NIfTI with the cine's own affine; between two recorded frames their weighted mean, as a zoom in time gives."""
    wanted = [(home / str(visit.image), frame) for visit, frame in zip(record.visits, frames, strict=True)]
    newest = path.stat().st_mtime
    if all(target.is_file() and target.stat().st_mtime >= newest for target, _ in wanted):
        return {}
    try:
        image = nibabel.load(path)
        cine = np.asarray(image.dataobj)
        for target, frame in wanted:
            below, part = int(frame), frame - int(frame)
            values: np.ndarray = cine[..., below].astype(np.float32)
            if part:
                values = (1 - part) * values + part * cine[..., (below + 1) % cine.shape[3]]
            header = image.header.copy()
            header.set_data_shape(values.shape)
            header.set_slope_inter(1, 0)
            header.set_data_dtype(np.float32)
            save_nifti(target, nibabel.Nifti1Image(values, image.affine, header))
    except (OSError, EOFError, ValueError, ImageFileError) as error:
        return {visit.visit_id: f"{path} cannot be decoded as a volume: {error}" for visit in record.visits}
    return {}
