"""The benches run on any machine, print a table and write their figures. (How fast they find it is the machine's affair.)"""

from __future__ import annotations

import json
from pathlib import Path

from medgen.bench.load import bench_load
from medgen.bench.train import bench_train


def test_the_loader_is_timed(tmp_path: Path) -> None:
    result = bench_load(images=6, side=128, size=64, repeats=1, out=tmp_path / "load.json")
    figures = json.loads((tmp_path / "load.json").read_text())
    assert figures["ratio"] == result.ratio > 1
    assert "second epoch" in str(result)


def test_a_training_step_is_timed(tmp_path: Path) -> None:
    result = bench_train(batch_size=1, steps=1, films=2, out=tmp_path / "train.json")
    figures = json.loads((tmp_path / "train.json").read_text())["figures"]
    assert figures["ratio"] > 0 and 0 < figures["share_of_fp32"] < 1.5
    # 9.2 M parameters, 64 tokens, forward and backward: 6 FLOP per parameter and token, and attention
    assert 2e9 < figures["step_flop"] < 6e9
    assert "times as fast" in str(result)
