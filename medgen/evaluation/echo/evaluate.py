"""`medgen evaluate ecg-to-echo`: generated echo videos against the ECGs and conditions they were given, and against held-out real ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medgen import __version__
from medgen.data import disk_cache
from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest
from medgen.evaluation.echo import controls, temporal
from medgen.evaluation.echo.agreement import Agreement, agreement
from medgen.evaluation.echo.controls import Effect, Intervals, Phase, Shift
from medgen.evaluation.echo.heart_rate import ecg_rate
from medgen.evaluation.echo.measure import load_judge
from medgen.evaluation.echo.targets import Target, targets
from medgen.evaluation.echo.video_fidelity import frame_distance, load_backbone, video_distance
from medgen.evaluation.echo.videos import Clip, read_generated, read_reference
from medgen.evaluation.features import fingerprint
from medgen.evaluation.fidelity import SMALLEST_SET, Fidelity
from medgen.evaluation.text_to_cxr import plain
from medgen.pipelines.echo_inputs import windows

JUDGED = ("population", "shift", "shuffle", "ef", "heart_rate", "one", "diversity")  # clips that follow the ECG they were given


@dataclass(frozen=True)
class Side:
    """What is measured alike on generated and on real clips. Heart rates in bpm and EF in percent are those of regular rhythms.

    With premature beats or fibrillation every beat has an EF of its own, and a short clip does not show their mean: `any_rhythm`.
    """

    heart_rate: Agreement | None
    period: Agreement | None  # the same by autocorrelation, without finding beats
    phase: Phase
    ejection_fraction: Agreement | None
    any_rhythm: Agreement | None
    intervals: Intervals | None


@dataclass(frozen=True)
class Judge:
    """The judge on real clips with known volumes: relative volume error per frame in percent (bias and mean absolute)."""

    volume_bias: float
    volume_error: float
    clips: int


@dataclass(frozen=True)
class Cost:
    """What a clip cost: function evaluations of the denoiser (guidance counted), frames, seconds if the sampler says."""

    evaluations: float | None
    frames: float
    seconds: float | None


@dataclass(frozen=True)
class Evaluation:
    """All that one run measured. `generated` are the clips that were given an ECG; `grid_ef`: one patient asked for many EFs."""

    facts: dict[str, Any]
    targets: tuple[Target, ...]
    generated: Side
    real: Side
    judge: Judge | None
    grid_ef: Agreement | None
    shuffled_given: Phase
    shuffled_own: Phase
    absent: Phase
    shift: Shift | None
    effects: tuple[Effect, ...]
    videos: Fidelity | None
    frames: Fidelity | None
    flicker: temporal.Flicker | None
    seams: temporal.Seams | None
    drift: temporal.Drift | None
    diversity: temporal.Spread | None
    cost: Cost
    warnings: tuple[str, ...]


def evaluate(
    generated: Path,
    reference: Path,
    out: Path,
    judge: Path | None = None,
    backbone: str = "digital-echo-judge",
    split: Literal["train", "val", "test", "all"] = "test",
    window: tuple[int, int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    replicates: int = 100,
) -> Path:
    """Measure generated echo videos: heart rate, phase, EF, controls, distances, steadiness. Writes metrics.json and report.html.

    Args:
        generated: folder that `medgen sample ecg-to-echo` wrote, best from the cases of `medgen evaluate echo-cases`.
        reference: manifest of real clips that the generator never saw.
        out: folder for metrics.json, report.html and the cache of what the judge has read.
        judge: folder of another video segmenter than the shipped one.
        backbone: of the Fréchet video distance: digital-echo-judge, r2plus1d:FILE, r3d:FILE or mc3:FILE.
        split: which split of the reference; "all" where the whole manifest was held out.
        window: frames and overlap of joined windows, where metadata.jsonl does not say where their seams are.
        limit: at most so many reference clips.
        seed: of splits, permutations and resamples.
        replicates: random halvings for the intervals of distances.
    """
    model, encoder = load_judge(judge), load_backbone(backbone)
    out.mkdir(parents=True, exist_ok=True)
    _say(f"judging the videos of {generated}")
    clips = read_generated(generated, model, out / "readings")
    manifest = read_manifest(reference, None if split == "all" else split, record=EchoRecord)
    _say(f"judging {min(limit or len(manifest), len(manifest))} clips of {manifest.name}")
    real = read_reference(manifest, model, out / "readings", limit)
    _say("measuring")
    following = [c for c in clips if c.purpose in JUDGED and len(c.r_peaks)]
    population = [c for c in clips if c.purpose == "population"] or following or clips
    distances = _distances(real, population, encoder, seed, replicates)
    facts = {
        "generated": generated.name,
        "clips": len(clips),
        "models": sorted({str(c.line.get("model", "unknown model")) for c in clips}),
        "reference": manifest.name,
        "reference_split": split,
        "reference_clips": len(real),
        "reference_manifest": manifest.sha256,
        "judge_learned_from": str(model.config.get("patients") or "unknown"),
        "judge_fingerprint": fingerprint(model),
        "seed": seed,
        "medgen": __version__,
    }
    parts: dict[str, Any] = {
        "generated": _side(following, clips, seed),
        "real": _side(real, real, seed),
        "judge": _judge(real),
        "grid_ef": _fraction([c for c in clips if c.purpose == "ef"], seed),
        "shuffled_given": controls.phase(_of(clips, "shuffle"), seed=seed),
        "shuffled_own": controls.phase(_of(clips, "shuffle"), own=True, seed=seed),
        "absent": controls.phase(_of(clips, "absent"), own=True, seed=seed),
        "shift": controls.shift_test(clips, seed),
        "effects": controls.one_at_a_time(clips, seed),
        "videos": distances[0],
        "frames": distances[1],
        "flicker": temporal.flicker(population, real, seed),
        "seams": temporal.seams(clips, _seams_of(window), seed),
        "drift": temporal.drift(_of(clips, "joined") or clips, 2 * min(len(c.reading.times) for c in clips), seed),
        "diversity": temporal.diversity(clips, real, seed),
        "cost": _cost(population),
    }
    evaluation = Evaluation(facts=facts, targets=targets(parts), warnings=_warnings(clips, parts), **parts)
    from medgen.evaluation.echo.report import render  # it draws an `Evaluation`

    page = out / "report.html"
    for path, text in ((out / "metrics.json", json.dumps(plain(evaluation), indent=1)), (page, render(evaluation, clips, real))):
        disk_cache.write_atomically(path, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]
    return page


def _of(clips: Sequence[Clip], purpose: str) -> list[Clip]:
    return [clip for clip in clips if clip.purpose == purpose]


def _side(following: Sequence[Clip], clips: Sequence[Clip], seed: int) -> Side:
    """`following` are timed against their ECG; among all `clips`, irregular rhythms are looked at beat by beat."""
    regular = [c for c in following if c.regular]
    asked, groups = [ecg_rate(c.r_peaks, c.reading.beats) for c in regular], [c.group for c in regular]
    wanted = [a if np.isfinite(a) else _nominal(c) for a, c in zip(asked, regular, strict=True)]
    uneven = [c for c in clips if len(c.r_peaks) and not c.regular and c.purpose != "absent"]
    return Side(
        agreement(wanted, [c.reading.rate for c in regular], groups, seed),
        agreement(wanted, [c.reading.period_rate for c in regular], groups, seed),
        controls.phase(following, seed=seed),
        _fraction(asked_own(regular), seed),
        _fraction(asked_own(following), seed),
        controls.intervals(uneven, seed),
    )


def asked_own(clips: Sequence[Clip]) -> list[Clip]:
    """Those whose EF was asked together with an ECG that may go with it: not of another patient's rhythm."""
    return [clip for clip in clips if clip.purpose != "shuffle"]


