"""What the echo pipelines share: ECGs and wishes → `EchoConditions`, checked and flagged; windows of a clip of any length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from torch import Tensor

from medgen.data.ecg import ECG, LEADS, ECGPreparation, PreparedECG, cut, frame_phase, prepare_ecg
from medgen.data.ecg_window import MARGIN_SECONDS, EcgWindow, ecg_window
from medgen.data.echo_dataset import shifted
from medgen.data.echo_records import ECHO_VIEWS
from medgen.models.ecg_encoders import ECGEncoder, ECGTokens, encode_span
from medgen.models.echo_conditioner import CONDITIONS, EchoConditions

_AROUND = 10.0  # seconds of ECG on each side of a clip that filters and beat detection look at


@dataclass
class EchoOutput(BaseOutput):
    """`frames` [B,T,H,W] float32 in [0,1] (an array or a tensor) or latents [B,T,C,h,w]; `times` [B,T] s from frame 0.

    `flags`: for each clip what was wrong with its ECG and put right, masked or left to the model; empty where nothing was.
    """

    frames: Any
    times: Any
    flags: list[tuple[str, ...]]


def echo_conditions(
    ecg: ECG | Sequence[ECG | None] | None,
    ejection_fraction: float | Sequence[float | None] | None,
    view: str | Sequence[str | None] | None,
    *,
    clips: int,
    num_frames: int,
    fps: float,
    start_seconds: float | Sequence[float],
    preparation: ECGPreparation,
    encoder: ECGEncoder | None = None,
) -> tuple[EchoConditions, list[tuple[str, ...]]]:
    """Conditions of `clips` clips of `num_frames` frames at `fps` Hz, and their flags. One value counts for every clip.

    `start_seconds`: second of the ECG's own clock at which frame 0 is taken. `encoder`: a published one that listens too.
    Raises `ECGError` for an ECG that cannot be used or has nothing recorded during the clip, `ValueError` for a number or view that
    cannot be.
    """
    times = torch.arange(num_frames, dtype=torch.float32)[None].repeat(clips, 1) / fps
    ecgs = _each(ecg if ecg is None or isinstance(ecg, ECG) else list(ecg), clips, "ecg")
    starts = _each(start_seconds, clips, "start_seconds")
    conditions = EchoConditions(
        times=times,
        ejection_fraction=torch.tensor([_fraction(value) for value in _each(ejection_fraction, clips, "ejection_fraction")]),
        view=torch.tensor([_view(value) for value in _each(view, clips, "view")]),
        fps=torch.full((clips,), float(fps)),
    )
    if all(one is None for one in ecgs):
        return conditions, [() for _ in ecgs]
    seconds = np.arange(num_frames) / fps
    parts = [_window(one, float(start), seconds, preparation) for one, start in zip(ecgs, starts)]
    windows = [window for window, _, _ in parts]
    timed = replace(
        conditions,
        ecg=torch.from_numpy(np.stack([window.signal for window in windows])),
        lead_mask=torch.from_numpy(np.stack([window.lead_mask for window in windows])),
        sample_mask=torch.from_numpy(np.stack([window.sample_mask for window in windows])),
        ecg_start=torch.tensor([window.start for window in windows], dtype=torch.float32),
        phase=torch.from_numpy(np.stack([phase for _, phase, _ in parts])),
        **({} if encoder is None else _encoded(encoder, ecgs, starts, float(seconds[-1]))),
    )
    return timed, [flags for _, _, flags in parts]


def _encoded(encoder: ECGEncoder, ecgs: list[ECG | None], starts: list[float], seconds: float) -> dict[str, Tensor]:
    """Tokens of a published encoder for each clip, on the frames' clock; NaN times where there are none."""
    nothing = ECGTokens(torch.zeros(0, encoder.width), torch.zeros(0))
    found = [
        nothing if ecg is None else encode_span(encoder, ecg, start - MARGIN_SECONDS, start + seconds + MARGIN_SECONDS)
        for ecg, start in zip(ecgs, starts)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "encoded": pad([one.tokens for one in found], batch_first=True),
        "encoded_times": pad([one.times - start for one, start in zip(found, starts)], batch_first=True, padding_value=torch.nan),
    }


def heard(
    ecg: ECG, start: float, times: NDArray[np.float64], preparation: ECGPreparation
) -> tuple[PreparedECG, NDArray[np.float32], tuple[str, ...]]:
    """What a clip hears of `ecg`: the signal around it on the clip's clock, the phase [T,4] of its frames at `times` [T], flags.

    Frame 0 is at second `start` of the ECG's clock. Raises `ECGError` where nothing of the clip itself was recorded, or no lead of
    it can be used.
    """
    seconds = float(times[-1])
    cut(ecg, start, max(seconds, 1 / ecg.rate))  # raises where nothing of the clip was recorded
    prepared = shifted(prepare_ecg(cut(ecg, start - _AROUND, seconds + 2 * _AROUND), preparation), -start)
    phase = frame_phase(prepared.r_peaks, prepared.t_ends, times)
    flags, half = list(prepared.flags), 0.5 / preparation.rate
    if prepared.start > half:
        flags.append(f"the ECG begins {prepared.start:.2f} s after the first frame")
    if (early := seconds - float(prepared.times[-1])) > half:
        flags.append(f"the ECG ends {early:.2f} s before the last frame")
    if unknown := int(np.isnan(phase).any(1).sum()):
        flags.append(f"the cardiac phase of {unknown} of {len(times)} frames is unknown: left to the model")
    return prepared, phase, tuple(flags)


