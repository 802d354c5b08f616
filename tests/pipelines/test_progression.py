"""The forecasting pipeline: any visits to any dates, joint or one after the other; a trajectory depends on its own generator only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from follow_ups import SIZE

from medgen.data.visit_records import Event
from medgen.diffusion.objectives import Objective, ObjectiveConfig
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.denoiser import SequenceTransformer
from medgen.models.progression_conditioner import ProgressionConditioner
from medgen.pipelines.progression import History, ProgressionPipeline


def build(deterministic: bool = False, max_history: int | None = None) -> ProgressionPipeline:
    """Random weights, also where training starts from zeros: what is conditioned on must show."""
    torch.manual_seed(0)
    vae = build_autoencoder(AutoencoderConfig(patch_size=2, block_out_channels=(8, 8), norm_num_groups=4,
                                              mid_block_attention=False, sample_size=SIZE))  # fmt: skip
    conditioner = ProgressionConditioner(width=8, events=["drainage"], numbers={"age": (60, 10)}, words={"sex": ("F", "M")})
    denoiser = SequenceTransformer(4, 8, 2, width=16, depth=2, heads=2, temporal_every=1, time_periods=(2, 200),
                                   feature_dim=conditioner.feature_dim)  # fmt: skip
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = ProgressionPipeline(
        vae, denoiser, conditioner, Objective(ObjectiveConfig()).scheduler(), preprocessing={"dim": 2, "size": SIZE},
        residual_std=[0.5] * 4, num_inference_steps=2, deterministic=deterministic, max_history=max_history,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> ProgressionPipeline:
    return build()


def history(times: Sequence[float] = (0.0, 30.0), seed: int = 0, **more: object) -> History:
    images = torch.rand(len(times), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return History(images, list(times), **more)  # type: ignore[arg-type]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_a_trajectory_depends_on_its_generator_not_on_its_neighbours(pipeline: ProgressionPipeline) -> None:
    both = pipeline([history(), history(seed=1)], [40, 90], num_trajectories=2, generator=seeds(1, 2, 3, 4)).frames
    alone = pipeline(history(seed=1), [40, 90], num_trajectories=2, generator=seeds(3, 4)).frames
    assert both.shape == (4, 2, SIZE, SIZE)
    torch.testing.assert_close(torch.from_numpy(both[2:]), torch.from_numpy(alone), atol=1e-5, rtol=0)
    assert (both[0] != both[1]).any()


def test_saved_and_loaded_it_is_the_same(pipeline: ProgressionPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = ProgressionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        pipeline(history(), [50], generator=seeds(0), output_type="pt").frames,
        loaded(history(), [50], generator=seeds(0), output_type="pt").frames,
    )
    assert loaded.preprocessing.shape == (SIZE, SIZE)


@pytest.mark.parametrize("change", [
    {"times": (0.0, 29.0)}, {"events": [Event("drainage", 35)]}, {"covariates": {"age": 90.0}}, {"covariates": {"sex": "M"}},
])  # fmt: skip
def test_what_is_conditioned_on_changes_the_forecast(pipeline: ProgressionPipeline, change: dict[str, object]) -> None:
    plain = pipeline(history(), [40], generator=seeds(0)).frames
    other = pipeline(history(**change), [40], generator=seeds(0)).frames  # type: ignore[arg-type]
    assert abs(plain - other).max() > 1e-5


def test_wanted_dates_may_lie_before_between_and_on_known_ones(pipeline: ProgressionPipeline) -> None:
    out = pipeline(history((0.0, 30.0, 60.0)), [-5, 10, 30, 45, 100], generator=seeds(0))
    assert out.frames.shape == (1, 5, SIZE, SIZE) and out.times.tolist() == [[-5, 10, 30, 45, 100]]


def test_an_untrained_residual_of_zero_gives_the_last_visit_back(pipeline: ProgressionPipeline) -> None:
    quiet = build(deterministic=True)
    torch.nn.init.zeros_(quiet.denoiser.project_out.weight)
    torch.nn.init.zeros_(quiet.denoiser.project_out.bias)
    given = history()
    forecast = quiet(given, [30, 500], output_type="pt").frames
    ceiling = quiet.reconstruct(given.images)[1, 0]
    torch.testing.assert_close(forecast[0, 0], ceiling)
    torch.testing.assert_close(forecast[0, 1], ceiling)


def test_one_after_the_other_each_frame_knows_the_one_before(pipeline: ProgressionPipeline) -> None:
    long = pipeline(history(), [40, 50, 60], mode="autoregressive", generator=seeds(0), context_noise=0.0).frames
    short = pipeline(history(), [40], mode="autoregressive", generator=seeds(0), context_noise=0.0).frames
    joint = pipeline(history(), [40, 50, 60], generator=seeds(0)).frames
    assert long.shape == joint.shape and abs(long - joint).max() > 1e-4
    assert short.shape == (1, 1, SIZE, SIZE)
    noisy = pipeline(history(), [40, 50, 60], mode="autoregressive", generator=seeds(0), context_noise=0.3).frames
    assert (noisy[0, 0] == long[0, 0]).all() and (noisy[0, 1] != long[0, 1]).any()


def test_only_the_nearest_visits_are_looked_at() -> None:
    near = build(max_history=2)
    far = history((0.0, 30.0, 60.0), seed=2)
    kept = History(far.images[1:], far.times[1:])
    torch.testing.assert_close(
        near(far, [70], generator=seeds(0), output_type="pt").frames,
        near(kept, [70], generator=seeds(0), output_type="pt").frames,
    )


def test_guidance_by_condition(pipeline: ProgressionPipeline) -> None:
    given = history(events=[Event("drainage", 35)])
    plain = pipeline(given, [40], generator=seeds(0), guidance_scale={"events": 1.0}).frames
    assert (plain == pipeline(given, [40], generator=seeds(0)).frames).all(), "a scale of 1 is no guidance"
    assert abs(pipeline(given, [40], generator=seeds(0), guidance_scale={"events": 3.0}).frames - plain).max() > 1e-5
    with pytest.raises(ValueError, match="events, covariates, reports"):
        pipeline(given, [40], guidance_scale={"weather": 2.0})


def test_an_unknown_treatment_is_said(pipeline: ProgressionPipeline) -> None:
    with pytest.warns(UserWarning, match="leeches"):
        pipeline(history(events=[Event("leeches", 35)]), [40])


@pytest.mark.parametrize(("wrong", "message"), [
    ({"times": []}, "at least one wanted time"),
    ({"times": [50, 40]}, "must increase"),
    ({"times": [40], "mode": "sideways"}, "neither"),
    ({"times": [40], "num_trajectories": 2, "generator": [torch.Generator()]}, "1 generators for 2"),
    ({"times": [40], "output_type": "gif"}, "none of"),
])  # fmt: skip
def test_requests_that_cannot_be_met(pipeline: ProgressionPipeline, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(history(), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("times", "more", "message"), [
    ((), {}, "at least one"), ((5.0, 5.0), {}, "increase"), ((0.0, 1.0), {"reports": ["one"]}, "1 reports of 2"),
])  # fmt: skip
def test_histories_that_cannot_be(times: Sequence[float], more: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        history(times, **more)
