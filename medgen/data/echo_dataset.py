"""Echo records as training items: a window of frames at real times, the ECG around it, and where each frame lies in the heart's cycle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from medgen.data import disk_cache
from medgen.data.clips import Clip, VideoPreprocessing, load_clip
from medgen.data.ecg import ECGError, ECGPreparation, PreparedECG, frame_phase, prepare_ecg, read_ecg
from medgen.data.ecg_window import EcgWindow, ecg_window
from medgen.data.echo_records import ECHO_VIEWS, EchoRecord, Pairing
from medgen.data.records import Manifest
from medgen.data.video import VideoError
from medgen.seeds import stable_seed

__all__ = ["Clip", "EcgWindow", "EchoDataError", "EchoDataset", "VideoPreprocessing", "ecg_window", "load_clip", "prepared_ecg"]
_CACHE_VERSION = 1  # raise it when `prepare_ecg` gives other values for the same file and preparation


class EchoDataError(ValueError):
    """A record whose video or ECG cannot be used; the message names the record, the file and the reason."""


class EchoDataset(Dataset[dict[str, Any]]):
    """Map-style data set of an echo manifest: `[i]` gives one window.

    ```
    {"id": record_id, "video": [T, 1, size, size] float32 in [-1, 1], "times": [T] float32 s (frame 0 = 0),
     "ecg": EcgWindow | None, "phase": [T, 4] float32 (sin φ, cos φ, s since R, RR in s; NaN where unknown),
     "ejection_fraction": float percent (NaN unknown), "view": int index in ECHO_VIEWS (-1 unknown), "fps": float Hz}
    ```
    T is `preprocessing.frames`, or less for a shorter clip. A longer clip gives a window whose start is drawn from (seed, epoch,
    record) alone: call `set_epoch` before every epoch. Without `ecg`, or for a record without a usable pairing, "ecg" is None.
    By default only beat-synchronous ECGs count; with "patient" in `pairings` another recording of the same patient is given too,
    its middle under the clip's middle, and the phase stays unknown. `cache` is a folder for resized clips and prepared ECGs
    (finding R peaks is slow), None prepares every time. Raises `EchoDataError` naming record and file.
    """

    def __init__(
        self,
        manifest: Manifest[EchoRecord],
        preprocessing: VideoPreprocessing,
        ecg: ECGPreparation | None = None,
        *,
        pairings: tuple[Pairing, ...] = ("beat_synchronous",),
        cache: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.manifest, self.preprocessing, self.ecg = manifest, preprocessing, ecg
        self.pairings, self.cache, self.seed, self.epoch = pairings, cache, seed, 0

    def __len__(self) -> int:
        return len(self.manifest)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's windows the next items are."""
        self.epoch = epoch

    def clip(self, index: int) -> Clip:
        """The whole clip at the wanted size and frame rate; its times count from frame 0 of the file."""
        record = self.manifest.records[index]
        try:
            return load_clip(self.manifest.path(record.video), self.preprocessing, record.fps, self.cache)
        except VideoError as error:
            raise EchoDataError(f"record {record.record_id!r} of {self.manifest.name}: {error}") from error

    def prepared_ecg(self, index: int) -> PreparedECG | None:
        """The record's whole ECG on the clip's clock (frame 0 of the file is second 0), or None if it has none of `pairings`.

        A "patient" ECG is laid with its middle under the clip's; it has no R peaks that mean anything for the video, so none.
        """
        record = self.manifest.records[index]
        if self.ecg is None or record.ecg is None or record.pairing not in self.pairings:
            return None
        try:
            prepared = prepared_ecg(self.manifest.path(record.ecg), self.ecg, self.cache)
        except ECGError as error:
            raise EchoDataError(f"record {record.record_id!r} of {self.manifest.name}: {error}") from error
        if record.pairing == "beat_synchronous":
            return shifted(prepared, -record.ecg_offset)
        middle = prepared.start + prepared.signal.shape[1] / prepared.rate / 2
        prepared = shifted(prepared, record.frames / record.fps / 2 - middle)
        return dataclasses.replace(prepared, r_peaks=prepared.r_peaks[:0], t_ends=prepared.t_ends[:0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.manifest.records[index]
        clip, prepared = self.clip(index), self.prepared_ecg(index)
        count = min(self.preprocessing.frames, len(clip.frames))
        first = stable_seed("window", self.seed, self.epoch, record.record_id) % (len(clip.frames) - count + 1)
        times = clip.times[first : first + count]
        phase = np.full((count, 4), np.nan, dtype=np.float32)
        window = None
        if prepared is not None:
            last = times[0] + (count - 1) / self.preprocessing.fps  # the even grid's: all windows of a data set have one length
            window = ecg_window(prepared, float(times[0]), float(last))
            if record.pairing == "beat_synchronous":
                phase = frame_phase(prepared.r_peaks, prepared.t_ends, times)
        ejection_fraction = record.ejection_fraction
        return {
            "id": record.record_id,
            "video": clip.video(first, count),
            "times": torch.from_numpy((times - times[0]).astype(np.float32)),
            "ecg": window,
            "phase": torch.from_numpy(np.asarray(phase, dtype=np.float32)),
            "ejection_fraction": float("nan") if ejection_fraction is None else ejection_fraction,
            "view": ECHO_VIEWS.index(record.view) if record.view in ECHO_VIEWS else -1,
            "fps": self.preprocessing.fps,
        }


def shifted(prepared: PreparedECG, seconds: float) -> PreparedECG:
    """The same ECG on a clock that shows `seconds` more."""
    return dataclasses.replace(
        prepared,
        start=prepared.start + seconds,
        r_peaks=prepared.r_peaks + seconds,
        t_ends=prepared.t_ends + seconds,
    )


def prepared_ecg(path: Path, preparation: ECGPreparation, cache: str | Path | None = None) -> PreparedECG:
    """`prepare_ecg` of a file; with `cache`, kept there by the hash of the file's content and the preparation. Raises `ECGError`."""
    if cache is None:
        return prepare_ecg(read_ecg(path), preparation)
    key = ("ecg", _CACHE_VERSION, _content_hash(path), preparation.model_dump_json())
    stored = disk_cache.arrays(
        disk_cache.entry(Path(cache), ".npz", *key), lambda: _packed(prepare_ecg(read_ecg(path), preparation))
    )
    return _unpacked(stored)


def _content_hash(path: Path) -> str:
    """Of the file, or of all files of a WFDB record."""
    files = [path] if path.is_file() else sorted(path.parent.glob(f"{path.name}.*"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _packed(prepared: PreparedECG) -> dict[str, NDArray[Any]]:
    values = {field.name: getattr(prepared, field.name) for field in dataclasses.fields(prepared)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    words = {name: value for name, value in values.items() if name not in arrays}
    return {**arrays, "_words": np.array(json.dumps(words))}


def _unpacked(stored: dict[str, NDArray[Any]]) -> PreparedECG:
    words = json.loads(str(stored["_words"]))
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in words.items()}
    values |= {name: value for name, value in stored.items() if name != "_words"}
    return PreparedECG(**values)
