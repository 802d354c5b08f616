"""Whose films an augmentation experiment trains on, chooses by and is tested on; what would make its figures lie is refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medgen.config import ConfigError
from medgen.data.records import CXRRecord, Manifest, Split
from medgen.seeds import stable_seed
from medgen.tasks.image_classifier import Films, FilmSource, FindingFilms, Thinning, drawn, targets_of


@dataclass(frozen=True)
class Cohorts:
    """The manifests of an experiment: `real` with its three splits, `synthetic` (training only), `external` (test only, whole)."""

    real: Manifest
    synthetic: Manifest | None
    external: Manifest | None
    findings: tuple[str, ...]
    films: Films

    def part(self, split: Split) -> Manifest:
        """The real films of one split. Raises `ConfigError` where it has none."""
        records = tuple(record for record in self.real.records if record.split == split)
        if not records:
            raise ConfigError(
                f"{self.real.name}: the manifest of real films has no split {split!r}; an experiment needs all three"
            )
        return replace(self.real, records=records)

    def sets(self, fraction: float, seed: int) -> dict[str, FindingFilms]:
        """Films by what they are for: "val" (cut down to `fraction` of its patients), "test", "external"."""
        parts = {"val": share_of_patients(self.part("val"), fraction, seed), "test": self.part("test")}
        if self.external is not None:
            parts["external"] = self.external
        return {name: FindingFilms([part], self.findings, self.films) for name, part in parts.items()}


def share_of_patients(manifest: Manifest, fraction: float, seed: int) -> Manifest:
    """The films of `fraction` of the patients of `manifest`; a smaller share lies inside a larger one."""
    if fraction == 1:
        return manifest
    patients = sorted({record.patient_id for record in manifest.records}, key=lambda name: stable_seed("val", seed, name))
    kept = set(patients[: max(round(fraction * len(patients)), 1)])
    return replace(manifest, records=tuple(record for record in manifest.records if record.patient_id in kept))


def open_cohorts(real: Path, synthetic: Path | None, external: Path | None, findings: Sequence[str], films: Films) -> Cohorts:
    """Read the manifests and refuse, naming patients or findings, what no experiment can be made of.

    Raises `ConfigError` for a patient in two manifests, synthetic films among real ones or the other way round, and a split or
    set in which a finding has only one class; `ManifestError` for a manifest of another kind.
    """
    paths = {"real": real, "synthetic": synthetic, "external": external}
    manifests = {name: films.manifest(path) for name, path in paths.items() if path is not None}
    for name, manifest in manifests.items():
        strange = [record for record in manifest.records if bool(record.extra.get("synthetic")) != (name == "synthetic")]
        if strange:
            what = "do not say that they are synthetic" if name == "synthetic" else "are synthetic"
            raise ConfigError(
                f"{name}: {len(strange)} of the {len(manifest)} films of {paths[name]} {what} (extra.synthetic): "
                f"{_some(record.record_id for record in strange)}"
            )
    _refuse_shared_patients(manifests, paths)
    cohorts = Cohorts(manifests["real"], manifests.get("synthetic"), manifests.get("external"), tuple(findings), films)
    for split in ("train", "val", "test"):
        refuse_one_class(cohorts.part(split).records, findings, f"{real}, split {split!r}")
    if cohorts.external is not None:
        refuse_one_class(cohorts.external.records, findings, str(external))
    return cohorts


def _refuse_shared_patients(manifests: dict[str, Manifest], paths: dict[str, Path | None]) -> None:
    names = list(manifests)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            here, there = ({record.patient_id for record in manifests[name].records} for name in (one, other))
            if shared := here & there:
                raise ConfigError(
                    f"{len(shared)} patients are in {one} ({paths[one]}) and in {other} ({paths[other]}): {_some(shared)}. "
                    "What a classifier has trained on, it cannot be tested on"
                )


def refuse_one_class(records: Iterable[CXRRecord], findings: Sequence[str], where: str) -> None:
    """Raise `ConfigError` naming every finding that all films of `where` show, or none."""
    records = list(records)
    targets, mask = targets_of(records, findings)
    shown, known = (targets * mask).sum(0).int().tolist(), mask.sum(0).int().tolist()
    wrong = [f"{name} ({n} of {k})" for name, n, k in zip(findings, shown, known, strict=True) if n == 0 or n == k]
    if wrong:
        raise ConfigError(
            f"{where}: only one class of {', '.join(wrong)} films show it; leave it out of `findings`, or take more patients"
        )


def sources(
    arm: str, fraction: float, seed: int, real: Path, synthetic: Path | None, rare: Thinning | None, films: Films
) -> tuple[FilmSource, ...]:
    """What `arm` trains on at `fraction` of the real patients (the last stage of "pretrained"). Raises `ConfigError` where films lack.

    "synthetic" has as many films as the real arm, "synthetic-3x" three times as many; "mixed-3x" adds those to the real ones.
    "-all" takes every synthetic film there is.
    """
    own = FilmSource(manifest=real, fraction=fraction, rare=rare)
    if arm in ("real", "pretrained"):
        return (own,)
    assert synthetic is not None
    kind, _, amount = arm.partition("-")
    if amount == "all":
        added = FilmSource(manifest=synthetic)
    else:
        count = int(amount.removesuffix("x") or 1) * len(drawn(own, films, seed))
        there = sum(record.split == "train" for record in films.manifest(synthetic).records)
        if count > there:
            raise ConfigError(
                f"arms.{arm} at {fraction:g} of the real patients needs {count} synthetic films; {synthetic} has {there}. Take that "
                "fraction out of the arm, or generate more"
            )
        added = FilmSource(manifest=synthetic, films=count)
    return (own, added) if kind == "mixed" else (added,)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
