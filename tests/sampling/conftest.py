"""Tiny pipelines that these tests sample: Stable Diffusion made with diffusers' own classes, and medgen's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny_echo import write_echo_pipeline
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.denoiser import SequenceTransformer
from medgen.models.progression_conditioner import ProgressionConditioner
from medgen.models.volume_autoencoder import VolumeAutoencoderKL
from medgen.pipelines.progression import ProgressionPipeline
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.tasks.text_encoder import train_tokenizer


def tokenizer() -> CLIPTokenizer:
    """Each character is a token."""
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=64)


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer(),
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(folder / "tiny"))
    return folder / "tiny"


@pytest.fixture(scope="session")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow model with random weights (a fresh one would predict zero for every prompt)."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(
        patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, mid_block_attention=False, sample_size=32
    )
    vae = build_autoencoder(shape)
    words = train_tokenizer(["Large left pleural effusion.", "Large right pleural effusion. No pneumothorax."], 300, 32)
    bert = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=64, pad_token_id=words.pad_token_id)  # fmt: skip
    denoiser = SequenceTransformer(vae.config.latent_channels, 16, width=32, depth=2, heads=2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = TextToCXRPipeline(vae, denoiser, BertModel(bert, add_pooling_layer=False), words, FlowMatchEulerDiscreteScheduler(),
                                 preprocessing={"size": 32}, num_inference_steps=3, guidance_scale=2.0)  # fmt: skip
    folder = tmp_path_factory.mktemp("pipelines") / "own"
    pipeline.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def echo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ECG to echo with random weights: clips of 8 frames of 32 pixels at 10 Hz."""
    return write_echo_pipeline(tmp_path_factory.mktemp("pipelines") / "echo")


@pytest.fixture(scope="session")
def progression_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A forecaster of 32-pixel pictures with random weights, for tests/follow_ups.py."""
    return forecaster(tmp_path_factory.mktemp("pipelines") / "progression", 2)


@pytest.fixture(scope="session")
def progression_folder_3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of volumes of 16³ voxels."""
    return forecaster(tmp_path_factory.mktemp("pipelines") / "progression_3d", 3)


def forecaster(folder: Path, dim: int) -> Path:
    """A `ProgressionPipeline` with random weights, saved."""
    torch.manual_seed(0)
    vae: AutoencoderKL | VolumeAutoencoderKL
    if dim == 2:
        shape = AutoencoderConfig(
            patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, mid_block_attention=False, sample_size=32
        )
        vae = build_autoencoder(shape)
    else:
        vae = VolumeAutoencoderKL(latent_channels=2, patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16)
    conditioner = ProgressionConditioner(
        16, events=["drainage"], numbers={"age": [50.0, 10.0], "weight_kg": [70.0, 10.0]}, words={"sex": ["F", "M"]}
    )
    denoiser = SequenceTransformer(vae.config.latent_channels, 16, spatial_dims=dim, width=24, depth=2, heads=2, temporal_every=2,
                                   time_periods=(2.0, 200.0), feature_dim=conditioner.feature_dim)  # fmt: skip
    for module in (denoiser, conditioner):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline = ProgressionPipeline(vae, denoiser, conditioner, FlowMatchEulerDiscreteScheduler(),
                                   preprocessing={"dim": dim, "size": 32 if dim == 2 else 16}, num_inference_steps=2,
                                   guidance_scale=2.0)  # fmt: skip
    pipeline.save_pretrained(str(folder))
    return folder
