"""Whose films or clips an augmentation experiment trains on, chooses by and is tested on; what would make its figures lie is refused by
name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medgen.augmentation.learners import Learner
from medgen.config import ConfigError
from medgen.data.records import Manifest, Split
from medgen.tasks.shares import first_patients


@dataclass(frozen=True)
class Cohorts:
    """The manifests of an experiment: `real` with its three splits, `synthetic` (training only), `external` (test only, whole)."""

    real: Manifest[Any]
    synthetic: Manifest[Any] | None
    external: Manifest[Any] | None
    learner: Learner

    def part(self, split: Split) -> Manifest[Any]:
        """The real items of one split. Raises `ConfigError` where it has none."""
        records = tuple(record for record in self.real.records if record.split == split)
        if not records:
            raise ConfigError(
                f"{self.real.name}: the manifest of real {self.learner.outcome.items} has no split {split!r}; an experiment needs all "
                "three"
            )
        return replace(self.real, records=records)

    def sets(self, fraction: float, seed: int) -> dict[str, Any]:
        """Data sets by what they are for: "val" (cut down to `fraction` of its patients), "test", "external"."""
        val = self.part("val")
        parts = {
            "val": replace(val, records=tuple(first_patients(val.records, fraction, seed, "val"))),
            "test": self.part("test"),
        }
        if self.external is not None:
            parts["external"] = self.external
        return {name: self.learner.dataset(part) for name, part in parts.items()}


def open_cohorts(real: Path, synthetic: Path | None, external: Path | None, learner: Learner) -> Cohorts:
    """Read the manifests and refuse, naming patients or findings, what no experiment can be made of.

    Raises `ConfigError` for a patient in two manifests, synthetic items among real ones or the other way round, and a split or
    set in which what is to be learned does not vary; `ManifestError` for a manifest of another kind.
    """
    paths = {"real": real, "synthetic": synthetic, "external": external}
    manifests = {name: learner.manifest(path) for name, path in paths.items() if path is not None}
    for name, manifest in manifests.items():
        strange = [record for record in manifest.records if bool(record.extra.get("synthetic")) != (name == "synthetic")]
        if strange:
            what = "do not say that they are synthetic" if name == "synthetic" else "are synthetic"
            raise ConfigError(
                f"{name}: {len(strange)} of the {len(manifest)} {learner.outcome.items} of {paths[name]} {what} (extra.synthetic): "
                f"{_some(record.record_id for record in strange)}"
            )
    _refuse_shared_patients(manifests, paths)
    cohorts = Cohorts(manifests["real"], manifests.get("synthetic"), manifests.get("external"), learner)
    for split in ("train", "val", "test"):
        learner.refuse_constant(cohorts.part(split).records, f"{real}, split {split!r}")
    if cohorts.external is not None:
        learner.refuse_constant(cohorts.external.records, str(external))
    return cohorts


def _refuse_shared_patients(manifests: dict[str, Manifest[Any]], paths: dict[str, Path | None]) -> None:
    names = list(manifests)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            here, there = ({record.patient_id for record in manifests[name].records} for name in (one, other))
            if shared := here & there:
                raise ConfigError(
                    f"{len(shared)} patients are in {one} ({paths[one]}) and in {other} ({paths[other]}): {_some(shared)}. "
                    "What a network has trained on, it cannot be tested on"
                )


def sources(arm: str, fraction: float, seed: int, real: Path, synthetic: Path | None, learner: Learner) -> tuple[Any, ...]:
    """What `arm` trains on at `fraction` of the real patients (the last stage of "pretrained"). Raises `ConfigError` where items lack.

    "synthetic" has as many items as the real arm, "synthetic-3x" three times as many; "mixed-3x" adds those to the real ones.
    "-all" takes every synthetic item there is.
    """
    own = learner.source(real, fraction, real=True)
    if arm in ("real", "pretrained"):
        return (own,)
    assert synthetic is not None
    kind, _, amount = arm.partition("-")
    if amount == "all":
        added = learner.source(synthetic)
    else:
        count = int(amount.removesuffix("x") or 1) * len(learner.drawn(own, seed))
        there = sum(record.split == "train" for record in learner.manifest(synthetic).records)
        if count > there:
            raise ConfigError(
                f"arms.{arm} at {fraction:g} of the real patients needs {count} synthetic {learner.outcome.items}; {synthetic} has "
                f"{there}. Take that fraction out of the arm, or generate more"
            )
        added = learner.source(synthetic, count=count)
    return (own, added) if kind == "mixed" else (added,)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
