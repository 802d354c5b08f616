"""The re-identification part of the audit: training patients in generated films against as many patients whom the model never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medgen.data.records import read_manifest
from medgen.evaluation.images import reference_set
from medgen.evaluation.privacy.re_identification import re_identification, verification
from tests.evaluation.privacy.test_copying import write_generated
from tests.privacy_films import SIZE, toy_film, write_network, write_patients


def measure(root: Path, films: list[np.ndarray]):
    manifest = write_patients(root, {"train": 40, "test": 24})
    train, test = (reference_set(read_manifest(manifest, split), SIZE) for split in ("train", "test"))  # type: ignore[arg-type]
    generated = write_generated(root / "generated", films)
    return re_identification(generated, train, test, root / "cache", model=write_network(root / "network"))


def test_copies_of_training_patients_are_matched_mirrored_too(tmp_path: Path) -> None:
    found = measure(tmp_path, [toy_film(i, 1)[:, :: (-1) ** i] for i in range(40)])
    assert found.patients == 24, "as many of the 40 training patients as there are held-out ones"
    assert found.to_train.value == pytest.approx(24 / 40, abs=0.15) and found.to_heldout.value < 0.1
    assert found.flagged and found.excess.low > 0 and found.unseen.value <= 0.03
    assert found.pairs[0].distance < 1e-3 and "of 24 training patients" in found.measured


def test_films_of_nobody_match_neither_side_more_than_the_other(tmp_path: Path) -> None:
    found = measure(tmp_path, [toy_film(900 + i, 0) for i in range(40)])
    assert not found.flagged and found.excess.low <= 0 <= found.excess.high and found.closer_to_train.low < 0.5


def test_verification_is_the_area_under_the_curve_by_patient() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 8))
    vectors = np.repeat(centres, 2, axis=0) + 0.01 * rng.normal(size=(100, 8))
    patients = [f"p{i // 2}" for i in range(100)]
    assert verification(vectors.astype(np.float32), patients).value == 1.0
    chance = verification(rng.normal(size=(100, 8)).astype(np.float32), patients)
    assert chance.low < 0.5 < chance.high and chance.n == 100
    assert np.isnan(verification(vectors[:3].astype(np.float32), ["a", "b", "c"]).value)
