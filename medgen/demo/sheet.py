"""The demo's clips on paper: for each its two ends of the beat, one row of pixels over time, the measured volume and the ECG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.ecg import prepare_ecg, read_ecg
from medgen.evaluation.echo.measure import Reading
from medgen.sampling.echo_cases import beat_frames

_R, _T = "#2f7fc1", "#d9772b"


def write_sheet(path: Path, cases: Path, clips: Sequence[tuple[dict[str, Any], np.ndarray, Reading]]) -> Path:
    """A column for each clip (metadata line, frames [T,H,W], reading) that has an ECG; `cases`: the folder of its ECG files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [clip for clip in clips if clip[0]["ecg"]]
    figure = Figure(figsize=(2.1 * len(shown), 7.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(5, len(shown), squeeze=False, gridspec_kw={"height_ratios": (3, 3, 1.7, 1.3, 1.1)})
    for column, (line, frames, reading) in zip(axes.T, shown):
        asked = f"{line['heart_rate']:.0f} a minute" if line["heart_rate"] else "?"
        column[0].set_title(f"{line['title']}\nasked: {asked}, EF {line['ejection_fraction']:g} %", fontsize=8)
        for axis, number in zip(column, beat_frames(line["r_peaks"], line["t_ends"], len(frames), line["fps"])):
            axis.imshow(frames[number], cmap="gray", vmin=0, vmax=255)
            axis.axis("off")
        _over_time(column[2:], cases, line, frames, reading)
    for axis, label in zip(axes[2:, 0], ("one row of pixels", "volume", "lead II, mV")):
        axis.set_ylabel(label, fontsize=7)
    figure.savefig(
        path, metadata={"Software": None, "Comment": "Synthetic videos made by a generative model: no patient is shown."}
    )
    return path


def _over_time(axes: Any, cases: Path, line: dict[str, Any], frames: np.ndarray, reading: Reading) -> None:
    """M-mode, volume and ECG on one time axis, with R peaks and T ends."""
    end, row = float(reading.times[-1]), frames.shape[1] * 2 // 5
    ecg = prepare_ecg(read_ecg(cases / line["ecg"]))
    axes[0].imshow(frames[:, row].T, cmap="gray", aspect="auto", extent=(0, end, frames.shape[2], 0), vmin=0, vmax=255)
    axes[1].plot(reading.times, reading.volume / np.nanmax(reading.volume), color="k", linewidth=1.2)
    axes[1].set_ylim(0.2, 1.08)
    axes[2].plot(ecg.times - line["ecg_start"], ecg.signal[ecg.leads.index("II")], color="k", linewidth=0.8)
    axes[2].set_xlabel("s", fontsize=7)
    for axis in axes:
        for seconds, colour in ((line["r_peaks"], _R), (line["t_ends"], _T)):
            for second in seconds:
                if second is not None and 0 <= second <= end:
                    axis.axvline(second, color=colour, linewidth=0.8, linestyle=(0, (3, 2)))
        axis.set_xlim(0, end)
        axis.tick_params(labelsize=6, length=2)
        axis.set_yticks([])
