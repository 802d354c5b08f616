from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.data.report_text import PromptConfig
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.privacy.extraction import Extraction, distances, extraction, largest_clique
from medgen.evaluation.privacy.predictor import load_predictor
from medgen.evaluation.privacy.subjects import draw_subjects, read_apart


def extract(pipeline: Path, hospital: Path, out: Path, n: int = 10) -> Extraction:
    predictor = load_predictor(pipeline)
    train, heldout = (draw_subjects(side, predictor, PromptConfig(view=True), 12) for side in read_apart(hospital, hospital))
    return extraction(pipeline, train, heldout, out, captions=3, n=n, progress=False)


def test_memorised_films_come_back_and_the_same_call_goes_on(leaky: Path, hospital: Path, tmp_path: Path) -> None:
    found = extract(leaky, hospital, tmp_path / "drawn")
    assert found.extracted.value > 0.5 and found.cliques.value == 1
    assert found.near_strangers.value == 0
    assert all((tmp_path / "drawn" / name).is_file() for asked in found.asked for name in asked.files)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").glob("*.png")}
    assert extract(leaky, hospital, tmp_path / "drawn") == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "drawn").glob("*.png")} == written


def test_an_innocent_pipeline_gives_no_film_back(innocent: Path, hospital: Path, tmp_path: Path) -> None:
    """It draws one blurred mean from any noise: a clique that is near to many films, and no copy of one."""
    found = extract(innocent, hospital, tmp_path / "drawn")
    assert found.extracted.value == 0


def test_too_few_generations_are_refused(innocent: Path, hospital: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="10 or more"):
        extract(innocent, hospital, tmp_path / "drawn", n=5)


def test_the_worst_tile_decides_how_far_films_are() -> None:
    film = torch.zeros(1, 16 * 64)
    other = film.clone()
    other[0, :64] = 0.8  # one tile of sixteen differs
    assert distances(film, other)[0, 0] == pytest.approx(0.8)
    assert distances(film, film + 0.2)[0, 0] == pytest.approx(0.2, abs=1e-6)


def test_the_largest_clique_is_found_among_smaller_ones() -> None:
    near = np.zeros((7, 7), dtype=bool)
    for group in ([0, 1], [2, 4, 6], [5, 3]):
        near[np.ix_(group, group)] = True
    near[1, 2] = near[2, 1] = True
    assert largest_clique(near) == [2, 4, 6]
