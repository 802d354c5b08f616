"""The patients of configs/text_to_cxr/leaky.yaml and configs/memcontrol/leaky.yaml: some to be memorised, others never seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medgen.data.records import Split, read_manifest, write_manifest
from medgen.digital.chest import write_dataset
from medgen.digital.site import SiteName


def write_leaky_patients(out: Path, patients: int = 48, seed: int = 7020, site: SiteName = "A", validation: int = 0) -> Path:
    """Write the films of digital patients below `out`: half of `patients` in split train, half in test; returns the manifest.

    Site A is the hospital that the shipped pipeline knows: fine-tuning on it can only memorise. Site B is new to it, so that there is
    something to learn as well; its patients have one film, those of A two.

    Args:
        out: folder to write into.
        patients: how many, both halves together.
        seed: of the population.
        site: their hospital.
        validation: further patients, in split val, to measure quality on.
    """
    films = read_manifest(write_dataset(out, (2 if site == "A" else 1) * (patients + validation), seed, site=site))
    order = list(dict.fromkeys(record.patient_id for record in films.records))
    half = patients // 2
    splits: dict[str, Split] = {name: "train" if i < half else "test" if i < patients else "val" for i, name in enumerate(order)}
    records = [replace(record, split=splits[record.patient_id]) for record in films.records]
    source = f"{films.source}; of {patients} patients half train, half test; the next {validation} val"
    return write_manifest(records, out / "manifest.parquet", name=films.name, source=source)
