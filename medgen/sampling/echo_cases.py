"""What an echo case asks for, and its files read and checked before anything is sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from pydantic import AfterValidator, Field
from torch import Tensor

from medgen.data.clips import VideoPreprocessing
from medgen.data.ecg import ECG, ECGError, ECGPreparation, PreparedECG, read_ecg
from medgen.data.echo_records import ECHO_VIEWS
from medgen.data.images import to_square
from medgen.data.video import VideoError, load_video
from medgen.pipelines.echo_inputs import heard
from medgen.sampling.case_files import find_file
from medgen.sampling.cases import Case, CaseError, Conditions, Text
from medgen.sampling.echo_pictures import Strip

_REPORTED = 2.0  # s on each side of a clip whose beats the metadata list
_IMAGES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


def _percent(value: float) -> float:
    if value <= 1:
        raise ValueError(f"expected percent from 1 to 100, this looks like a fraction ({100 * value:g} %?)")
    return value


def _known_view(name: str) -> str:
    if name not in ECHO_VIEWS:
        raise ValueError(f"expected one of {', '.join(ECHO_VIEWS)}")
    return name


Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class EchoAsked(Conditions):
    """What a clip is conditioned on; whatever is None is left to the model.

    `ecg`: WFDB record, DICOM waveform or the name of a shipped example; frame 0 is at second `ecg_start` of its clock (None: one
    second into it where the recording is long enough, so that the first beat has a past). `ejection_fraction` in percent.
    `first_frame`: an image or a video whose first frame is meant. `num_frames` at `fps` Hz, the pipeline's own if None.
    """

    ecg: Text | None = None
    ecg_start: Number | None = None
    ejection_fraction: Annotated[Number, Field(ge=0, le=100), AfterValidator(_percent)] | None = None
    view: Annotated[str, AfterValidator(_known_view)] | None = None
    first_frame: Text | None = None
    num_frames: Annotated[int, Field(strict=True, ge=1, le=100_000)] | None = None
    fps: Annotated[Number, Field(ge=1, le=1000)] | None = None


EchoCase = Case[EchoAsked]


@dataclass(frozen=True)
class Inputs:
    """A case's length, rate and files, found and checked. Beats in seconds from frame 0: `r_peaks`, `t_ends` (NaN: not found)."""

    clip: VideoPreprocessing
    strip: Strip
    ecg: Path | None = None
    ecg_start: float = 0.0
    first_frame: Path | None = None
    flags: tuple[str, ...] = ()
    r_peaks: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    t_ends: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    sha256: dict[str, str] = field(default_factory=dict)

    def read_ecg(self) -> ECG | None:
        """The whole recording, on its own clock."""
        return None if self.ecg is None else read_ecg(self.ecg)

    def read_first_frame(self) -> Tensor | None:
        """[1,1,H,W] in [0,1], at the pipeline's size."""
        return None if self.first_frame is None else _still(self.first_frame, self.clip)

    def facts(self) -> dict[str, Any]:
        """What the metadata say about the inputs."""
        return {
            "num_frames": self.clip.frames,
            "fps": self.clip.fps,
            "ecg_start": None if self.ecg is None else self.ecg_start,
            "ecg_flags": list(self.flags),
            "heart_rate": heart_rate(self.r_peaks, _seconds(self.clip)),
            "r_peaks": [round(float(second), 4) for second in self.r_peaks],
            "t_ends": [None if np.isnan(second) else round(float(second), 4) for second in self.t_ends],
            **{f"{name}_sha256": digest for name, digest in self.sha256.items()},
        }


