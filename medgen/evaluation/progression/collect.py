"""The two sides of an evaluation of forecasts: real visits and generated ones, prepared alike and read by the same judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medgen.data import disk_cache
from medgen.data.visit_images import VisitPreprocessing, load_visit
from medgen.data.visit_records import BIOMARKERS, Visit
from medgen.data.volumes import load_volume
from medgen.evaluation.features import fingerprint
from medgen.evaluation.images import EvaluationError, read_metadata
from medgen.evaluation.progression.measure import Readings, read_films, read_volumes
from medgen.evaluation.progression.patients import Patient, truth
from medgen.evaluation.statistics import Floats
from medgen.models.film_meter import FilmMeter

Images = NDArray[np.float32]
_VERSION = 1  # raise it when the same judge and files give other readings


@dataclass(frozen=True)
class Reader:
    """Opens images as the pipeline does, and lets the judge read them; what it read of the same files before comes from `cache`."""

    preprocessing: VisitPreprocessing
    judge: FilmMeter | None
    cache: Path

    def images(self, paths: Sequence[Path]) -> Images:
        """[N,*S] float32 in [0,1]."""
        return np.stack([(load_visit(path, self.preprocessing)[0].numpy() + 1) / 2 for path in paths])

    def read(self, paths: Sequence[Path]) -> Readings:
        """Biomarkers [N] and features [N,F] of image files."""
        mark = "volumes" if self.judge is None else fingerprint(self.judge, _VERSION)[:16]
        states = [disk_cache.file_state(path) for path in paths]
        where = disk_cache.entry(self.cache / mark, ".npz", self.preprocessing.model_dump_json(), *states)

        def make() -> dict[str, NDArray]:
            made = self._volumes(paths) if self.judge is None else self.read_images(self.images(paths))
            return {**made.biomarkers, "features": made.features}

        arrays = disk_cache.arrays(where, make)
        features = arrays.pop("features")
        return Readings(arrays, features)

    def read_images(self, images: Images) -> Readings:
        """The same of images [...,H,W] in [0,1] that are no files: reconstructions, means, straight lines."""
        if self.judge is None:
            raise EvaluationError("volumes are read from their files, which say how large a voxel is")
        return read_films(self.judge, images)

    def _volumes(self, paths: Sequence[Path]) -> Readings:
        """HU volumes by threshold: there is no film to meter."""
        settings, found = self.preprocessing, defaultdict(list)
        for path in paths:
            volume = load_volume(path, settings.size, settings.volume)
            voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
            for name, value in read_volumes(settings.volume.restored(volume.values), voxel_ml).items():
                found[name].append(float(np.ravel(value)[0]))
        return Readings({name: np.array(values) for name, values in found.items()}, np.zeros((len(paths), 0), np.float32))


@dataclass(frozen=True)
class Sampled:
    """One case as it came back: n trajectories of T frames. readings: biomarkers [n,T] as the judge sees them; features [n,T,F]."""

    line: Mapping[str, Any]
    files: tuple[tuple[Path, ...], ...]
    readings: Mapping[str, Floats]
    features: NDArray[np.float32]

    @property
    def purpose(self) -> str:
        return str(self.line.get("purpose", "forecast"))

    @property
    def record_id(self) -> str:
        return str(self.line["record_id"])

    @property
    def times(self) -> list[float]:
        return [float(frame["time"]) for frame in self.line["frames"]]

    def first(self, count: int) -> Sampled:
        """With its first `count` trajectories only."""
        readings = {name: values[:count] for name, values in self.readings.items()}
        return replace(self, files=self.files[:count], readings=readings, features=self.features[:count])

    def middle(self, name: str) -> Floats:
        """The median over trajectories of a biomarker, [T]."""
        return np.asarray(np.median(self.readings[name], axis=0))


@dataclass(frozen=True)
class Real:
    """A patient's imaged visits as the judge sees them: images [V,*S] in [0,1], biomarkers [V], features [V,F]; the first `known` are past.

    reconstructed [V,*S]: the images through the pipeline's autoencoder and back, None where no pipeline was given.
    """

    patient: Patient
    images: Images
    readings: Mapping[str, Floats]
    features: NDArray[np.float32]
    reconstructed: Images | None = None

    @property
    def known(self) -> int:
        return len(self.patient.past)

    @cached_property
    def visits(self) -> tuple[Visit, ...]:
        return self.patient.past + self.patient.later

    @cached_property
    def times(self) -> list[float]:
        return [visit.time for visit in self.visits]

    def truth(self, name: str) -> Floats:
        """A biomarker [V] as the manifest knows it."""
        return np.array([truth(visit, name) for visit in self.visits])

    def index(self, time: float) -> int:
        """The visit at this time. Raises `EvaluationError` where there is none."""
        for i, own in enumerate(self.times):
            if abs(own - time) < 1e-6 * max(1.0, abs(own)):
                return i
        raise EvaluationError(
            f"record {self.patient.record_id!r} of the reference has no imaged visit at {time:g}: another manifest?"
        )

    def judged(self) -> Real:
        """The judge's readings in place of a truth that nobody knows."""
        seen = {visit.visit_id: i for i, visit in enumerate(self.visits)}
        visits = tuple(
            replace(v, truth={name: float(values[seen[v.visit_id]]) for name, values in self.readings.items()})
            if v.visit_id in seen else v
            for v in self.patient.series.visits
        )  # fmt: skip
        return replace(self, patient=replace(self.patient, series=replace(self.patient.series, visits=visits)))


