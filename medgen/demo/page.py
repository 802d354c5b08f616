"""The page that `medgen demo` leaves: films, charts and figures in one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from PIL import Image

_TEXT, _SOFT, _LINE = "#8b97a5", "#5d6875", "#222a33"
_COLOURS = ("#7cc4ff", "#ffb37c", "#7fd6a2")
# One colour per finding, in the order of `FINDINGS`: bright, and told apart on grey.
_MASK_COLOURS = ("#4fc3f7", "#ffd54f", "#ff8a65", "#ba68c8", "#e57373", "#4db6ac", "#aed581", "#90a4ae")


def write_page(path: Path, content: Mapping[str, Any]) -> Path:
    """Fill the template with `content` and write it whole."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((files("medgen.demo") / "page.html.j2").read_text("utf-8"))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(template.render(**content), "utf-8")
    temporary.replace(path)
    return path


def picture(grey: np.ndarray) -> str:
    """A film [H,W] in [0,1] as a data address, enlarged smoothly so that a browser shows it without blocks."""
    image = Image.fromarray((np.clip(grey, 0, 1) * 255).round().astype(np.uint8))
    return _address(image.resize((384, 384), Image.Resampling.LANCZOS), "JPEG", quality=88)


def drawing(image: Image.Image) -> str:
    """Any picture as a data address, as it is."""
    return _address(image.convert("RGB"), "PNG")


def video(path: Path) -> str:
    """An MP4 file as a data address."""
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def change(film: np.ndarray, normal: np.ndarray) -> str:
    """What differs between two films [H,W]: denser in orange, more lucent in blue, transparent where nothing changed."""
    difference = film.astype(np.float32) - normal.astype(np.float32)
    strength = np.clip((np.abs(difference) - 0.05) / 0.35, 0, 1) ** 0.8
    colour = np.where(difference[..., None] > 0, np.array([255, 150, 80]), np.array([70, 160, 255]))
    rgba = np.concatenate([colour, strength[..., None] * 215], axis=-1).round().astype(np.uint8)
    return _address(Image.fromarray(rgba).resize((256, 256), Image.Resampling.BICUBIC), "PNG")


def overlay(mask: np.ndarray) -> str | None:
    """The findings' masks ([H,W] uint8, one bit each) as a coloured transparent picture; None where nothing is marked."""
    if not mask.any():
        return None
    rgba = np.zeros((*mask.shape, 4), dtype=np.uint8)
    for bit, colour in enumerate(_MASK_COLOURS):
        rgba[(mask >> bit & 1).astype(bool)] = (*bytes.fromhex(colour[1:]), 120)
    return _address(Image.fromarray(rgba).resize((256, 256), Image.Resampling.NEAREST), "PNG")


def marked(prompt: str) -> Markup:
    """The prompt with the words that matter set off: sides and sizes, and negations in another colour."""
    text = str(escape(prompt))
    text = re.sub(r"\b(left|right|bilateral|small|moderate|large|mild|severe|\d+ mm)\b", r"<mark>\1</mark>", text, flags=re.I)
    return Markup(re.sub(r"\b(no|without)\b", r'<mark class="not">\1</mark>', text, flags=re.I))


def code(text: str) -> Markup:
    """A block of commands; what follows `# ` is set back."""
    return Markup("<pre>" + re.sub(r"(# .*)", r'<span class="c">\1</span>', str(escape(text.strip()))) + "</pre>")


def loss_chart(
    whole: Sequence[tuple[int, float]], before: Sequence[tuple[int, float]], after: Sequence[tuple[int, float]]
) -> Markup:
    """Loss per step of the run that was left alone, and of the one that was killed and went on."""
    figure, axes = _axes(7.2, 3.4)
    axes.plot(*zip(*whole), color=_SOFT, linewidth=5, alpha=0.45, solid_capstyle="round", label="left alone")
    axes.plot(*zip(*before), color=_COLOURS[1], linewidth=1.6, label="until it was killed")
    axes.plot(*zip(*after), color=_COLOURS[0], linewidth=1.6, label="the same command again")
    axes.plot(*before[-1], "x", color="#ff8a80", markersize=9, markeredgewidth=2.2)
    axes.set_xlabel("step")
    figure.legend(frameon=False, labelcolor=_TEXT, fontsize=9.5, loc="outside upper left", ncols=3)
    return _svg(figure)


