"""Sequences of made frames: does a long roll-out stay steady, and do states between two known ends lead from one to the other?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medgen.evaluation.progression.collect import Images, Reader, Real, Sampled
from medgen.evaluation.progression.fidelity import fidelity
from medgen.evaluation.progression.scores import means
from medgen.evaluation.progression.trends import monotonicity
from medgen.evaluation.statistics import Estimate, Floats, wilson
from medgen.models.film_meter import EDGE_MM, FilmMeter

MODES = ("joint", "autoregressive")


@dataclass(frozen=True)
class Rollout:
    """Relative change since the last real image, over the steps. drift: from the first step to the last, by mode and measure.

    real: relative change of the same patients' own films from the last past visit to the last later one (disease and exposure).
    """

    curves: dict[str, dict[str, tuple[float, ...]]]
    drift: dict[str, dict[str, Estimate]]
    real: dict[str, Estimate]
    patients: int


@dataclass(frozen=True)
class Between:
    """Frames between two known visits. monotone: share of cases in which the biomarker never turns back by more than the judge's noise;
    strictly: not at all.

    ends: SSIM of the first and last frame asked for to the known images; ceiling: of their reconstructions; backwards: mean share of steps
    that turn back at all; curves: (biomarker, readings from the first end to the last as shares of the way) of each case.
    """

    monotone: Estimate
    strictly: Estimate
    ends: Estimate
    ceiling: Estimate | None
    short: Estimate | None
    backwards: Estimate
    curves: tuple[tuple[str, tuple[float, ...]], ...]


def look(images: Images, judge: FilmMeter | None) -> dict[str, Floats]:
    """Mean brightness, sharpness (mean |gradient|), and the judge's lung and heart areas, each [N], of images [N,*S] in [0,1]."""
    axes = tuple(range(1, images.ndim))
    slopes = np.gradient(images, axis=axes)
    found = {
        "brightness": images.mean(axis=axes).astype(np.float64),
        "sharpness": np.sqrt(sum(slope**2 for slope in slopes)).mean(axis=axes).astype(np.float64),
    }
    if judge is not None and images.ndim == 3:
        with torch.inference_mode():
            maps = judge(torch.from_numpy(images)[:, None].to(next(judge.parameters()).device) * 2 - 1).cpu()
        area = (maps[:, :2] > EDGE_MM).double().mean((2, 3)).numpy()
        found |= {"heart area": area[:, 0], "lung area": area[:, 1]}
    return found


def rollout(cases: Sequence[Sampled], real: Mapping[str, Real], reader: Reader, seed: int = 0) -> Rollout | None:
    """Of patients followed for many steps both ways."""
    by_mode = {mode: [c for c in cases if c.purpose == "rollout" and c.line.get("variant") == mode] for mode in MODES}
    both = set.intersection(*({case.record_id for case in chosen} for chosen in by_mode.values()))
    if not both:
        return None
    curves: dict[str, dict[str, tuple[float, ...]]] = {}
    drift: dict[str, dict[str, Estimate]] = {}
    for mode, chosen in by_mode.items():
        rows: dict[str, list[Floats]] = defaultdict(list)
        kept = [case for case in chosen if case.record_id in both]
        for case in kept:
            one = real[case.record_id]
            frames = np.concatenate([one.images[one.known - 1 : one.known], reader.images(case.files[0])])
            for name, values in look(frames, reader.judge).items():
                rows[name].append(values[1:] / max(values[0], 1e-9) - 1)
        stacked = {name: np.stack(values) for name, values in rows.items()}
        curves[mode] = {name: tuple(float(v) for v in values.mean(0)) for name, values in stacked.items()}
        drift[mode] = means({n: v[:, -1] - v[:, 0] for n, v in stacked.items()}, [c.record_id for c in kept], seed)
    own: dict[str, list[float]] = defaultdict(list)
    for name in sorted(both):
        one = real[name]
        for measure, values in look(one.images[[one.known - 1, -1]], reader.judge).items():
            own[measure].append(float(values[1] / max(values[0], 1e-9) - 1))
    return Rollout(curves, drift, means({n: np.array(v) for n, v in own.items()}, sorted(both), seed), len(both))


def between(
    cases: Sequence[Sampled], real: Mapping[str, Real], reader: Reader, noise: Mapping[str, float], seed: int = 0
) -> Between | None:
    """Of cases between two known visits; `noise`: how much the judge's error differs from visit to visit (standard deviation), of
    the biomarkers that it can read."""
    chosen = [case for case in cases if case.purpose == "between" and case.line.get("biomarker") in noise]
    if not chosen:
        return None
    rows: dict[str, list[float]] = defaultdict(list)
    monotone, strictly, curves = [], [], []
    for case in chosen:
        one, name = real[case.record_id], str(case.line["biomarker"])
        ends = [one.index(case.times[0]), one.index(case.times[-1])]
        frames = reader.images(case.files[0])[[0, -1]]
        made = fidelity(frames, one.images[ends])["ssim"].mean()
        rows["ends"].append(float(made))
        if one.reconstructed is not None:
            ceiling = float(fidelity(one.reconstructed[ends], one.images[ends])["ssim"].mean())
            rows["ceiling"].append(ceiling)
            rows["short"].append(ceiling - float(made))
        values = case.readings[name][0]
        way = float(values[-1] - values[0])
        right = np.sign(way) == int(case.line["direction"])
        back = [float(monotonicity(case.times, values[None], allowed).violations[0]) for allowed in (noise[name], 0.0)]
        monotone.append(bool(right and back[0] == 0))
        strictly.append(bool(right and back[1] == 0))
        rows["backwards"].append(back[1])
        curves.append((name, tuple(float(v) for v in (values - values[0]) / (way if abs(way) > 1e-9 else 1.0))))
    found = means({n: np.array(v) for n, v in rows.items()}, [case.record_id for case in chosen], seed)
    return Between(
        wilson(sum(monotone), len(monotone)),
        wilson(sum(strictly), len(strictly)),
        found["ends"], found.get("ceiling"), found.get("short"), found["backwards"], tuple(curves),
    )  # fmt: skip
