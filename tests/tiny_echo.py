"""An ECG-to-echo pipeline with random weights, for tests that sample: clips of 8 frames of 32 pixels at 10 Hz."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.denoiser import SequenceTransformer
from medgen.models.echo_conditioner import EchoConditioner
from medgen.pipelines.ecg_to_echo import ECGToEchoPipeline


def write_echo_pipeline(folder: Path) -> Path:
    """Save it to `folder`, and return that."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(
        patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, mid_block_attention=False, sample_size=32
    )
    vae, conditioner = build_autoencoder(shape), EchoConditioner(width=16, depth=1, heads=2)
    denoiser = SequenceTransformer(vae.config.latent_channels, 16, width=32, depth=2, heads=2, temporal_every=2,
                                   time_periods=(0.2, 20.0), feature_dim=conditioner.feature_dim)  # fmt: skip
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = ECGToEchoPipeline(vae, denoiser, conditioner, FlowMatchEulerDiscreteScheduler(), num_inference_steps=2, overlap=2,
                                 preprocessing={"size": 32, "frames": 8, "fps": 10.0}, guidance_scale=2.0)  # fmt: skip
    pipeline.save_pretrained(str(folder))
    return folder
