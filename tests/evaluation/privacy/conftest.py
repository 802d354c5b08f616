"""A toy hospital and a tiny pipeline that memorised half of its patients: trained here for seconds, nothing is faked."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import BertConfig, BertModel

from medgen.data.records import CXRRecord, write_manifest
from medgen.diffusion.frames import FrameBatch
from medgen.diffusion.objectives import Objective, ObjectiveConfig, denoising_loss
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder, encode_moments, set_latent_statistics
from medgen.models.denoiser import SequenceTransformer
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.seeds import generator
from medgen.tasks.text_encoder import train_tokenizer

SIZE, PATIENTS = 32, 12  # patients a side
PLACES = ("upper lobe of the left lung", "lower lobe of the left lung", "middle lobe of the right lung")


def toy_film(seed: int) -> np.ndarray:
    """[32,32] uint8: a smooth field that no other seed has."""
    field = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8))
    return np.asarray(field.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def caption(number: int) -> str:
    return f"A nodule of {10 + number} mm is seen in the {PLACES[number % 3]}."


@pytest.fixture(scope="session")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 12 patients in train and 12 in test, one film and one report each."""
    folder = tmp_path_factory.mktemp("hospital")
    (folder / "images").mkdir()
    records = []
    for number in range(2 * PATIENTS):
        name = f"p{number:02d}"
        Image.fromarray(toy_film(number)).save(folder / f"images/{name}.png")
        split = "train" if number < PATIENTS else "test"
        records.append(CXRRecord(name, name, name, f"images/{name}.png", "PA", caption(number), "", split))
    return write_manifest(records, folder / "manifest.parquet", name="toy hospital", source="test")


@lru_cache(maxsize=1)
def build_pipeline() -> TextToCXRPipeline:
    """A flow model for the toy hospital's films: a small autoencoder that knows smooth fields, a denoiser that knows nothing yet."""
    torch.manual_seed(0)
    shape = AutoencoderConfig(
        patch_size=4, block_out_channels=(16,), norm_num_groups=4, mid_block_attention=False, sample_size=SIZE
    )
    vae = build_autoencoder(shape)
    films = torch.stack([torch.from_numpy(toy_film(1000 + seed).copy()) for seed in range(64)])[:, None] / 127.5 - 1
    optimiser = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(80):
        batch = films[torch.randperm(len(films))[:16]]
        loss = (vae.decode(vae.encode(batch).latent_dist.mean).sample - batch).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    latents = vae.encode(films).latent_dist.mean.detach()
    set_latent_statistics(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    words = train_tokenizer([caption(number) for number in range(2 * PATIENTS)], 300, 64)
    bert = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=64, pad_token_id=words.pad_token_id)  # fmt: skip
    denoiser = SequenceTransformer(vae.config.latent_channels, 16, width=64, depth=2, heads=2)
    return TextToCXRPipeline(vae, denoiser, BertModel(bert, add_pooling_layer=False).eval(), words, FlowMatchEulerDiscreteScheduler(),
                             preprocessing={"size": SIZE}, num_inference_steps=8, guidance_scale=2.0)  # fmt: skip


def memorise(pipeline: TextToCXRPipeline, steps: int = 200) -> None:
    """Teach the denoiser the 12 training films under their captions, and, one example in ten, without."""
    films = torch.stack([torch.from_numpy(toy_film(seed).copy()) for seed in range(PATIENTS)])[:, None] / 127.5 - 1
    with torch.no_grad():
        latents = encode_moments(pipeline.vae, films)[0].repeat(4, 1, 1, 1)
        tokens, mask = (t.repeat(4, 1, 1) if t.ndim == 3 else t.repeat(4, 1) for t in
                        pipeline.encode_prompt([f"PA chest X-ray. {caption(number)}" for number in range(PATIENTS)]))  # fmt: skip
    denoiser, objective = pipeline.denoiser.train(), Objective(ObjectiveConfig())
    optimiser = torch.optim.AdamW(denoiser.parameters(), lr=2e-3)
    for step in range(steps):
        draw = generator("memorise", step)
        kept = torch.rand(len(mask), generator=draw) >= 0.1
        loss = denoising_loss(denoiser, objective, FrameBatch.single(latents, tokens, mask & kept[:, None]), draw)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    denoiser.eval()


@pytest.fixture(scope="session")
def innocent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that learned no patient."""
    pipeline = deepcopy(build_pipeline())
    for parameter in pipeline.denoiser.parameters():  # a fresh one would predict zero for every caption
        torch.nn.init.normal_(parameter, std=0.05)
    pipeline.save_pretrained(str(folder := tmp_path_factory.mktemp("pipelines") / "innocent"))
    return folder


@pytest.fixture(scope="session")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that memorised the training patients."""
    memorise(pipeline := deepcopy(build_pipeline()))
    pipeline.save_pretrained(str(folder := tmp_path_factory.mktemp("pipelines") / "leaky"))
    return folder
