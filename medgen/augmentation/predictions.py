"""What the runs of an experiment predicted, read from RUNS/experiment.json and RUNS/<arm>/<percent>/<seed>/predictions.parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medgen.augmentation.outcomes import FINDINGS, Outcome, outcome_of
from medgen.config import ConfigError
from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, read_manifest

Bools = NDArray[np.bool_]
Scores = NDArray[np.float64]
Person = CXRRecord | EchoRecord
TESTED = ("test", "external")


@dataclass(frozen=True)
class Films:
    """The films (or clips) of one set, the same for every run. truth [N,F]: whether a finding is there, or a number; known (not
    uncertain) [N,F]; patients [N]."""

    record_ids: tuple[str, ...]
    patients: NDArray[np.str_]
    truth: NDArray[Any]
    known: Bools


@dataclass(frozen=True)
class Run:
    """One trained network: probabilities, or numbers read, [N,F] by set; its facts as experiment.json has them."""

    arm: str
    fraction: float
    seed: int
    scores: dict[str, Scores]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """All runs of one experiment. `people` are the records by set, None where their manifest is not as it was; `facts` experiment.json."""

    findings: tuple[str, ...]
    films: dict[str, Films]
    runs: tuple[Run, ...]
    people: dict[str, dict[str, Person] | None]
    facts: dict[str, Any]
    warnings: tuple[str, ...]
    outcome: Outcome

    def of(self, arm: str, fraction: float) -> dict[int, Run]:
        """The runs of an arm at a fraction, by seed."""
        return {run.seed: run for run in self.runs if run.arm == arm and np.isclose(run.fraction, fraction)}

    @property
    def arms(self) -> list[str]:
        """Real first, then as the runs come."""
        return sorted(dict.fromkeys(run.arm for run in self.runs), key=lambda arm: arm != "real")

    @property
    def sets(self) -> list[str]:
        return [name for name in TESTED if name in self.films]

    def fractions(self, arm: str) -> list[float]:
        """Of the real patients, smallest first."""
        return sorted({run.fraction for run in self.runs if run.arm == arm})


def read_experiment(runs: Path) -> Experiment:
    """Every complete run below `runs`. Raises `ConfigError` naming the file and what is wrong with it."""
    path = runs / "experiment.json"
    if not path.is_file():
        raise ConfigError(f"{path} is not there: `medgen augment train` writes it; give the folder of its runs")
    facts = json.loads(path.read_text())
    if not facts["runs"]:
        raise ConfigError(f"{path} names no complete run yet: let `medgen augment train` finish some")
    findings, outcome = tuple(facts["findings"]), outcome_of(facts)
    films: dict[str, Films] = {}
    read = []
    for one in facts["runs"]:
        file = runs / one["folder"] / "predictions.parquet"
        if not file.resolve().is_relative_to(runs.resolve()):
            raise ConfigError(f"{path}: the folder {one['folder']!r} leads out of {runs}")
        scores = _read(file, findings, films, outcome)
        read.append(Run(one["arm"], float(one["fraction"]), int(one["seed"]), scores, one))
    if "test" not in films or "val" not in films:
        raise ConfigError(f"{runs}: the predictions have the sets {', '.join(films)}; val and test are needed")
    _refuse_shared_patients(films)
    people, warnings = _people(facts, films, outcome)
    if not facts["complete"]:
        warnings.insert(0, f"{len(read)} of {facts['planned']} planned runs are complete: the figures will change.")
    return Experiment(findings, films, tuple(read), people, facts, tuple(warnings), outcome)


def _read(file: Path, findings: Sequence[str], films: dict[str, Films], outcome: Outcome) -> dict[str, Scores]:
    """Predictions [N,F] by set, in the order of `films`, which gets the sets that it has not yet."""
    if not file.is_file():
        raise ConfigError(f"{file} is not there although experiment.json names its run as complete")
    wanted = ["record_id", "patient_id", "set", *(f"{kind}_{name}" for name in findings for kind in ("truth", "mask", "p"))]
    lacking = set(wanted) - set(pq.read_schema(file).names)
    if lacking:
        raise ConfigError(f"{file} lacks the columns {', '.join(sorted(lacking))}")
    table = pq.read_table(file, columns=wanted).to_pandas()
    scores = {}
    for name, part in table.groupby("set"):
        part = part.sort_values("record_id")
        truth, known, p = (
            np.stack([part[f"{kind}_{finding}"].to_numpy() for finding in findings], axis=1) for kind in ("truth", "mask", "p")
        )
        truth = truth.astype(bool if outcome is FINDINGS else np.float64)
        here = Films(tuple(part["record_id"]), part["patient_id"].to_numpy(str), truth, known.astype(bool))
        before = films.setdefault(str(name), here)
        if name != "val" and not _same(before, here):
            raise ConfigError(
                f"{file}: other {name} {outcome.items} or truths than the runs before it; runs can only be compared on the same "
                f"{outcome.items}"
            )
        if not (np.isfinite(p).all() and (outcome is not FINDINGS or ((p >= 0) & (p <= 1)).all())):
            raise ConfigError(
                f"{file}: predictions of {name} {outcome.items} that are no numbers" + " from 0 to 1" * (outcome is FINDINGS)
            )
        scores[str(name)] = p.astype(np.float64)
        if name == "val":  # may be cut down to a run's fraction: only its threshold matters
            scores["val_truth"], scores["val_known"] = truth.astype(np.float64), known.astype(np.float64)
    missing = set(films) - set(scores)
    if missing:
        raise ConfigError(f"{file}: no predictions of the sets {', '.join(sorted(missing))}, which other runs have")
    return scores


def _same(one: Films, other: Films) -> bool:
    return (
        one.record_ids == other.record_ids
        and bool((one.patients == other.patients).all())
        and bool((one.truth == other.truth).all())
        and bool((one.known == other.known).all())
    )


def _refuse_shared_patients(films: dict[str, Films]) -> None:
    names = [name for name in ("val", *TESTED) if name in films]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            shared = sorted(set(films[one].patients) & set(films[other].patients))
            if shared:
                listed = ", ".join(shared[:5]) + (f" and {len(shared) - 5} more" if len(shared) > 5 else "")
                raise ConfigError(f"{len(shared)} patients are in the sets {one} and {other}: {listed}")


def _people(
    facts: dict[str, Any], films: dict[str, Films], outcome: Outcome
) -> tuple[dict[str, dict[str, Person] | None], list[str]]:
    """Who is on the test films, from the manifests that experiment.json names."""
    people: dict[str, dict[str, Person] | None] = {}
    warnings = []
    kind: type[Person] = CXRRecord if outcome.kind == CXRRecord.kind else EchoRecord
    for name in [s for s in TESTED if s in films]:
        source = facts["manifests"]["external" if name == "external" else "real"]
        path = Path(source["path"])
        manifest = read_manifest(path, record=kind) if path.is_file() else None
        if manifest is None or manifest.sha256 != source["sha256"]:
            what = "is not there" if manifest is None else "has changed since the runs"
            warnings.append(
                f"The manifest of the {name} {outcome.items} ({path.name}) {what}: no groups of patients for this set."
            )
            people[name] = None
            continue
        records = {record.record_id: record for record in manifest.records}
        people[name] = {film: records[film] for film in films[name].record_ids}
    return people, warnings
