"""Averages must not hide a disease that is drawn wrongly, nor a group of patients that is left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from medgen.data.records import FINDINGS, CXRRecord
from medgen.evaluation.subgroups import frechet_by_finding, group_of, subgroup_coverage

NODULE, EDEMA = FINDINGS.index("nodule"), FINDINGS.index("edema")


def record(number: int, **values: Any) -> CXRRecord:
    name = f"r{number}"
    fields = {"findings": "", "impression": "No nodule.", "split": "test", **values}
    return CXRRecord(name, f"p{number}", name, f"{name}.png", fields.pop("view", "PA"), **fields)


def test_a_disease_that_is_drawn_wrongly_stands_out() -> None:
    rng = np.random.default_rng(0)
    shows = np.zeros((240, len(FINDINGS)), bool)
    shows[:100, NODULE] = shows[100:200, EDEMA] = True
    real, fake = rng.normal(size=(2, 240, 6))
    real[:100, 0] += 6  # how nodules look, which the generator does not know
    names = [f"g{i}" for i in range(240)]
    results = {r.name: r for r in frechet_by_finding("toy", real, shows, names, fake, shows, names, replicates=10)}
    nodule, edema = results["nodule"].frechet, results["edema"].frechet
    assert nodule is not None and nodule.ratio is not None and nodule.ratio.low > 5
    assert edema is not None and edema.ratio is not None and edema.ratio.value < 2
    assert results["nodule"].n == 50
    assert results["atelectasis"].frechet is None  # nobody asked for it: said, not invented


def test_a_group_that_the_generator_leaves_out_is_not_covered() -> None:
    rng = np.random.default_rng(1)
    records = [record(i, sex="F" if i % 2 else "M", age=40.0 if i % 4 < 2 else 70.0) for i in range(200)]
    women = np.array([r.sex == "F" for r in records])
    real = rng.normal(size=(200, 4)) + 8 * women[:, None]
    result = subgroup_coverage(records, real, rng.normal(size=(200, 4)))  # it draws men only
    assert result is not None
    groups = {(g.attribute, g.group): g for g in result.groups}
    assert groups["sex", "F"].coverage.high < 0.1 and groups["sex", "F"].floor.value > 0.8
    assert groups["sex", "M"].coverage.low > 0.8
    gaps = {g.attribute: g for g in result.gaps}
    assert gaps["sex"].gap.low > 0.7 and gaps["sex"].floor.value < 0.2
    assert gaps["age"].gap.value < 0.3
    assert "view" not in gaps  # all films are PA


def test_groups_are_known_or_none() -> None:
    assert group_of(record(0, age=49.0), "age") == "under 50" and group_of(record(0, age=65.0), "age") == "65 and over"
    assert group_of(record(0), "age") is None and group_of(record(0), "sex") is None
    assert group_of(record(0, view="UNKNOWN"), "view") is None
    assert subgroup_coverage([record(i) for i in range(40)], np.zeros((40, 2)), np.zeros((40, 2))) is None
