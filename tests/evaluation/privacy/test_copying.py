"""Copies among generated films are found and shown beside their source; films of nobody in particular are not accused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgen.data.records import read_manifest
from medgen.evaluation.images import EvaluationError, ImageSet, read_generated, reference_set
from medgen.evaluation.privacy.copying import copying, pair_sheet
from tests.privacy_films import SIZE, toy_film, write_patients


def sets(root: Path) -> tuple[ImageSet, ImageSet]:
    manifest = write_patients(root, {"train": 30, "test": 30})
    train, test = (reference_set(read_manifest(manifest, split), SIZE) for split in ("train", "test"))  # type: ignore[arg-type]
    return train, test


def write_generated(folder: Path, films: list[np.ndarray]) -> ImageSet:
    folder.mkdir()
    lines = []
    for i, film in enumerate(films):
        Image.fromarray(film).save(folder / f"c{i}_000.png")
        lines.append(json.dumps({"file_name": f"c{i}_000.png", "case_id": f"c{i}", "trajectory": 0, "prompt": "a film"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return read_generated(folder)


def test_a_generator_that_copies_is_flagged_and_its_copies_are_the_pairs(tmp_path: Path) -> None:
    train, heldout = sets(tmp_path)
    films = [toy_film(i, 0) for i in range(12)]
    films[4] = films[4][:, ::-1]  # a mirrored copy is for the gate: neither pixels nor features know it
    found = copying(write_generated(tmp_path / "generated", films), train, heldout, tmp_path / "cache", spaces=["pixels"])
    assert found.flagged and found.closer_to_train[0].low > 0.5 and found.spaces[0].distance_ratio.high < 1
    best = found.pairs[0]
    assert train.groups[best.train] == f"p{best.generated}" and best.distance < 0.01
    assert max(found.overlaid) > 0.999 and "nearer to a training patient (50 % without copying)" in found.measured


def test_a_generator_of_new_films_is_not(tmp_path: Path) -> None:
    train, heldout = sets(tmp_path)
    fresh = write_generated(tmp_path / "generated", [toy_film(1000 + i, 0) for i in range(40)])
    found = copying(fresh, train, heldout, tmp_path / "cache", spaces=["pixels"])
    assert not found.flagged and found.closer_to_train[0].low < 0.5 and max(found.overlaid) < 0.99


def test_the_sheet_of_pairs_says_which_side_is_a_patient(tmp_path: Path) -> None:
    train, heldout = sets(tmp_path)
    generated = write_generated(tmp_path / "generated", [toy_film(i, 0) for i in range(10)])
    found = copying(generated, train, heldout, tmp_path / "cache", spaces=["pixels"])
    with Image.open(io.BytesIO(pair_sheet(generated, train, found.pairs[:3], width=64))) as sheet:
        assert sheet.width == 128 and sheet.height == 16 + 3 * 80
        assert "real patients" in sheet.text["Comment"]
        rows = np.asarray(sheet)[16:80]
    assert np.array_equal(rows[:, :64], rows[:, 64:]), "the nearest pair is a copy"


def test_an_empty_side_is_refused(tmp_path: Path) -> None:
    train, heldout = sets(tmp_path)
    with pytest.raises(EvaluationError, match="holds no film"):
        copying(replace(train, paths=(), groups=(), metadata=()), train, heldout, tmp_path / "cache")
