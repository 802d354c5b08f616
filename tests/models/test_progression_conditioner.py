"""Treatments, covariates and sentences as tokens at their dates; gaps and what came since as features; anything may be missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medgen.models.progression_conditioner import CONDITIONS, ProgressionConditioner, ProgressionConditions

NAN = float("nan")


@pytest.fixture
def conditioner() -> ProgressionConditioner:
    torch.manual_seed(0)
    return ProgressionConditioner(
        width=8, events=["drainage", "antibiotic"], numbers={"age": (60, 10)}, words={"sex": ("F", "M")}, sentence_dim=4
    )


@pytest.fixture
def conditions() -> ProgressionConditions:
    """Two patients, known on days 0 and 10, wanted on day 20; the second one's weight, sex and treatments are unknown."""
    return ProgressionConditions(
        times=torch.tensor([[0.0, 10.0, 20.0]] * 2),
        known=torch.tensor([[True, True, False]] * 2),
        event_kind=torch.tensor([[0, 1], [-1, -1]]),
        event_times=torch.tensor([[12.0, 3.0], [0.0, 0.0]]),
        event_values=torch.full((2, 2), NAN),
        events_known=torch.tensor([True, False]),
        numbers=torch.tensor([[70.0], [NAN]]),
        words=torch.tensor([[1], [-1]]),
        sentences=torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)),
        sentence_times=torch.tensor([[0.0, 10.0, NAN], [NAN, NAN, NAN]]),
    )


def test_what_is_missing_is_masked(conditioner: ProgressionConditioner, conditions: ProgressionConditions) -> None:
    context, times, mask, features = conditioner(conditions)
    assert context.shape == (2, 2 + 1 + 2 + 3, 8) and features.shape == (2, 3, conditioner.feature_dim)
    assert mask[0].sum() == 2 + 1 + 2 + 2 and not mask[1].any()
    assert context[mask].isfinite().all() and features.isfinite().all()
    assert times[0, :2].tolist() == [12, 3], "a treatment stands at its date"
    assert times[0, 3:5].isnan().all(), "a covariate has none"


def test_a_treatment_since_the_last_visit_is_seen_by_the_frames_after_it(
    conditioner: ProgressionConditioner, conditions: ProgressionConditions
) -> None:
    with_it = conditioner(conditions)[3]
    without = conditioner(replace(conditions, event_kind=torch.tensor([[-1, 1], [-1, -1]])))[3]
    changed = (with_it != without).any(-1)
    assert changed.tolist() == [[False, False, True], [False, False, False]]


def test_a_longer_gap_is_another_feature(conditioner: ProgressionConditioner, conditions: ProgressionConditions) -> None:
    later = replace(conditions, times=torch.tensor([[0.0, 10.0, 400.0]] * 2))
    assert not torch.allclose(conditioner(conditions)[3][:, 2], conditioner(later)[3][:, 2])
    moved = replace(conditions, times=conditions.times + 1000, event_times=conditions.event_times + 1000)
    torch.testing.assert_close(conditioner(conditions)[3], conditioner(moved)[3])


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_can_be_dropped_alone(
    conditioner: ProgressionConditioner, conditions: ProgressionConditions, name: str
) -> None:
    before, after = conditioner(conditions)[2], conditioner(conditions.drop([name]))[2]
    parts = {"events": slice(0, 3), "covariates": slice(3, 5), "reports": slice(5, 8)}
    for other, part in parts.items():
        assert torch.equal(before[:, part], after[:, part]) == (other != name)
    assert not after[:, parts[name]].any()
    only_second = conditions.drop({name: torch.tensor([False, True])})
    assert torch.equal(conditioner(only_second)[2][0], before[0])


def test_covariates_by_name(conditioner: ProgressionConditioner) -> None:
    numbers, words = conditioner.covariates({"sex": "M", "shoe size": 44})
    assert math.isnan(numbers[0]) and words == [1]
    assert conditioner.covariates({"sex": "unknown", "age": 50})[1] == [-1]


def test_it_is_saved_with_its_names(
    conditioner: ProgressionConditioner, conditions: ProgressionConditions, tmp_path: Path
) -> None:
    conditioner.save_pretrained(tmp_path)
    loaded = ProgressionConditioner.from_pretrained(tmp_path)
    for before, after in zip(conditioner(conditions), loaded(conditions), strict=True):
        torch.testing.assert_close(before, after, equal_nan=True)


def test_a_patient_without_treatments_and_covariates(conditions: ProgressionConditions) -> None:
    plain = ProgressionConditioner(width=8)
    bare = replace(
        conditions, event_kind=torch.zeros(2, 0).long(), event_times=torch.zeros(2, 0), event_values=torch.zeros(2, 0),
        numbers=torch.zeros(2, 0), words=torch.zeros(2, 0).long(), sentences=None, sentence_times=None,
    )  # fmt: skip
    context, _, mask, features = plain(bare)
    assert context.shape == (2, 1, 8) and mask.shape == (2, 1) and features.shape[-1] == plain.feature_dim
