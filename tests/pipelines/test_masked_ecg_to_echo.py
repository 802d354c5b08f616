"""The masked-token echo pipeline: conditions and guidance that act, prefixes that stay, clips of any length without seams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medgen.data.ecg import ECG
from medgen.models.echo_conditioner import EchoConditioner, EchoConditions
from medgen.models.token_transformer import TokenTransformer
from medgen.models.video_tokenizer import VideoTokenizer
from medgen.pipelines.masked_ecg_to_echo import MaskedECGToEchoPipeline, of_token_frames

SIZE, FRAMES = 16, 9


@pytest.fixture(scope="module")
def pipeline() -> MaskedECGToEchoPipeline:
    """Random weights, away from their zero start, so that everything has an effect."""
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(
        patch_size=8, width=16, depth=1, heads=2, memory=2, codes_per_place=2, code_dim=4, codebook_size=12
    )
    conditioner = EchoConditioner(width=16, depth=1, heads=2)
    denoiser = TokenTransformer(codebook_size=12, codes_per_place=2, token_dim=8, context_dim=16, width=16, depth=2, heads=2,
                                time_periods=(0.2, 8.0), feature_dim=conditioner.feature_dim)  # fmt: skip
    with torch.no_grad():
        for parameter in (*denoiser.parameters(), *conditioner.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape))
    made = MaskedECGToEchoPipeline(tokenizer, denoiser, conditioner, num_inference_steps=3, overlap=4,
                                   preprocessing={"size": SIZE, "frames": FRAMES, "fps": 20.0})  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def ecg(rr: float = 0.8, seconds: float = 6.0) -> ECG:
    times = np.arange(round(500 * seconds)) / 500
    signal = sum(np.exp(-((times - r) ** 2) / (2 * 0.015**2)) for r in np.arange(0.3, seconds, rr))
    signal = signal + sum(0.3 * np.exp(-((times - r - 0.28) ** 2) / (2 * 0.04**2)) for r in np.arange(0.3, seconds, rr))
    return ECG(np.stack([signal, 0.5 * signal]).astype(np.float32), ("II", "V5"), 500.0)


def make(pipeline: MaskedECGToEchoPipeline, *args: Any, seed: int = 0, **options: Any) -> np.ndarray:
    options = {"start_seconds": 1.5, "generator": torch.Generator().manual_seed(seed), **options}
    return pipeline(*args, **options).frames


def test_frames_and_times(pipeline: MaskedECGToEchoPipeline) -> None:
    out = pipeline(ecg(), ejection_fraction=[30.0, 60.0], start_seconds=1.5, num_frames=8)
    assert out.frames.shape == (2, 8, SIZE, SIZE) and out.frames.dtype == np.float32
    assert out.frames.min() >= 0 and out.frames.max() <= 1
    np.testing.assert_allclose(out.times[0], np.arange(8) / 20, atol=1e-6)
    codes = pipeline(ecg(), start_seconds=1.5, num_frames=8, output_type="latent").frames
    assert codes.shape[:2] == (1, 5) and codes.max() < 12


def test_a_clip_depends_on_its_own_generator_alone(pipeline: MaskedECGToEchoPipeline) -> None:
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipeline(ecg(), generator=draws, start_seconds=1.5).frames
    assert np.array_equal(both[1:], make(pipeline, ecg(), seed=2))
    assert not np.array_equal(both[0], both[1])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"ecg": ecg()}, {"ecg": None}),
        ({"ecg": ecg()}, {"ecg": ecg(rr=1.1)}),
        ({"ejection_fraction": 25.0}, {"ejection_fraction": 65.0}),
        ({"view": "A4C"}, {"view": "A2C"}),
        ({"fps": 5.0}, {"fps": 80.0}),
    ],
)
def test_every_condition_moves_the_clip(pipeline: MaskedECGToEchoPipeline, one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not np.array_equal(make(pipeline, **one), make(pipeline, **other))


def test_guidance_really_guides(pipeline: MaskedECGToEchoPipeline) -> None:
    """ECHOPulse's released code computes the same branch twice. Here the two differ, and the scale changes what comes out."""
    plain, guided = (make(pipeline, ecg(), ejection_fraction=60.0, guidance_scale=scale) for scale in (1.0, 4.0))
    assert not np.array_equal(plain, guided)
    alone = make(pipeline, ecg(), ejection_fraction=60.0, guidance_scale={"ejection_fraction": 4.0})
    assert not np.array_equal(plain, alone) and not np.array_equal(guided, alone)
    times = torch.arange(5)[None] / 10
    conditions = EchoConditions(times, ejection_fraction=torch.tensor([60.0]))
    codes, levels = torch.full((1, 5, 2, 2, 2), 12), torch.ones(1, 5)
    given, lacking, pushed = (
        pipeline._predict(one, scale)(codes, levels)
        for one, scale in ((conditions, 1.0), (conditions.drop(["ejection_fraction"]), 1.0), (conditions, 3.0))
    )
    assert (given - lacking).abs().max() > 1e-3
    torch.testing.assert_close(pushed, lacking + 3 * (given - lacking), rtol=1e-4, atol=1e-4)


