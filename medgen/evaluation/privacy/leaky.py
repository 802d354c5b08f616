"""The patients of configs/text_to_cxr/leaky.yaml: half to be memorised on purpose, half never seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medgen.data.records import read_manifest, write_manifest
from medgen.digital.chest import write_dataset


def write_leaky_patients(out: Path, patients: int = 48, seed: int = 7020) -> Path:
    """Write both films of digital patients below `out`, the first half of them in split train, the others in test; returns the manifest.

    Args:
        out: folder to write into.
        patients: how many, both halves together.
        seed: of the population.
    """
    films = read_manifest(write_dataset(out, 2 * patients, seed))
    order = list(dict.fromkeys(record.patient_id for record in films.records))
    members = set(order[: patients // 2])
    records = [replace(record, split="train" if record.patient_id in members else "test") for record in films.records]
    source = f"{films.source}; first half of the patients train, the others test"
    return write_manifest(records, out / "manifest.parquet", name=films.name, source=source)
