"""Reconstruction quality in known cases, and the files of a whole run with a tiny autoencoder."""

from __future__ import annotations

import json

import pytest
import torch

from medgen.evaluation.autoencoder import evaluate_autoencoder, reconstruction_quality
from medgen.evaluation.images import EvaluationError
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder


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