def test_a_scale_of_one_costs_nothing(pipeline: MaskedECGToEchoPipeline) -> None:
    rows: list[int] = []
    hook = pipeline.denoiser.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    make(pipeline, ecg())
    make(pipeline, ecg(), guidance_scale={"ecg": 2.0, "view": 1.0})
    hook.remove()
    assert rows == [1, 1, 1, 2, 2, 2]


def test_the_first_frame_is_a_prefix_that_stays(pipeline: MaskedECGToEchoPipeline) -> None:
    still = torch.rand(1, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    expected = pipeline.decode(pipeline.encode_still(2 * still - 1)[:, None])[0, 0].numpy()
    clips = [make(pipeline, ecg(), first_frame=still, seed=seed) for seed in (0, 1)]
    for clip in clips:
        np.testing.assert_allclose(clip[0, 0], expected, atol=1e-6)
    assert not np.array_equal(clips[0], clips[1])


def test_a_long_clip_goes_on_from_its_own_last_frames(pipeline: MaskedECGToEchoPipeline) -> None:
    """What the first window made is what the next one starts from: the start of a longer clip is the shorter clip."""
    calls: list[tuple[int, ...]] = []
    hook = pipeline.denoiser.register_forward_pre_hook(lambda _, given: calls.append(tuple((given[1] == 0).sum(1).tolist())))
    out = pipeline(ecg(seconds=8), start_seconds=1.5, num_frames=30, generator=torch.Generator().manual_seed(3))
    hook.remove()
    assert out.frames.shape == (1, 30, SIZE, SIZE)
    assert calls[:3] == [(0,)] * 3 and all(known >= 2 for (known,) in calls[3:])
    codes = pipeline(ecg(seconds=8), start_seconds=1.5, num_frames=30, generator=torch.Generator().manual_seed(3),
                     output_type="latent").frames  # fmt: skip
    np.testing.assert_allclose(pipeline.decode(codes)[:, :30].numpy(), out.frames, atol=1e-6)
    assert pipeline.seams(30) == [9, 15, 21, 25] and pipeline.seams(FRAMES) == []
    assert not (codes == 12).any()


def test_token_frames_of_any_span() -> None:
    times = torch.arange(8)[None] / 10
    conditions = EchoConditions(times, phase=torch.arange(32.0).reshape(1, 8, 4))
    tokens = of_token_frames(conditions, 2)
    torch.testing.assert_close(tokens.times, torch.tensor([[0.0, 0.2, 0.4, 0.6, 0.7]]))
    assert tokens.phase is not None and torch.equal(tokens.phase[0, :, 0], torch.tensor([0.0, 8, 16, 24, 28]))
    assert of_token_frames(replace(conditions, phase=None), 3).times.shape == (1, 4)


def test_saved_loaded_and_the_same(pipeline: MaskedECGToEchoPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = MaskedECGToEchoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(make(loaded, ecg()), make(pipeline, ecg()))


def test_parts_that_do_not_fit_are_named(pipeline: MaskedECGToEchoPipeline) -> None:
    other = TokenTransformer(codebook_size=10, codes_per_place=2, token_dim=8, context_dim=16, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="codebook_size 12, the denoiser 10"):
        MaskedECGToEchoPipeline(pipeline.tokenizer, other, pipeline.conditioner)


def test_hostile_requests(pipeline: MaskedECGToEchoPipeline) -> None:
    with pytest.raises(ValueError, match="first_frame has shape"):
        make(pipeline, first_frame=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="num_inference_steps"):
        make(pipeline, num_inference_steps=0)
    with pytest.raises(ValueError, match="percent"):
        make(pipeline, ejection_fraction=0.55)
