"""A tiny but whole world: films with reports on disk, an autoencoder, a text encoder with its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig

from medgen.data.echo_records import EchoRecord
from medgen.data.records import CXRRecord, FindingLabel, read_manifest, write_manifest
from medgen.digital.echo import write_dataset as write_echo
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.conditioners import TokenBert
from medgen.tasks.text_encoder import train_tokenizer

SIZE = 32
SIDES = ("left", "right")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 films: a bright half says on which side the effusion of the report is."""
    root = tmp_path_factory.mktemp("films")
    (root / "images").mkdir()
    records = []
    for i in range(24):
        side = SIDES[i % 2]
        pixels = np.random.default_rng(i).integers(40, 60, (SIZE, SIZE), dtype=np.uint8)
        half = slice(SIZE // 2, None) if side == "left" else slice(0, SIZE // 2)  # a patient's left is the film's right
        pixels[SIZE // 2 :, half] += 150
        Image.fromarray(pixels).save(root / "images" / f"r{i}.png")
        split: Any = "train" if i < 16 else "val" if i < 20 else "test"
        effusion = FindingLabel("pleural_effusion", "present", side, "large")  # type: ignore[arg-type]
        text = f"Large {side} pleural effusion."
        record = CXRRecord(f"r{i}", f"p{i}", f"s{i}", f"images/r{i}.png", "PA", text + " No pneumothorax.", text, split,
                           (effusion, FindingLabel("pneumothorax", "absent")))  # fmt: skip
        records.append(record)
    return write_manifest(records, root / "manifest.parquet", name="tiny", source="test")


@pytest.fixture(scope="session")
def autoencoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    shape = AutoencoderConfig(
        patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, mid_block_attention=False, sample_size=SIZE
    )
    build_autoencoder(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text_encoder")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Large left pleural effusion.", "Large right pleural effusion. No pneumothorax."], 300, 64)
    shape = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                       max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    TokenBert(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hearts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of six digital hearts in clips of nine frames of 32 pixels: four to train on, two to validate with."""
    root = tmp_path_factory.mktemp("hearts")
    written = read_manifest(write_echo(root, n=6, seed=3, size=SIZE, frames=9, processes=1), record=EchoRecord)
    records = [replace(record, split="train" if i < 4 else "val") for i, record in enumerate(written.records)]
    return write_manifest(records, root / "manifest.parquet", name="hearts", source="test")


@pytest.fixture
def recipe(manifest: Path, autoencoder_folder: Path, text_encoder_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A text-to-CXR recipe on that world; two steps."""
    return {
        "data": {"manifest": manifest, "preprocessing": {"size": SIZE}},
        "autoencoder": {"path": str(autoencoder_folder)},
        "text_encoder": {"path": str(text_encoder_folder), "max_tokens": 64},
        "denoiser": {"width": 16, "depth": 2, "heads": 2, "patch_size": 2},
        "sampling": {"num_inference_steps": 2},
        "train": {"out": tmp_path / "run", "steps": 2, "batch_size": 4, "mixed_precision": "no", "cpu": True, "tensorboard": False,
                  "validate_every": 2, "validation_batches": 1, "preview_every": 2},
    }  # fmt: skip
