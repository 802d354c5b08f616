"""Every later visit of every patient as one row: what came, what was forecast, and what each baseline says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from medgen.data.visit_records import TimeUnit
from medgen.evaluation.progression.baselines import copy_last, extrapolate
from medgen.evaluation.progression.change import change_fidelity
from medgen.evaluation.progression.collect import Images, Reader, Real, Sampled
from medgen.evaluation.progression.fidelity import fidelity
from medgen.evaluation.progression.patients import MOVES, primary
from medgen.evaluation.statistics import Floats

METHODS = {
    "forecast": "forecast: middle of the futures",
    "single": "forecast: one future",
    "copy_last": "copy the last visit",
    "linear": "straight line",
    "regressor": "deterministic regressor",
    "ceiling": "true visit through the autoencoder",
}
BASELINES = ("copy_last", "linear", "regressor")
Encode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Prediction:
    """What one method says of a patient's T later visits: images [T,*S] in [0,1] and biomarkers [T] as the judge reads them."""

    images: Images
    readings: Mapping[str, Floats]


@dataclass(frozen=True)
class Points:
    """P later visits, their times in `time_unit`. By biomarker: truth, real (the judge on the true visit), draws [P,M], read[method], and
    futures (each [K], or None where none were simulated).

    gap: time since the last past visit; history: how many visits were known; primary: the patient's; changed: any biomarker moved by at
    least `MOVES` spreads since the last past visit; pictures[method][measure]: fidelity and change fidelity.
    """

    time_unit: TimeUnit
    groups: tuple[str, ...]
    gap: Floats
    history: Floats
    changed: NDArray[np.bool_]
    primary: tuple[str, ...]
    spread: Mapping[str, float]
    truth: Mapping[str, Floats]
    real: Mapping[str, Floats]
    draws: Mapping[str, Floats]
    futures: Mapping[str, tuple[Floats | None, ...]]
    read: Mapping[str, Mapping[str, Floats]]
    pictures: Mapping[str, Mapping[str, Floats]]

    def __len__(self) -> int:
        return len(self.groups)

    def of_primary(self, table: Mapping[str, Floats]) -> Floats:
        """Each patient's primary biomarker out of a table by name, in spreads: [P] or [P,M]."""
        rows = [table[name][i] / self.spread[name] for i, name in enumerate(self.primary)]
        return np.array(rows)

    @property
    def draws_each(self) -> int:
        """M, the futures of every visit."""
        return next(iter(self.draws.values())).shape[1]

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(name for name in METHODS if name in self.read)


def predictions(
    case: Sampled, real: Real, reader: Reader, regressor: Sampled | None, most: Mapping[str, float]
) -> dict[str, Prediction]:
    """What every method says at the case's times, from the visits that the case was given; `most`: where straight lines end."""
    given = [real.index(float(visit["time"])) for visit in case.line["past"]]
    times, images = [real.times[i] for i in given], real.images[given]
    past = {name: values[given] for name, values in real.readings.items()}
    drawn = np.stack([reader.images(files) for files in case.files])
    found = {
        "forecast": Prediction(drawn.mean(0), {name: case.middle(name) for name in case.readings}),
        "single": Prediction(drawn[0], {name: values[0] for name, values in case.readings.items()}),
        "copy_last": Prediction(
            copy_last(images, len(case.times)), {name: copy_last(values, len(case.times)) for name, values in past.items()}
        ),
        "linear": Prediction(
            extrapolate(times, images, case.times, 0.0, 1.0),
            {name: extrapolate(times, values, case.times, 0.0, most[name]) for name, values in past.items()},
        ),
    }
    if regressor is not None:
        found["regressor"] = Prediction(
            reader.images(regressor.files[0]), {name: values[0] for name, values in regressor.readings.items()}
        )
    if real.reconstructed is not None:
        wanted = [real.index(time) for time in case.times]
        there = real.reconstructed[wanted]
        blank = {name: np.full(len(wanted), np.nan) for name in case.readings}  # volumes are read from files, and this is none
        found["ceiling"] = Prediction(there, blank if reader.judge is None else reader.read_images(there).biomarkers)
    return found


