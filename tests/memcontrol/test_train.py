"""Stage 2 ends in an ordinary pipeline; private training bounds every patient and says what it spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medgen.cli import main
from medgen.config import ConfigError
from medgen.data.caption_noise import VARIANTS, with_random_words
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.dp import PrivateRun, train_private
from medgen.memcontrol.masks import Adaptation
from medgen.memcontrol.task import FineTuning, MaskedTextToCXR, Start
from medgen.memcontrol.train import train
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.sampling.text_to_cxr import sample
from medgen.training.loop import train as run_loop


def test_a_chosen_mask_becomes_a_pipeline_that_samples(finished: Path, tmp_path: Path) -> None:
    folder = train(finished, tmp_path / "run")
    names = load_file(folder / "denoiser" / "diffusion_pytorch_model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert TextToCXRPipeline.from_pretrained(folder)("Large left pleural effusion.").images[0].size == (32, 32)
    assert sample(folder, tmp_path / "samples", prompt="Large left pleural effusion.", progress=False).complete
    with pytest.raises(ConfigError, match=r"has no trial 'x'; it has 00000"):
        train(finished, tmp_path / "other", trial="x")


def test_training_with_random_words_resumes_to_the_same_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    config = MemControlConfig.model_validate(settings)
    start, adaptation = Start.of(config), Adaptation(method="bias")
    seen: set[str] = set()

    def weights(name: str, *stops: int | None) -> dict[str, torch.Tensor]:
        for stop in stops:  # 8 films in batches of 4: step 3 is in the second epoch
            train = config.train.model_copy(update={"out": tmp_path / name, "steps": 5, "stop_at": stop, "validate_every": 0})
            task = MaskedTextToCXR(start.task(train, 0.1, random_words=2), adaptation)
            run_loop(task, train, FineTuning(memcontrol=config, adaptation=adaptation, random_words=2, train=train))
        data = task.dataset("train")
        for epoch in range(3):
            data.set_epoch(epoch)
            seen.add(data[0]["prompt"])
        assert task.dataset("val")[0]["prompt"] in ("Large left pleural effusion.", "Large right pleural effusion.")
        return load_file(tmp_path / name / "checkpoints" / "step-00000005" / "model" / "model.safetensors")

    whole, resumed = weights("whole", None), weights("resumed", 3, None)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert len(seen) == 3 and all(len(caption.split()) == 6 for caption in seen)


def test_random_words_keep_the_caption_in_order() -> None:
    caption = "Large left pleural effusion."
    for key in range(VARIANTS):
        words = iter(with_random_words(caption, 5, "r1", key).split())
        assert all(word in words for word in caption.split())


@pytest.fixture
def private(settings: dict[str, Any], tmp_path: Path) -> MemControlConfig:
    train = settings["train"] | {"out": tmp_path / "private", "steps": 4, "batch_size": 4, "checkpoint_every": 2}
    return MemControlConfig.model_validate(settings | {"train": train})


def test_gradients_are_per_patient_and_sum_to_the_batch(private: MemControlConfig) -> None:
    run = PrivateRun(private, 8.0, None, 0.1)
    for value in run.optimizer.params:  # away from LoRA's zero, where half of the gradients vanish
        torch.nn.init.normal_(value, std=0.1)
    batch = run.task.collate([run.films[row] for row in range(3)])

    def loss_of(module: torch.nn.Module) -> torch.Tensor:
        from medgen.diffusion.objectives import denoising_loss

        draws = torch.Generator().manual_seed(0)
        return denoising_loss(module, run.base.objective, run.base.frames({"model": run.model}, batch, draws), draws)

    loss_of(run.wrapped).backward()
    kept = [(value.grad_sample.mean(0), len(value.grad_sample)) for value in run.optimizer.params]
    run.wrapped.to_standard_module()
    plain = torch.autograd.grad(loss_of(run.model), run.optimizer.params)
    for (mean, count), whole in zip(kept, plain, strict=True):
        assert count == 3
        torch.testing.assert_close(mean, whole, atol=1e-6, rtol=1e-4)


def test_a_private_run_spends_its_budget_and_resumes_to_the_same_weights(
    private: MemControlConfig, config: Path, tmp_path: Path
) -> None:
    options = ("train.steps=4", "train.checkpoint_every=2")
    words = ["--config", str(config), "--out", str(tmp_path / "whole"), "--epsilon", "8", "--overrides", *options]
    assert main(["memcontrol", "private", *words]) == 0
    folder = tmp_path / "whole" / "export"
    spent = json.loads((folder / "privacy.json").read_text())
    assert 7.5 < spent["epsilon"] <= 8.0 and spent["delta"] == 1 / 80 and spent["unit"] == "patient"
    assert TextToCXRPipeline.from_pretrained(folder)("Large left pleural effusion.").images[0].size == (32, 32)

    out = tmp_path / "resumed"
    interrupted = PrivateRun(private.model_copy(update={"train": _of(private, out)}), 8.0, None, 0.1)
    interrupted.take_step(), interrupted.take_step(), interrupted.save()
    again = train_private(config, out, epsilon=8.0, overrides=options)
    name = "denoiser/diffusion_pytorch_model.safetensors"
    whole, resumed = load_file(folder / name), load_file(again / name)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def _of(private: MemControlConfig, out: Path) -> Any:
    return private.train.model_copy(update={"out": out, "learning_rate": 1e-3, "checkpoint_every": 2})


def test_a_delta_that_would_allow_publishing_a_patient_is_refused(private: MemControlConfig) -> None:
    with pytest.raises(ConfigError, match=r"delta: 0.5 for 8 patients"):
        PrivateRun(private, 8.0, 0.5, 0.1)
