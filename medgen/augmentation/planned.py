"""What every plan of synthetic data is on disk, of films or of clips: cases.jsonl, plan.json and plan.png in one folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen.data.records import Manifest, Record, Split

CASES, PLAN, PLOT = "cases.jsonl", "plan.json", "plan.png"


class PlanError(ValueError):
    """A plan that cannot be made; the message names the classes or patients and what to do."""


@dataclass(frozen=True)
class Planned:
    """What `plan` wrote."""

    out: Path
    n: int
    notes: tuple[str, ...]
    items: str = "prompts"

    def __str__(self) -> str:
        return f"{self.out / CASES}: {self.n} {self.items}; see {self.out / PLOT}" + "".join(f"\n  {note}" for note in self.notes)


def origin(data: Manifest[Any], manifest: Path, out: Path, split: Split) -> dict[str, str]:
    """Which records a plan was made for; the path leads from the plan's folder to the manifest."""
    return {"name": data.name, "sha256": data.sha256, "path": os.path.relpath(manifest, out), "split": split}


def refuse_shared_patients(data: Manifest[Any], heldout: Manifest[Any]) -> None:
    """Raise `PlanError` naming the patients of `data` who are among those held out."""
    shared = sorted(_patients(data) & _patients(heldout))
    if shared:
        raise PlanError(
            f"{len(shared)} patients are both in the split to plan for and in {heldout.name!r}, which was to be held out: "
            f"{', '.join(shared[:10])}{', ...' if len(shared) > 10 else ''}; take them out of one of the two"
        )


def _patients(manifest: Manifest[Record]) -> set[str]:
    return {record.patient_id for record in manifest.records}


def write_plan(out: Path, cases: str, facts: Mapping[str, Any], plot: bytes) -> None:
    """The plan's folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, content in {CASES: cases.encode(), PLAN: json.dumps(facts, indent=1).encode(), PLOT: plot}.items():
        (out / name).write_bytes(content)


def read_facts(folder: Path) -> dict[str, Any]:
    """A plan's facts. Raises `PlanError` for a folder that is none."""
    try:
        facts: dict[str, Any] = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PlanError(f"{folder} is no plan: no readable {PLAN}; `medgen augment plan` writes one") from None
    return facts
