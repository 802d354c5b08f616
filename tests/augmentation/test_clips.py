"""The augmentation experiment on echo clips, from a plan of ejection fractions to the page, with tiny networks; and what it measures."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from made_up_runs import write_clip_runs
from sklearn.metrics import mean_absolute_error, r2_score
from tiny_echo import write_echo_pipeline

from medgen.augmentation import agreement
from medgen.augmentation.claims import Comparison, arm_words
from medgen.augmentation.clip_generate import collect
from medgen.augmentation.clip_plan import plan_clips
from medgen.augmentation.experiment import train
from medgen.augmentation.generate import generate
from medgen.augmentation.measures import Spread
from medgen.augmentation.outcomes import EJECTION_FRACTION, FINDINGS
from medgen.augmentation.plan import plan
from medgen.augmentation.planned import PlanError
from medgen.augmentation.report import report
from medgen.config import ConfigError
from medgen.data.echo_dataset import EchoDataset, VideoPreprocessing
from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest, write_manifest
from medgen.digital.echo import write_dataset

N = 8


@pytest.fixture(scope="module")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 digital hearts in clips of nine small frames: six to train on, three to choose by, three to test on."""
    root = tmp_path_factory.mktemp("hearts")
    records = read_manifest(write_dataset(root, n=12, seed=3, size=32, frames=9, processes=1), record=EchoRecord).records
    splits = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    moved = [replace(record, split=split) for record, split in zip(records, splits, strict=True)]  # type: ignore[arg-type]
    return write_manifest(moved, root / "manifest.parquet", name="hearts", source="test")