def _nominal(clip: Clip) -> float:
    gaps = np.diff(clip.r_peaks)
    return float(60 / np.median(gaps)) if len(gaps) else float("nan")


def _fraction(clips: Sequence[Clip], seed: int) -> Agreement | None:
    """EF asked for (real: known) against EF measured."""
    return agreement([c.asked_ef for c in clips], [c.reading.ejection_fraction for c in clips], [c.group for c in clips], seed)


def _judge(real: Sequence[Clip]) -> Judge | None:
    errors = []
    for clip in real:
        truth = clip.line.get("lv_volume_ml")
        if truth is not None and len(truth) == len(clip.reading.volume):
            errors.append(100 * (clip.reading.volume / truth - 1))
    if not errors:
        return None
    pooled = np.concatenate(errors)
    return Judge(float(np.nanmean(pooled)), float(np.nanmean(np.abs(pooled))), len(errors))


def _distances(
    real: Sequence[Clip], fake: Sequence[Clip], encoder: Any, seed: int, replicates: int
) -> tuple[Fidelity | None, Fidelity | None]:
    """Distances of videos and of frames; None where either side has too few clips for a floor."""
    if len(fake) < SMALLEST_SET or len({c.group for c in real}) < 2 * SMALLEST_SET:
        return None, None
    return video_distance(real, fake, encoder, seed, replicates), frame_distance(real, fake, seed, replicates)


