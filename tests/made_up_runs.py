"""Predictions of a made-up augmentation experiment whose true effects are known, written as `medgen augment train` writes them.

Every film has a latent difficulty for each finding; a classifier's score is `skill` x truth + what all classifiers see alike + what
this training alone sees. For two normals `skill` apart with common variance, AUROC = Phi(skill / sqrt(2 variance)).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, write_manifest

FINDINGS = ("pleural_effusion", "nodule", "edema")
SHARED, OWN, OF_SEED = (
    0.8,
    0.6,
    0.04,
)  # spread of what classifiers have in common; of one film in one training; of skill over seeds


def true_auroc(skill: float) -> float:
    """Mean over trainings, over other patients."""
    return float(norm.cdf(skill / np.sqrt(2 * (SHARED**2 + OWN**2) + OF_SEED**2)))


def skill_for(auroc: float) -> float:
    """The skill whose `true_auroc` that is."""
    return float(norm.ppf(auroc) * np.sqrt(2 * (SHARED**2 + OWN**2) + OF_SEED**2))


def write_runs(
    out: Path,
    aurocs: Mapping[tuple[str, float], float],
    *,
    seeds: int = 3,
    patients: int = 150,
    draw: int = 0,
    missed_women: float = 0.0,
    sets: tuple[str, ...] = ("val", "test", "external"),
) -> Path:
    """RUNS with a run for every (arm, fraction) of `aurocs` and seed; women's findings score lower by `missed_women`."""
    rng = np.random.default_rng(draw)
    sites: dict[str, list[CXRRecord]] = {"real": [], "external": []}
    films: dict[str, list[CXRRecord]] = {}
    for name in sets:
        films[name] = [record for i in range(patients) for record in _patient(name, i, rng)]
        sites["external" if name == "external" else "real"] += films[name]
    manifests = {}
    for key, records in sites.items():
        if records:
            path = write_manifest(records, out / "manifests" / key / "manifest.parquet", name=f"made-up {key}", source="test")
            manifests[key] = {"path": str(path), "name": f"made-up {key}", "sha256": _sha(path)}
    truths = {name: rng.random((len(r) // 2, len(FINDINGS))).repeat(2, axis=0) < 0.3 for name, r in films.items()}
    common = {
        name: rng.normal(0, SHARED, (len(t) // 2, t.shape[1])).repeat(2, axis=0) for name, t in truths.items()
    }  # a patient is as hard twice
    runs = []
    luck = {(arm, f, s): rng.normal(0, OF_SEED) for arm, f in aurocs for s in range(seeds)}
    for (arm, fraction), wanted in aurocs.items():
        for seed in range(seeds):
            skill = skill_for(wanted) + luck[arm, fraction, seed]
            tables = [_predicted(name, films[name], truths[name], common[name], skill, missed_women, rng) for name in sets]
            folder = f"{arm}/{fraction * 100:g}/{seed}"
            (out / folder).mkdir(parents=True)
            pd.concat(tables).to_parquet(out / folder / "predictions.parquet")
            real = 0 if arm.startswith("synthetic") else round(4000 * fraction)
            runs.append(
                {
                    "arm": arm, "fraction": fraction, "seed": seed, "folder": folder, "real_films": real, "real_patients": real // 2,
                    "synthetic_films": 0 if arm == "real" else round(4000 * fraction), "selected_step": 100, "val_loss": 0.3,
                    "positives": {f: round((0.01 if f == "nodule" else 0.3) * 4000 * fraction) for f in FINDINGS},
                    "cpu_seconds": 1.0,
                }
            )  # fmt: skip
    facts = {
        "findings": FINDINGS,
        "manifests": manifests,
        "config": {"rare": None},
        "runs": runs,
        "planned": len(runs),
        "complete": True,
    }
    (out / "experiment.json").write_text(json.dumps({**facts, "notes": ["made up to test the report"]}))
    return out


def write_clip_runs(out: Path, errors: Mapping[tuple[str, float], float], *, seeds: int = 3, patients: int = 120) -> Path:
    """RUNS of networks that read ejection fractions with a normal error of that many points, the same patients wrong in all of them."""
    rng, people, truths, shared = np.random.default_rng(0), {}, {}, {}
    for name in ("val", "test"):
        truths[name], shared[name] = rng.uniform(15, 75, patients), rng.normal(0, 1, patients)
        people[name] = [
            EchoRecord(f"{name}{i:03d}", f"{name}{i:03d}", f"{name}{i:03d}", f"{name}{i:03d}.avi", ("A4C", "A2C")[i % 2], 20.0, 32, name,
                       float(truths[name][i]), sex="FM"[i % 3 == 0], age=60.0)  # type: ignore[arg-type]
            for i in range(patients)
        ]  # fmt: skip
    path = write_manifest([*people["val"], *people["test"]], out / "hearts.parquet", name="made-up hearts", source="test")
    runs = []
    for (arm, fraction), error in errors.items():
        for seed in range(seeds):
            folder = f"{arm}/{fraction * 100:g}/{seed}"
            (out / folder).mkdir(parents=True)
            tables = []
            for name, records in people.items():
                own = 0.8 * shared[name] + 0.6 * rng.normal(0, 1, patients)
                ids = [record.record_id for record in records]
                tables.append(pd.DataFrame({
                    "record_id": ids, "patient_id": ids, "set": name, "truth_ejection_fraction": truths[name],
                    "mask_ejection_fraction": True, "p_ejection_fraction": truths[name] + error * own,
                }))  # fmt: skip
            pd.concat(tables).to_parquet(out / folder / "predictions.parquet")
            real = 0 if arm.startswith("synthetic") else round(1000 * fraction)
            runs.append({"arm": arm, "fraction": fraction, "seed": seed, "folder": folder, "real_clips": real, "real_patients": real,
                         "synthetic_clips": 0 if arm == "real" else round(1000 * fraction),
                         "ejection_fraction": {"mean": 46.0, "std": 17.0, "below_40": 4}})  # fmt: skip
    facts = {
        "findings": ["ejection_fraction"], "config": {"task": "ejection-fraction"}, "runs": runs, "planned": len(runs),
        "complete": True, "manifests": {"real": {"path": str(path), "name": "made-up hearts", "sha256": _sha(path)}}, "notes": [],
    }  # fmt: skip
    (out / "experiment.json").write_text(json.dumps(facts))
    return out


def _patient(name: str, i: int, rng: np.random.Generator) -> list[CXRRecord]:
    sex, age = ("F" if rng.random() < 0.5 else "M"), float(rng.integers(20, 95))
    who = f"{name}{i:04d}"
    split = "val" if name == "val" else "test"
    return [
        CXRRecord(f"{who}-{view}", who, who, f"{who}-{view}.png", view, "Clear.", "Clear.", split, age=age, sex=sex)  # type: ignore[arg-type]
        for view in ("PA", "AP")
    ]


def _predicted(
    name: str,
    records: list[CXRRecord],
    truth: np.ndarray,
    common: np.ndarray,
    skill: float,
    missed_women: float,
    rng: np.random.Generator,
) -> pd.DataFrame:
    women = np.array([r.sex == "F" for r in records])[:, None]
    score = (skill - missed_women * women) * truth + common + rng.normal(0, OWN, truth.shape)
    columns: dict[str, object] = {
        "record_id": [r.record_id for r in records], "patient_id": [r.patient_id for r in records], "set": name
    }  # fmt: skip
    for i, finding in enumerate(FINDINGS):
        columns[f"truth_{finding}"] = truth[:, i].astype("int8")
        columns[f"mask_{finding}"] = np.arange(len(records)) % 17 != i
        columns[f"p_{finding}"] = (1 / (1 + np.exp(-1.5 * (score[:, i] - skill / 2) + 0.8))).astype("float32")
    return pd.DataFrame(columns)


def _sha(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
