"""`medgen export mp4`: echo clips for eyes: the frames, a line above that says they are synthetic, the ECG below where it may be shown."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from medgen import __version__
from medgen.export.recordings import Recording, recording_of
from medgen.export.release import STATEMENT, Release, exported
from medgen.export.source import ExportError, Made, only, read_generated
from medgen.sampling.echo_pictures import Strip, film

_LABEL = "SYNTHETIC: no patient is shown"
_BAND, _INK, _GROUND = 22, (255, 179, 124), (10, 14, 18)
_AROUND = 0.2  # s of signal drawn before and after the clip


def export(generated: Path, out: Path, ecg_root: Path | None = None, progress: bool = True) -> None:
    """Export echo clips as MP4 (H.264) with the ECG under them, a visible label and a mark in the container; lossy, for eyes.

    The clips are drawn anew from their lossless frames: an ECG that may be a patient's (its header does not say SYNTHETIC) is left out.
    The same command again continues an interrupted folder. OUT.sources.jsonl, beside the release, names the samples.

    Args:
        generated: a folder that `medgen sample ecg-to-echo` wrote.
        out: folder of the MP4 files.
        ecg_root: folder below which the ECGs of the clips' cases lie.
        progress: a progress line on the terminal; --no-progress hides it.
    """
    made = only(read_generated(generated), ("clip",), "MP4 clips")
    release = Release(out, "mp4", made, {"ecgs": ecg_root is not None})
    work, left_out = {one.files[0]: one for one in made}, list[str]()
    for item in exported(work, len(work), "MP4", progress):
        if not release.has(item):
            release.write(item, {f"{work[item].identity}.mp4": _clip(work[item], ecg_root, left_out)}, [item])
    release.finish(list(work), {"codec": "H.264, yuv420p: lossy"})
    for reason in dict.fromkeys(left_out):
        print(f"ECG not shown: {reason}")
    print(f"{len(work)} clips in {out}")


def container_notes(made: Made) -> dict[str, str]:
    """What a video's container says: that it is synthetic, of which model and seed, and no id of any case."""
    origin = {key: made.line[key] for key in ("model", "model_sha256", "seed", "noise_seed")} | {"patient": made.identity}
    return {
        "title": "SYNTHETIC echocardiogram",
        "comment": f"Synthetic. {STATEMENT} {json.dumps(origin)}",
        "encoder": f"medgen {__version__}",
    }


def _clip(made: Made, ecg_root: Path | None, left_out: list[str]) -> bytes:
    from medgen.data.video import VideoError, read_video, write_video

    try:
        frames, fps = read_video(made.folder / made.files[0])
    except VideoError as error:
        raise ExportError(str(error)) from None
    recording, reason = recording_of(made, ecg_root)
    if reason:
        left_out.append(reason)
    picture = film(frames / np.float32(255), np.arange(len(frames)) / fps, _strip(made, recording, len(frames) / fps))
    with tempfile.TemporaryDirectory() as scratch:
        path = write_video(Path(scratch) / "clip.mp4", _labelled(picture, made), fps, "libx264", container_notes(made))
        return path.read_bytes()


def _strip(made: Made, recording: Recording | None, seconds: float) -> Strip:
    line = made.line
    words = [f"{line['heart_rate']:.0f} bpm"] if line.get("heart_rate") else []
    words += [f"EF {line['ejection_fraction']:g} % asked"] if line.get("ejection_fraction") is not None else []
    peaks = tuple(line.get("r_peaks") or ())
    if recording is None:
        why = "no ECG" if line.get("ecg") is None else "ECG not released"
        return Strip(seconds, "   ".join([why, *words]), r_peaks=peaks)
    lead = "II" if "II" in recording.leads else recording.leads[0]
    times = np.arange(len(recording.samples)) / recording.rate - recording.start
    shown = (times > -_AROUND) & (times < seconds + _AROUND)
    signal = recording.millivolts[recording.leads.index(lead)][shown]
    start = float(times[shown][0]) if shown.any() else 0.0
    return Strip(seconds, "   ".join(words), lead, signal, recording.rate, start, peaks)


def _labelled(pictures: NDArray[np.uint8], made: Made) -> NDArray[np.uint8]:
    """[T,H,W,3] with a band above that says in words what this is."""
    band = Image.new("RGB", (pictures.shape[2], _BAND), _GROUND)
    draw = ImageDraw.Draw(band)
    large, small = ImageFont.load_default(13), ImageFont.load_default(11)
    draw.text((5, 4), _LABEL, fill=_INK, font=large)
    if 5 + large.getlength(_LABEL) + 12 + small.getlength(made.identity) + 5 <= band.width:
        draw.text((band.width - 5, 5), made.identity, fill=_INK, font=small, anchor="ra")
    above = np.broadcast_to(np.asarray(band), (len(pictures), *np.asarray(band).shape))
    return np.concatenate([above, pictures], axis=1)
