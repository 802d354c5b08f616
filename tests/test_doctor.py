"""The doctor: what it says was tried, and its estimates follow the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from medgen import doctor, estimates
from medgen.training.run import TASKS

RECIPE = """
data: {manifest: nowhere.parquet, preprocessing: {size: 64}}
autoencoder: {block_out_channels: [8, 16], norm_num_groups: 4, sample_size: 64, mid_block_attention: false}
train: {out: runs/x, steps: 1, batch_size: 4, mixed_precision: "no", ema: null}
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder" / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "autoencoder" / "wrong.yaml").write_text(RECIPE.replace("steps", "setps"))
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "cpu.yaml").write_text("num_processes: 1\n")
    return tmp_path


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """This machine, tried once: both ways of telling it are asked about the same measurement."""
    return doctor.examine()


def test_json_tells_devices_attention_and_recipes(
    configs: Path, measured: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", measured.copy)
    doctor.doctor(json=True, configs=configs)
    found = json.loads(capsys.readouterr().out)
    cpu = found["devices"][0]
    assert found["software"]["torch"] == torch.__version__.partition("+")[0]
    assert cpu["tflops"]["float32"] > 0
    assert cpu["attention"]["sdpa math"] == "works"
    assert cpu["attention"]["xformers"] == "needs a CUDA device"
    assert cpu["free_gb"] <= cpu["memory_gb"]
    tiny, wrong = found["recipes"]
    assert tiny["fits"]
    assert tiny["need_gb"] < 1
    assert "train.setps" in wrong["problem"]


def test_tables_show_every_recipe(
    configs: Path, measured: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "examine", measured.copy)
    doctor.doctor(configs=configs)
    said = capsys.readouterr().out
    assert "autoencoder tiny" in said
    assert "sdpa math" in said


def test_a_backend_with_wrong_numbers_does_not_count_as_working() -> None:
    expected = torch.ones(1, 64, 2, 32)
    assert doctor._try(lambda: expected, expected) == "works"
    assert doctor._try(lambda: expected + 1, expected).startswith("wrong by 1")

    def refuses() -> torch.Tensor:
        raise RuntimeError("No available kernel. Aborting execution.")

    assert doctor._try(refuses, expected) == "not on this device"


def test_the_estimate_counts_parameters_and_grows_with_the_batch(configs: Path) -> None:
    from medgen.config import load_config
    from medgen.models.autoencoder import build_autoencoder
    from medgen.tasks.autoencoder import AutoencoderRecipe

    path = configs / "autoencoder" / "tiny.yaml"
    one = estimates.estimate("autoencoder", path)
    model = build_autoencoder(load_config(AutoencoderRecipe, path).autoencoder)
    assert one.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert one.state_bytes == 16 * one.parameters
    path.write_text(RECIPE.replace("batch_size: 4", "batch_size: 8"))
    two = estimates.estimate("autoencoder", path)
    assert (two.activation_bytes, two.step_flop) == (2 * one.activation_bytes, 2 * one.step_flop)


def test_a_volume_of_twice_the_side_keeps_eight_times_as_much(configs: Path) -> None:
    kept = []
    for size in (16, 32):
        path = configs / "autoencoder" / "volumes.yaml"
        path.write_text(
            RECIPE.replace("{size: 64}", f"{{dim: 3, size: {size}}}").replace("sample_size: 64", f"sample_size: {size}")
        )
        found = estimates.estimate("autoencoder", path)
        assert found.problem is None
        kept.append(found)
    assert kept[0].parameters == kept[1].parameters
    assert kept[1].step_flop == pytest.approx(8 * kept[0].step_flop, rel=0.01)
    assert kept[1].activation_bytes == pytest.approx(8 * kept[0].activation_bytes, rel=0.05)


def test_shipped_recipes_can_all_be_estimated() -> None:
    found = estimates.estimate_recipes(Path(__file__).parents[1] / "configs")
    assert {estimate.task for estimate in found} == set(TASKS)
    for estimate in found:
        assert estimate.problem is None or "fine-tunes" in estimate.problem, estimate


@pytest.mark.parametrize(
    ("task", "recipe"),
    [
        ("autoencoder", "autoencoder/digital_echo"),
        ("ecg-to-echo", "ecg_to_echo/digital_echo"),
        ("ecg-translation", "ecg_translation/missing_leads"),
        ("echo-tokens", "ecg_to_echo/digital_echo_tokens"),
        ("segmenter", "segmenter/digital_echo"),
        ("video-tokenizer", "video_tokenizer/digital_echo"),
    ],
)
def test_every_recipe_of_the_digital_heart_is_estimated_without_data(task: str, recipe: str) -> None:
    found = estimates.estimate(task, Path(__file__).parents[1] / "configs" / f"{recipe}.yaml")
    assert found.problem is None
    assert found.parameters > 10_000 and found.step_flop > 1e8 and found.activation_bytes > 0
