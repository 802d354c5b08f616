"""Generated leads are compared with recorded ones: regressions, R peaks, controls, and a report that says it all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.data.ecg import LEADS
from medgen.diffusion.objectives import Objective, ObjectiveConfig
from medgen.digital.recordings import write_dataset
from medgen.evaluation import ecg_translation
from medgen.evaluation.ecg_translation import evaluate
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.signal_measures import LinearRegression, correlation, f1, match_peaks
from medgen.models.denoiser import SequenceTransformer
from medgen.models.signal_autoencoder import fit_signal_autoencoder
from medgen.pipelines.ecg_translation import ECGTranslationPipeline


def test_regression_finds_the_mixing_and_the_lag() -> None:
    rng = np.random.default_rng(0)
    given = [rng.standard_normal((2, 300)).astype(np.float32) for _ in range(4)]
    mixed = [np.stack([2 * g[0] - g[1]]) for g in given]
    np.testing.assert_allclose(LinearRegression().fit(given, mixed).predict(given[0]), mixed[0], atol=0.01)
    late = [np.roll(g[:1], 3, 1) for g in given]
    inner = slice(5, -5)
    lagged = LinearRegression(reach=5).fit(given, late).predict(given[0])
    np.testing.assert_allclose(lagged[:, inner], late[0][:, inner], atol=0.15)  # the roll wraps: not quite exact
    assert np.abs(LinearRegression().fit(given, late).predict(given[0])).mean() < 0.2  # the same instant knows nothing of it


def test_correlation_is_per_lead() -> None:
    wave = np.sin(np.arange(100) / 5)
    first, second = np.stack([wave, wave, wave]), np.stack([3 * wave + 1, -wave, np.ones(100)])
    r = correlation(first.astype(np.float32), second.astype(np.float32))
    np.testing.assert_allclose(r[:2], [1, -1], atol=1e-6)
    assert np.isnan(r[2])


def test_peaks_match_one_to_one_within_the_tolerance() -> None:
    match = match_peaks(np.array([1.02, 1.04, 2.2, 3.0]), np.array([1.0, 2.0, 3.0]), 0.05)
    assert (match.true, match.found, match.matched) == (3, 4, 2)
    np.testing.assert_allclose(sorted(match.errors), [0.0, 0.02], atol=1e-9)
    assert f1([match]) == pytest.approx(4 / 7)
    assert match_peaks(np.zeros(0), np.array([1.0]), 0.05).matched == 0
    assert np.isnan(f1([]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A manifest of digital recordings, and an untrained pipeline: its mean is the linear guess it starts from."""
    root = tmp_path_factory.mktemp("translation")
    manifest = write_dataset(root / "data", 40, seed=2, seconds=4.0, rate=250.0)
    data = ecg_translation.load_recordings(
        ecg_translation.read_manifest(manifest, "train", record=ecg_translation.ECGRecord),
        LEADS,
        ecg_translation.ECGPreparation(rate=125),
        None,
        root / "cache",
    )
    signals = torch.from_numpy(np.stack([s[:, :496] for s in data.signals]))
    given = torch.tensor([[name in ("I", "II", "V2") for name in LEADS]] * len(signals))
    codec = fit_signal_autoencoder(LEADS, signals, given, 16, 8)
    denoiser = SequenceTransformer(
        8, 1, 1, patch_size=1, width=16, depth=1, heads=2, temporal_every=1, feature_dim=codec.feature_width
    )
    pipeline = ECGTranslationPipeline(
        codec, denoiser, Objective(ObjectiveConfig()).scheduler(), {"rate": 125}, 10, 2, default_given="I,II,V2"
    )
    pipeline.save_pretrained(root / "pipeline")
    return root / "pipeline", manifest


def test_the_report(world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ecg_translation, "SMALLEST_SET", 2)
    pipeline, manifest = world
    path = evaluate(pipeline, manifest, tmp_path, trajectories=2, cache=manifest.parents[1] / "cache")
    found = json.loads(path.read_text())
    assert found["given"] == ["I", "II", "V2"] and "II" not in found["missing"] and len(found["missing"]) == 9
    rmse, ratio = found["rmse_mv"], found["ratio_to_linear"]
    assert rmse["linear"]["III"] < 0.01 < rmse["linear"]["V5"]  # Einthoven is exact, the chest is not
    assert rmse["single"]["III"] < 0.01
    assert ratio["linear"]["all"]["value"] == 1 and ratio["linear"]["all"]["n"] == found["recordings"]
    assert rmse["mean_shuffled"]["all"] > 2 * rmse["linear"]["all"]
    assert found["r_peaks"]["recorded"]["f1_100ms"] > 0.9 > found["r_peaks"]["linear_shuffled"]["f1_50ms"]
    assert "| V5 |" in (tmp_path / "leads.md").read_text()
    assert (tmp_path / "examples.png").stat().st_size > 10_000


def test_refusals(world: tuple[Path, Path], tmp_path: Path) -> None:
    pipeline, manifest = world
    with pytest.raises(EvaluationError, match="no lead is missing"):
        evaluate(pipeline, manifest, tmp_path, given=LEADS)
    with pytest.raises(EvaluationError, match="are in the reference and in the training split"):
        evaluate(pipeline, manifest, tmp_path, split="train")
