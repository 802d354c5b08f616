"""Killed, stopped and resumed runs equal the uninterrupted one bit for bit; bad steps apply no update and name their samples."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import Launch, assert_same_run, final_state, free_port
from tiny import recipe

from medgen.config import save_config
from medgen.training.guards import EXIT_STOPPED


@pytest.mark.parametrize("world", [1, 2])
def test_kill_9_at_ten_random_moments(world: int, tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    settings = recipe(tmp_path / "run")
    started = time.monotonic()
    assert Launch(recipe(tmp_path / "clock"), world).wait() == 0
    duration = time.monotonic() - started
    moments = random.Random(world)
    kills = 0
    while kills < 10:
        launch = Launch(settings, world)
        time.sleep(duration * moments.uniform(0.5, 1.0))
        launch.signal(signal.SIGKILL)
        launch.wait()
        kills += 1
    last = Launch(settings, world)
    assert last.wait() == 0, last.output()
    assert_same_run(settings.train.out, uninterrupted[world])


@pytest.mark.parametrize("micro_step", [5, 11, 18, 22])
def test_kill_9_inside_an_accumulation_and_again_after_resuming(
    micro_step: int, tmp_path: Path, uninterrupted: dict[int, Path]
) -> None:
    # 22 samples in micro batches of 4: micro step 6 crosses the first epoch, odd ones lie in the middle of an optimiser step.
    for kill_after in (micro_step, 3, 9):
        assert Launch(recipe(tmp_path / "run", kill_after=kill_after)).wait() == -signal.SIGKILL
    assert Launch(recipe(tmp_path / "run")).wait() == 0
    assert_same_run(tmp_path / "run", uninterrupted[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_with_its_own_code(number: int, tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    first = Launch(recipe(tmp_path / "run", kill_after=13, kill_with=number))
    assert first.wait() == EXIT_STOPPED, first.output()
    assert (tmp_path / "run/checkpoints/step-00000006").is_dir()  # micro step 13 belongs to step 7, which is taken again
    assert Launch(recipe(tmp_path / "run")).wait() == 0
    assert_same_run(tmp_path / "run", uninterrupted[1])


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    launch = Launch(recipe(tmp_path / "run", kill_after=13, kill_with=signal.SIGTERM), world=2)
    assert launch.wait() == EXIT_STOPPED, launch.output()
    assert (tmp_path / "run/checkpoints/step-00000007").is_dir()
    assert Launch(recipe(tmp_path / "run"), world=2).wait() == 0
    assert_same_run(tmp_path / "run", uninterrupted[2])


def test_a_signal_during_validation_is_heard_and_validation_redone(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    stopped = Launch(recipe(tmp_path / "run", stop_in_validation=True))
    assert stopped.wait() == EXIT_STOPPED, stopped.output()
    assert (tmp_path / "run/checkpoints/step-00000006").is_dir()
    assert Launch(recipe(tmp_path / "run")).wait() == 0
    assert_same_run(tmp_path / "run", uninterrupted[1])


@pytest.mark.timeout(600)
def test_accelerate_launch_of_two_processes_is_the_same_run(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    settings = recipe(tmp_path / "run")
    save_config(settings, tmp_path / "run.yaml")
    root = Path(__file__).parents[2]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    topology = ["--config_file", str(root / "configs/accelerate/cpu2.yaml"), "--main_process_port", free_port()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, *topology, str(Path(__file__).with_name("tiny.py")), str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr
    assert_same_run(settings.train.out, uninterrupted[2])


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, uninterrupted: dict[int, Path]) -> None:
    assert Launch(recipe(tmp_path / "run", kill_after=27)).wait() == -signal.SIGKILL
    damaged = tmp_path / "run/checkpoints/step-00000012/model/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    resumed = Launch(recipe(tmp_path / "run"))
    assert resumed.wait() == 0
    assert "differs from its hash" in resumed.output() and "from step 8" in resumed.output()
    assert_same_run(tmp_path / "run", uninterrupted[1])


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert Launch(recipe(tmp_path / "run", kill_after=11)).wait() == -signal.SIGKILL
    (tmp_path / "run/checkpoints/step-00000004/optimizer.bin").write_bytes(b"\x80\x04.")
    launch = Launch(recipe(tmp_path / "run"))
    assert launch.wait() == 1 and "is a pickle" in launch.output()


@pytest.mark.parametrize("world", [1, 2])
def test_nan_applies_no_update_names_the_sample_and_goes_on(world: int, tmp_path: Path) -> None:
    settings = recipe(tmp_path / "run", nan_samples=(7,), train={"steps": 4})
    launch = Launch(settings, world)
    assert launch.wait() == 0, launch.output()
    tensors, lines = final_state(settings.train.out)
    bad = [line for line in lines if line["kind"] == "nonfinite"]
    assert bad and all(line["ids"] == ["point-7"] for line in bad)
    assert all(value.isfinite().all() for value in tensors.values())  # running statistics included
    updates = tensors["optimizer/model.safetensors:0.weight:step"].item()
    assert updates == 4 - len(bad)


def test_too_many_bad_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    launch = Launch(recipe(tmp_path / "run", nan_samples=tuple(range(22)), train={"max_nonfinite": 3}))
    assert launch.wait() == 1
    assert "3 steps in a row were not finite" in launch.output()


def test_another_configuration_in_the_same_folder_is_an_error_that_names_the_keys(tmp_path: Path) -> None:
    assert Launch(recipe(tmp_path / "run", train={"steps": 1})).wait() == 0
    launch = Launch(recipe(tmp_path / "run", train={"steps": 2, "learning_rate": 0.5}))
    assert launch.wait() == 1
    assert "train.learning_rate: 0.01 there, 0.5 now" in launch.output() and "train.steps" not in launch.output()


def test_the_folder_holds_what_it_promises(uninterrupted: dict[int, Path]) -> None:
    out = uninterrupted[1]
    newest = sorted((out / "checkpoints").iterdir())
    assert [path.name for path in newest] == ["step-00000012", "step-00000014"]  # `keep` is 2
    assert yaml.safe_load((newest[-1] / "config.yaml").read_text())["train"]["steps"] == 14
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 6, 9, 12, 14]
    assert [line["step"] for line in lines if line["kind"] == "val"] == [6, 12, 14]
    assert lines[-1]["loss"] < lines[2]["loss"]  # it learns
    assert (out / "export/model.safetensors").is_file()
