"""Joining echo clips and ECGs: of the same patient, nearest in time, and beat-synchronous only where one clock is proven.

Hours apart, an ECG tells of the same heart but not of the same beats: such a pair is "patient", never "beat_synchronous".
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from pydicom.dataset import Dataset

from medgen.data.ecg_records import ECGRecord
from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest, write_manifest


class JoinError(ValueError):
    """Two sets that cannot be joined; the message says why."""


@dataclass(frozen=True)
class TimedECG:
    """An ECG to be joined: `ecg` its path (as records name it), `time` when its first sample was taken.

    `clock` identifies a synchronised clock (see `clock_of`) and `seconds` how long it runs; both are needed for "beat_synchronous".
    """

    ecg: str
    patient_id: str
    time: datetime
    clock: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Unmatched:
    """An echo record that got no ECG, and why."""

    record_id: str
    reason: str


@dataclass(frozen=True)
class JoinReport:
    """What a join did: how many clips by pairing, hours between clip and ECG (median), and those left without one."""

    pairings: dict[str, int]
    median_hours: float | None
    unmatched: tuple[Unmatched, ...]

    def __str__(self) -> str:
        pairs = ", ".join(f"{count} {pairing.replace('_', '-')}" for pairing, count in self.pairings.items()) or "none"
        hours = "" if self.median_hours is None else f"; ECG and echo are {self.median_hours:.1f} h apart in the median"
        first = f"; {len(self.unmatched)} without an ECG" if self.unmatched else ""
        return f"joined: {pairs}{hours}{first}"


def clock_of(header: Dataset) -> str | None:
    """The synchronised clock a DICOM object was recorded on (PS3.3 C.7.4.2): its UID, if acquisition was synchronised to it."""
    synchronised = header.get("AcquisitionTimeSynchronized") == "Y"
    return str(header.get("SynchronizationFrameOfReferenceUID") or "") or None if synchronised else None


def join_ecgs(
    echoes: Iterable[EchoRecord], ecgs: Iterable[TimedECG], limit_hours: float = 24.0
) -> tuple[list[EchoRecord], JoinReport]:
    """Give every clip the ECG of its patient that is nearest in time, at most `limit_hours` away.

    A clip's time is `extra["acquired"]` (ISO). `ecg_offset` becomes the seconds from the ECG's first sample to frame 0, and
    `extra["ecg_hours"]` the hours from the clip to the ECG. The pair is "beat_synchronous" only if `extra["clock"]` is the ECG's
    `clock` and the ECG runs through the whole clip; otherwise "patient". A clip that already has an ECG keeps it.
    """
    by_patient: dict[str, list[TimedECG]] = defaultdict(list)
    for ecg in ecgs:
        by_patient[ecg.patient_id].append(ecg)
    for found in by_patient.values():
        found.sort(key=lambda ecg: (ecg.time, ecg.ecg))
    joined: list[EchoRecord] = []
    unmatched: list[Unmatched] = []
    hours: list[float] = []
    for record in echoes:
        paired = record if record.ecg is not None else _paired(record, by_patient.get(record.patient_id, []), limit_hours)
        if isinstance(paired, Unmatched):
            unmatched.append(paired)
            paired = record
        elif "ecg_hours" in paired.extra:
            hours.append(abs(float(paired.extra["ecg_hours"])))
        joined.append(paired)
    pairings = dict(Counter(str(record.pairing) for record in joined if record.pairing != "none"))
    median = sorted(hours)[len(hours) // 2] if hours else None
    return joined, JoinReport(pairings, median, tuple(unmatched))


def _paired(record: EchoRecord, ecgs: Sequence[TimedECG], limit_hours: float) -> EchoRecord | Unmatched:
    if not ecgs:
        return Unmatched(record.record_id, "no ECG of this patient")
    try:
        shown = datetime.fromisoformat(str(record.extra.get("acquired", "")))
    except ValueError:
        return Unmatched(record.record_id, "the clip's time is not known (extra.acquired)")
    shown = shown.replace(tzinfo=None)
    same = [ecg for ecg in ecgs if _runs_through(ecg, record, shown)]
    after = bisect_left([ecg.time for ecg in ecgs], shown)
    nearest = min(same or ecgs[max(after - 1, 0) : after + 1], key=lambda ecg: abs(ecg.time - shown))
    offset = (shown - nearest.time).total_seconds()
    if not same and abs(offset) > limit_hours * 3600:
        return Unmatched(record.record_id, f"the nearest ECG is {abs(offset) / 3600:.1f} h away, more than {limit_hours:g}")
    return replace(
        record,
        ecg=nearest.ecg,
        ecg_offset=offset,
        pairing="beat_synchronous" if same else "patient",
        extra={**record.extra, "ecg_hours": round(-offset / 3600, 4)},
    )


def _runs_through(ecg: TimedECG, record: EchoRecord, shown: datetime) -> bool:
    """Whether ECG and clip were recorded on one proven clock, the ECG through the whole of the clip."""
    if ecg.clock is None or record.extra.get("clock") != ecg.clock:
        return False
    first = (shown - ecg.time).total_seconds()
    return first >= 0 and first + (record.frames - 1) / record.fps <= ecg.seconds


def join(echo: Path, ecg: Path, out: Path, limit_hours: float = 24.0) -> JoinReport:
    """Write an echo manifest whose clips name the ECGs of an ECG manifest that are nearest in time, of the same patient.

    Beside it goes `unmatched.jsonl`, one line for each clip without an ECG with its reason. Both manifests' folders must lie below
    that of `out`, which writes paths relative to itself.

    Args:
        echo: an echo manifest whose records say when they were taken (extra.acquired, ISO).
        ecg: an ECG manifest whose records say so too (time, ISO; or extra.time).
        out: the manifest to write, .parquet or .jsonl.
        limit_hours: the largest distance in time between a clip and its ECG.
    """
    clips, signals = read_manifest(echo, record=EchoRecord), read_manifest(ecg, record=ECGRecord)
    home = Path(out).parent.resolve()
    moved = _moved(clips.root, home)
    records = [record.below(moved) for record in clips.records]
    timed = [TimedECG(f"{_moved(signals.root, home)}{r.ecg}", r.patient_id, time) for r in signals.records if (time := _time(r))]
    if not timed:
        raise JoinError(f"{ecg}: none of its {len(signals)} records says when it was taken (extra.time, ISO)")
    joined, report = join_ecgs(records, timed, limit_hours)
    source = f"{clips.source}; joined with {signals.name} ({signals.sha256[:12]}) within {limit_hours:g} h"
    write_manifest(joined, out, name=clips.name, source=source)
    write_unmatched(Path(out).parent / "unmatched.jsonl", report)
    return report


def write_unmatched(path: Path, report: JoinReport) -> None:
    """One line of JSON for each clip without an ECG, in one atomic step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    lines = [json.dumps({"record_id": item.record_id, "reason": item.reason}) for item in report.unmatched]
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


def _moved(root: Path, home: Path) -> str:
    """What leads from the new manifest's folder to another's."""
    root = root.resolve()
    if not root.is_relative_to(home):
        raise JoinError(f"{root} does not lie below {home}; write the joined manifest above both sets")
    inside = root.relative_to(home).as_posix()
    return "" if inside == "." else f"{inside}/"


def _time(record: ECGRecord) -> datetime | None:
    try:
        found = datetime.fromisoformat(str(getattr(record, "time", None) or record.extra.get("time") or ""))
    except ValueError:
        return None
    return found.replace(tzinfo=None)
