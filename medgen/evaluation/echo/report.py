"""From an echo evaluation to one self-contained HTML page: films that move, curves beside their ECG, the controls in a table."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from medgen.data.images import to_square
from medgen.data.video import load_video
from medgen.evaluation.echo import plots
from medgen.evaluation.echo.evaluate import JUDGED, Evaluation, asked_own
from medgen.evaluation.echo.heart_rate import ecg_rate
from medgen.evaluation.echo.phase import timing_errors
from medgen.evaluation.echo.videos import Clip
from medgen.evaluation.report import estimate, percent

SHOWN_PIXELS, LONGEST = 112, 64


def render(evaluation: Evaluation, clips: Sequence[Clip], real: Sequence[Clip]) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("medgen.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"estimate": estimate, "percent": percent}
    following = [c for c in clips if c.purpose in JUDGED and len(c.r_peaks)]
    return environment.get_template("ecg_to_echo.html.j2").render(
        e=evaluation,
        films=[_card(clip) for clip in spread(clips, 12)],
        real=[film(clip) for clip in _evenly(real, 8)],
        held=held_films(clips),
        worst=[_card(clip) for clip in worst(following, 6)],
        plots={name: Markup(text) for name, text in _plots(evaluation, clips, real, following).items()},
    )


def _plots(evaluation: Evaluation, clips: Sequence[Clip], real: Sequence[Clip], following: Sequence[Clip]) -> dict[str, str]:
    drawn = {"volumes": plots.volume_plot(spread(clips, 9))}
    if following:
        drawn["errors"] = plots.error_plot(following, real)
    if (rate := evaluation.generated.heart_rate) is not None:
        regular = [c for c in following if c.regular]
        wanted, seen = (
            np.array(v) for v in zip(*((ecg_rate(c.r_peaks, c.reading.beats), c.reading.rate) for c in regular), strict=True)
        )
        drawn["rates"] = plots.agreement_plot(wanted, seen, rate, "bpm", ("ECG", "video"))
    if (fraction := evaluation.generated.ejection_fraction) is not None:
        asked = [c for c in asked_own(following) if c.regular]
        wanted, seen = (np.array(v) for v in zip(*((c.asked_ef, c.reading.ejection_fraction) for c in asked), strict=True))
        drawn["fractions"] = plots.agreement_plot(wanted, seen, fraction, "%", ("EF asked", "EF measured"))
    if evaluation.shift is not None and evaluation.shift.points:
        drawn["shift"] = plots.points_plot(evaluation.shift.points, ("ECG shifted by", "end-systole moved by"))
    if evaluation.generated.intervals is not None:
        drawn["intervals"] = plots.points_plot(
            evaluation.generated.intervals.points, ("RR of the ECG", "beat interval of the video")
        )
    return drawn


def spread(clips: Sequence[Clip], count: int) -> list[Clip]:
    """Clips to show, chosen without looking at them: evenly spaced ones of the population."""
    chosen = [c for c in clips if c.purpose == "population"] or list(clips)
    return _evenly(chosen, count)


def _evenly(clips: Sequence[Clip], count: int) -> list[Clip]:
    return [clips[i] for i in sorted({int(i) for i in np.linspace(0, len(clips) - 1, min(count, len(clips)))})]


def worst(clips: Sequence[Clip], count: int) -> list[Clip]:
    """The clips whose EF and ES timing are furthest from what was asked, worst first (10 EF points weigh as much as 100 ms)."""

    def badness(clip: Clip) -> float:
        errors = np.abs(timing_errors(clip.reading.beats.es, clip.t_ends, clip.reading.duration, "es"))
        late = float(np.nanmean(errors)) if np.isfinite(errors).any() else 0.3 * bool(len(errors))
        off = abs(clip.reading.ejection_fraction - clip.asked_ef)
        return 10 * late + (off / 10 if np.isfinite(off) else 0.0)

    return sorted(clips, key=badness, reverse=True)[:count]


def held_films(clips: Sequence[Clip], count: int = 2) -> list[list[dict[str, Any]]]:
    """Clips of which one condition was changed at a time, a row for each held first frame."""
    names = sorted({str(c.line.get("pair_id")) for c in clips if c.purpose == "one"})[:count]
    rows = [[c for c in clips if c.purpose == "one" and str(c.line.get("pair_id")) == name] for name in names]
    return [[{**_card(c), "variant": str(c.line.get("variant")).replace("_", " ")} for c in row] for row in rows]


def _card(clip: Clip) -> dict[str, Any]:
    reading = clip.reading
    asked = ecg_rate(clip.r_peaks, reading.beats)
    return {
        **film(clip),
        "name": clip.name,
        "rate": _numbers(asked, reading.rate, "bpm"),
        "fraction": _numbers(clip.asked_ef, reading.ejection_fraction, "%"),
    }


def _numbers(asked: float, seen: float, unit: str) -> str:
    """ "72 → 71 bpm": asked → seen."""
    said = ["–" if not np.isfinite(value) else f"{value:.0f}" for value in (asked, seen)]
    return f"{said[0]} → {said[1]} {unit}"


def film(clip: Clip) -> dict[str, Any]:
    """The video as a moving WebP in a data URI."""
    video = load_video(clip.path)
    frames = to_square(torch.from_numpy(video.frames[:LONGEST]).float() / 255, SHOWN_PIXELS, pad=True)
    pictures = [Image.fromarray(frame) for frame in (frames * 255).round().to(torch.uint8).numpy()]
    content = io.BytesIO()
    pictures[0].save(
        content, "WEBP", save_all=True, append_images=pictures[1:], duration=round(1000 / video.fps), loop=0, quality=60
    )
    return {"source": f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"}
