"""The pipeline as its user meets it: prompts, seeds, output types, saving, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from transformers import BertConfig

from medgen.diffusion.objectives import Objective, ObjectiveConfig
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.conditioners import PromptTooLong, TokenBert
from medgen.models.denoiser import SequenceTransformer
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.tasks.text_encoder import train_tokenizer

LEFT, RIGHT = "Large left pleural effusion.", "Large right pleural effusion."


@pytest.fixture(scope="module")
def pipeline() -> TextToCXRPipeline:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([LEFT, RIGHT, "No pneumothorax."], 300, 24)
    text = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=24, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    denoiser = SequenceTransformer(context_dim=16, width=16, depth=1, heads=2)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    pipeline = TextToCXRPipeline(
        vae=build_autoencoder(AutoencoderConfig(patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32)),
        denoiser=denoiser,
        text_encoder=TokenBert(text).eval(),
        tokenizer=tokenizer,
        scheduler=Objective(ObjectiveConfig()).scheduler(),
        preprocessing={"size": 32},
        num_inference_steps=2,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pipeline: TextToCXRPipeline, prompt: str = LEFT, seed: int = 0, **options: Any) -> torch.Tensor:
    return pipeline(prompt, generator=[torch.Generator().manual_seed(seed)], output_type="pt", **options).images


def test_the_same_seed_gives_the_same_image_and_words_change_it(pipeline: TextToCXRPipeline) -> None:
    first = image(pipeline)
    assert first.shape == (1, 1, 32, 32) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, image(pipeline))
    assert not torch.equal(first, image(pipeline, RIGHT))
    assert not torch.equal(first, image(pipeline, seed=1))
    assert not torch.equal(first, image(pipeline, negative_prompt=RIGHT))
    assert not torch.equal(first, image(pipeline, guidance_scale=1.0))


def test_a_neighbour_changes_nothing(pipeline: TextToCXRPipeline) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 7)]
    both = pipeline([LEFT, "No pneumothorax. " + RIGHT], generator=seeds, output_type="pt").images
    torch.testing.assert_close(both[:1], image(pipeline), atol=1e-5, rtol=0)


def test_output_types(pipeline: TextToCXRPipeline) -> None:
    options: dict[str, Any] = {"num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(0)}
    pictures = pipeline([LEFT, RIGHT], **options).images
    assert [p.size for p in pictures] == [(32, 32)] * 4 and {p.mode for p in pictures} == {"L"}
    array = pipeline(LEFT, output_type="np").images
    assert array.shape == (1, 32, 32, 1) and array.dtype == np.float32
    assert pipeline(LEFT, output_type="latent").images.shape == (1, 4, 8, 8)
    assert isinstance(pipeline(LEFT, return_dict=False), tuple)


def test_saved_in_half_it_loads_whole_and_keeps_its_settings(pipeline: TextToCXRPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "full")
    loaded = TextToCXRPipeline.from_pretrained(tmp_path / "full")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(image(loaded), image(pipeline), atol=1e-4, rtol=0)
    assert loaded.config.num_inference_steps == 2
    assert json.loads((tmp_path / "full" / "model_index.json").read_text())["preprocessing"] == {"size": 32}
    loaded.to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    again = TextToCXRPipeline.from_pretrained(tmp_path / "half")
    again.set_progress_bar_config(disable=True)
    assert {again.vae.dtype, again.denoiser.dtype, again.text_encoder.dtype} == {torch.float32}
    assert (image(again) - image(pipeline)).abs().max() < 0.1
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.filterwarnings("error::FutureWarning")
def test_loading_and_sampling_warn_of_nothing_outdated(pipeline: TextToCXRPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = TextToCXRPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert image(loaded).shape == (1, 1, 32, 32)


def test_another_scheduler(pipeline: TextToCXRPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    other = TextToCXRPipeline.from_pretrained(
        tmp_path, scheduler=DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    )
    other.set_progress_bar_config(disable=True)
    assert image(other).isfinite().all()


def test_the_callback_sees_every_step_and_may_steer(pipeline: TextToCXRPipeline) -> None:
    seen = []

    def watch(_: Any, index: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(index)
        return {"latents": values["latents"] * 0}

    latents = pipeline(LEFT, num_inference_steps=3, output_type="latent", callback_on_step_end=watch).images
    assert seen == [0, 1, 2] and (latents == 0).all()


def test_without_a_prompt_only_if_that_is_meant(pipeline: TextToCXRPipeline) -> None:
    for empty in (None, "", "   ", [LEFT, ""], []):
        with pytest.raises(ValueError, match="prompt is empty"):
            pipeline(empty)
    assert len(pipeline(unconditional=True).images) == 1
    with pytest.raises(ValueError, match="leave `prompt` out"):
        pipeline(LEFT, unconditional=True)


def test_an_empty_negative_prompt_is_none(pipeline: TextToCXRPipeline) -> None:
    assert torch.equal(image(pipeline, negative_prompt=""), image(pipeline))


def test_a_long_report_is_cut_at_a_sentence_and_says_so(pipeline: TextToCXRPipeline) -> None:
    with pytest.warns(PromptTooLong, match=r"more than the 24 tokens.*pleural effusion"):
        cut = image(pipeline, LEFT + " " + "There is no pneumothorax on either side. " * 1000)
    assert torch.equal(cut, image(pipeline))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "at least 1"),
        ({"output_type": "tiff"}, "output_type 'tiff'"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images"),
        ({"negative_prompt": [LEFT, RIGHT]}, "2 negative prompts for 1 prompts"),
    ],
)
def test_refusals(pipeline: TextToCXRPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(LEFT, **options)
