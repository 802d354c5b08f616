"""The masked-token generator's task: codes and conditions of a batch, what is hidden, a run from start to export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medgen.config import ConfigError, load_config
from medgen.digital.ecg import simulate_ecg
from medgen.digital.rhythm import draw_rhythm
from medgen.models.video_tokenizer import VideoTokenizer
from medgen.pipelines.masked_ecg_to_echo import MaskedECGToEchoPipeline
from medgen.tasks.base import Task
from medgen.tasks.echo_tokens import EchoTokens, EchoTokensRecipe
from medgen.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
SIZE, FRAMES = 32, 9  # of the clips of `hearts`


@pytest.fixture(scope="module")
def world(hearts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Manifest and tokenizer folder."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(patch_size=8, width=16, depth=1, heads=2, codes_per_place=2, code_dim=4, codebook_size=12)
    tokenizer.save_pretrained(root / "tokenizer")
    return hearts, root / "tokenizer"


def recipe(world: tuple[Path, Path], out: Path, **changes: Any) -> EchoTokensRecipe:
    values: dict[str, Any] = {
        "data": {"manifest": world[0], "preprocessing": {"size": SIZE, "frames": FRAMES, "fps": 20}},
        "tokenizer": {"path": str(world[1])},
        "conditioner": {"width": 16, "depth": 1, "heads": 2},
        "denoiser": {"patch_size": 1, "width": 16, "depth": 2, "heads": 2, "temporal_every": 1, "time_periods": [0.2, 8.0]},
        "token_dim": 8,
        "known": {"longest": 4},
        "cache": out.parent / "cache",
        "sampling": {"num_inference_steps": 2, "overlap": 4, "num_frames": 14},
        "train": {"out": out, "steps": 2, "batch_size": 2, "mixed_precision": "no", "cpu": True, "tensorboard": False,
                  "validate_every": 2, "validation_batches": 1, "preview_every": 2},
    }  # fmt: skip
    return EchoTokensRecipe.model_validate({**values, **changes})


def batch_of(task: EchoTokens, count: int = 4) -> dict[str, Any]:
    data = task.dataset("train")
    return task.collate([data[i] for i in range(count)])


def test_a_run_exports_a_pipeline_that_generates(world: tuple[Path, Path], tmp_path: Path) -> None:
    config = recipe(world, tmp_path / "run")
    task = EchoTokens(config)
    assert isinstance(task, Task)
    result = train(task, config.train, config)
    assert {"val/loss", "val/accuracy"} <= result.metrics.keys()
    assert list((result.folder / "previews").glob("*samples.png"))
    assert not list((result.folder / "export").rglob("*.bin"))
    pipeline = MaskedECGToEchoPipeline.from_pretrained(result.folder / "export")
    out = pipeline(None, ejection_fraction=50.0, view="A4C", generator=torch.Generator().manual_seed(0))
    assert out.frames.shape == (1, 14, SIZE, SIZE) and 0 <= out.frames.min() <= out.frames.max() <= 1


def test_token_frames_carry_the_time_and_phase_of_their_last_frame(world: tuple[Path, Path], tmp_path: Path) -> None:
    task = EchoTokens(recipe(world, tmp_path / "run"))
    batch = batch_of(task)
    codes, conditions, present = task.tokens(batch)
    assert codes.shape == (4, 5, 4, 4, 2) and present.all()
    torch.testing.assert_close(conditions.times[0], torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]))
    assert conditions.phase is not None and torch.equal(conditions.phase, batch["phase"][:, ::2])


def test_a_shorter_clip_is_filled_up_and_masked(world: tuple[Path, Path], tmp_path: Path) -> None:
    task = EchoTokens(recipe(world, tmp_path / "run"))
    item = task.dataset("train")[0]
    short = {**item, "video": item["video"][:4], "times": item["times"][:4], "phase": item["phase"][:4]}
    batch = task.collate([short, item])
    _, conditions, present = task.tokens(batch)
    assert present.tolist() == [[True, True, True, False, False], [True] * 5]
    assert batch["phase"][0, 4:].isnan().all()
    torch.testing.assert_close(conditions.times[0], conditions.times[1])


def test_the_loss_falls_and_the_same_generator_gives_the_same_loss(world: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = EchoTokens(recipe(world, tmp_path / "run"))
    modules, batch = task.modules(), batch_of(task)
    first, _ = task.loss(modules, batch, "model", torch.Generator().manual_seed(1))
    again, _ = task.loss(modules, batch, "model", torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    optimiser = torch.optim.Adam(modules["model"].parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss, _ = task.loss(modules, batch, "model", torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_clips_middle_is_learned_too(world: tuple[Path, Path], tmp_path: Path) -> None:
    """With `middle` the first token frame is left out of some batches: their loss is another."""
    task = EchoTokens(recipe(world, tmp_path / "run", middle=0.999))
    never = EchoTokens(recipe(world, tmp_path / "run", middle=0.0))
    modules, batch = task.modules(), batch_of(task)
    seen: list[int] = []
    hook = modules["model"].denoiser.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    for one in (task, never):
        one.loss(modules, batch, "model", torch.Generator().manual_seed(0))
    hook.remove()
    assert seen == [4, 5]


def test_the_ecg_moves_what_is_generated(world: tuple[Path, Path], tmp_path: Path) -> None:
    """Random weights away from their zero start: an ECG and no ECG give other codes from the same generator."""
    task = EchoTokens(recipe(world, tmp_path / "run"))
    modules = task.modules()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in modules["model"].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    pipeline = task.pipeline(modules)
    pipeline.set_progress_bar_config(disable=True)
    ecg, _ = simulate_ecg(draw_rhythm(0, "sinus", 75.0, -1.5, 2.0, 0.0), 0, start=-1.5, end=2.0)
    given, absent = (pipeline(one, generator=torch.Generator().manual_seed(0)).frames for one in (ecg, None))
    assert abs(given - absent).max() > 1e-3


def test_mistakes_are_named(world: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.preprocessing\.size: 36"):
        EchoTokens(recipe(world, tmp_path, data={"manifest": world[0], "preprocessing": {"size": 36, "frames": FRAMES}}))
    with pytest.raises(ConfigError, match=r"known\.longest"):
        EchoTokens(recipe(world, tmp_path, known={"longest": FRAMES}))
    with pytest.raises(ConfigError, match=r"denoiser\.patch_size"):
        EchoTokens(recipe(world, tmp_path, denoiser={"patch_size": 2, "temporal_every": 1})).modules()


def test_the_recipe_is_valid() -> None:
    config = load_config(EchoTokensRecipe, ROOT / "configs/ecg_to_echo/digital_echo_tokens.yaml")
    assert config.denoiser.patch_size == 1
