"""The pipeline as its user meets it: ECGs, seeds, long clips, guidance, saving, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medgen.data.ecg import ECG, ECGError, cut
from medgen.diffusion.objectives import Objective, ObjectiveConfig
from medgen.digital.ecg import simulate_ecg
from medgen.digital.rhythm import draw_rhythm
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.denoiser import SequenceTransformer
from medgen.models.ecg_encoders import PublishedECGEncoder
from medgen.models.echo_conditioner import EchoConditioner
from medgen.pipelines.ecg_to_echo import ECGToEchoPipeline

SIZE, FRAMES = 32, 6


def loud(module: nn.Module, by: float) -> nn.Module:
    """Away from its zero initialisation, so that everything has an effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape))
    return module.eval()


@pytest.fixture(scope="module")
def pipeline() -> ECGToEchoPipeline:
    torch.manual_seed(0)
    denoiser = SequenceTransformer(
        context_dim=16, width=16, depth=2, heads=2, temporal_every=1, time_periods=(0.2, 8.0), feature_dim=7
    )
    shape = AutoencoderConfig(patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, sample_size=SIZE)
    pipeline = ECGToEchoPipeline(
        vae=build_autoencoder(shape).eval(),
        denoiser=loud(denoiser, 0.2),
        conditioner=loud(EchoConditioner(width=16, depth=1, heads=2), 0.1),
        scheduler=Objective(ObjectiveConfig()).scheduler(),
        preprocessing={"size": SIZE, "frames": FRAMES, "fps": 20.0},
        overlap=2,
        num_inference_steps=2,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ecgs() -> list[ECG]:
    """Six seconds at 60 and at 100 beats a minute."""
    rhythms = [draw_rhythm(i, "sinus", rate, 0.0, 6.0, 0.02) for i, rate in enumerate((60, 100))]
    return [simulate_ecg(rhythm, i, start=0.0, end=6.0)[0] for i, rhythm in enumerate(rhythms)]


def clip(pipeline: ECGToEchoPipeline, ecg: Any = None, seed: int = 0, **options: Any) -> torch.Tensor:
    given = {"generator": [torch.Generator().manual_seed(seed)], "output_type": "pt", "start_seconds": 2.0, **options}
    return pipeline(ecg, **given).frames


def test_every_condition_and_the_seed_change_the_clip(pipeline: ECGToEchoPipeline, ecgs: list[ECG]) -> None:
    first = clip(pipeline, ecgs[0])
    assert first.shape == (1, FRAMES, SIZE, SIZE) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, clip(pipeline, ecgs[0]))
    others: list[dict[str, Any]] = [
        {"ecg": ecgs[1]}, {"ecg": None}, {"seed": 1}, {"start_seconds": 2.2}, {"ejection_fraction": 30.0}, {"view": "A2C"},
        {"fps": 40.0}, {"first_frame": torch.rand(1, 1, SIZE, SIZE)},
    ]  # fmt: skip
    for change in others:
        assert not torch.equal(first, clip(pipeline, **{"ecg": ecgs[0], **change})), change


def test_a_neighbour_changes_nothing(pipeline: ECGToEchoPipeline, ecgs: list[ECG]) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (7, 0)]
    both = pipeline([None, ecgs[0]], ejection_fraction=[40.0, None], start_seconds=2.0, generator=seeds, output_type="pt").frames
    torch.testing.assert_close(both[1:], clip(pipeline, ecgs[0]), atol=1e-5, rtol=0)


def test_output(pipeline: ECGToEchoPipeline, ecgs: list[ECG]) -> None:
    out = pipeline(ecgs, ejection_fraction=50.0, view="A4C", start_seconds=1.0)
    assert out.frames.shape == (2, FRAMES, SIZE, SIZE) and out.frames.dtype == np.float32
    assert out.times.shape == (2, FRAMES) and out.times[1, 1] == pytest.approx(0.05)
    assert len(out.flags) == 2
    assert pipeline(output_type="latent").frames.shape == (1, FRAMES, 4, 8, 8)
    assert isinstance(pipeline(return_dict=False), tuple)


@pytest.mark.parametrize("num_frames", [1, 3, 7, 14])
def test_clips_of_any_length(pipeline: ECGToEchoPipeline, ecgs: list[ECG], num_frames: int) -> None:
    assert clip(pipeline, ecgs[0], num_frames=num_frames).shape == (1, num_frames, SIZE, SIZE)
    seams = pipeline.seams(num_frames)
    assert seams == {1: [], 3: [], 7: [5, 6], 14: [5, 6, 9, 10]}[num_frames]


def test_a_long_clip_begins_as_its_first_window(pipeline: ECGToEchoPipeline, ecgs: list[ECG]) -> None:
    """Noise is drawn for the whole clip, frame by frame; the next window changes only the frames that it fades over."""
    short, long = (
        clip(pipeline, ecgs[0], num_frames=n, guidance_scale={"ecg": 2.0, "view": 1.0}, output_type="latent") for n in (6, 14)
    )
    begin = pipeline.seams(14)[0]
    torch.testing.assert_close(long[:, :begin], short[:, :begin], atol=1e-4, rtol=0)
    assert (long[:, FRAMES:] - long[:, :1]).abs().amax((0, 2, 3, 4)).min() > 1e-3


