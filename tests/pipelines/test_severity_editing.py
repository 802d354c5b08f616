"""Rounds of editing: nothing outside the ROI moves, an edit to what is already there gives the film back, prompts and strength count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import BertConfig, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.conditioners import TokenBert
from medgen.models.denoiser import SequenceTransformer
from medgen.pipelines.severity_editing import PIE, EditSettings, SeverityEditingPipeline, feathered
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.tasks.text_encoder import train_tokenizer

NOW, MORE, MOST = "small left pleural effusion.", "moderate left pleural effusion.", "large left pleural effusion."


@pytest.fixture(scope="module")
def editor() -> SeverityEditingPipeline:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([NOW, MORE, MOST], 300, 24)
    text = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=24, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    denoiser = SequenceTransformer(context_dim=16, width=16, depth=1, heads=2)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae = build_autoencoder(AutoencoderConfig(patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32))
    return SeverityEditingPipeline(
        TextToCXRPipeline(vae.eval(), denoiser, TokenBert(text).eval(), tokenizer, FlowMatchEulerDiscreteScheduler(),
                          preprocessing={"size": 32})
    )  # fmt: skip


@pytest.fixture(scope="module")
def films() -> torch.Tensor:
    return torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def roi() -> torch.Tensor:
    region = torch.zeros(2, 1, 32, 32)
    region[..., 12:28, 16:32] = 1
    return region


def edit(editor: SeverityEditingPipeline, films: torch.Tensor, roi: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    asked = {"stages": [[MORE, MOST]] * len(films), "source": [NOW] * len(films)} | options
    call = {key: asked.pop(key) for key in ("stages", "source", "generator") if key in asked}
    return editor(films, roi=roi, settings=EditSettings(**({"num_inference_steps": 6} | asked)), **call).frames


def test_outside_the_roi_the_film_stays_as_it_was(
    editor: SeverityEditingPipeline, films: torch.Tensor, roi: torch.Tensor
) -> None:
    frames = edit(editor, films, roi)
    assert frames.shape == (2, 3, 32, 32) and frames.min() >= 0 and frames.max() <= 1
    assert torch.equal(frames[:, 0], films[:, 0])
    outside = (roi[:, 0] == 0)[:, None].expand_as(frames)
    assert torch.equal(frames[outside], films.expand_as(frames)[outside])
    inside = roi[0, 0] > 0
    changes = (frames[0, :, inside] - frames[0, :1, inside]).abs().mean(1)
    assert changes[1] > 1e-4 and changes[2] > 1e-4 and not torch.equal(frames[:, 1], frames[:, 2])


def test_editing_towards_what_is_there_gives_the_film_back(editor: SeverityEditingPipeline, films: torch.Tensor) -> None:
    same = edit(editor, films, stages=[[NOW, NOW]] * 2, refinements=12, away_from="source")
    torch.testing.assert_close(same[:, 2], films[:, 0], atol=2e-3, rtol=0)
    noisy = edit(
        editor, films, stages=[[NOW, NOW]] * 2, inversion="noise", inside=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert (noisy[:, 2] - films[:, 0]).abs().max() > 0.02  # what PIE's release does: the film is gone


def test_without_pasting_back_it_is_the_autoencoders_film(
    editor: SeverityEditingPipeline, films: torch.Tensor, roi: torch.Tensor
) -> None:
    settings = EditSettings(outside=0.0, paste_back=False, num_inference_steps=6)
    out = editor(films, [[MOST]] * 2, [NOW] * 2, roi, settings)
    # The decoder's group norms look at the whole film, so that a little of the change is everywhere, most of it where it was asked for.
    change = (out.frames[:, 1] - out.autoencoder).abs()
    assert change[:, :, :4].mean() < 0.5 * change[roi[:, 0] > 0.5].mean()
    assert not torch.allclose(out.frames[:, 1], films[:, 0], atol=0.05)


def test_a_neighbour_changes_nothing_and_noise_is_the_generators(
    editor: SeverityEditingPipeline, films: torch.Tensor, roi: torch.Tensor
) -> None:
    torch.testing.assert_close(edit(editor, films, roi)[1:], edit(editor, films[1:], roi[1:]), atol=1e-5, rtol=0)

    def noisy(*seeds: int) -> torch.Tensor:
        return edit(editor, films, inversion="noise", generator=[torch.Generator().manual_seed(seed) for seed in seeds])

    assert torch.equal(noisy(1, 2), noisy(1, 2)) and not torch.equal(noisy(1, 2), noisy(3, 2))


def test_chained_rounds_go_on_from_the_last_one(editor: SeverityEditingPipeline, films: torch.Tensor) -> None:
    asked: dict[str, Any] = {"stages": [[MOST, MOST]] * 2, "inside": 1.0}
    alone, chained = edit(editor, films, **asked), edit(editor, films, chained=True, **asked)
    torch.testing.assert_close(alone[:, :2], chained[:, :2])
    assert not torch.allclose(alone[:, 2], chained[:, 2], atol=1e-3)
    # A prompt that lasts two rounds is half reached after the first one.
    whole = edit(editor, films, stages=[[MOST]] * 2, inside=1.0)
    torch.testing.assert_close(whole[:, 1], alone[:, 2])
    assert (alone[:, 1] - films[:, 0]).abs().mean() < (alone[:, 2] - films[:, 0]).abs().mean()


def test_pie_as_released_runs(editor: SeverityEditingPipeline, films: torch.Tensor, roi: torch.Tensor) -> None:
    settings = replace(PIE, num_inference_steps=6)
    frames = editor(films, [[MOST] * 3] * 2, [NOW] * 2, roi, settings, torch.Generator().manual_seed(0)).frames
    assert frames.shape == (2, 4, 32, 32) and torch.isfinite(frames).all()


def test_the_blend_keeps_its_shares(editor: SeverityEditingPipeline, films: torch.Tensor) -> None:
    still = edit(editor, films, inside=0.0)
    torch.testing.assert_close(still[:, 1:], films.expand(-1, 2, -1, -1), atol=1e-5, rtol=0)
    differences = [(edit(editor, films, **options)[:, -1] - films[:, 0]).abs().mean() for options in
                   ({"inside": 0.2}, {"inside": 1.0}, {"inside": 1.0, "guidance_scale": 1.0, "stages": [[NOW]] * 2})]  # fmt: skip
    assert differences[2] < differences[0] < differences[1]


def test_a_stable_diffusion_pipeline_is_edited_by_ddim_inversion() -> None:
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    text = CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                          max_position_embeddings=77, bos_token_id=0, eos_token_id=1)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
                                attention_head_dim=8)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, safety_checker=None, feature_extractor=None,
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1),
        tokenizer=CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77),
        requires_safety_checker=False,
    )  # fmt: skip
    film = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # latents of about unit variance, as a trained model has them
        vae.register_to_config(scaling_factor=1 / float(vae.encode(2 * film.expand(-1, 3, -1, -1) - 1).latent_dist.mean.std()))
    editor = SeverityEditingPipeline(pipeline)
    assert editor.kind == "ddim"
    frames = edit(editor, film, num_inference_steps=4)
    assert frames.shape == (1, 3, 32, 32) and torch.isfinite(frames).all()
    same = edit(editor, film, stages=[[NOW]], num_inference_steps=24, refinements=8, away_from="source")
    torch.testing.assert_close(same[:, 1], film[:, 0], atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match="takes 'ddim' or 'noise'"):
        edit(editor, film, inversion="flow")


def test_the_feather_stays_inside(roi: torch.Tensor) -> None:
    soft = feathered(roi)
    assert torch.equal(soft * (1 - roi), torch.zeros_like(roi)) and soft[0, 0, 20, 24] > 0.999
    assert soft[0, 0, 12, 24] < 0.9 and soft[0, 0, 20, 31] > 0.999  # rises from its edge; none where the film ends
    torch.testing.assert_close(feathered(torch.ones(1, 1, 16, 16)), torch.ones(1, 1, 16, 16))


def test_what_does_not_fit_is_said(editor: SeverityEditingPipeline, films: torch.Tensor, roi: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        edit(editor, films[..., :30])
    with pytest.raises(ValueError, match="one of each per film"):
        edit(editor, films, stages=[[MORE]])
    with pytest.raises(ValueError, match="same number of stages"):
        edit(editor, films, stages=[[MORE], [MORE, MOST]])
    with pytest.raises(ValueError, match="empty roi"):
        edit(editor, films, roi * 0)
    with pytest.raises(ValueError, match="takes 'flow' or 'noise'"):
        edit(editor, films, inversion="ddim")
    with pytest.raises(ValueError, match="no denoiser"):
        SeverityEditingPipeline(type("Odd", (), {"vae": None, "encode_prompt": None})())
