"""A tiny pipeline of the right kind, and the films of a few patients to fine-tune it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig

from medgen.config import save_config
from medgen.data.records import CXRRecord, FindingLabel, write_manifest
from medgen.diffusion.objectives import Objective, ObjectiveConfig
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.search import search
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.conditioners import TokenBert
from medgen.models.denoiser import SequenceTransformer
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.tasks.text_encoder import train_tokenizer

SIZE = 32
SIDES = ("left", "right")


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One film of each of 56 patients: 8 to train on, 40 to validate, 8 never seen."""
    root = tmp_path_factory.mktemp("films")
    (root / "images").mkdir()
    records = []
    for i in range(56):
        side = SIDES[i % 2]
        pixels = np.random.default_rng(i).integers(30, 90, (SIZE, SIZE), dtype=np.uint8)
        half = slice(SIZE // 2, None) if side == "left" else slice(0, SIZE // 2)  # a patient's left is the film's right
        pixels[SIZE // 2 :, half] += 100
        Image.fromarray(pixels).save(root / "images" / f"r{i}.png")
        split: Any = "train" if i < 8 else "val" if i < 48 else "test"
        effusion = FindingLabel("pleural_effusion", "present", side, "large")  # type: ignore[arg-type]
        text = f"Large {side} pleural effusion."
        records.append(CXRRecord(f"r{i}", f"p{i}", f"s{i}", f"images/r{i}.png", "PA", text, text, split, (effusion,)))
    return write_manifest(records, root / "manifest.parquet", name="tiny", source="test")


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks: four attention layers. Not at zero, where adaLN would hide the blocks."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Large left pleural effusion.", "Large right pleural effusion."], 300, 32)
    text = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    denoiser = SequenceTransformer(latent_channels=4, context_dim=16, width=16, depth=2, heads=2)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    shape = AutoencoderConfig(
        patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, mid_block_attention=False, sample_size=SIZE
    )
    TextToCXRPipeline(
        vae=build_autoencoder(shape),
        denoiser=denoiser,
        text_encoder=TokenBert(text),
        tokenizer=tokenizer,
        scheduler=Objective(ObjectiveConfig()).scheduler(),
        preprocessing={"size": SIZE},
        num_inference_steps=2,
        guidance_scale=1.0,
    ).save_pretrained(folder)
    return folder


def settings_of(films: Path, pipeline: Path, root: Path) -> dict[str, Any]:
    """A search of seconds: two steps a trial, quality by the denoising loss."""
    return {
        "pipeline": str(pipeline),
        "data": {"manifest": films, "preprocessing": {"size": SIZE}},
        "cache": films.parent / "cache",
        "out": root / "search",
        "rank": 2,
        "inner": {"steps": 2, "batch_size": 4, "memorised_patients": 4, "repeats": 2, "warmup_steps": 0},
        "memorisation": {"measure": "loss_gap", "levels": [0.5], "draws": 1},
        "quality": {"measure": "validation_loss", "encoder": "pixels", "films": 40, "steps": 1},
        "search": {"trials": 3, "population": 2, "learning_rate": [1e-3, 1e-1]},
        "baselines": {"methods": ["full", "deduplicated"], "learning_rates": [1e-2]},
        "confirmation": {"repeats": 1, "baselines": ["full"]},
        "train": {"out": root / "chosen", "steps": 2, "batch_size": 4, "mixed_precision": "no", "cpu": True, "ema": None,
                  "tensorboard": False, "validate_every": 2, "validation_batches": 1, "preview_every": 0},
    }  # fmt: skip


def written(settings: dict[str, Any], root: Path) -> Path:
    """The recipe as a file."""
    save_config(MemControlConfig.model_validate(settings), root / "memcontrol.yaml")
    return root / "memcontrol.yaml"


@pytest.fixture
def settings(films: Path, pipeline_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return settings_of(films, pipeline_folder, tmp_path)


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    return written(settings, tmp_path)


@pytest.fixture(scope="session")
def finished(films: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that nobody interrupted."""
    root = tmp_path_factory.mktemp("finished")
    search(written(settings_of(films, pipeline_folder, root), root))
    return root / "search"
