"""EchoNet-Dynamic (Ouyang et al., Nature 2020): 10,030 apical four-chamber videos, one a patient, with EF and two traced frames each.

```
ROOT/FileList.csv        FileName,EF,ESV,EDV,FrameHeight,FrameWidth,FPS,NumberOfFrames,Split     names may lack .avi
ROOT/VolumeTracings.csv  FileName,X1,Y1,X2,Y2,Frame     per frame: the long axis first, then the discs across it
ROOT/Videos/*.avi        112 x 112, Motion JPEG; no ECG
```
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from medgen.data.echo_records import EchoRecord
from medgen.data.records import Split
from medgen.data.sources.base import (
    Annotated,
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_id,
    as_number,
    one_file,
    read_rows,
)

_SPLITS: Mapping[str, Split] = {"TRAIN": "train", "VAL": "val", "TEST": "test"}
_COLUMNS = ("FileName", "EF", "ESV", "EDV", "FPS", "NumberOfFrames", "Split")
Tracing = dict[int, list[tuple[float, float, float, float]]]  # frame → lines, frames in the file's order


def records(root: Path, options: SourceOptions) -> Records:
    """Every video of the list; a traced one with masks of its end-diastolic and end-systolic frame, an untraced one without."""
    if "A4C" not in options.views:
        return
    table = one_file(root, "FileList.csv")
    if not (root / "Videos").is_dir():
        raise SourceError(f"{root} holds no folder Videos")
    files = {path.stem.lower(): path.name for path in sorted((root / "Videos").iterdir()) if path.suffix.lower() == ".avi"}
    tracings = _tracings(root / "VolumeTracings.csv")
    rows = [(_stem(row["FileName"]), row) for row in read_rows(table, _COLUMNS)]
    listed = Counter(stem.lower() for stem, _ in rows)
    for stem, row in rows:
        name, key = as_id(stem), stem.lower()
        if listed[key] > 1:
            splits = sorted({other["Split"] for same, other in rows if same.lower() == key})
            yield Quarantined(name, f"{stem} is listed {listed[key]} times in {table.name} (splits {', '.join(splits)})")
        elif row["Split"].upper() not in _SPLITS:
            yield Quarantined(name, f"{stem} has the split {row['Split']!r}; expected TRAIN, VAL or TEST")
        elif key not in files:
            yield Quarantined(name, f"no video at Videos/{stem}.avi")
        else:
            yield _record(name, files[key], row, tracings.get(key, {}))


def _record(name: str, file: str, row: dict[str, str], tracing: Tracing) -> EchoRecord | Annotated | Quarantined:
    fps, frames = as_number(row["FPS"]), as_number(row["NumberOfFrames"])
    if not fps or not frames:
        return Quarantined(name, f"{file}: {row['NumberOfFrames']!r} frames at {row['FPS']!r} per second in the list")
    record = EchoRecord(
        record_id=name,
        patient_id=name,
        study_id=name,
        video=f"Videos/{file}",
        view="A4C",
        fps=fps,
        frames=int(frames),
        split=_SPLITS[row["Split"].upper()],
        ejection_fraction=as_number(row["EF"]),
        edv_ml=as_number(row["EDV"]),
        esv_ml=as_number(row["ESV"]),
        extra={"traced": len(tracing) > 1},
    )
    height, width = int(as_number(row.get("FrameHeight")) or 112), int(as_number(row.get("FrameWidth")) or 112)
    traced = list(tracing)
    if len(traced) < 2 or max(traced) >= frames:
        return record
    masks = np.stack([_filled(tracing[frame], height, width) for frame in traced])
    ends = {"es_frames": np.array(traced[:1]), "ed_frames": np.array(traced[-1:])}  # the last traced frame in file order is ED
    return Annotated(record, {"mask_frames": np.array(traced), "masks": masks, **ends})


def _tracings(table: Path) -> dict[str, Tracing]:
    """Lines by video and frame, frames in the order of the file; nothing if the table is not there."""
    found: dict[str, Tracing] = {}
    if not table.is_file():
        return found
    for row in read_rows(table, ("FileName", "X1", "Y1", "X2", "Y2", "Frame")):
        values: list[Any] = [as_number(row[column]) for column in ("X1", "Y1", "X2", "Y2", "Frame")]
        if None in values:
            raise SourceError(f"{table}: a row of {row['FileName']} holds {row}, not five numbers")
        lines = found.setdefault(_stem(row["FileName"]).lower(), {}).setdefault(int(values[4]), [])
        lines.append((values[0], values[1], values[2], values[3]))
    return found


def _filled(lines: list[tuple[float, float, float, float]], height: int, width: int) -> NDArray[np.uint8]:
    """The cavity `[H, W]`: the outline runs down the discs' first ends and up their second; line 0 is the long axis, no disc."""
    discs = lines[1:]
    outline = [(x1, y1) for x1, y1, _, _ in discs] + [(x2, y2) for _, _, x2, y2 in reversed(discs)]
    picture = Image.new("L", (width, height))
    if len(outline) > 2:
        ImageDraw.Draw(picture).polygon(outline, fill=1)
    return np.asarray(picture)


def _stem(name: str) -> str:
    return name[:-4] if name.lower().endswith(".avi") else name