def reconstruct(real: Mapping[str, Real], encode: Encode) -> dict[str, Real]:
    """The patients with their images sent through the autoencoder and back."""

    def through(images: Images) -> Images:
        return encode(torch.from_numpy(images)[:, None])[:, 0].float().cpu().numpy()

    return {name: replace(one, reconstructed=through(one.images)) for name, one in real.items()}


def gather(
    cases: Sequence[Sampled],
    real: Mapping[str, Real],
    reader: Reader,
    regressor: Mapping[str, Sampled],
    spread: Mapping[str, float],
    readable: Mapping[str, float],
) -> Points:
    """The rows of all forecast cases; `regressor` by record id. Methods that lack a patient are left out for all.

    `readable`: those of `spread` that the judge can read, one of which is a patient's primary biomarker.
    """
    blocks = []
    trajectories = min(len(case.files) for case in cases)
    most = {name: max(float(np.nanmax(one.readings[name])) for one in real.values()) for name in cases[0].readings}
    for case in cases:
        one = real[case.record_id]
        said = predictions(case, one, reader, regressor.get(case.record_id), most)
        pictures = _pictures(said, one, [one.index(time) for time in case.times])
        readings = {name: prediction.readings for name, prediction in said.items()}  # the images would fill the memory
        blocks.append(_Block(case.first(trajectories), one, readings, pictures))
    methods = [name for name in METHODS if all(name in block.said for block in blocks)]
    names = [name for name in blocks[0].case.readings if name in spread]
    usable = {name: readable[name] for name in names if name in readable}
    return Points(
        time_unit=blocks[0].real.patient.series.time_unit,
        groups=tuple(b.real.patient.series.patient_id for b in blocks for _ in b.case.times),
        gap=np.concatenate([np.array(b.case.times) - b.real.times[b.real.known - 1] for b in blocks]),
        history=np.array([float(b.real.known) for b in blocks for _ in b.case.times]),
        changed=np.concatenate([b.changed(names, spread) for b in blocks]),
        primary=tuple(primary(b.real.patient, usable) or names[0] for b in blocks for _ in b.case.times),
        spread={name: spread[name] for name in names},
        truth={name: np.concatenate([b.real.truth(name)[b.wanted] for b in blocks]) for name in names},
        real={name: np.concatenate([b.real.readings[name][b.wanted] for b in blocks]) for name in names},
        draws={name: np.concatenate([b.case.readings[name].T for b in blocks]) for name in names},
        futures={name: tuple(row for b in blocks for row in b.futures(name)) for name in names},
        read={m: {name: np.concatenate([b.said[m][name] for b in blocks]) for name in names} for m in methods},
        pictures={
            m: {measure: np.concatenate([b.pictures[m][measure] for b in blocks]) for measure in blocks[0].pictures[m]}
            for m in methods
        },
    )


@dataclass(frozen=True)
class _Block:
    """The rows of one patient."""

    case: Sampled
    real: Real
    said: Mapping[str, Mapping[str, Floats]]
    pictures: Mapping[str, Mapping[str, Floats]]

    @property
    def wanted(self) -> list[int]:
        return [self.real.index(time) for time in self.case.times]

    def changed(self, names: Sequence[str], spread: Mapping[str, float]) -> NDArray[np.bool_]:
        moved = [np.abs(self.real.truth(n)[self.wanted] - self.real.truth(n)[self.real.known - 1]) / spread[n] for n in names]
        return np.asarray(np.nanmax(np.stack(moved), axis=0) >= MOVES)

    def futures(self, name: str) -> list[Floats | None]:
        """The simulated values at each of the case's times."""
        known = self.real.patient.futures
        if known is None or name not in known.values:
            return [None] * len(self.case.times)
        near = [np.flatnonzero(np.abs(known.times - time) < 1e-3) for time in self.case.times]
        return [known.values[name][:, at[0]] if len(at) else None for at in near]


def _pictures(said: Mapping[str, Prediction], real: Real, wanted: Sequence[int]) -> dict[str, dict[str, Floats]]:
    """Fidelity to the true visits, and of the change since the last past visit, of every method: [T] by measure."""
    came, last = real.images[list(wanted)], copy_last(real.images[: real.known], len(wanted))
    return {m: {**fidelity(one.images, came), **change_fidelity(last, one.images, came)} for m, one in said.items()}