def inspect(case: EchoCase, root: Path | None, own: VideoPreprocessing, preparation: ECGPreparation) -> Inputs:
    """Find, read and check the files of `case`. `own` and `preparation`: the clips that a pipeline makes, how it prepares an ECG.

    Raises `CaseError` naming case and field.
    """
    asked = case.conditions
    clip = own.model_copy(update={"frames": asked.num_frames or own.frames, "fps": asked.fps or own.fps})
    try:
        field_name = "first_frame"
        still = None if asked.first_frame is None else find_file(asked.first_frame, root)
        digests = {} if still is None else {"first_frame": _digest(_still(still, clip).numpy())}
        field_name = "ecg"
        if asked.ecg is None:
            if asked.ecg_start is not None:
                raise CaseError("missing, but there is an ecg_start")
            return Inputs(clip, Strip(_seconds(clip), _words(asked, None)), first_frame=still, sha256=digests)
        path = find_file(asked.ecg, root)
        whole = read_ecg(path)
        start = _start(whole, asked.ecg_start, clip)
        prepared, _, flags = heard(whole, start, np.arange(clip.frames) / clip.fps, preparation)
    except (CaseError, ECGError, VideoError, OSError) as error:
        raise CaseError(f"case {case.case_id!r}, field {field_name!r}: {error}") from None
    digests["ecg"] = _digest(whole.signal)
    return _described(asked, Inputs(clip, Strip(_seconds(clip), ""), path, start, still, flags, sha256=digests), prepared)


def heart_rate(r_peaks: NDArray[np.float64], seconds: float) -> float | None:
    """Beats per minute of the RR intervals that touch [0, seconds]; None where there is no whole one."""
    touching = [b - a for a, b in pairwise(r_peaks) if b > 0 and a < seconds]
    return round(60 / float(np.mean(touching)), 1) if touching else None


def beat_frames(r_peaks: Sequence[float], t_ends: Sequence[float | None], num_frames: int, fps: float) -> tuple[int, int]:
    """Numbers of the frames nearest to the first R peak in a clip and to the end of its T wave (end-diastole, end-systole).

    Without such a beat: the first and the middle frame.
    """
    for peak, end in zip(r_peaks, t_ends):
        if end is not None and peak >= -0.5 / fps and end <= (num_frames - 0.5) / fps:
            return max(0, round(peak * fps)), min(round(end * fps), num_frames - 1)
    return 0, num_frames // 2


def _seconds(clip: VideoPreprocessing) -> float:
    return clip.frames / clip.fps


def _start(ecg: ECG, asked: float | None, clip: VideoPreprocessing) -> float:
    if asked is not None:
        return asked
    return ecg.start + max(0.0, min(1.0, ecg.seconds - _seconds(clip)))


def _still(path: Path, clip: VideoPreprocessing) -> Tensor:
    """An image, or the first frame of a video, as [1,1,size,size] in [0,1]."""
    if path.suffix.lower() in _IMAGES:
        try:
            with Image.open(path) as image:
                grey = np.asarray(image.convert("L"))
        except (UnidentifiedImageError, OSError) as error:
            raise CaseError(f"{path} is not a readable image: {error}") from None
    else:
        grey = load_video(path, clip.fps).frames[0]  # its rate does not matter, and need not be known
    return to_square(torch.from_numpy(grey / np.float32(255))[None], clip.size, clip.pad)[None]


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _words(asked: EchoAsked, rate: float | None) -> str:
    """The strip's small text."""
    said = ["no ECG" if asked.ecg is None else "rate ?" if rate is None else f"{rate:.0f} bpm"]
    if asked.ejection_fraction is not None:
        said.append(f"EF {asked.ejection_fraction:g} % asked")
    return "   ".join(said)


def _described(asked: EchoAsked, inputs: Inputs, prepared: PreparedECG) -> Inputs:
    """`inputs` with the beats and strip of `prepared`, whose clock starts with frame 0."""
    seconds = _seconds(inputs.clip)
    near = (prepared.r_peaks > -_REPORTED) & (prepared.r_peaks < seconds + _REPORTED)
    lead = "II" if "II" in prepared.leads else prepared.leads[0]
    shown = (prepared.times > -0.2) & (prepared.times < seconds + 0.2)
    strip = Strip(
        seconds,
        _words(asked, heart_rate(prepared.r_peaks, seconds)),
        lead,
        prepared.signal[prepared.leads.index(lead)][shown],
        prepared.rate,
        float(prepared.times[shown][0]),
        prepared.r_peaks[near].tolist(),
    )
    return replace(inputs, strip=strip, r_peaks=prepared.r_peaks[near], t_ends=prepared.t_ends[near])
