"""The quality gate on real films of the digital chest: own reports pass, planted errors are stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from medgen.augmentation.quality_check import check_quality_gate
from medgen.data.records import read_manifest, write_manifest
from medgen.digital.chest import write_dataset


def test_own_reports_pass_and_planted_errors_are_stopped(tmp_path: Path) -> None:
    source = write_dataset(tmp_path, 12, seed=7100, processes=1)
    records = [replace(record, split="test") for record in read_manifest(source).records]
    heldout = write_manifest(records, tmp_path / "heldout.parquet", name="heldout", source="test")
    report = json.loads(check_quality_gate(heldout, tmp_path / "out").read_text())
    own, planted = report["passed_with_own_report"], report["stopped_with_planted_error"]
    assert own["all"]["n"] == 12 and own["all"]["value"] > 0.6
    assert planted["other side"]["value"] > 0.8 and planted["invented"]["value"] > 0.8
    assert own["all"]["low"] <= own["all"]["value"] <= own["all"]["high"]
    assert report["gate"]["validated"] and report["manifest"]["split"] == "test"
