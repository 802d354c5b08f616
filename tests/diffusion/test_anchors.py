"""Anchors: known frames held and blended."""

from __future__ import annotations

import pytest
import torch

from medgen.diffusion.anchors import anchors, neighbours

TIMES = torch.tensor([[0.0, 10.0, 20.0, 40.0]])


def latents(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1, 1).expand(1, len(values), 2, 3, 3)


def test_neighbours_are_the_nearest_known_frames() -> None:
    before, after = neighbours(torch.tensor([[False, True, False, True]]))
    assert before.tolist() == [[-1, 1, 1, 3]] and after.tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize(("known", "expected"), [
    ([True, False, False, False], [1, 1, 1, 1]),  # held
    ([True, False, False, True], [1, 3, 5, 9]),  # linear in time, not in number
    ([True, True, False, False], [1, 7, 7, 7]),  # the last one counts
    ([False, False, True, False], [4, 4, 4, 4]),  # also backwards
])  # fmt: skip
def test_known_frames_are_held_and_blended(known: list[bool], expected: list[float]) -> None:
    found = anchors(latents(1, 7, 4, 9), TIMES, torch.tensor([known]))
    torch.testing.assert_close(found[0, :, 0, 0, 0], torch.tensor(expected, dtype=torch.float32))


def test_unknown_frames_do_not_count_even_if_they_are_nan() -> None:
    found = anchors(latents(1, torch.nan, torch.nan, 9), TIMES, torch.tensor([[True, False, False, True]]))
    assert found.isfinite().all()


def test_two_frames_of_one_time_are_the_same() -> None:
    found = anchors(latents(3, 0, 8, 0), torch.tensor([[5.0, 5.0, 9.0, 9.0]]), torch.tensor([[True, False, True, False]]))
    torch.testing.assert_close(found[0, :, 0, 0, 0], torch.tensor([3.0, 3.0, 8.0, 8.0]))


def test_volumes_are_frames_like_any_other() -> None:
    assert anchors(torch.ones(2, 3, 4, 2, 2, 2), torch.arange(3.0).expand(2, 3), torch.ones(2, 3).bool()).shape == (
        2,
        3,
        4,
        2,
        2,
        2,
    )


def test_without_a_known_frame_there_is_no_anchor() -> None:
    with pytest.raises(ValueError, match="at least one visit"):
        anchors(latents(1, 2, 3, 4), TIMES, torch.zeros(1, 4).bool())
