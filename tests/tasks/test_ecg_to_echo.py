"""The flow generator's task, end to end on six tiny digital hearts: train, export, load, sample; resume to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medgen.config import ConfigError, load_config
from medgen.diffusion.frames import FrameBatch
from medgen.models.echo_conditioner import CONDITIONS, ConditionedDenoiser
from medgen.pipelines.ecg_to_echo import ECGToEchoPipeline
from medgen.tasks.base import Task
from medgen.tasks.ecg_to_echo import ECGToEcho, ECGToEchoRecipe, KnownFrames, known_frames
from medgen.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
SIZE, CLIP, FRAMES = 32, 9, 6  # of the clips of `hearts`, and of the window that is learned


def recipe(hearts: Path, autoencoder: Path, out: Path, **changes: Any) -> ECGToEchoRecipe:
    values: dict[str, Any] = {
        "data": {"manifest": hearts, "preprocessing": {"size": SIZE, "frames": FRAMES, "fps": 20}},
        "autoencoder": {"path": str(autoencoder)},
        "conditioner": {"width": 16, "depth": 1, "heads": 2},
        "denoiser": {"width": 16, "depth": 2, "heads": 2, "temporal_every": 1, "time_periods": [0.2, 8.0]},
        "known": {"longest": 4},
        "cache": hearts.parent / "cache",
        "sampling": {"num_inference_steps": 2, "overlap": 2},
        "train": {"out": out, "steps": 2, "batch_size": 2, "mixed_precision": "no", "cpu": True, "tensorboard": False,
                  "validate_every": 2, "validation_batches": 1, "preview_every": 2},
    }  # fmt: skip
    for name, change in changes.items():
        values[name] = {**values.get(name, {}), **change} if isinstance(change, dict) else change
    return ECGToEchoRecipe.model_validate(values)


@pytest.fixture
def task(hearts: Path, autoencoder_folder: Path, tmp_path: Path) -> ECGToEcho:
    return ECGToEcho(recipe(hearts, autoencoder_folder, tmp_path / "run"))


def batch_of(task: ECGToEcho, epoch: int = 0) -> dict[str, Any]:
    data = task.dataset("train")
    data.set_epoch(epoch)
    return task.collate([data[i] for i in range(4)])


def frames_of(task: ECGToEcho, seed: int = 0) -> FrameBatch:
    model = task.modules()["model"]
    assert isinstance(model, ConditionedDenoiser)
    return task.frames(model, batch_of(task), torch.Generator().manual_seed(seed))


def test_a_run_ends_in_a_pipeline_that_samples(hearts: Path, autoencoder_folder: Path, tmp_path: Path) -> None:
    config = recipe(hearts, autoencoder_folder, tmp_path / "run")
    task = ECGToEcho(config)
    assert isinstance(task, Task)
    result = train(task, config.train, config)
    assert result.metrics["val/loss"] > 0
    for name in ("samples", "real"):
        assert list((result.folder / "previews").glob(f"*{name}*.png"))
    pipeline = ECGToEchoPipeline.from_pretrained(result.folder / "export")
    out = pipeline(ejection_fraction=50.0, view="A4C", num_frames=8)
    assert out.frames.shape == (1, 8, SIZE, SIZE)
    card = (result.folder / "export" / "README.md").read_text()
    assert "synthetic" in card and str(hearts.parent) not in card


def test_items_are_windows_on_their_own_clock(task: ECGToEcho) -> None:
    first, other = batch_of(task), batch_of(task, epoch=1)
    assert first["mean"].shape == (4, FRAMES, 4, 8, 8) and first["present"].all()
    assert (first["times"][:, 0] == 0).all()
    torch.testing.assert_close(first["times"][0], torch.arange(FRAMES) / 20)
    assert first["ecg"].shape == (4, 12, round(((FRAMES - 1) / 20 + 2) * 250)) and first["lead_mask"].all()
    assert not torch.equal(first["mean"], other["mean"]), "another epoch, another part of the clip"
    assert torch.equal(first["mean"], batch_of(task)["mean"])


def test_signal_and_phase_move_with_the_window(task: ECGToEcho) -> None:
    """What frame k of one window and frame k - d of another show is one moment: the same latents, ECG and phase."""
    batches = [batch_of(task, epoch) for epoch in range(8)]
    pairs = 0
    for one in batches:
        for two in batches:
            for lag in range(1, CLIP - FRAMES + 1):
                for clip in range(4):
                    if not torch.equal(one["mean"][clip, lag:], two["mean"][clip, :-lag]):
                        continue
                    pairs += 1
                    torch.testing.assert_close(one["phase"][clip, lag:], two["phase"][clip, :-lag], equal_nan=True)
                    later = lag / 20 + two["ecg_start"][clip] - one["ecg_start"][clip]
                    skipped = round(float(later) * 250)
                    assert float(later) * 250 == pytest.approx(skipped, abs=1e-3), "whole samples, at their true seconds"
                    assert torch.equal(one["ecg"][clip, :, skipped:], two["ecg"][clip, :, :-skipped])
    assert pairs


def test_some_frames_of_each_window_at_their_times(hearts: Path, autoencoder_folder: Path, tmp_path: Path) -> None:
    few = ECGToEcho(recipe(hearts, autoencoder_folder, tmp_path / "run", shown_frames=3))
    whole = ECGToEcho(recipe(hearts, autoencoder_folder, tmp_path / "run"))
    seen = set()
    for epoch in range(6):
        part, all_frames = batch_of(few, epoch), batch_of(whole, epoch)
        assert part["mean"].shape[:2] == part["phase"].shape[:2] == (4, 3) and part["ecg"].shape == all_frames["ecg"].shape
        for clip in range(4):
            where = (part["times"][clip] * 20).round().long()
            assert where[0] == 0 and (where.diff() > 0).all()
            assert torch.equal(part["mean"][clip], all_frames["mean"][clip, where])
            torch.testing.assert_close(part["phase"][clip], all_frames["phase"][clip, where], equal_nan=True)
            seen |= set(where.tolist())
    assert seen == set(range(FRAMES))
    assert few.dataset("val")[0]["mean"].shape[0] == FRAMES, "validation sees whole windows"


def test_conditions_are_dropped_independently(hearts: Path, autoencoder_folder: Path, tmp_path: Path) -> None:
    half = dict.fromkeys(CONDITIONS, 0.5) | {"everything": 0.0, "leads": 0.0}
    task = ECGToEcho(recipe(hearts, autoencoder_folder, tmp_path / "run", dropout=half))
    masks = torch.cat([frames_of(task, seed).context_mask[:, [0, -3, -2, -1]] for seed in range(40)]).float()
    assert ((masks.mean(0) > 0.35) & (masks.mean(0) < 0.65)).all()
    assert masks.T.corrcoef().fill_diagonal_(0).abs().max() < 0.3


def test_without_dropout_everything_is_there(hearts: Path, autoencoder_folder: Path, tmp_path: Path) -> None:
    none = dict.fromkeys((*CONDITIONS, "everything", "leads"), 0.0)
    frames = frames_of(ECGToEcho(recipe(hearts, autoencoder_folder, tmp_path / "run", dropout=none)))
    assert frames.context_mask.all() and frames.feature_mask.all()


def test_known_frames_are_the_first_ones_and_never_all() -> None:
    present = torch.ones(400, FRAMES, dtype=torch.bool)
    present[::2, 3:] = False
    known = known_frames(present, KnownFrames(first=0.3, continuing=0.3, longest=5), torch.Generator().manual_seed(0))
    counts = known.sum(1)
    assert (known == (torch.arange(FRAMES) < counts[:, None])).all() and (counts < present.sum(1)).all()
    assert set(counts[1::2].tolist()) == {0, 1, 2, 3, 4, 5}
    assert 0.3 < (counts == 0).float().mean() < 0.5


def test_known_frames_do_not_count_and_reach_the_denoiser_clean(
    hearts: Path, autoencoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = ECGToEcho(recipe(hearts, autoencoder_folder, tmp_path / "run", known={"first": 1.0, "continuing": 0.0}))
    modules, batch = task.modules(), batch_of(task)
    seen: list[torch.Tensor] = []
    forward = modules["model"].denoiser.forward

    def watching(latents: torch.Tensor, levels: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.extend((latents, levels))
        return forward(latents, levels, *rest, **named)

    monkeypatch.setattr(modules["model"].denoiser, "forward", watching)
    batch["std"] = torch.zeros_like(batch["std"])
    task.loss(modules, batch, "model", torch.Generator().manual_seed(0))
    assert torch.equal(seen[0][:, 0], batch["mean"][:, 0].float()) and (seen[1][:, 0] == 0).all() and (seen[1][:, 1:] > 0).all()


def test_stopped_and_continued_is_never_stopped(hearts: Path, autoencoder_folder: Path, tmp_path: Path) -> None:
    def run(out: str, **changes: Any) -> Path:
        settings = {"out": tmp_path / out, "steps": 4, "checkpoint_every": 2, "validate_every": 0, "preview_every": 0, "log_every": 1,
                    **changes}  # fmt: skip
        config = recipe(hearts, autoencoder_folder, tmp_path / out, train=settings)
        return train(ECGToEcho(config), config.train, config).folder

    whole = run("whole")
    run("parts", stop_at=2)
    parts = run("parts")
    last = sorted((whole / "checkpoints").iterdir())[-1]
    tensors = list(last.rglob("*.safetensors"))
    assert len(tensors) == 3, "weights, average, moments"
    for path in tensors:
        other = load_file(parts / path.relative_to(whole))
        assert all(torch.equal(value, other[name]) for name, value in load_file(path).items()), path
    losses = [[json.loads(line)["loss"] for line in (f / "metrics.jsonl").read_text().splitlines() if "loss" in line][-2:]
              for f in (whole, parts)]  # fmt: skip
    assert losses[0] == losses[1]


def test_fine_tuning_starts_from_an_exported_pipeline(hearts: Path, autoencoder_folder: Path, tmp_path: Path) -> None:
    first = ECGToEcho(recipe(hearts, autoencoder_folder, tmp_path / "run", export_dtype="float32"))
    modules = first.modules()
    first.export(modules, tmp_path)
    again = recipe(hearts, tmp_path, tmp_path / "run", denoiser={"init_from": str(tmp_path)})
    weights = ECGToEcho(again).modules()["model"].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in modules["model"].state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"preprocessing": {"size": 36, "frames": FRAMES}}}, "multiple of 8"),
        ({"denoiser": {"temporal_every": 0}}, "needs attention in time"),
        ({"known": {"longest": FRAMES}}, r"known\.longest: 6 of the 6 frames"),
        ({"sampling": {"overlap": 9}}, r"sampling\.overlap: 9"),
        ({"conditioner": {"heads": 3}}, "conditioner: width 16 / heads 3"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(
    hearts: Path, autoencoder_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ECGToEcho(recipe(hearts, autoencoder_folder, tmp_path / "run", **change)).modules()


@pytest.mark.parametrize("name", ["digital_echo", "echo_gpu"])
def test_the_recipes_are_valid(name: str) -> None:
    config = load_config(ECGToEchoRecipe, ROOT / "configs" / "ecg_to_echo" / f"{name}.yaml")
    assert config.known.longest < config.data.preprocessing.frames
