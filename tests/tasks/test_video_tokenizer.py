"""Training the video tokenizer: it learns to reconstruct, resumes bit for bit with its codebook, and exports itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medgen.config import ConfigError, load_config
from medgen.models.video_tokenizer import load_video_tokenizer
from medgen.tasks.base import Task
from medgen.tasks.video_tokenizer import VideoTokenizerRecipe, VideoTokenizerTask
from medgen.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
SIZE, FRAMES = 32, 9  # of the clips of `hearts`


def recipe(hearts: Path, out: Path, **changes: Any) -> VideoTokenizerRecipe:
    values: dict[str, Any] = {
        "data": {"manifest": hearts, "preprocessing": {"size": SIZE, "frames": 5, "fps": 20}},
        "tokenizer": {"patch_size": 16, "width": 16, "depth": 1, "heads": 2, "memory": 2, "codes_per_place": 2, "code_dim": 4,
                      "codebook_size": 16},
        "train": {"out": out, "steps": 4, "batch_size": 2, "accumulate": 2, "mixed_precision": "no", "cpu": True, "warmup_steps": 0,
                  "tensorboard": False, "validate_every": 4, "validation_batches": 1, "preview_every": 4, "checkpoint_every": 2,
                  "log_every": 1},
    }  # fmt: skip
    return VideoTokenizerRecipe.model_validate({**values, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").glob("step-*"))[-1] / "model" / "model.safetensors")


def test_a_run_exports_a_tokenizer(hearts: Path, tmp_path: Path) -> None:
    config = recipe(hearts, tmp_path / "run")
    task = VideoTokenizerTask(config)
    assert isinstance(task, Task)
    result = train(task, config.train, config)
    assert {"val/psnr", "val/ssim", "val/perplexity", "commitment"} <= result.metrics.keys()
    assert list((result.folder / "previews").glob("*reconstruction.png"))
    model = load_video_tokenizer(result.folder / "export")
    codes = model.encode(task.dataset("val")[0]["video"][None])
    assert codes.shape == (1, 3, 2, 2, 2)


def test_resume_is_bit_exact_codebook_included(hearts: Path, tmp_path: Path) -> None:
    """Accumulation moves the codebook within a step; stopped after step 2 and continued, all of it is as if never stopped."""
    whole, parts = recipe(hearts, tmp_path / "whole"), recipe(hearts, tmp_path / "parts")
    train(VideoTokenizerTask(whole), whole.train, whole)
    early = parts.model_copy(update={"train": parts.train.model_copy(update={"stop_at": 2})})
    train(VideoTokenizerTask(early), early.train, early)
    before = weights(tmp_path / "parts")
    train(VideoTokenizerTask(parts), parts.train, parts)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert {"quantizer.codebook", "quantizer.sums", "quantizer.usage"} <= expected.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert not torch.equal(before["quantizer.codebook"], found["quantizer.codebook"])


def test_it_learns_to_reconstruct(hearts: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = VideoTokenizerTask(recipe(hearts, tmp_path))
    model = task.modules()["model"].train()
    data = task.dataset("train")
    batch = task.collate([data[i] for i in range(4)])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss, _ = task.loss({"model": model}, batch, "model", torch.Generator())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_frames_that_are_not_there_do_not_count(hearts: Path, tmp_path: Path) -> None:
    task = VideoTokenizerTask(recipe(hearts, tmp_path))
    model = task.modules()["model"].eval()
    item = task.dataset("train")[0]
    short = {**item, "video": item["video"][:2]}
    batch = task.collate([short, item])
    assert batch["videos"].shape == (2, 5, 1, SIZE, SIZE) and batch["frames"].tolist() == [2, 5]
    alone, _ = task.loss({"model": model}, task.collate([short]), "model", torch.Generator())
    batch["videos"], batch["frames"] = batch["videos"][:1], batch["frames"][:1]
    padded, _ = task.loss({"model": model}, batch, "model", torch.Generator())
    assert padded.item() == pytest.approx(alone.item(), rel=0.1)  # commitment alone sees the repeated frames
    assert FRAMES > 5  # so that the windows above were cut


def test_a_size_that_does_not_fit_is_named(hearts: Path, tmp_path: Path) -> None:
    wrong = recipe(hearts, tmp_path, data={"manifest": hearts, "preprocessing": {"size": 40}})
    with pytest.raises(ConfigError, match=r"data\.preprocessing\.size: 40"):
        VideoTokenizerTask(wrong).modules()


def test_the_recipe_is_valid() -> None:
    config = load_config(VideoTokenizerRecipe, ROOT / "configs/video_tokenizer/digital_echo.yaml")
    assert config.data.preprocessing.size % config.tokenizer.patch_size == 0