def read_real(patients: Sequence[Patient], reader: Reader) -> dict[str, Real]:
    """Patients by record id, read by the judge. Where a manifest knows no biomarker at all, the judge's readings become its truth."""
    found = {}
    for patient in patients:
        paths = [patient.root / str(visit.image) for visit in patient.past + patient.later]
        readings = reader.read(paths)
        found[patient.record_id] = Real(patient, reader.images(paths), readings.biomarkers, readings.features)
    if any(np.isfinite(real.truth(name)).any() for real in found.values() for name in BIOMARKERS):
        return found
    return {name: real.judged() for name, real in found.items()}


def read_sampled(folder: Path, reader: Reader, real: Mapping[str, Real]) -> list[Sampled]:
    """Every case below `folder` that is about one of these patients, its trajectories together and read by the judge.

    Raises `EvaluationError` for a folder that holds no forecasts, frames that are not there, or none about these patients.
    """
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in read_metadata(folder, ("file_name", "case_id", "record_id", "frames")):
        cases[line["case_id"]].append(line)
    about = {name: lines for name, lines in cases.items() if str(lines[0]["record_id"]) in real}
    if not about:
        raise EvaluationError(
            f"{folder}: none of its {len(cases)} cases is about one of the {len(real)} held-out patients; give the --reference that "
            "`medgen evaluate progression-cases` had"
        )
    return [_case(lines, reader) for lines in about.values()]


def _case(lines: Sequence[Mapping[str, Any]], reader: Reader) -> Sampled:
    files = []
    for line in lines:
        paths = tuple(line["_path"].with_name(str(frame["file_name"])) for frame in line["frames"])
        for path in paths:
            if path.parent != line["_path"].parent or not path.is_file():
                raise EvaluationError(f"{line['_path'].parent}: metadata.jsonl lists {path.name}, which is not there")
        files.append(paths)
    if len({len(paths) for paths in files}) > 1:
        raise EvaluationError(f"case {lines[0]['case_id']!r}: its trajectories have different numbers of frames")
    readings = reader.read([path for paths in files for path in paths])
    shape = (len(files), len(files[0]))
    return Sampled(
        {key: value for key, value in lines[0].items() if key != "_path"},
        tuple(files),
        {name: values.reshape(shape) for name, values in readings.biomarkers.items()},
        readings.features.reshape(*shape, -1),
    )
