"""From some leads to all, end to end on a tiny population: train, resume, export, load, translate; hidden leads stay hidden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medgen.config import ConfigError
from medgen.data.ecg import LEADS, ECGError
from medgen.data.ecg_records import ECGRecord
from medgen.data.records import ManifestError, read_manifest
from medgen.digital.recordings import write_dataset
from medgen.pipelines.ecg_translation import ECGTranslationPipeline
from medgen.tasks.base import Task
from medgen.tasks.ecg_translation import ECGTranslation, ECGTranslationRecipe
from medgen.training.loop import train


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("recordings"), 16, seed=1, seconds=3.0, rate=250.0)


def a_recipe(manifest: Path, out: Path, **changes: Any) -> ECGTranslationRecipe:
    values: dict[str, Any] = {
        "data": {"manifest": manifest, "signals": LEADS, "latent_channels": 8, "window_frames": 6, "cache": manifest.parent / "cache"},
        "given": {"subsets": [["I", "II", "V2"], ["II"]], "random": 0.3},
        "denoiser": {"patch_size": 1, "width": 16, "depth": 1, "heads": 2, "temporal_every": 1, "time_periods": (0.25, 8.0)},
        "num_inference_steps": 2,
        "export_dtype": "float32",
        "train": {"out": out, "steps": 4, "batch_size": 4, "warmup_steps": 0, "cpu": True, "mixed_precision": "no", "log_every": 2,
                  "checkpoint_every": 2, "validate_every": 4, "preview_every": 4, "tensorboard": False},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return ECGTranslationRecipe.model_validate(values)


def test_a_run_ends_in_a_pipeline_and_a_resumed_run_in_the_same(manifest: Path, tmp_path: Path) -> None:
    whole = a_recipe(manifest, tmp_path / "whole")
    task = ECGTranslation(whole)
    assert isinstance(task, Task)
    result = train(task, whole.train, whole)
    assert result.metrics["val/loss"] > 0 or not len(task.dataset("val"))
    assert list((result.folder / "previews").glob("*.png"))
    assert "synthetic" in (result.folder / "export" / "README.md").read_text()

    half = a_recipe(manifest, tmp_path / "halves", train={"stop_at": 2})
    train(ECGTranslation(half), half.train, half)
    rest = a_recipe(manifest, tmp_path / "halves")
    train(ECGTranslation(rest), rest.train, rest)
    one, two = (ECGTranslationPipeline.from_pretrained(tmp_path / run / "export") for run in ("whole", "halves"))
    assert all(torch.equal(a, b) for a, b in zip(one.denoiser.parameters(), two.denoiser.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.autoencoder.parameters(), two.autoencoder.parameters(), strict=True))


def test_hidden_leads_do_not_reach_the_network(manifest: Path, tmp_path: Path) -> None:
    task = ECGTranslation(a_recipe(manifest, tmp_path, given={"random": 0.0, "subsets": [["I", "II", "V2"]]}))
    data = task.dataset("train")
    batch = task.collate([data[i] for i in range(4)])
    hidden = [i for i, name in enumerate(LEADS) if name not in ("I", "II", "V2")]
    changed = {**batch, "signals": batch["signals"].clone()}
    changed["signals"][:, hidden] = 100 * torch.randn(4, len(hidden), batch["signals"].shape[2])
    one, other = (task.frames(b, torch.Generator().manual_seed(0)) for b in (batch, changed))
    assert one.features is not None and other.features is not None
    assert torch.equal(one.features, other.features)  # all that the denoiser is told
    assert not torch.equal(one.latents, other.latents)  # what it is to find


def test_subsets_are_drawn_as_asked(manifest: Path, tmp_path: Path) -> None:
    task = ECGTranslation(a_recipe(manifest, tmp_path, given={"random": 0.5}))
    given = task.draw_given(2000, torch.Generator().manual_seed(0))
    named = sum(int((given == torch.tensor([n in s for n in LEADS])).all(1).sum()) for s in (("I", "II", "V2"), ("II",)))
    assert 900 < named < 1200
    assert given.any(1).all() and not given.all(1).any()
    assert (given[:, LEADS.index("V6")].float().mean() - 0.27).abs() < 0.05


def test_an_ecg_from_a_pulse_wave(manifest: Path, tmp_path: Path) -> None:
    recipe = a_recipe(manifest, tmp_path, data={"signals": ("II", "PPG")}, given={"subsets": [["PPG"]], "random": 0.0})
    task = ECGTranslation(recipe)
    pipeline = task.pipeline(task.modules())
    pipeline.set_progress_bar_config(disable=True)
    signals = task.dataset("train")[0]["signals"][None]
    drawn = pipeline.translate(signals, task.autoencoder.given(["PPG"])[None], generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (1, 1, 2, signals.shape[2]) and drawn.isfinite().all()
    assert torch.equal(drawn[0, 0, 1], signals[0, 1])


def test_windows_move_with_the_epoch_and_the_cache_changes_nothing(manifest: Path, tmp_path: Path) -> None:
    cached = ECGTranslation(a_recipe(manifest, tmp_path)).dataset("train")
    direct = ECGTranslation(a_recipe(manifest, tmp_path, data={"cache": None})).dataset("train")
    assert cached.fingerprint == direct.fingerprint
    assert torch.equal(cached[0]["signals"], direct[0]["signals"])
    for data in (cached, direct):
        data.set_epoch(3)
    assert torch.equal(cached[1]["signals"], direct[1]["signals"])
    first = cached[1]["signals"].clone()
    cached.set_epoch(4)
    assert not torch.equal(first, cached[1]["signals"])


def test_recordings_that_cannot_serve_are_named(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ECGError, match=r"none of \d+ recordings .*3.00 s long, the window has 6.4 s"):
        ECGTranslation(a_recipe(manifest, tmp_path, data={"window_frames": 50})).dataset("train")
    records = read_manifest(manifest, record=ECGRecord).records
    (manifest.parent / "ppg" / f"{records[0].record_id}.hea").rename(manifest.parent / "hidden.hea")
    try:
        data = ECGTranslation(
            a_recipe(manifest, tmp_path, data={"signals": ("II", "PPG"), "cache": None}, given={"subsets": [["PPG"]]})
        )
        assert "no WFDB record" in data.dataset("train").left_out.get(records[0].record_id, "no WFDB record")
    finally:
        (manifest.parent / "hidden.hea").rename(manifest.parent / "ppg" / f"{records[0].record_id}.hea")
    with pytest.raises(ManifestError, match="no manifest"):
        ECGTranslation(a_recipe(tmp_path / "none.parquet", tmp_path)).dataset("val")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"signals": ("II", "III")}}, "data.signals: .*through I and II"),
        ({"given": {"subsets": [["V9"]]}}, "given.subsets: .*must be some of"),
        ({"denoiser": {"patch_size": 2}}, "denoiser.patch_size: .*so 1"),
        ({"data": {"latent_channels": 999}}, "latent_channels 999"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(manifest: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ECGTranslation(a_recipe(manifest, tmp_path, **changes))


def test_digital_recordings_are_reproducible(manifest: Path, tmp_path: Path) -> None:
    again = read_manifest(write_dataset(tmp_path, 3, seed=1, seconds=3.0, rate=250.0), record=ECGRecord)
    first = read_manifest(manifest, record=ECGRecord)
    assert again.records == first.records[:3]
    for name in ("ecg", "ppg"):
        path = f"{name}/{again.records[2].record_id}.dat"
        assert np.array_equal(np.fromfile(tmp_path / path, np.int16), np.fromfile(manifest.parent / path, np.int16))