def _window(
    ecg: ECG | None, start: float, times: NDArray[np.float64], preparation: ECGPreparation
) -> tuple[EcgWindow, NDArray[np.float32], tuple[str, ...]]:
    """The ECG of one clip on the frames' clock, the phase [T,4] of its frames, and flags."""
    if ecg is None:
        count = round((float(times[-1]) + 2 * MARGIN_SECONDS) * preparation.rate)
        silent, nothing = np.zeros((len(LEADS), count), np.float32), np.zeros(len(LEADS), bool)
        unheard = EcgWindow(silent, nothing, np.zeros(count, bool), -MARGIN_SECONDS, preparation.rate)
        return unheard, np.full((len(times), 4), np.nan, np.float32), ()
    prepared, phase, flags = heard(ecg, start, times, preparation)
    return ecg_window(prepared, 0.0, float(times[-1])), phase, flags


def part_of(conditions: EchoConditions, first: int, count: int, rate: float) -> EchoConditions:
    """The conditions of frames `first` to `first + count` alone, on the clock of the first of them; `rate` of the ECG in Hz."""
    times = conditions.times[:, first : first + count]
    values: dict[str, Any] = {"times": times - times[:, :1]}
    if conditions.phase is not None:
        values["phase"] = conditions.phase[:, first : first + count]
    if conditions.ecg is not None and conditions.sample_mask is not None and conditions.ecg_start is not None:
        skipped = round(float(times[0, 0]) * rate)
        samples = slice(skipped, skipped + round((float(times[0, -1] - times[0, 0]) + 2 * MARGIN_SECONDS) * rate))
        values |= {"ecg": conditions.ecg[..., samples], "sample_mask": conditions.sample_mask[:, samples]}
        values["ecg_start"] = conditions.ecg_start + skipped / rate - times[:, 0]
    if conditions.encoded_times is not None:
        moments = conditions.encoded_times - times[:, :1]
        near = (moments >= -MARGIN_SECONDS) & (moments <= times[:, -1:] - times[:, :1] + MARGIN_SECONDS)
        values["encoded_times"] = moments.masked_fill(~near, torch.nan)
    return replace(conditions, **values)


def windows(total: int, size: int, overlap: int) -> Iterator[tuple[int, int]]:
    """(first frame, known frames) of evenly spaced windows of `size` frames that cover `total`, each sharing `overlap` or more.

    The known frames of a window are those that the one before it has made. A clip no longer than `size` is one window.
    """
    if total <= size:
        yield 0, 0
        return
    if not 0 < overlap < size:
        raise ValueError(f"overlap {overlap} must be from 1 to {size - 1}, less than a window's {size} frames")
    count = -(-(total - overlap) // (size - overlap))
    starts = [round(i * (total - size) / (count - 1)) for i in range(count)]
    yield 0, 0
    for before, start in pairwise(starts):
        yield start, before + size - start


def guided_conditions(scale: float | Mapping[str, float]) -> tuple[tuple[float, ...], list[tuple[str, ...]]]:
    """Guidance scales, and for each the conditions that its prediction lacks: one number guides all of them together."""
    if not isinstance(scale, Mapping):
        return (float(scale),), [CONDITIONS]
    if wrong := sorted(set(scale) - set(CONDITIONS)):
        raise ValueError(f"guidance_scale for {', '.join(map(repr, wrong))}: there are {', '.join(CONDITIONS)}")
    return tuple(float(value) for value in scale.values()) or (1.0,), [(name,) for name in scale] or [CONDITIONS]


def still_frames(first_frame: Tensor, clips: int, size: int) -> Tensor:
    """`first_frame` [B,1,H,W] (or one for all clips, [1,H,W] or [H,W]) in [0,1] as [clips,1,size,size] in [-1,1], checked."""
    frames = first_frame.float()
    frames = frames.reshape((1,) * (4 - frames.ndim) + tuple(frames.shape)) if frames.ndim < 4 else frames
    if frames.shape[0] == 1:
        frames = frames.expand(clips, -1, -1, -1)
    if tuple(frames.shape) != (clips, 1, size, size):
        raise ValueError(
            f"first_frame has shape {list(first_frame.shape)}: expected [{clips}, 1, {size}, {size}], or one frame for all"
        )
    if not bool(frames.isfinite().all()) or frames.min() < 0 or frames.max() > 1:
        raise ValueError("first_frame must hold grey values from 0 to 1")
    return 2 * frames - 1


def clip_count(*given: Any, generators: Any = None) -> int:
    """How many clips a call asks for: the length of the lists in it, which must agree; 1 without any."""
    counts = {len(value) for value in given if isinstance(value, Sequence) and not isinstance(value, str)}
    counts |= {len(value) for value in given if isinstance(value, Tensor) and value.ndim == 4 and len(value) > 1}
    if not counts and isinstance(generators, Sequence):
        counts = {len(generators)}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"lists of {sorted(counts)} values were given: give one value for all clips, or one for each")
    return counts.pop() if counts else 1


def _each(value: Any, clips: int, name: str) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * clips
    if len(values) != clips:
        raise ValueError(f"{name}: {len(values)} values for {clips} clips")
    return values


def _fraction(percent: float | None) -> float:
    if percent is None:
        return float("nan")
    if not 1 < percent <= 100:
        hint = f" (a fraction? {100 * percent:g} percent)" if 0 < percent <= 1 else ""
        raise ValueError(f"ejection_fraction {percent:g}: expected percent, more than 1 and up to 100{hint}")
    return float(percent)


def _view(name: str | None) -> int:
    if name is None or name == "UNKNOWN":
        return -1
    if name not in ECHO_VIEWS:
        raise ValueError(f"view {name!r}: expected one of {', '.join(ECHO_VIEWS)}")
    return ECHO_VIEWS.index(name)