def _seams_of(window: tuple[int, int] | None) -> Callable[[Clip], Sequence[int]]:
    """Where a clip's later windows begin to be new: its metadata say, or the window length and overlap do."""

    def places(clip: Clip) -> Sequence[int]:
        if clip.line.get("seams") is not None:
            return [int(place) for place in clip.line["seams"]]
        if window is None:
            return []
        return [start + known for start, known in windows(len(clip.reading.times), *window)][1:]

    return places


def _cost(clips: Sequence[Clip]) -> Cost:
    steps = [c.line.get("num_inference_steps") for c in clips]
    guided = [c.line.get("guidance_scale") for c in clips]
    known = [int(s) * _evaluations(g) for s, g in zip(steps, guided, strict=True) if isinstance(s, int)]
    seconds = [float(c.line["seconds"]) for c in clips if c.line.get("seconds") is not None]
    frames = float(np.mean([len(c.reading.times) for c in clips]))
    return Cost(float(np.mean(known)) if known else None, frames, float(np.mean(seconds)) if seconds else None)


def _evaluations(guidance: Any) -> int:
    """Predictions per step: one, and one more for every condition that is guided on its own."""
    scales = list(guidance.values()) if isinstance(guidance, dict) else [guidance]
    return 1 + sum(scale not in (None, 1, 1.0) for scale in scales)


def _warnings(clips: Sequence[Clip], parts: dict[str, Any]) -> tuple[str, ...]:
    missing = [
        name
        for name, there in (
            ("shifted ECGs", parts["shift"]),
            ("shuffled ECGs", parts["shuffled_given"].es),
            ("clips without ECG", parts["absent"].es),
            ("one condition changed at a time", parts["effects"]),
            ("an irregular rhythm", parts["generated"].intervals),
            ("joined windows", parts["seams"]),
            ("distances (too few clips)", parts["videos"]),
        )
        if not there
    ]
    warnings = []
    if missing:
        warnings.append(f"Not tested, for want of cases: {', '.join(missing)}. `medgen evaluate echo-cases` writes them.")
    on_real = parts["real"].ejection_fraction
    if on_real is not None and on_real.mae.value > 3:
        warnings.append(f"The judge itself errs by {on_real.mae.value:.1f} EF points on real clips: it is weak evidence here.")
    blank = sum(not np.isfinite(c.reading.volume).any() for c in clips)
    if blank:
        warnings.append(f"In {blank} of {len(clips)} generated clips the judge sees no left ventricle at all.")
    if not all(c.line.get("synthetic") for c in clips):
        warnings.append("Not every line of metadata.jsonl says that its video is synthetic.")
    return tuple(warnings)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
