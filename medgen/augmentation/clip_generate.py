"""Synthetic echo clips as a manifest to train on: a plan's through the sampler, or any folder that `medgen sample ecg-to-echo` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen.augmentation.planned import CASES, PlanError
from medgen.data.echo_records import EchoRecord
from medgen.data.records import write_manifest
from medgen.sampling.cases import read_cases
from medgen.sampling.ecg_to_echo import sample
from medgen.sampling.echo_cases import EchoAsked
from medgen.sampling.output import METADATA
from medgen.sampling.request import RESERVED

MANIFEST = "manifest.parquet"
_KEPT = ("synthetic", "model_sha256", "noise_seed", "stratum", "ecg_of")


@dataclass(frozen=True)
class Collected:
    """`clips` of the `sampled` ones are in the manifest OUT/manifest.parquet; `notes` say which are not, and why."""

    out: Path
    clips: int
    sampled: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n  ".join([f"{self.out / MANIFEST}: {self.clips} of {self.sampled} sampled clips", *self.notes])


def collect(folder: Path, name: str = "synthetic-clips", source: str = "medgen sample ecg-to-echo") -> Collected:
    """Write FOLDER/manifest.parquet: sampled echo clips with the ejection fraction that was asked for as their label, to train on.

    Left out are clips of which no ejection fraction was asked, and those that start from a given first frame: they show the patient
    whose frame it is.

    Args:
        folder: what `medgen sample ecg-to-echo` wrote.
        name: of the data set.
        source: where it comes from, as the manifest says it.

    Raises `PlanError`.
    """
    path = folder / METADATA
    if not path.is_file():
        raise PlanError(f"{folder} holds no {METADATA}: give a folder that `medgen sample ecg-to-echo` has finished")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not all("frames_file" in line for line in lines):
        raise PlanError(f"{folder} holds no echo clips; films come with a manifest from `medgen augment generate`")
    unasked = [line for line in lines if line["ejection_fraction"] is None]
    started = [line for line in lines if line["ejection_fraction"] is not None and line["first_frame"] is not None]
    kept = [line for line in lines if line["ejection_fraction"] is not None and line["first_frame"] is None]
    notes = [f"{len(unasked)} clips left out: no ejection fraction was asked for"] * bool(unasked)
    notes += [f"{len(started)} clips left out: they start from a first frame, and show its patient"] * bool(started)
    if not kept:
        raise PlanError(f"{folder}: none of {len(lines)} clips can be trained on: {'; '.join(notes)}")
    write_manifest(map(record_of, kept), folder / MANIFEST, name=name, source=source)
    return Collected(folder, len(kept), len(lines), tuple(notes))


def record_of(line: Mapping[str, Any]) -> EchoRecord:
    """The record of one sampled clip. Its ECG is not in it: nothing that reads a clip's ejection fraction looks at it."""
    name = Path(line["file_name"]).stem
    return EchoRecord(
        record_id=name,
        patient_id=f"synthetic-{line['case_id']}",
        study_id=f"synthetic-{name}",
        video=line["frames_file"],
        view=line["view"] or "UNKNOWN",
        fps=line["fps"],
        frames=line["num_frames"],
        split="train",
        ejection_fraction=line["ejection_fraction"],
        extra={"pipeline": line["model"], **{key: line[key] for key in _KEPT if key in line}},
    )


def generate_clips(plan: Path, facts: Mapping[str, Any], pipeline: str, out: Path, **options: Any) -> Collected | None:
    """Sample the cases of a plan of echo clips and collect them; None while other shards have work left.

    `options` are those of `medgen.sampling.ecg_to_echo.sample`.
    """
    cases = read_cases(plan / CASES, EchoAsked, RESERVED)
    root = (plan / facts["manifest"]["path"]).parent  # the plan's cases name ECGs as the real manifest does
    if not sample(pipeline, out, cases=cases, root=root, **options).complete:
        return None
    source = f"medgen augment generate: target {facts['target']['base']}"
    return collect(out, f"synthetic-{facts['manifest']['name']}", source)
