"""The measure of severity edits: true films of rising severity pass it, disorder and damage outside the ROI do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter

from medgen.data.records import FINDINGS
from medgen.digital.chest import draw_study, render
from medgen.digital.patient import Finding
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.severity import evaluate
from medgen.evaluation.severity_cases import write_severity_cases
from medgen.sampling.severity import sample

EFFUSION = FINDINGS.index("pleural_effusion")


@pytest.fixture(scope="module")
def severities() -> tuple[list[np.ndarray], np.ndarray]:
    """Films of one digital patient, left effusion absent to large, [H,W] uint8; and where it is at most."""
    study = draw_study(90_600, 3, ("PA",))
    films, mask = [], np.zeros((128, 128), bool)
    for severity in (0.0, 0.25, 0.55, 0.95):
        found = (Finding("pleural_effusion", severity, "left", seed=1),) if severity else ()
        film = render(replace(study, findings=found))[0]
        films.append(np.rint(film.image * 255).astype(np.uint8))
        mask = (film.mask >> EFFUSION & 1) > 0
    return films, binary_dilation(mask, iterations=4)


def edit(folder: Path, case: str, films: Sequence[np.ndarray], roi: np.ndarray, degrees: Sequence[float]) -> None:
    """An edit as the sampler leaves it: what is outside the ROI is the source."""
    folder.mkdir(exist_ok=True)
    frames: list[dict[str, Any]] = []
    for number, film in enumerate(films):
        Image.fromarray(np.where(roi, film, films[0])).save(folder / f"{case}_{number:02d}.png")
        frames.append({"file_name": f"{case}_{number:02d}.png", "round": number, "prompt": "", "synthetic": number > 0})
    Image.fromarray((roi * 255).astype(np.uint8)).save(folder / f"{case}_roi.png")
    Image.fromarray(gaussian_filter(films[0], 1)).save(folder / f"{case}_autoencoder.png")
    Image.fromarray(films[0]).save(folder / f"{case}.png")
    line = {"file_name": f"{case}.png", "case_id": case, "trajectory": 0, "frames": frames, "roi_file": f"{case}_roi.png",
            "autoencoder_file": f"{case}_autoencoder.png", "finding": "pleural_effusion", "side": "left", "degrees": list(degrees),
            "direction": int(np.sign(degrees[-1] - degrees[0])), "model": "hand", "synthetic": True}  # fmt: skip
    with (folder / "metadata.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def measured(folder: Path, out: Path) -> dict[str, Any]:
    page = evaluate(folder, out).read_text()
    assert "no forecast" in page and "data:image/png" in page
    values: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return values


def test_true_severities_are_in_order_both_ways(severities: tuple[list[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    films, roi = severities
    edit(tmp_path / "true", "up", films, roi, (0, 1, 2, 3))
    edit(tmp_path / "true", "down", films[::-1], roi, (3, 2, 1, 0))
    result = measured(tmp_path / "true", tmp_path / "out")
    whole = result["measures"]["all"]
    assert whole["extent_spearman"]["value"] == pytest.approx(1.0) and whole["extent_monotone"]["value"] == 1.0
    assert whole["arrived"]["value"] == 1.0 and whole["outside_ratio"]["value"] == 0.0 and whole["autoencoder"]["value"] > 0
    assert {"progression", "resolution"} <= set(result["measures"])
    assert result["facts"]["says"] == "severity editing: no time, not a forecast; synthetic"


def test_disorder_and_damage_are_seen(severities: tuple[list[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    films, roi = severities
    edit(tmp_path / "bad", "shuffled", [films[0], films[3], films[1], films[2]], roi, (0, 1, 2, 3))
    edit(tmp_path / "bad", "nothing", [films[0]] * 4, roi, (0, 1, 2, 3))
    # The whole film replaced by another patient's: what the ROI was for.
    other = np.rint(render(draw_study(90_600, 8, ("PA",)))[0].image * 255).astype(np.uint8)
    folder = tmp_path / "bad"
    Image.fromarray(other).save(folder / "nothing_03.png")
    edits = {one["case_id"]: one for one in measured(folder, tmp_path / "out")["edits"]}
    assert edits["nothing"]["outside"][3] > edits["nothing"]["autoencoder"] * 1.05
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["measures"]["all"]
    assert result["extent_monotone"]["value"] <= 0.5, "the shuffled one is out of order"
    (folder / "shuffled_02.png").unlink()
    with pytest.raises(EvaluationError, match="shuffled_02.png"):
        evaluate(folder, tmp_path / "out")


def test_from_cases_to_the_report_with_the_shipped_model(tmp_path: Path) -> None:
    cases = write_severity_cases(tmp_path / "cases", patients=1)
    lines = [json.loads(line) for line in cases.read_text().splitlines()]
    assert [line["purpose"] for line in lines] == ["progression", "resolution"]
    assert lines[0]["truth"] != lines[1]["truth"] and "pleural effusion" in lines[0]["report"].lower()
    sample("digital_chest", tmp_path / "edits", cases=cases, rounds=2, steps=6, refinements=1, progress=False)
    result = measured(tmp_path / "edits", tmp_path / "out")
    assert result["measures"]["all"]["outside_ratio"]["value"] <= 1.05
    up, down = sorted(result["edits"], key=lambda one: -one["direction"])
    assert up["extent"][-1] > up["extent"][0] and down["extent"][-1] < down["extent"][0]
