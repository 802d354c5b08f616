"""EchoXFlow (2605.05447): 2-D B-mode recordings with the scanner's own ECG and QRS triggers on one clock, Zarr stores in beam space.

```
ROOT/croissant.json          recordSet "recordings": exam_id, recording_id, zarr_path, array_paths
ROOT/<zarr_path>             data/2d_brightness_mode [T, range, beam] uint8, data/ecg [S], timestamps/<same names> in seconds,
                             data/ecg_qrs or timestamps/ecg_qrs [K]; attrs: recording_manifest.sectors[semantic_id bmode].geometry
```
`unpack` scan-converts the frames to AVI and writes the ECG as WFDB below the manifest; a second run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from medgen.data.ecg import ECG, ECGError, write_wfdb
from medgen.data.echo_records import EchoRecord
from medgen.data.records import ManifestError, read_manifest, write_manifest
from medgen.data.sources.base import (
    Annotated,
    Quarantined,
    Records,
    SourceError,
    SourceOptions,
    as_echo_view,
    as_id,
    hashed_split,
)
from medgen.data.video import VideoError, write_video

_BMODE = "data/2d_brightness_mode"
_HEIGHT = 256  # pixels of the scan-converted picture; the beams hold no more detail at the depths of the heart


class _Unusable(ValueError):
    """A recording that lacks something; the message says what."""


@dataclass(frozen=True)
class Sector:
    """A sector's geometry: depths in metres, angles in radians from straight down, rising to the right."""

    depth_start: float
    depth_end: float
    angle_start: float
    angle_end: float


def unpack(root: Path, out: Path) -> Path:
    """Write every 2-D B-mode recording as AVI, WFDB and a one-line manifest below `out`/echoxflow; returns that folder.

    Raises `SourceError` if there is no catalogue, or Zarr is not installed.
    """
    try:
        import zarr  # noqa: F401
    except ImportError:
        raise SourceError("EchoXFlow's recordings are Zarr stores: install medgen[echoxflow]") from None
    folder = out / "echoxflow"
    for row in _catalogue(root):
        name = as_id(f"{row['exam_id']}_{row['recording_id']}").replace(".", "_")  # WFDB allows no dots
        if (folder / "records" / f"{name}.jsonl").is_file():
            continue
        try:
            record = _convert(root, folder, name, row)
            write_manifest([record], folder / "records" / f"{name}.jsonl", name=name, source="echoxflow")
        except (_Unusable, VideoError, ECGError, ManifestError) as error:
            (folder / "unusable").mkdir(parents=True, exist_ok=True)
            reason = {"record_id": name, "reason": f"{row['zarr_path']}: {error}"}
            (folder / "unusable" / f"{name}.json").write_text(json.dumps(reason))
    return folder


def records(root: Path, options: SourceOptions) -> Records:
    """Every converted recording with its QRS triggers; splits by exam."""
    for path in sorted((root / "unusable").glob("*.json")):
        yield Quarantined(**json.loads(path.read_text()))
    for path in sorted((root / "records").glob("*.jsonl")):
        record = read_manifest(path, record=EchoRecord).records[0]
        record = replace(record, split=hashed_split(record.patient_id, options))
        if record.view in options.views:
            triggers = np.asarray(record.extra.get("r_peaks_s", []), dtype=np.float64)
            yield Annotated(record, {"r_peaks": triggers}) if len(triggers) else record


