"""A checkpoint is complete or absent, whatever ends its writing; damage is noticed, pickles are refused, old ones go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medgen.training.checkpoint import (
    CheckpointError,
    PickleRefused,
    checkpoints,
    newest,
    read_tensors,
    verify,
    write_checkpoint,
    write_tensors,
)


def write(folder: Path) -> None:
    write_tensors(folder / "model/m.safetensors", {"w": torch.arange(6.0).reshape(2, 3).t()})
    (folder / "state.json").write_text("{}")


def test_what_was_written_is_read_and_old_ones_are_pruned(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        write_checkpoint(tmp_path, step, write, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000030"]
    found = newest(tmp_path)
    assert found is not None and found.name == "step-00000030"
    assert torch.equal(read_tensors(found / "model/m.safetensors")["w"], torch.arange(6.0).reshape(2, 3).t())


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, write, keep=2)

    def disk_full(folder: Path) -> None:
        write(folder)
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_checkpoint(tmp_path, 2, disk_full, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    assert newest(tmp_path) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # the half-written folder was cleared away


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "extra", "no manifest", "bad manifest"])
def test_damage_is_noticed_and_the_one_before_is_used(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step, write, keep=2)
    folder = checkpoints(tmp_path)[-1]
    file, manifest = folder / "model/m.safetensors", folder / "manifest.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif damage == "changed":
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    elif damage == "missing":
        file.unlink()
    elif damage == "extra":
        (folder / "more.json").write_text("{}")
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:20])
    with pytest.raises(CheckpointError):
        verify(folder)
    found = newest(tmp_path)
    assert found is not None and found.name == "step-00000001"
    assert "falling back" in caplog.text


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1, write, keep=2)
    torch.save({"w": torch.ones(1)}, folder / "model/m.pt")
    with pytest.raises(PickleRefused, match="can run code"):
        newest(tmp_path)
    disguised = tmp_path / "elsewhere/weights.safetensors"
    disguised.parent.mkdir()
    torch.save({"w": torch.ones(1)}, disguised)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_tensors(disguised)
