"""A published checkpoint, made tiny with diffusers' own classes, is searched by the same code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.masks import Adaptation, attention_layers
from medgen.memcontrol.rewards import Scorer
from medgen.memcontrol.task import FineTuning, MaskedTextToCXR, Start
from medgen.memcontrol.trials import Bench, Trial
from medgen.training.loop import train


@pytest.fixture
def stable_diffusion(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    text = CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          max_position_embeddings=77, bos_token_id=0, eos_token_id=1)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
                                attention_head_dim=8)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        tokenizer=CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77),
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "sd")  # fmt: skip
    return tmp_path / "sd"


def test_a_mask_of_stable_diffusion_is_trained_scored_and_exported(
    settings: dict[str, Any], stable_diffusion: Path, tmp_path: Path
) -> None:
    changed = {"pipeline": str(stable_diffusion), "data": settings["data"] | {"preprocessing": {"size": 16}}}
    quality = settings["quality"] | {"measure": "frechet", "guidance": 2.0}
    config = MemControlConfig.model_validate(settings | changed | {"quality": quality})
    start = Start.of(config)
    every = attention_layers(start.network)
    scorer = Scorer(config, start)
    bench = Bench(config, scorer)
    adaptation = Adaptation(method="lora", layers=every[::3], rank=2)
    before = bench.run(Trial("start", "start", None, 0.0))
    after = bench.run(Trial("00000", "search", adaptation, 1e-1))
    assert before is not None and after is not None
    assert before.values != after.values and after.scores.frechet == after.scores.quality
    assert before.scores.text_noise > 0 and before.scores.membership == 0.5
    assert after.scores.loss_gap is not None and after.scores.memorisation == after.scores.loss_gap

    task = MaskedTextToCXR(start.task(config.train, 0.1), adaptation)
    train(task, config.train, FineTuning(memcontrol=config, adaptation=adaptation, train=config.train))
    saved = load_file(config.train.out / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == UNet2DConditionModel.from_pretrained(stable_diffusion / "unet").state_dict().keys()
    assert StableDiffusionPipeline.from_pretrained(config.train.out / "export").unet is not None
