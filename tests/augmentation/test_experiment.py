"""The augmentation experiment on two dozen films: arms, shares by patient, what is predicted, killed and continued, refused by name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from medgen.augmentation.experiment import train
from medgen.augmentation.experiment_config import load_experiment
from medgen.config import ConfigError
from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, FindingLabel, ManifestError, read_manifest, write_manifest

SIZE = 32
CONFIGS = Path(__file__).parents[2] / "configs"


def write_films(root: Path, splits: dict[str, int], synthetic: bool = False, prefix: str | None = None) -> Path:
    """Two films a patient, one when synthetic; a bright left half is an effusion, a bright right half edema."""
    (root / "images").mkdir(parents=True)
    records = []
    for split, count in splits.items():
        for patient in range(count):
            effusion, edema = patient % 2 == 0, patient % 3 == 0
            labels = (FindingLabel("pleural_effusion", "present" if effusion else "absent"),
                      FindingLabel("edema", "uncertain" if patient == 5 else "present" if edema else "absent"))  # fmt: skip
            for film in range(1 if synthetic else 2):
                pixels = np.random.default_rng([patient, film]).integers(30, 70, (SIZE, SIZE), dtype=np.uint8)
                pixels[:, : SIZE // 2] += 120 * effusion
                pixels[:, SIZE // 2 :] += 120 * edema
                name = f"{root.name}-{split}-{patient}-{film}"
                Image.fromarray(pixels).save(root / f"images/{name}.png")
                person = f"{prefix or root.name}-{split}-{patient}"
                records.append(CXRRecord(name, person, person, f"images/{name}.png", "PA", "", "", split, labels,  # type: ignore[arg-type]
                                         extra={"synthetic": True} if synthetic else {}))  # fmt: skip
    return write_manifest(records, root / "manifest.parquet", name=root.name, source="test")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("world")
    return {
        "real": str(write_films(root / "real", {"train": 12, "val": 6, "test": 6})),
        "synthetic": str(write_films(root / "synthetic", {"train": 26}, synthetic=True)),
        "external": str(write_films(root / "external", {"test": 7})),
    }


def write_config(folder: Path, world: dict[str, str], **changes: Any) -> Path:
    values = {
        **world, "arms": {"real": [1.0]}, "seeds": [0], "findings": ["pleural_effusion", "edema"],
        "preprocessing": {"size": SIZE}, "in_memory": True, "model": {"width": 8},
        "train": {"out": str(folder / "runs"), "steps": 6, "batch_size": 8, "learning_rate": 0.003, "warmup_steps": 1,
                  "schedule": "cosine", "mixed_precision": "no", "cpu": True, "ema": None, "tensorboard": False, "preflight": False,
                  "checkpoint_every": 2, "keep": 2, "validate_every": 0, "preview_every": 0},
    }  # fmt: skip
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def test_every_arm_predicts_the_same_films_and_says_what_it_saw(tmp_path, world, capsys):
    arms = {"real": [0.5, 1.0], "synthetic": [0.5], "mixed-2x": [0.5], "mixed-all": [0.5], "pretrained": [0.5]}
    config = write_config(tmp_path, world, arms=arms)
    train(config)
    facts = json.loads((tmp_path / "runs/experiment.json").read_text())
    assert (facts["complete"], facts["planned"]) == (True, 6)
    runs = {f"{run['arm']} {run['fraction']:g}": run for run in facts["runs"]}
    films = {name: (run["real_patients"], run["real_films"], run["synthetic_films"]) for name, run in runs.items()}
    assert films == {"real 0.5": (6, 12, 0), "real 1": (12, 24, 0), "synthetic 0.5": (0, 0, 12), "mixed-2x 0.5": (6, 12, 24),
                     "mixed-all 0.5": (6, 12, 26), "pretrained 0.5": (6, 12, 26)}  # fmt: skip
    assert runs["real 1"]["selected_step"] in (4, 6)  # the two kept
    assert runs["pretrained 0.5"]["selected_step"] in (2, 3)  # half of the steps went to synthetic films
    assert runs["real 1"]["positives"]["pleural_effusion"] == 12
    tables = {name: pq.read_table(tmp_path / "runs" / run["folder"] / "predictions.parquet") for name, run in runs.items()}
    first = tables["real 1"].to_pydict()
    assert [first["set"].count(name) for name in ("val", "test", "external")] == [12, 12, 14]
    assert all(table.to_pydict()["record_id"] == first["record_id"] for table in tables.values())
    doubtful = [name for name, known in zip(first["record_id"], first["mask_edema"], strict=True) if not known]
    assert doubtful and all("-5-" in name for name in doubtful)
    assert first["truth_pleural_effusion"][:4] == [1, 1, 0, 0]
    assert len({tuple(table.to_pydict()["p_edema"]) for table in tables.values()}) == 6  # every arm learned something else
    assert not list((tmp_path / "runs").glob("real/**/checkpoints"))

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("**/run.json")}
    train(config, ("seeds=[0, 1]", "arms={real: [1.0]}"))  # another seed comes; what is complete stays
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (tmp_path / "runs/real/100/1/predictions.parquet").exists()
    with pytest.raises(ConfigError, match=r"another experiment:\n  train.steps: 6 there, 7 now"):
        train(config, ("train.steps=7",))


KILLED = """
import os, signal, sys
sys.addaudithook(lambda event, args: event == "os.rename" and "step-00000004" in str(args[1]) and os.kill(os.getpid(), signal.SIGKILL))
from medgen.cli import main
main(sys.argv[1:])
"""


def test_killed_while_it_writes_a_checkpoint_the_same_command_gives_the_same_predictions(tmp_path, world, capsys):
    del (alone := dict(world))["synthetic"]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    config = write_config(tmp_path / "killed", alone)
    process = subprocess.run([sys.executable, "-c", KILLED, "augment", "train", "--config", config], stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL
    checkpoints = tmp_path / "killed/runs/real/100/0/training/checkpoints"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000002"]
    train(config)
    assert "continuing" in capsys.readouterr().err
    train(write_config(tmp_path / "whole", alone))
    whole, killed = (tmp_path / name / "runs/real/100/0/predictions.parquet" for name in ("whole", "killed"))
    assert pq.read_table(whole).equals(pq.read_table(killed))


def test_shards_share_the_runs(tmp_path, world, capsys):
    config = write_config(tmp_path, world, arms={"real": [0.5, 1.0]})
    train(config, ("train.steps=2",), shard=1, shards=2)
    assert "1 of 2 runs are complete" in capsys.readouterr().out
    assert not (tmp_path / "runs/real/50").exists()


def test_what_would_make_the_figures_lie_is_refused_by_name(tmp_path, world):
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises((ConfigError, ManifestError), match=message):
            train(write_config(tmp_path, world, **changes))

    again = write_films(tmp_path / "again", {"test": 4}, prefix="real")  # the same test patients under another roof
    refused(
        r"4 patients are in real .* and in external .*: real-test-0, real-test-1, real-test-2, real-test-3", external=str(again)
    )
    copied = write_films(tmp_path / "copied", {"train": 12}, synthetic=True, prefix="external-test".removesuffix("-test"))
    manifest = read_manifest(copied)
    moved = [replace(record, patient_id=record.patient_id.replace("train", "test")) for record in manifest.records]
    write_manifest(moved, copied, name="copied", source="test")
    refused("7 patients are in synthetic .* and in external", synthetic=str(copied))
    refused(r"synthetic: 14 of the 14 films of .* do not say that they are synthetic", synthetic=world["external"], external=None)
    refused("external: 26 of the 26 films of .* are synthetic", external=world["synthetic"], synthetic=None)
    healthy = [replace(r, labels=()) for r in read_manifest(world["external"]).records]
    root = Path(world["external"]).parent
    refused(r"one_class.parquet: only one class of pleural_effusion \(0 of 14\), edema \(0 of 14\)",
            external=str(write_manifest(healthy, root / "one_class.parquet", name="x", source="test")))  # fmt: skip
    clip = EchoRecord("clip", "person", "study", "clip.avi", "A4C", 20.0, 9, "test")
    hearts = write_manifest([clip], tmp_path / "hearts.parquet", name="hearts", source="test")
    refused("lists records of kind 'echo'; expected a manifest of 'cxr'", external=str(hearts))
    refused(r"arms.mixed-2x at 1 of the real patients needs 48 synthetic films; .* has 26", arms={"mixed-2x": [1.0]})
    refused("'mixed-12x' is no arm", arms={"mixed-12x": [1.0]})
    refused(r"arms mixed-1x need `synthetic`", arms={"mixed-1x": [1.0]}, synthetic=None)
    refused(r"findings.1.*expected 'pleural_effusion'.*got 'fracture'", findings=["edema", "fracture"])
    refused("rare.finding 'nodule' is not among", rare={"finding": "nodule", "prevalence": 0.01})
    refused(
        "pleural_effusion in 0.10% of the films would be 0 of them", rare={"finding": "pleural_effusion", "prevalence": 0.001}
    )


@pytest.mark.parametrize("name", ["digital_chest", "digital_chest_rare", "mimic_cxr", "digital_echo", "echonet_dynamic"])
def test_the_shipped_experiments_are_valid(name):
    assert len(load_experiment(CONFIGS / f"augmentation/{name}.yaml").seeds) >= 3
