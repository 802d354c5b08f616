"""The preflight says what a step needs and what to lower, before memory runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import TinyTask, recipe

from medgen.training.memory import MemoryPreflightError, activation_bytes, check_memory, free_bytes

CPU = torch.device("cpu")


def test_activations_grow_with_the_batch() -> None:
    task = TinyTask(recipe(Path("unused")))
    modules, data = task.modules(), task.dataset("train")
    small, large = (
        activation_bytes(task, modules, "model", task.collate([data[i] for i in range(n)]), torch.float32) for n in (2, 20)
    )
    assert 0 < 5 * small < large < 15 * small


@pytest.mark.parametrize(
    ("parameters", "activations", "advice"),
    [
        (10**6, 10**15, "train.gradient_checkpointing=true"),
        (10**14, 1000, "the model's size"),
    ],
)
def test_too_much_is_refused_with_advice(parameters: int, activations: int, advice: str) -> None:
    config = recipe(Path("unused"), train={"batch_size": 64}).train
    with pytest.raises(MemoryPreflightError, match=advice) as caught:
        check_memory(parameters, parameters, activations, 2, config, CPU)
    assert "mixed_precision=bf16" in str(caught.value) and "GB are free" in str(caught.value)


def test_the_batch_size_that_would_fit_is_named() -> None:
    config = recipe(Path("unused"), train={"batch_size": 64}).train
    per_sample = free_bytes(CPU) // 20
    with pytest.raises(MemoryPreflightError, match=r"batch_size to 1[5-9] or less"):
        check_memory(1000, 0, 2 * per_sample, 2, config, CPU)


def test_a_step_that_fits_is_described() -> None:
    line = check_memory(10**6, 10**6, 2 * 10**6, 2, recipe(Path("unused")).train, CPU)
    assert "a step needs 0.02 GB more" in line and "activations (4 × 1.0 MB)" in line
