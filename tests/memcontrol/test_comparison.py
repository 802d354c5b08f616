"""What the confirmation may say: less memorisation counts only at equal quality, and only where every training agrees."""

from __future__ import annotations

import pytest

from medgen.memcontrol.comparison import arms, comparisons, conclusions
from medgen.memcontrol.masks import Adaptation
from medgen.memcontrol.rewards import Scores
from medgen.memcontrol.trials import Result, Trial


def result(name: str, kind: str, memorisation: float, quality: float, repeat: int = 0, membership: float = 0.9) -> Result:
    scores = Scores(memorisation, quality, None, quality, 0.1, memorisation, membership, [], [])
    method = Adaptation(method="lora" if kind == "search" else "full", layers=("blocks.0.space",) if kind == "search" else None)
    return Result(Trial(name, kind, method, 1e-3), 10, 0.1, 1.0, scores, repeat)


SEARCH = [result("full-1e-03", "full", 0.6, 0.5), result("00000", "search", 0.2, 0.49), result("00001", "search", 0.1, 0.9)]


@pytest.mark.parametrize(
    ("memorised", "lost", "state", "said"),
    [
        ((0.20, 0.22, 0.18), (0.50, 0.51, 0.50), "shown", "At equal quality mask 00000 memorises less than full"),
        ((0.20, 0.90, 0.10), (0.50, 0.51, 0.50), "open", "is not shown"),  # one training disagrees
        ((0.20, 0.22, 0.18), (0.60, 0.61, 0.60), "open", "at equal quality is not shown"),  # it learned less
        ((0.80, 0.82, 0.81), (0.50, 0.51, 0.50), "warning", "Mask 00000 memorises more than full"),
    ],
)
def test_a_claim_needs_both_intervals(memorised: tuple[float, ...], lost: tuple[float, ...], state: str, said: str) -> None:
    repeats = [result("full-1e-03", "full", 0.6 + 0.01 * k, 0.5, k) for k in (1, 2, 3)]
    repeats += [result("00000", "search", *values, repeat=k) for k, values in enumerate(zip(memorised, lost), 1)]
    (found,) = comparisons(SEARCH, repeats)
    assert found.state == state and said in found.text
    assert [arm.name for arm in arms(repeats)] == ["full", "mask 00000"]


def test_one_training_shows_nothing_and_a_search_where_nobody_was_memorised_says_so() -> None:
    repeats = [result("full-1e-03", "full", 0.6, 0.5, 1), result("00000", "search", 0.2, 0.5, 1)]
    (found,) = comparisons(SEARCH, repeats)
    assert found.state == "open"
    forgetful = [result("full-1e-03", "full", 0.01, 0.5, membership=0.52), *SEARCH[1:]]
    assert any("there was nothing to avoid" in text for state, text in conclusions(forgetful, []) if state == "warning")
