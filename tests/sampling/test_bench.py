"""`medgen.bench.sample` times real batches and names the machine (here, beside the tiny pipeline that it times)."""

from __future__ import annotations

import json
from pathlib import Path

from medgen.bench.sample import bench_sample


def test_it_times_its_own_and_other_steps(pipeline_folder: Path, tmp_path: Path) -> None:
    result = bench_sample(str(pipeline_folder), batch_size=2, steps=(1, 2), repeats=1, out=tmp_path / "bench" / "sample.json")
    written = json.loads((tmp_path / "bench" / "sample.json").read_text())
    assert [row["steps"] for row in written["rows"]] == [1, 2, 50]
    assert [row["shipped"] for row in written["rows"]] == [False, False, True]
    assert written["rows"][2]["seconds_per_image"] > written["rows"][0]["seconds_per_image"] > 0
    assert written["machine"]["name"] and written["machine"]["threads"] >= 1
    assert "s per image" in str(result) and "50 (own)" in str(result)