def test_a_first_frame_comes_back(pipeline: ECGToEchoPipeline) -> None:
    still = torch.rand(1, 1, SIZE, SIZE)
    expected = pipeline.encode_still(2 * still - 1)
    for frames in (FRAMES, 14):
        latents = clip(pipeline, first_frame=still, num_frames=frames, output_type="latent")
        assert torch.equal(latents[:, 0], expected)


def test_guidance_costs_an_evaluation_for_each_condition_guided(
    pipeline: ECGToEchoPipeline, ecgs: list[ECG], monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes: list[int] = []
    forward = pipeline.denoiser.forward

    def counting(latents: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        lanes.append(len(latents))
        return forward(latents, *rest, **named)

    monkeypatch.setattr(pipeline.denoiser, "forward", counting)
    results = []
    for scale, evaluations in ((1.0, 1), (2.0, 2), ({"ecg": 2.0}, 2), ({"ecg": 2.0, "ejection_fraction": 1.5, "fps": 1}, 3)):
        lanes.clear()
        results.append(clip(pipeline, ecgs[0], ejection_fraction=35.0, guidance_scale=scale))
        assert lanes == [evaluations, evaluations]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_guidance_of_a_condition_that_is_not_given_changes_nothing(pipeline: ECGToEchoPipeline, ecgs: list[ECG]) -> None:
    plain = clip(pipeline, ecgs[0])
    torch.testing.assert_close(clip(pipeline, ecgs[0], guidance_scale={"view": 5.0}), plain, atol=1e-5, rtol=0)


def test_saved_in_half_it_loads_whole_and_keeps_its_settings(
    pipeline: ECGToEchoPipeline, ecgs: list[ECG], tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "full")
    loaded = ECGToEchoPipeline.from_pretrained(tmp_path / "full")
    loaded.set_progress_bar_config(disable=True)
    latents = [clip(one, ecgs[0], num_frames=8, output_type="latent") for one in (loaded, pipeline)]
    assert torch.equal(*latents)
    torch.testing.assert_close(loaded.decode(latents[0]), pipeline.decode(latents[0]), atol=1e-5, rtol=0)  # another memory layout
    assert loaded.config.preprocessing == {"size": SIZE, "frames": FRAMES, "fps": 20.0} and loaded.config.overlap == 2
    assert loaded.config.ecg_preparation["rate"] == 250
    loaded.to(dtype=torch.float16).save_pretrained(tmp_path / "half")
    again = ECGToEchoPipeline.from_pretrained(tmp_path / "half")
    again.set_progress_bar_config(disable=True)
    assert {again.vae.dtype, again.denoiser.dtype, again.conditioner.dtype} == {torch.float32}
    assert (clip(again, ecgs[0]) - clip(pipeline, ecgs[0])).abs().max() < 0.2
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"fps": 0.0}, "fps 0: expected"),
        ({"output_type": "gif"}, "output_type 'gif'"),
        ({"first_frame": torch.rand(1, 1, 16, 16)}, r"first_frame has shape \[1, 1, 16, 16\]"),
        ({"generator": [torch.Generator()] * 2, "view": ["A4C"] * 3}, "2 generators for 3 clips"),
        ({"guidance_scale": {"heart": 2.0}}, "guidance_scale for 'heart'"),
    ],
)
def test_refusals(pipeline: ECGToEchoPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**options)


def test_an_ecg_of_another_time_is_refused(pipeline: ECGToEchoPipeline, ecgs: list[ECG]) -> None:
    with pytest.raises(ECGError, match="were not recorded"):
        clip(pipeline, ecgs[0], start_seconds=6.5)
    flags = pipeline(ecgs[0], start_seconds=5.5, num_frames=20).flags
    assert any("the ECG ends 0.4" in flag for flag in flags[0])


def test_a_published_encoder_travels_with_the_pipeline(pipeline: ECGToEchoPipeline, tmp_path: Path) -> None:
    """Twelve seconds of ECG: ST-MEM listens to nine of them at a time."""
    torch.manual_seed(0)
    encoder = loud(PublishedECGEncoder("st_mem", {"width": 16, "depth": 1, "heads": 2, "dim_head": 8, "mlp_dim": 16}), 0.1)
    own = ECGToEchoPipeline(
        vae=pipeline.vae,
        denoiser=pipeline.denoiser,
        conditioner=loud(EchoConditioner(width=16, depth=1, heads=2, encoder_dim=16), 0.1),
        scheduler=pipeline.scheduler,
        ecg_encoder=encoder,
        preprocessing=pipeline.config.preprocessing,
        overlap=2,
        num_inference_steps=2,
    )
    own.save_pretrained(tmp_path)
    loaded = ECGToEchoPipeline.from_pretrained(tmp_path)
    ecg, _ = simulate_ecg(draw_rhythm(3, "sinus", 70, 0.0, 12.0, 0.02), 3, start=0.0, end=12.0)
    latents = []
    for one in (own, loaded):
        one.set_progress_bar_config(disable=True)
        latents.append(clip(one, ecg, start_seconds=5.0, num_frames=8, output_type="latent"))
    torch.testing.assert_close(*latents)  # not to the bit: products round by where in memory the weights lie
    two = loaded([ecg, None], start_seconds=5.0, output_type="latent", generator=[torch.Generator().manual_seed(0)] * 2).frames
    assert not torch.equal(two[0], two[1])
    with pytest.raises(ValueError, match="reads 9 s at a time, the ECG has 4 s"):
        clip(loaded, cut(ecg, 4.0, 4.0), start_seconds=5.0)