def bar_chart(values: Sequence[tuple[str, float]], target: float | None, start: float = 0.0) -> Markup:
    """Horizontal bars from `start` to 1, with a line at `target`."""
    figure, axes = _axes(4.8, 0.36 * len(values) + 0.7)
    names, numbers = zip(*reversed(values))
    axes.barh(range(len(names)), [max(number, start) - start for number in numbers], left=start, height=0.5, color=_COLOURS[0])
    for row, number in enumerate(numbers):
        axes.text(1.01, row, f"{number:.2f}", color="#e9f1fa", va="center", fontsize=9.5)
    if target is not None:
        axes.axvline(target, color=_COLOURS[1], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(start, 1.0)
    axes.tick_params(length=0)
    axes.grid(False, axis="y")
    return _svg(figure)


def volume_chart(times: np.ndarray, volume: np.ndarray, r_peaks: Sequence[float], t_ends: Sequence[float]) -> Markup:
    """A clip's volume [T] at `times` [T] s as wide as the clip, with its ECG's R peaks and T ends; `.now` moves with the film."""
    width, height, end = 336, 84, float(times[-1] + times[1] - times[0])
    low, high = float(np.nanmin(volume)), float(np.nanmax(volume))
    low, high = min(low, 0.35 * high), 1.06 * high
    points = [
        f"{second / end * width:.1f},{(high - value) / (high - low) * (height - 14) + 2:.1f}"
        for second, value in zip(times, volume)
        if np.isfinite(value)
    ]
    ticks = [
        f'<line x1="{second / end * width:.1f}" x2="{second / end * width:.1f}" y1="0" y2="{height - 12}" class="{kind}"/>'
        for kind, seconds in (("r", r_peaks), ("t", t_ends))
        for second in seconds
        if 0 <= second <= end
    ]
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" class="volume" role="img" aria-label="volume of the left ventricle over time">'
        f'{"".join(ticks)}<polyline points="{" ".join(points)}"/><line x1="0" x2="0" y1="0" y2="{height - 12}" class="now"/>'
        f'<text x="0" y="{height - 1}">volume of the left ventricle</text>'
        f'<text x="{width}" y="{height - 1}" text-anchor="end">{end:.1f} s</text></svg>'
    )


def fan_chart(
    times: Sequence[float], truth: Sequence[float], known: int, futures: np.ndarray, treated: Sequence[float], label: str
) -> Markup:
    """A biomarker over days: truth [V] at `times` [V], of which `known` are past, and futures [N,V-known] as measured in the films."""
    figure, axes = _axes(4.8, 3.0)
    start, later = times[known - 1], np.array(times[known - 1 :])
    from_now = np.concatenate([np.full((len(futures), 1), truth[known - 1]), futures], axis=1)
    low, middle, high = np.nanquantile(from_now, [0.1, 0.5, 0.9], axis=0)
    axes.fill_between(later, low, high, color=_COLOURS[0], alpha=0.22, linewidth=0, label="futures, 80 %")
    axes.plot(later, middle, color=_COLOURS[0], linewidth=1.6, label="median")
    axes.plot(times[:known], truth[:known], "o-", color="#e9f1fa", markersize=4.5, linewidth=1, label="past")
    axes.plot(times[known:], truth[known:], "o", color=_COLOURS[1], markersize=6, label="what came")
    for day in treated:
        axes.axvline(day, color=_COLOURS[2], linewidth=1, linestyle=(0, (1, 2)))
    axes.axvline(start, color=_SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlabel(f"days (dotted: treatment); {label}")
    figure.legend(frameon=False, labelcolor=_TEXT, fontsize=9.5, loc="outside upper left", ncols=4)
    return _svg(figure)


def _axes(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_LINE)
    axes.tick_params(colors=_TEXT, labelsize=9.5, length=0)
    axes.xaxis.label.set_color(_TEXT)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> Markup:
    import matplotlib

    text = io.StringIO()
    # text stays text, in the page's own font; no date, so that the same run gives the same bytes
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "medgen"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    body = text.getvalue()
    body = re.sub(
        r"font: [^;\"']*;?|font-family: [^;\"']*;?", lambda match: _without_family(match.group()), body[body.index("<svg") :]
    )
    return Markup(body)


def _without_family(declaration: str) -> str:
    size = re.search(r"[\d.]+px", declaration)
    return f"font-size: {size.group()};" if size else ""


def _address(image: Image.Image, form: str, **options: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
