"""What the quality gate lets through and what it stops, on real held-out films: their own reports, and reports with one planted error."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medgen.augmentation.captions import FRONTAL
from medgen.data.images import load_image
from medgen.data.records import FINDINGS, CXRRecord, FindingLabel, Split, read_manifest
from medgen.evaluation.statistics import Estimate, Indices, group_bootstrap
from medgen.models.classifier import SIDED_FINDINGS
from medgen.sampling.quality_gate import QualityGate
from medgen.seeds import stable_seed

CHECK = "quality_gate.json"


def check_quality_gate(heldout: Path, out: Path, judge: Path | None = None, split: Split = "test", seed: int = 0) -> Path:
    """Measure the quality gate on patients whom its judge never saw; writes quality_gate.json with intervals over patients.

    Reported: how many real films pass with their own report (by finding, too: those it stops, it would stop when synthetic), and how
    many are stopped when one present finding is denied, put on the other side, or one that is not there is invented.

    Args:
        heldout: manifest of patients whom the judge never saw.
        out: folder to write into.
        judge: classifier's export folder; the shipped judge if not given.
        split: which split of the manifest.
        seed: of the invented findings and of the intervals.
    """
    gate = QualityGate.load(judge)
    manifest = read_manifest(heldout, split)
    own: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    planted: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for record in (record for record in manifest.records if record.view in FRONTAL):
        image = load_image(manifest.image_path(record), int(gate.judge.config["image_size"]))[None]
        passed = gate.verdict(image, record.labels).passed
        present: list[str] = [label.name for label in record.labels if label.state == "present"]
        for group in ("all", *(present or ["normal"])):
            own[group].append((record.patient_id, passed))
        for kind, labels in _planted(record, seed):
            planted[kind].append((record.patient_id, not gate.verdict(image, labels).passed))
    report = {
        "manifest": {"name": manifest.name, "sha256": manifest.sha256, "split": split},
        "gate": gate.describe(),
        "passed_with_own_report": {name: _rate(rows, seed).as_dict() for name, rows in own.items()},
        "stopped_with_planted_error": {name: _rate(rows, seed).as_dict() for name, rows in sorted(planted.items())},
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / CHECK).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return out / CHECK


def _planted(record: CXRRecord, seed: int) -> Iterator[tuple[str, list[FindingLabel]]]:
    """The labels of `record` with one error each."""
    labels = list(record.labels)
    for place, label in enumerate(labels):
        if label.state != "present":
            continue
        rest = labels[:place] + labels[place + 1 :]
        yield "denied", [*rest, FindingLabel(label.name, "absent")]
        if label.side in ("left", "right"):
            yield "other side", [*rest, replace(label, side="right" if label.side == "left" else "left")]
    free = [name for name in FINDINGS if name not in {label.name for label in labels if label.state != "absent"}]
    rng = np.random.default_rng(stable_seed("planted", seed, record.study_id))
    if free:
        name = free[int(rng.integers(len(free)))]
        side = ("left", "right")[int(rng.integers(2))] if name in SIDED_FINDINGS else None
        yield "invented", [*(x for x in labels if x.name != name), FindingLabel(name, "present", side)]  # type: ignore[arg-type]


def _rate(rows: Sequence[tuple[str, bool]], seed: int) -> Estimate:
    patients, hits = zip(*rows, strict=True)
    values = np.array(hits, dtype=float)

    def share(chosen: Indices) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return values[chosen].mean(keepdims=True)

    return group_bootstrap(share, patients, seed)[0]
