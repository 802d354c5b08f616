"""Windows of prepared recordings: chosen leads (and the PPG) at one rate, band-passed, in mV, read from disk once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medgen.data.ecg import ECG, ECGError, ECGPreparation, filter_ecg, read_ecg
from medgen.data.ecg_records import ECGRecord
from medgen.data.ppg import PPGError, prepare_ppg, read_ppg
from medgen.data.records import Manifest
from medgen.seeds import stable_seed


class SignalDataset:
    """Items {"id", "signals" [N,S] float32}: a window of `seconds` of each recording in which every one of `names` is good.

    The window moves with the epoch (`set_epoch`); before the first it is the middle one. Recordings that cannot serve are named in
    `left_out` with their reason; a manifest without any that can is an `ECGError`. Prepared signals are kept in `cache`, if given.
    """

    def __init__(
        self,
        manifest: Manifest[ECGRecord],
        names: Sequence[str],
        preparation: ECGPreparation,
        seconds: float,
        cache: Path | None = None,
    ) -> None:
        self.names, self.rate = tuple(names), float(preparation.rate)
        self.length = round(seconds * self.rate)
        self.records, self.left_out = self._load(manifest, preparation, cache)
        for record_id, values in self.records.items():
            if values.shape[1] < self.length:
                self.left_out[record_id] = f"{values.shape[1] / self.rate:.2f} s long, the window has {seconds:g} s"
        self.ids = [record_id for record_id in self.records if record_id not in self.left_out]
        if not self.ids:
            reasons = "; ".join(f"{key}: {why}" for key, why in list(self.left_out.items())[:3])
            raise ECGError(f"{manifest.name}: none of {len(manifest)} recordings has good {', '.join(self.names)} ({reasons})")
        self.fingerprint = hashlib.sha256(
            "\n".join([manifest.sha256, *self.names, str(preparation), *self.ids]).encode()
        ).hexdigest()
        self.epoch: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def set_epoch(self, epoch: int) -> None:
        """Windows start elsewhere in every epoch, as a pure function of (epoch, recording)."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        values = self.records[self.ids[index]]
        spare = values.shape[1] - self.length
        start = spare // 2 if self.epoch is None else stable_seed("window", self.epoch, self.ids[index]) % (spare + 1)
        return {"id": self.ids[index], "signals": torch.from_numpy(values[:, start : start + self.length].copy())}

    def whole(self, index: int) -> NDArray[np.float32]:
        """All of recording `index`: [N,S]."""
        return self.records[self.ids[index]]

    def _load(
        self, manifest: Manifest[ECGRecord], preparation: ECGPreparation, cache: Path | None
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
        if cache is None:
            return self._prepare(manifest, preparation)
        ids = "\n".join(record.record_id for record in manifest.records)
        key = hashlib.sha256("\n".join([manifest.sha256, preparation.model_dump_json(), *self.names, ids]).encode()).hexdigest()
        folder = cache / f"signals-{key[:16]}"
        if not (folder / "index.json").is_file():
            _store(folder, *self._prepare(manifest, preparation))
        index = json.loads((folder / "index.json").read_text())
        values = np.load(folder / "signals.npy", mmap_mode="r")
        ends = np.cumsum([length for _, length in index["recordings"]])
        found = {name: values[:, end - length : end] for (name, length), end in zip(index["recordings"], ends)}
        return found, dict(index["left_out"])

    def _prepare(
        self, manifest: Manifest[ECGRecord], preparation: ECGPreparation
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
        found: dict[str, NDArray[np.float32]] = {}
        left_out: dict[str, str] = {}
        for record in manifest.records:
            try:
                found[record.record_id] = read_signals(manifest, record, self.names, preparation)
            except (ECGError, PPGError) as error:
                left_out[record.record_id] = str(error)
        return found, left_out


def read_signals(
    manifest: Manifest[ECGRecord], record: ECGRecord, names: Sequence[str], preparation: ECGPreparation
) -> NDArray[np.float32]:
    """`names` [N,S] of one recording, all of it. Raises `ECGError` or `PPGError` unless every one is there and good."""
    recordings = [read_ecg(manifest.path(record.ecg))]
    if "PPG" in names:
        if record.ppg is None:
            raise PPGError(f"recording {record.record_id} has no PPG")
        signal, rate = read_ppg(manifest.path(record.ppg))
        recordings.append(ECG(signal[None], ("PPG",), rate))
    values, usable = prepare_signals(recordings, names, preparation)
    bad = [name for name, good in zip(names, usable) if not good]
    if bad:
        raise ECGError(f"recording {record.record_id}: {', '.join(bad)} missing or not good")
    return values


def prepare_signals(
    recordings: Sequence[ECG], names: Sequence[str], preparation: ECGPreparation
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Rows `names` [N,S] of recordings that share a clock, at `preparation.rate`; which rows are there and good, [N].

    A signal called "PPG" is prepared as a pulse wave, the others as an ECG (missing limb leads derived where two are there). Rows
    that are not usable (absent, flat, saturated, noise, or with a gap) hold NaN. Where lengths differ, all are cut to the shortest.
    """
    rows: dict[str, NDArray[np.float32]] = {}
    for recording in recordings:
        ecg = [name for name in recording.leads if name != "PPG"]
        if "PPG" in recording.leads:
            ppg = recording.signal[recording.leads.index("PPG")]
            rows["PPG"] = prepare_ppg(ppg, recording.rate, preparation.rate)
        if ecg:
            part = ECG(
                recording.signal[[recording.leads.index(name) for name in ecg]], tuple(ecg), recording.rate, recording.start
            )
            filtered, _, _ = filter_ecg(part, preparation)
            rows |= dict(zip(filtered.leads, filtered.signal))
    length = min((len(row) for row in rows.values()), default=0)
    values = np.full((len(names), length), np.nan, np.float32)
    for i, name in enumerate(names):
        if name in rows:
            values[i] = rows[name][:length]
    return values, np.asarray(np.isfinite(values).all(1) & (length > 0))


def _store(folder: Path, found: dict[str, NDArray[np.float32]], left_out: dict[str, str]) -> None:
    """Everything in one array, placed in one step."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    values = np.concatenate([*found.values()], axis=1) if found else np.zeros((0, 0), np.float32)
    np.save(temporary / "signals.npy", values)
    index = {"recordings": [(name, part.shape[1]) for name, part in found.items()], "left_out": left_out}
    (temporary / "index.json").write_text(json.dumps(index))
    try:
        temporary.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
