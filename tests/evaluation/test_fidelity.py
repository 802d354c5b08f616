"""Population metrics against closed forms and hand-made cases, and the floor that stands beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgen.evaluation.fidelity import compare, frechet_distance, kernel_distance, prdc
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.statistics import Gaussian

RNG = np.random.default_rng


def gaussian(mean, covariance, n=10) -> Gaussian:
    return Gaussian(n, np.array(mean, float), np.array(covariance, float) * (n - 1))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (gaussian([0, 0], np.eye(2)), gaussian([3, 4], np.eye(2)), 25.0),  # means only
        (gaussian([0, 0], np.diag([1.0, 4.0])), gaussian([0, 0], np.diag([9.0, 1.0])), 4.0 + 1.0),  # Σ (σ₁ − σ₂)²
        (gaussian([1, 2], np.zeros((2, 2))), gaussian([1, 2], np.eye(2)), 2.0),  # no rank at all
        (gaussian([1, 2], [[2, 1], [1, 2]]), gaussian([1, 2], [[2, 1], [1, 2]]), 0.0),
    ],
)
def test_frechet_distance_of_known_gaussians(first, second, expected):
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, abs=1e-6)


def test_merged_shards_are_the_whole_even_far_from_the_origin():
    features = (RNG(0).normal(size=(1001, 7)) + 1e4).astype(np.float32)
    whole = Gaussian.of(features)
    shards = [Gaussian.of(part, chunk=13) for part in np.array_split(features, 5)]
    merged = shards[0]
    for shard in shards[1:]:
        merged = merged.merge(shard)
    assert merged.n == 1001
    np.testing.assert_allclose(merged.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features.astype(np.float64), rowvar=False), atol=1e-8)
    assert frechet_distance(merged, whole) < 1e-6


def test_kernel_distance_is_unbiased_around_zero_and_sees_a_shift():
    def draw(seed: int, mean: float = 0.0) -> np.ndarray:
        return RNG(seed).normal(mean, 1, size=(200, 8)).astype(np.float32)

    same = [kernel_distance(draw(i), draw(100 + i), seed=i) for i in range(20)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(20) + 1e-3
    assert min(same) < 0 < max(same)  # unbiased: below zero as often as above
    assert kernel_distance(draw(0), draw(1, 0.5), seed=0) > 5 * max(same)


def test_prdc_by_hand():
    """On a line with k = 1: real balls are [-1, 2] (0 and 1 reach each other) and [7, 13] (10 ↔ 13)."""
    real = np.array([[0.0], [1.0], [10.0], [13.0]], dtype=np.float32)
    fake = np.array([[0.5], [0.6], [30.0], [31.0]], dtype=np.float32)
    result = prdc(real, fake, k=1, chunk=3)
    assert result["precision"] == 0.5  # 0.5 and 0.6 lie inside real balls, 30 and 31 in none
    assert result["recall"] == 0.0  # fake balls: [0.4, 0.7] and [29, 32] hold no real value
    assert result["density"] == pytest.approx((2 + 2 + 0 + 0) / 4)
    assert result["coverage"] == 0.5  # 0 and 1 have a fake within their radius of 1


def test_prdc_does_not_depend_on_the_chunk():
    real, fake = (RNG(i).normal(size=(150, 6)).astype(np.float32) for i in (0, 1))
    assert prdc(real, fake, chunk=7) == pytest.approx(prdc(real, fake, chunk=1000))


def patients(n: int) -> list[str]:
    return [f"p{i // 2}" for i in range(n)]  # two films of every patient


def test_equal_distributions_sit_on_the_floor_and_a_shifted_one_above_it():
    real, same = (RNG(i).normal(size=(400, 6)).astype(np.float32) for i in (0, 1))
    good = compare("toy", real, patients(400), same, patients(400), replicates=40)
    bad = compare("toy", real, patients(400), same + 1, patients(400), replicates=40)
    ratio = good.metrics["frechet"].ratio
    assert ratio is not None and ratio.low < 1.0 < ratio.high
    assert 0.7 < ratio.value < 1.4
    assert good.n == 200  # half of the reference, on both sides
    for name in ("frechet", "kernel"):
        assert bad.metrics[name].value.low > bad.metrics[name].floor.high
    assert bad.metrics["precision"].value.value < good.metrics["precision"].value.value
    assert bad.metrics["frechet"].value.value == pytest.approx(6.0, rel=0.2)


def test_the_interval_covers_the_truth():
    """In 15 repetitions a 95 % interval around the distance of a shifted Gaussian misses the truth rarely."""
    misses = 0
    for seed in range(15):
        real = RNG(2 * seed).normal(size=(200, 3)).astype(np.float32)
        fake = RNG(2 * seed + 1).normal(size=(100, 3)).astype(np.float32) + 1
        names = [str(i) for i in range(200)]
        estimate = compare("toy", real, names, fake, names[:100], seed, splits=2, replicates=15).metrics["frechet"].value
        misses += not estimate.low <= 3.0 + 0.1 <= estimate.high  # 0.1: the bias of N = 100
    assert misses <= 4


def test_too_few_images_and_missing_rank_are_said():
    real, fake = (RNG(i).normal(size=(60, 50)).astype(np.float32) for i in (0, 1))
    assert "rank-deficient" in compare("toy", real, patients(60), fake, patients(60), replicates=5).warnings[0]
    with pytest.raises(EvaluationError, match="10 on each side"):
        compare("toy", real, patients(60), fake[:10], patients(10))


def test_frechet_matches_torchmetrics_on_features():
    from torchmetrics.image.fid import _compute_fid

    real, fake = (RNG(i).normal(i, 1 + i, size=(300, 5)) for i in (0, 1))
    a, b = Gaussian.of(real), Gaussian.of(fake)
    tensors = [torch.from_numpy(value) for value in (a.mean, a.covariance, b.mean, b.covariance)]
    assert frechet_distance(a, b) == pytest.approx(float(_compute_fid(*tensors)), rel=1e-6)
