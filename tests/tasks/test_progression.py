"""The progression task, end to end on tiny follow-ups: train, export, load, forecast; what is shown, known, missing and repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from follow_ups import SIZE, write_follow_ups

from medgen.config import ConfigError
from medgen.data.visit_records import Event
from medgen.diffusion.frames import FrameBatch
from medgen.models.echo_conditioner import ConditionedDenoiser
from medgen.pipelines.progression import History, ProgressionPipeline
from medgen.tasks.base import Task
from medgen.tasks.progression import KnownVisits, Progression, ProgressionRecipe, conditions_of, visible
from medgen.training.loop import train


@pytest.fixture(scope="module")
def follow_ups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_follow_ups(tmp_path_factory.mktemp("follow_ups"))


def recipe(manifest: Path, autoencoder: Path, text_encoder: Path, out: Path, **changes: Any) -> ProgressionRecipe:
    values: dict[str, Any] = {
        "data": {"manifest": manifest, "preprocessing": {"dim": 2, "size": SIZE}},
        "autoencoder": {"path": str(autoencoder)},
        "reports": {"path": str(text_encoder), "max_tokens": 64},
        "conditioner": {"width": 16, "events": ["drainage"], "numbers": {"age": [50, 10], "weight_kg": [70, 10]},
                        "words": {"sex": ["F", "M"]}},
        "denoiser": {"width": 16, "depth": 2, "heads": 2, "temporal_every": 1, "time_periods": [2, 200]},
        "shown_visits": 3,
        "cache": manifest.parent / "cache",
        "sampling": {"num_inference_steps": 2},
        "train": {"out": out, "steps": 2, "batch_size": 4, "mixed_precision": "no", "cpu": True, "tensorboard": False,
                  "validate_every": 2, "validation_batches": 1, "preview_every": 2},
    }  # fmt: skip
    return ProgressionRecipe.model_validate(values | changes)


@pytest.fixture
def task(follow_ups: Path, autoencoder_folder: Path, text_encoder_folder: Path, tmp_path: Path) -> Progression:
    return Progression(recipe(follow_ups, autoencoder_folder, text_encoder_folder, tmp_path / "run"))


def batch_of(task: Progression, epoch: int = 0) -> dict[str, Any]:
    data = task.dataset("train")
    assert not isinstance(data, list)
    data.set_epoch(epoch)
    return task.collate([data[i] for i in range(len(data))])


def frames_of(task: Progression, seed: int = 0) -> FrameBatch:
    model = task.modules()["model"]
    assert isinstance(model, ConditionedDenoiser)
    return task.frames(model, batch_of(task), torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_ends_in_a_pipeline_that_forecasts(
    follow_ups: Path, autoencoder_folder: Path, text_encoder_folder: Path, tmp_path: Path, deterministic: bool
) -> None:
    config = recipe(follow_ups, autoencoder_folder, text_encoder_folder, tmp_path / "run", deterministic=deterministic)
    task = Progression(config)
    assert isinstance(task, Task)
    result = train(task, config.train, config)
    assert result.metrics["val/loss"] > 0
    for name in ("samples", "real"):
        assert list((result.folder / "previews").glob(f"*{name}*.png"))
    pipeline = ProgressionPipeline.from_pretrained(result.folder / "export")
    history = History(torch.rand(2, 1, SIZE, SIZE), [0.0, 9.0], [Event("drainage", 10.0)], {"age": 60.0}, ["Small effusion.", ""])
    out = pipeline(history, [12.0, 40.0], num_trajectories=2)
    assert out.frames.shape == (2, 2, SIZE, SIZE) and out.times.tolist() == [[12, 40], [12, 40]]
    assert (out.frames[0] == out.frames[1]).all() == deterministic, "a regressor has one answer, a flow has many"
    card = (result.folder / "export" / "README.md").read_text()
    assert "not a causal effect" in card and str(follow_ups.parent) not in card


def test_items_show_some_visits_in_order_and_others_in_the_next_epoch(task: Progression) -> None:
    first, other = batch_of(task), batch_of(task, epoch=1)
    assert first["latents"].shape == (8, 3, 4, 8, 8) and first["present"].all()
    assert (first["times"].diff(dim=1) > 0).all()
    assert not torch.equal(first["times"], other["times"])


def test_what_is_unknown_is_masked_not_zero(task: Progression) -> None:
    batch = batch_of(task)
    assert batch["numbers"][:, 1].isnan().tolist() == [p % 3 == 0 for p in range(8)], "a third of the weights are unknown"
    assert (batch["event_kind"] >= 0).sum() == 4


def test_something_is_known_and_something_wanted_in_every_series(task: Progression) -> None:
    for seed in range(20):
        frames = frames_of(task, seed)
        wanted = frames.present & ~frames.known
        assert frames.known.any(1).all() and wanted.any(1).all()
        assert not (frames.known & ~frames.present).any(), "a missing visit is absent, not known"


def test_a_repeated_visit_is_a_residual_of_nothing(task: Progression) -> None:
    batch = batch_of(task)
    shares = KnownVisits(between=0, missing=0, repeated=1, noise=0)
    latents, times, _, known = visible(batch, shares, torch.Generator().manual_seed(0))
    last = known.long().sum(1) - 1
    rows = torch.arange(len(last))
    torch.testing.assert_close(latents[rows, last + 1], latents[rows, last])
    torch.testing.assert_close(times[rows, last + 1], times[rows, last])


def test_in_betweening_knows_both_ends(task: Progression) -> None:
    shares = KnownVisits(between=1, missing=0, repeated=0, noise=0)
    _, _, present, known = visible(batch_of(task), shares, torch.Generator().manual_seed(1))
    both = known[:, 0] & known[:, -1]
    assert both.any() and (present & ~known)[both].any(1).all()


def test_visits_that_are_not_known_do_not_speak(task: Progression) -> None:
    batch = batch_of(task)
    known = torch.zeros_like(batch["present"])
    assert conditions_of(batch, batch["times"], known).sentence_times.isnan().all()  # type: ignore[union-attr]
    heard = conditions_of(batch, batch["times"], ~known)
    assert not heard.sentence_times.isnan().all()  # type: ignore[union-attr]


def test_residuals_are_about_as_large_as_noise(task: Progression) -> None:
    frames = frames_of(task)
    residual = frames.latents[frames.present & ~frames.known]
    assert 0.3 < float(residual.std()) < 3


@pytest.mark.parametrize(("change", "message"), [
    ({"denoiser": {"temporal_every": 0}}, "temporal_every"),
    ({"data": {"manifest": "x.parquet", "preprocessing": {"dim": 2, "size": 36}}}, "multiple of 8"),
])  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused(
    follow_ups: Path, autoencoder_folder: Path, text_encoder_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Progression(recipe(follow_ups, autoencoder_folder, text_encoder_folder, tmp_path, **change))
