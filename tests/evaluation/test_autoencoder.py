"""Reconstruction quality in known cases, and the files of a whole run with a tiny autoencoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from medgen.data.records import write_manifest
from medgen.data.visit_records import Visit, VisitSeries
from medgen.data.volumes import write_volume
from medgen.evaluation.autoencoder import evaluate_autoencoder, reconstruction_quality
from medgen.evaluation.images import EvaluationError
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.volume_autoencoder import VolumeAutoencoderKL


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 1, 32, 32)
    errors = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1).expand_as(images)
    psnr, ssim = reconstruction_quality(images, images + errors)
    assert psnr.tolist() == pytest.approx([20.0, 40.0], abs=1e-3)  # 10 log10(2² / 0.2²)
    assert ssim.shape == (2,)
    assert reconstruction_quality(images, images)[1].tolist() == pytest.approx([1.0, 1.0])


def test_a_run_writes_intervals_and_the_worst_films(tmp_path, reference):
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=(8, 16), norm_num_groups=8, sample_size=32, mid_block_attention=False)
    build_autoencoder(config).save_pretrained(tmp_path / "vae")
    metrics = json.loads(evaluate_autoencoder(tmp_path / "vae", reference, tmp_path / "out").read_text())
    assert metrics["images"] == 120
    for name in ("psnr_db", "ssim"):
        assert metrics[name]["low"] < metrics[name]["value"] < metrics[name]["high"]
        assert metrics[name]["worst"] <= metrics[name]["value"]
    assert (tmp_path / "out" / "worst.png").stat().st_size > 1000


def test_an_empty_split_is_said(tmp_path, reference):
    config = AutoencoderConfig(block_out_channels=(8,), norm_num_groups=8, sample_size=32, mid_block_attention=False)
    build_autoencoder(config).save_pretrained(tmp_path / "vae")
    with pytest.raises((EvaluationError, ValueError), match="split 'val'"):
        evaluate_autoencoder(tmp_path / "vae", reference, tmp_path / "out", split="val")


def test_volumes_are_measured_as_films_are(tmp_path, reference):
    """Prepared as the autoencoder's training visits were: with its window, at its size."""
    series = []
    for index in range(4):
        visits = []
        for k in range(2):
            hu = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(10 * index + k)) * 300 - 500
            write_volume(tmp_path / f"v{index}{k}.nii.gz", hu, np.diag([5.0, 5.0, 5.0, 1.0]))
            visits.append(Visit(f"v{index}{k}", float(k), f"v{index}{k}.nii.gz"))
        series.append(VisitSeries(f"s{index}", f"p{index}", f"s{index}", tuple(visits), "ct", 3, "days", "test"))
    manifest = write_manifest(series, tmp_path / "manifest.parquet", name="volumes", source="test")
    torch.manual_seed(0)
    model = VolumeAutoencoderKL(block_out_channels=(8,), norm_num_groups=4, patch_size=2, sample_size=16)
    model.save_pretrained(tmp_path / "vae")
    metrics = json.loads(evaluate_autoencoder(tmp_path / "vae", manifest, tmp_path / "out").read_text())
    assert metrics["images"] == 8 and metrics["size"] == 16
    assert metrics["psnr_db"]["low"] <= metrics["psnr_db"]["value"] <= metrics["psnr_db"]["high"]
    assert (tmp_path / "out" / "worst.png").stat().st_size > 1000
    with pytest.raises(EvaluationError, match="autoencoder of volumes"):
        evaluate_autoencoder(tmp_path / "vae", reference, tmp_path / "out")