def _convert(root: Path, folder: Path, name: str, row: dict[str, Any]) -> EchoRecord:
    group = _open(root, str(row["zarr_path"]))
    frames, times = _array(group, _BMODE), _times(group, _BMODE)
    if frames.ndim != 3 or frames.dtype != np.uint8 or len(frames) < 2 or len(times) != len(frames):
        raise _Unusable(f"B-mode {list(frames.shape)} {frames.dtype} with {len(times)} times; expected [T, range, beam] uint8")
    sector, words = _sector(dict(group.attrs))
    even = np.linspace(times[0], times[-1], len(times))
    chosen = np.abs(times[None] - even[:, None]).argmin(axis=1)  # an AVI runs evenly: the real frame nearest to each moment
    fps = (len(times) - 1) / float(times[-1] - times[0])
    write_video(folder / "videos" / f"{name}.avi", to_picture(frames[chosen], sector), fps)
    exam = as_id(str(row["exam_id"]))
    record = EchoRecord(
        record_id=name,
        patient_id=exam,
        study_id=exam,
        video=f"videos/{name}.avi",
        view=as_echo_view(words),
        fps=fps,
        frames=len(frames),
        split="train",
        extra={"moved_frames": int((chosen != np.arange(len(times))).sum())},
    )
    if "data/ecg" not in group:
        return record
    ecg, offset = _ecg(group, float(times[0]))
    write_wfdb(ecg, folder / "ecg" / name)
    triggers = [round(float(t) - float(times[0]), 4) for t in _triggers(group)]
    extra = {**record.extra, "r_peaks_s": triggers, "ecg_lead": "the scanner's only lead, taken for II"}
    return replace(record, ecg=f"ecg/{name}", ecg_offset=offset, pairing="beat_synchronous", extra=extra)


def _ecg(group: Any, first: float) -> tuple[ECG, float]:
    """The scanner's ECG on an even grid, and the second of it at which frame 0 (at `first` of the store's clock) was taken."""
    signal, times = _array(group, "data/ecg").astype(np.float64).ravel(), _times(group, "data/ecg")
    if len(times) != len(signal) or len(signal) < 2 or not (np.diff(times) > 0).all():
        raise _Unusable(f"ECG of {len(signal)} samples with {len(times)} times; expected one rising time for each")
    if not np.isfinite(signal).all():
        raise _Unusable("ECG holds NaN or infinite samples")
    rate = 1 / float(np.median(np.diff(times)))
    grid = times[0] + np.arange(int((times[-1] - times[0]) * rate) + 1) / rate
    even = np.interp(grid, times, signal - np.median(signal))
    return ECG(even[None].astype(np.float32), ("II",), rate), first - float(times[0])


def to_picture(frames: NDArray[np.uint8], sector: Sector, height: int = _HEIGHT) -> NDArray[np.uint8]:
    """Scan conversion: beam space `[T, range, beam]` to `[T, height, W]` with square pixels, probe at the top, 0 outside the sector."""
    angles = np.linspace(sector.angle_start, sector.angle_end, 181)
    edge = np.array([[r * np.sin(angles), r * np.cos(angles)] for r in (sector.depth_start, sector.depth_end)])
    (left, right), (top, bottom) = ((edge[:, axis].min(), edge[:, axis].max()) for axis in (0, 1))
    width = max(2, round(height * (right - left) / (bottom - top)))
    x, y = np.meshgrid(np.linspace(left, right, width), np.linspace(top, bottom, height))
    depth, angle = np.hypot(x, y), np.arctan2(x, y)
    rows = (depth - sector.depth_start) / (sector.depth_end - sector.depth_start) * (frames.shape[1] - 1)
    columns = (angle - sector.angle_start) / (sector.angle_end - sector.angle_start) * (frames.shape[2] - 1)
    slack = 1e-6
    outside = (
        (rows < -slack) | (rows > frames.shape[1] - 1 + slack) | (columns < -slack) | (columns > frames.shape[2] - 1 + slack)
    )
    pictures = np.stack([map_coordinates(f.astype(np.float32), (rows, columns), order=1, mode="nearest") for f in frames])
    pictures[:, outside] = 0
    return np.rint(pictures).astype(np.uint8)


