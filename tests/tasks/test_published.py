"""Published checkpoints, made tiny with diffusers' own classes: what is fine-tuned loads in plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, Gemma2Config, Gemma2Model

from medgen.config import ConfigError, load_config
from medgen.models.adopted import AdoptedDenoiser
from medgen.tasks.base import Task
from medgen.tasks.published import PublishedRecipe, PublishedTextToCXR
from medgen.tasks.text_encoder import train_tokenizer
from medgen.training.loop import train
from medgen.training.run import task_of

PROMPT = "large left pleural effusion."
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stable_diffusion")
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
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        tokenizer=CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77),
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def sana(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sana")
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
                                         attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
                                         cross_attention_dim=8, caption_channels=8, sample_size=32)  # fmt: skip
    vae = AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
                        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), encoder_layers_per_block=(1, 1),
                        decoder_layers_per_block=(1, 1), downsample_block_type="conv", upsample_block_type="interpolate",
                        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4)  # fmt: skip
    tokenizer = train_tokenizer([PROMPT, "No pneumothorax."], 300, 300)
    text = Gemma2Config(head_dim=4, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1,
                        num_key_value_heads=1, vocab_size=len(tokenizer), max_position_embeddings=1024,
                        pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    SanaPipeline(tokenizer=tokenizer, text_encoder=Gemma2Model(text), vae=vae, transformer=transformer,
                 scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)).save_pretrained(folder)  # fmt: skip
    return folder


def recipe_for(base: dict[str, Any], checkpoint: Path, **options: Any) -> PublishedRecipe:
    published = {"path": str(checkpoint), **options.pop("published", {})}
    kept = {"data": base["data"], "train": base["train"], "sampling": base["sampling"], "preview_prompts": (PROMPT,)}
    return PublishedRecipe.model_validate(kept | {"published": published} | options)


def different(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    other = second.state_dict()
    return any(not torch.equal(value, other[name]) for name, value in first.state_dict().items())


@pytest.mark.parametrize("text_too", [False, True])
def test_a_full_fine_tune_is_a_stable_diffusion_folder(
    recipe: dict[str, Any], stable_diffusion: Path, tmp_path: Path, text_too: bool
) -> None:
    parsed = recipe_for(recipe, stable_diffusion, published={"train_text_encoder": text_too}, cache=tmp_path / "cache")
    task = PublishedTextToCXR(parsed)
    assert isinstance(task, Task)
    result = train(task, parsed.train, parsed)
    assert list((result.folder / "previews").glob("*.png"))

    before = StableDiffusionPipeline.from_pretrained(stable_diffusion)
    after = StableDiffusionPipeline.from_pretrained(result.folder / "export")
    assert different(before.unet, after.unet)
    assert different(before.text_encoder, after.text_encoder) == text_too
    assert not different(before.vae, after.vae)
    after.set_progress_bar_config(disable=True)
    assert after(PROMPT, num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)


@pytest.mark.parametrize("family", ["stable_diffusion", "sana"])
def test_a_lora_loads_into_the_untouched_pipeline(recipe: dict[str, Any], family: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(family)
    parsed = recipe_for(recipe, checkpoint, published={"method": "lora", "lora_rank": 2, "merge": True})
    task = PublishedTextToCXR(parsed)
    folder = train(task, parsed.train, parsed).folder / "export"
    trained = [name for name, p in task.network.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name for name in trained)

    kind = type(task.pipeline)
    pipeline, merged = kind.from_pretrained(checkpoint), kind.from_pretrained(folder / "merged")
    original = {name: value.clone() for name, value in getattr(pipeline, task.part).state_dict().items()}
    pipeline.load_lora_weights(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused, other = (getattr(p, task.part).state_dict() for p in (pipeline, merged))
    assert any(not torch.equal(fused[name], value) for name, value in original.items())
    for name, value in fused.items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-4)


def test_the_objective_is_read_from_the_checkpoint(recipe: dict[str, Any], stable_diffusion: Path, sana: Path) -> None:
    diffusion = PublishedTextToCXR(recipe_for(recipe, stable_diffusion, min_snr_gamma=5.0)).objective.config
    flow = PublishedTextToCXR(recipe_for(recipe, sana)).objective.config
    assert (diffusion.kind, diffusion.beta_end, diffusion.min_snr_gamma) == ("epsilon", 0.012, 5.0)
    assert (flow.kind, flow.shift) == ("flow", 3.0)
    with pytest.raises(ConfigError, match="remove the key"):
        PublishedTextToCXR(recipe_for(recipe, sana, min_snr_gamma=5.0))


def test_a_dropped_caption_is_the_empty_prompt(recipe: dict[str, Any], stable_diffusion: Path, tmp_path: Path) -> None:
    losses = []
    for cache in (None, tmp_path / "cache"):
        task = PublishedTextToCXR(recipe_for(recipe, stable_diffusion, caption_dropout=0.5, cache=cache))
        data = task.dataset("train")
        batch = task.collate([data[i] for i in range(6)])
        loss, _ = task.loss(task.modules(), batch, "model", torch.Generator().manual_seed(0))
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], atol=1e-2, rtol=0)  # the cache keeps half precision


def test_pixart_is_called_as_its_pipeline_calls_it() -> None:
    network = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
                                       cross_attention_dim=8, caption_channels=6, sample_size=8, norm_num_groups=1)  # fmt: skip
    model = AdoptedDenoiser(network, 1000, continuous=False)
    x, levels, words = torch.randn(2, 1, 4, 8, 8), torch.tensor([[0.2], [0.7]]), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    prediction = model(x, levels, torch.zeros(2, 1), context=words, context_mask=mask)
    assert prediction.shape == x.shape  # the learned variance is left out
    other = words.clone()
    other[1, 3:] = 9
    torch.testing.assert_close(
        model(x, levels, torch.zeros(2, 1), context=other, context_mask=mask), prediction, atol=2e-3, rtol=0
    )


def test_what_cannot_be_adopted_is_refused(recipe: dict[str, Any], stable_diffusion: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load a diffusers pipeline"):
        PublishedTextToCXR(recipe_for(recipe, tmp_path))
    with pytest.raises(ConfigError, match="LoRA trains the denoiser only"):
        PublishedTextToCXR(recipe_for(recipe, stable_diffusion, published={"method": "lora", "train_text_encoder": True}))
    with pytest.raises(ValueError, match="cannot be adopted"):
        AdoptedDenoiser(torch.nn.Linear(2, 2), 1000, False)
    model = AdoptedDenoiser(UNet2DConditionModel.from_pretrained(stable_diffusion / "unet"), 1000, False)
    with pytest.raises(ValueError, match="sequences of 2"):
        model(torch.randn(1, 2, 4, 8, 8), torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("name", ["roentgen_sd15", "sana_lora"])
def test_the_recipes_are_valid_and_found_by_their_section(name: str) -> None:
    path = ROOT / "configs" / "text_to_cxr" / f"{name}.yaml"
    assert load_config(PublishedRecipe, path).data.preprocessing.size == 512
    assert task_of("text-to-cxr", path)[2] == "PublishedTextToCXR"
    assert task_of("text-to-cxr", path.with_name("digital_chest.yaml"))[2] == "TextToCXR"