@pytest.fixture(scope="module")
def clips(hearts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan's clips."""
    out = tmp_path_factory.mktemp("clips")
    plan(hearts, out / "plan", n=N)
    pipeline = write_echo_pipeline(out / "pipeline")
    done = generate(out / "plan", str(pipeline), out / "clips", progress=False)
    assert str(done).startswith(f"{out / 'clips/manifest.parquet'}: {N} of {N} planned clips; see ")
    return out / "clips"


def test_sampled_clips_come_back_with_the_asked_ejection_fraction(clips: Path, hearts: Path) -> None:
    synthetic = read_manifest(clips / "manifest.parquet", "train", record=EchoRecord)
    lines = {Path(line["file_name"]).stem: line for line in map(json.loads, (clips / "metadata.jsonl").read_text().splitlines())}
    asked = {record.record_id: record for record in read_manifest(hearts, "train", record=EchoRecord).records}
    for record in synthetic.records:
        line = lines[record.record_id]
        assert record.ejection_fraction == line["ejection_fraction"] == asked[line["ecg_of"]].ejection_fraction
        assert record.patient_id == f"synthetic-{line['case_id']}" and record.view == asked[line["ecg_of"]].view
        assert record.extra["synthetic"] and record.extra["model_sha256"] and record.extra["noise_seed"] == line["noise_seed"]
    video = EchoDataset(synthetic, VideoPreprocessing(size=32, frames=8, fps=10))[0]["video"]
    assert video.shape == (8, 1, 32, 32)


def test_clips_without_a_label_or_from_a_patients_frame_are_left_out(clips: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (clips / "metadata.jsonl").read_text().splitlines()]
    lines[0]["ejection_fraction"], lines[1]["first_frame"] = None, "frame.png"
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = collect(tmp_path)
    assert (done.clips, done.sampled, len(done.notes)) == (N - 2, N, 2)
    with pytest.raises(PlanError, match="no metadata.jsonl: give a folder that `medgen sample ecg-to-echo` has finished"):
        collect(tmp_path / "none")


def a_hospital(root: Path, fractions: list[float], **changes: Any) -> Path:
    """Records without files: no plan opens one."""
    clip = EchoRecord("c", "p", "s", "c.avi", "A4C", 20.0, 9, "train", ecg="e", ecg_offset=1.0, pairing="beat_synchronous")
    records = [
        replace(clip, record_id=f"c{i}", patient_id=f"p{i}", ejection_fraction=fraction, **changes)
        for i, fraction in enumerate(fractions)
    ]
    return write_manifest(records, root / "manifest.parquet", name="hospital", source="test")


@pytest.mark.parametrize(("target", "low"), [("balance", 50), ("fill", 90), ("real", 10)])
def test_low_ejection_fractions_become_as_frequent_as_others(tmp_path: Path, target: str, low: int) -> None:
    manifest = a_hospital(tmp_path, [25.0 + i / 100 for i in range(10)] + [62.0 + i / 100 for i in range(90)])
    plan_clips(manifest, tmp_path, target, 100, "train", None, 0)
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    asked = [line["ejection_fraction"] < 30 for line in lines]
    assert sum(asked) == pytest.approx(low, abs=1) and sum(asked[:50]) == pytest.approx(low / 2, abs=9)
    assert json.loads((tmp_path / "plan.json").read_text())["planned"]["20 to 30"] == sum(asked)
    assert {(line["ecg"], line["ecg_start"], line["view"]) for line in lines} == {("e", 1.0, "A4C")}


def test_clips_without_an_ecg_are_asked_for_without_one(tmp_path: Path) -> None:
    manifest = a_hospital(tmp_path, [25.0, 62.0], ecg=None, ecg_offset=0.0, pairing="none")
    done = plan_clips(manifest, tmp_path, "balance", 4, "train", None, 0)
    lines = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    assert not any("ecg" in line for line in lines) and any("without an ECG" in note for note in done.notes)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_plans_that_cannot_be_made_are_refused(tmp_path: Path, hearts: Path) -> None:
    same = a_hospital(tmp_path, [55.0] * 4)
    with pytest.raises(PlanError, match="of 4 clips all between 50 to 60 %"):
        plan(same, tmp_path / "none")
    with pytest.raises(PlanError, match="it is balance, fill or real"):
        plan(hearts, tmp_path / "none", target="low")
    with pytest.raises(PlanError, match="100 clips from 6 would repeat one more than 10 times"):
        plan(hearts, tmp_path / "none", n=100)
    plan(hearts, tmp_path / "plan", n=2)
    with pytest.raises(PlanError, match="no gate judges echo clips yet"):
        generate(tmp_path / "plan", "digital_echo", tmp_path / "out", quality="shipped")


def experiment(folder: Path, hearts: Path, clips: Path, **changes: Any) -> Path:
    values = {
        "task": "ejection-fraction", "real": str(hearts), "synthetic": str(clips / "manifest.parquet"),
        "arms": {"real": [0.5], "mixed-2x": [0.5]}, "seeds": [0], "preprocessing": {"size": 32, "frames": 5, "fps": 10},
        "model": {"width": 8}, "windows": 1,
        "train": {"out": str(folder / "runs"), "steps": 4, "batch_size": 3, "learning_rate": 0.003, "warmup_steps": 1,
                  "mixed_precision": "no", "cpu": True, "ema": None, "tensorboard": False, "preflight": False,
                  "checkpoint_every": 2, "keep": 2, "validate_every": 0, "preview_every": 0},
    }  # fmt: skip
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def test_from_clips_to_the_page(tmp_path: Path, hearts: Path, clips: Path) -> None:
    config = experiment(tmp_path, hearts, clips)
    train(config)
    facts = json.loads((tmp_path / "runs/experiment.json").read_text())
    seen = {run["arm"]: (run["real_patients"], run["real_clips"], run["synthetic_clips"]) for run in facts["runs"]}
    assert seen == {"real": (3, 3, 0), "mixed-2x": (3, 3, 6)}
    real, mixed = (pq.read_table(tmp_path / f"runs/{arm}/50/0/predictions.parquet").to_pydict() for arm in ("real", "mixed-2x"))
    assert real["record_id"] == mixed["record_id"] and real["set"] == ["val"] * 3 + ["test"] * 3
    truth = {record.record_id: record.ejection_fraction for record in read_manifest(hearts, record=EchoRecord).records}
    assert real["truth_ejection_fraction"] == [truth[name] for name in real["record_id"]]
    assert real["p_ejection_fraction"] != mixed["p_ejection_fraction"]
    before = (tmp_path / "runs/real/50/0/run.json").stat().st_mtime_ns
    train(config, ("arms={real: [0.5], pretrained: [0.5]}",))  # another arm comes; what is complete stays
    assert before == (tmp_path / "runs/real/50/0/run.json").stat().st_mtime_ns
    assert (tmp_path / "runs/pretrained/50/0/predictions.parquet").exists()
    train(config)
    page = report(tmp_path / "runs", tmp_path / "page", fraction=0.5, resamples=100)
    told = json.loads((page.parent / "report.json").read_text())
    cell = next(row for row in told["measures"] if row["arm"] == "real")["macro"]
    test = [i for i, name in enumerate(real["set"]) if name == "test"]
    errors = np.array([real["p_ejection_fraction"][i] - real["truth_ejection_fraction"][i] for i in test])
    assert cell["mae"]["value"] == pytest.approx(np.abs(errors).mean()) and cell["bias"]["value"] == pytest.approx(errors.mean())
    assert told["primary"][0]["verdict"] == "one seed"
    assert "real clips and 2 times as many synthetic ones" in page.read_text() and "film" not in page.read_text()


def test_experiments_that_would_lie_are_refused(tmp_path: Path, hearts: Path, clips: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            train(experiment(tmp_path, hearts, clips, **changes))

    refused("12 patients are in real .* and in external", external=str(hearts))
    refused("synthetic: 12 of the 12 clips of .* do not say that they are synthetic", synthetic=str(hearts))
    refused(r"arms.mixed-2x at 1 of the real patients needs 12 synthetic clips; .* has 8", arms={"mixed-2x": [1.0]})
    refused("unknown key 'findings'", findings=["edema"])
    alike = [replace(r, ejection_fraction=50.0) for r in read_manifest(hearts, record=EchoRecord).records]
    same = write_manifest(alike, hearts.parent / "same.parquet", name="same", source="test")
    refused("split 'train': all 6 clips have the ejection fraction 50 %", real=str(same))


def test_agreement_is_scikit_learns_and_bland_and_altmans_on_every_resample() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(15, 75, 40)
    seen, weights = truth + rng.normal(2, 6, 40), rng.integers(0, 4, (12, 40)).astype(float)
    for ours, theirs in ((agreement.mae, mean_absolute_error), (agreement.r2, r2_score)):
        assert ours(truth, seen, weights) == pytest.approx([theirs(truth, seen, sample_weight=w) for w in weights])
    for row, w in enumerate(weights.astype(int)):
        difference = np.repeat(seen - truth, w)
        ends = difference.mean() + np.array([-1.96, 1.96]) * difference.std(ddof=1)
        assert agreement.bias(truth, seen, weights)[row] == pytest.approx(difference.mean())
        assert [side[row] for side in agreement.limits(truth, seen, weights)] == pytest.approx(ends.tolist())
    assert np.isnan(agreement.r2(np.full(4, 50.0), np.arange(4.0), np.ones((1, 4)))).all()


def test_less_error_is_better_and_more_auroc_is(tmp_path: Path) -> None:
    def verdict(value: float, kind: Any, outcome: Any) -> str:
        spread = Spread(value, value - 0.1 / outcome.scale, value + 0.1 / outcome.scale, 0.04 / outcome.scale, 0.03, 50, 3, ())
        return Comparison(kind, "synthetic", 0.1, "test", spread, 0.001, 0.001, outcome).verdict

    assert [verdict(x, "gain", EJECTION_FRACTION) for x in (-0.5, 0.5)] == ["better", "worse"]
    assert [verdict(x, "equal", EJECTION_FRACTION) for x in (-0.5, 0.5, 1.5, -1.5)] == [
        "within the margin", "within the margin", "behind", "not decided"
    ]  # fmt: skip
    assert [verdict(x, "gain", FINDINGS) for x in (0.05, -0.05)] == ["better", "worse"]
    assert [verdict(x, "equal", FINDINGS) for x in (0.01, -0.05, 0.05)] == ["within the margin", "behind", "not decided"]


def test_report_shows_the_error_that_was_made_and_who_is_read_worse(tmp_path: Path) -> None:
    runs = write_clip_runs(tmp_path / "runs", {("real", 0.1): 9.0, ("mixed-1x", 0.1): 6.0, ("synthetic", 0.1): 9.0})
    page = report(runs, tmp_path / "page", resamples=100)
    told = json.loads((page.parent / "report.json").read_text())
    gain = next(one for one in told["primary"] if one["kind"] == "gain")
    assert gain["verdict"] == "better" and gain["difference"]["value"] == pytest.approx(-3 * np.sqrt(2 / np.pi), abs=0.6)
    assert "Synthetic clips helped" in gain["sentence"] and gain["sentence"] in html.unescape(page.read_text())
    assert told["targets"][0]["met"]
    cell = next(row for row in told["measures"] if row["arm"] == "real")["macro"]
    assert cell["upper"]["value"] - cell["lower"]["value"] == pytest.approx(2 * 1.96 * 9, rel=0.15)
    groups = {group["name"] for group in told["missed"][0]["groups"]}
    assert {"below 30 %", "50 % and over", "A4C", "women"} <= groups


def test_arms_in_words() -> None:
    assert arm_words("mixed-all") == "real films and all synthetic ones"
    assert arm_words("mixed-3x", "clips") == "real clips and 3 times as many synthetic ones"
    assert arm_words("synthetic-all", "clips") == "synthetic clips alone, all of them"
    assert arm_words("synthetic-2x") == "synthetic films alone, 2 times as many"
    assert arm_words("synthetic") == "synthetic films alone" and arm_words("real", "clips") == "real clips"