def _sector(attributes: Mapping[str, Any]) -> tuple[Sector, str]:
    """The B-mode sector's geometry, and whatever words the manifest says about the view."""
    manifest = attributes.get("recording_manifest")
    manifest = manifest if isinstance(manifest, Mapping) else {}
    for item in manifest.get("sectors") or []:
        role = str(item.get("semantic_id") or item.get("sector_role_id") or "") if isinstance(item, Mapping) else ""
        if role != "bmode":
            continue
        g = {key.lower().replace("_", "").removesuffix("m").removesuffix("rad"): v for key, v in dict(item["geometry"]).items()}
        try:
            tilt, width = float(g.get("tilt") or g.get("angle") or 0.0), float(g.get("width") or 0.0)
            start, end = g.get("anglestart", tilt - width / 2), g.get("angleend", tilt + width / 2)
            sector = Sector(float(g["depthstart"]), float(g["depthend"]), float(start), float(end))
        except (KeyError, TypeError, ValueError) as error:
            raise _Unusable(f"its sector geometry is not complete: {error}") from None
        if not (0 <= sector.depth_start < sector.depth_end < 1 and -1.6 < sector.angle_start < sector.angle_end < 1.6):
            raise _Unusable(f"its sector geometry is none (metres, radians): {sector}")
        return sector, " ".join(
            str(place.get(key) or "") for place in (item, manifest) for key in ("view", "view_code", "panel_id")
        )
    raise _Unusable("its manifest names no B-mode sector")


def _triggers(group: Any) -> NDArray[np.float64]:
    """QRS triggers in seconds of the store's clock, wherever they are kept."""
    for path in ("timestamps/ecg_qrs", "data/ecg_qrs"):
        if path in group:
            return np.sort(_array(group, path).astype(np.float64).ravel())
    metadata = (group.attrs.get("recording_manifest") or {}).get("metadata") or {}
    return np.sort(np.asarray(metadata.get("qrs_trigger_times") or [], dtype=np.float64))


def _times(group: Any, path: str) -> NDArray[np.float64]:
    where = path.replace("data/", "timestamps/", 1)
    if where not in group:
        raise _Unusable(f"it has no {where}: without times nothing is synchronous")
    times = _array(group, where).astype(np.float64).ravel()
    if not np.isfinite(times).all() or (len(times) > 1 and not times[-1] > times[0]):
        raise _Unusable(f"{where} does not rise")
    return times


def _array(group: Any, path: str) -> NDArray[Any]:
    try:
        return np.asarray(group[path][...])
    except Exception as error:  # a damaged chunk fails in any way it likes
        raise _Unusable(f"{path} cannot be read: {error}") from None


def _open(root: Path, below: str) -> Any:
    import zarr

    path = PurePosixPath(below)
    if path.is_absolute() or ".." in path.parts:
        raise _Unusable("path outside the data set")
    if not (root / below).exists():
        raise _Unusable("no recording there")
    try:
        store = zarr.storage.ZipStore(root / below, mode="r") if (root / below).is_file() else root / below
        return zarr.open_group(store, mode="r")
    except Exception as error:  # zarr raises many kinds
        raise _Unusable(f"not a readable Zarr store: {error}") from None


def _catalogue(root: Path) -> Iterator[dict[str, Any]]:
    """Rows of croissant.json's recordings that hold 2-D B-mode, column names without their prefix."""
    path = root / "croissant.json"
    try:
        sets = json.loads(path.read_text(encoding="utf-8")).get("recordSet", [])
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(f"{path} is not a readable catalogue: {error}") from None
    for item in sets:
        if isinstance(item, dict) and "recordings" in (item.get("@id"), item.get("name")):
            for row in item.get("data") or []:
                plain = {key.removeprefix("recordings/"): value for key, value in row.items()}
                missing = [key for key in ("exam_id", "recording_id", "zarr_path") if not plain.get(key)]
                if missing:
                    raise SourceError(f"{path}: a recording lacks {', '.join(missing)}; it has {', '.join(plain)}")
                if _BMODE in (plain.get("array_paths") or [_BMODE]):
                    yield plain
