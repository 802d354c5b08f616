"""The two sides of an echo evaluation: generated videos with their metadata, and real clips of a manifest, with the beats of their ECGs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.ecg import ECGError, ECGPreparation, prepare_ecg, read_ecg
from medgen.data.echo_records import EchoRecord
from medgen.data.records import Manifest
from medgen.evaluation.echo.measure import Reading, read_file
from medgen.evaluation.images import EvaluationError, read_metadata
from medgen.evaluation.statistics import Floats
from medgen.models.segmenter import VideoSegmenter

NOTHING = np.empty(0)


@dataclass(frozen=True)
class Clip:
    """One video, what it was asked to show, and what the judge read.

    `r_peaks`, `t_ends` (s from frame 0) are those of the ECG that it was given (generated) or recorded with (real); `own_r`, `own_t` those
    of the record a case is about, which differ where the ECG was shuffled or withheld. Clips of one `group` (patient) are never
    split apart. Asked EF in percent, NaN where none was asked. `line` is its metadata.
    """

    name: str
    path: Path
    group: str
    r_peaks: Floats
    t_ends: Floats
    asked_ef: float
    reading: Reading
    own_r: Floats = field(default_factory=lambda: NOTHING)
    own_t: Floats = field(default_factory=lambda: NOTHING)
    rhythm: str = ""
    line: dict[str, Any] = field(default_factory=dict)

    @property
    def purpose(self) -> str:
        return str(self.line.get("purpose", "population"))

    @property
    def regular(self) -> bool:
        """Whether no RR interval near the clip differs from their median by more than 15 %."""
        gaps = np.diff(self.r_peaks[(self.r_peaks > -1.5) & (self.r_peaks < self.reading.duration + 1.5)])
        return len(gaps) > 0 and bool((np.abs(gaps / np.median(gaps) - 1) <= 0.15).all())


def read_generated(folder: Path, judge: VideoSegmenter, cache: Path) -> list[Clip]:
    """Every video that `metadata.jsonl` below `folder` lists, by case and trajectory, judged.

    Beats of the ECG: `r_true` and `t_end_true` of the case where it knows them, else `r_peaks` and `t_ends` that the sampler found.
    """
    lines = read_metadata(folder, ("file_name", "case_id"))
    clips = []
    for line in lines:
        path = line["_path"].with_name(str(line.get("frames_file") or line["file_name"]))
        if not path.is_file() or path.parent != line["_path"].parent:
            raise EvaluationError(f"{line['_path'].parent}: metadata.jsonl lists {path.name}, which is not there")
        given = line.get("ecg") is not None
        r_peaks, t_ends = (
            _beats(line.get(true) if line.get(true) is not None else line.get(found)) if given else NOTHING
            for true, found in (("r_true", "r_peaks"), ("t_end_true", "t_ends"))
        )
        asked = line.get("ejection_fraction")
        clips.append(
            Clip(
                name=f"{line['case_id']}_{int(line.get('trajectory', 0)):03d}",
                path=path,
                group=str(line.get("patient_id") or line["case_id"]),
                r_peaks=r_peaks,
                t_ends=t_ends,
                asked_ef=float("nan") if asked is None else float(asked),
                reading=read_file(path, judge, cache, line.get("fps")),
                own_r=_beats(line.get("own_r")),
                own_t=_beats(line.get("own_t")),
                rhythm=str(line.get("rhythm", "")),
                line={key: value for key, value in line.items() if key != "_path"},
            )
        )
    return clips


def read_reference(manifest: Manifest[EchoRecord], judge: VideoSegmenter, cache: Path, limit: int | None = None) -> list[Clip]:
    """The clips of a manifest (the first `limit`), judged, with the beats of ECGs that are beat-synchronous."""
    clips = []
    for record in manifest.records[:limit]:
        truth = read_truth(manifest.root, record)
        path, pixel = manifest.root / record.video, record.truth.get("pixel_mm")
        fraction = record.ejection_fraction
        clips.append(
            Clip(
                name=record.record_id,
                path=path,
                group=record.patient_id,
                r_peaks=truth.r_peaks,
                t_ends=truth.t_ends,
                asked_ef=float("nan") if fraction is None else fraction,
                reading=read_file(path, judge, cache, record.fps, None if pixel is None else float(pixel)),
                rhythm=str(record.truth.get("rhythm", "")),
                line={"record_id": record.record_id, "view": record.view, "lv_volume_ml": truth.volume},
            )
        )
    return clips


@dataclass(frozen=True)
class Truth:
    """What is known of a recorded clip: beats in s from frame 0 (empty: unknown) and LV volume [T] mL (None: unknown)."""

    r_peaks: Floats
    t_ends: Floats
    volume: Floats | None = None


def read_truth(root: Path, record: EchoRecord) -> Truth:
    """Beats from the annotations, else found in the record's ECG if that is beat-synchronous; volume from the annotations."""
    found = Truth(NOTHING, NOTHING)
    if record.annotations is not None:
        with np.load(root / record.annotations, allow_pickle=False) as stored:
            values = {key: stored[key].astype(np.float64) for key in ("r_peaks", "t_ends", "lv_volume_ml") if key in stored}
        found = Truth(values.get("r_peaks", NOTHING), values.get("t_ends", NOTHING), values.get("lv_volume_ml"))
    if len(found.r_peaks) or record.ecg is None or record.pairing != "beat_synchronous":
        return found
    try:
        prepared = prepare_ecg(read_ecg(root / record.ecg), ECGPreparation())
    except ECGError:  # a clip without a usable ECG still has volumes and looks
        return found
    return replace(found, r_peaks=prepared.r_peaks - record.ecg_offset, t_ends=prepared.t_ends - record.ecg_offset)


def _beats(values: Sequence[float | None] | None) -> Floats:
    """JSON's list of seconds; an event that was not found (null) is NaN."""
    if values is None:
        return NOTHING
    return np.array([np.nan if value is None else float(value) for value in values])
