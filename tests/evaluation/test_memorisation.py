"""Copies are found, and models without memory are not accused."""

from __future__ import annotations

import numpy as np

from medgen.evaluation.memorisation import memorisation, nearest

RNG = np.random.default_rng


def draw(n: int, seed: int) -> np.ndarray:
    return RNG(seed).normal(size=(n, 12)).astype(np.float32)


def test_nearest_is_exact_whatever_the_chunk():
    queries, targets = draw(40, 0) + 300, draw(70, 1) + 300  # far from the origin, where the quick formula fails
    distance, index = nearest(queries, targets, chunk=3)
    full = np.linalg.norm(queries[:, None] - targets[None], axis=-1)
    np.testing.assert_array_equal(index, full.argmin(1))
    np.testing.assert_allclose(distance, full.min(1), rtol=1e-4)


def test_planted_copies_are_the_nearest_pairs():
    train, heldout, generated = draw(300, 1), draw(300, 2), draw(100, 3)
    generated[[7, 70]] = train[[17, 170]] + 0.01 * draw(2, 4)
    result = memorisation("toy", generated, [str(i) for i in range(100)], train, heldout)
    assert [(pair.generated, pair.train) for pair in sorted(result.worst[:2], key=lambda pair: pair.generated)] == [
        (7, 17),
        (70, 170),
    ]
    assert result.worst[1].distance < 0.05 < result.worst[2].distance


def test_a_model_without_memory_is_at_chance_and_one_that_copies_is_not():
    train, heldout = draw(300, 1), draw(200, 2)
    groups = [str(i) for i in range(200)]
    fresh = memorisation("toy", draw(200, 3), groups, train, heldout)
    assert fresh.closer_to_train.low < 0.5 < fresh.closer_to_train.high
    assert fresh.distance_ratio.low < 1 < fresh.distance_ratio.high
    assert fresh.suspicious.value < 0.05
    copied = memorisation("toy", train[:200] + 0.1 * draw(200, 3), groups, train, heldout)
    assert copied.closer_to_train.value > 0.75
    assert copied.suspicious.value > 0.9
    assert copied.distance_ratio.value < 0.5
