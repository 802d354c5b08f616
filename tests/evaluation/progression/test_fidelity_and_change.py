"""Nearness to the true image, and to what changed in it, by hand and by scikit-learn and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from medgen.evaluation.progression.change import change_fidelity
from medgen.evaluation.progression.fidelity import fidelity, lpips, ssim


def pictures(count: int = 3, side: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(size=(count, 1, 6, 6)))
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")[:, 0].numpy()


def test_errors_by_hand():
    true = np.zeros((1, 16, 16))
    true[0, :8] = 0.5
    found = fidelity(true + 0.1, true)
    assert found["mae"][0] == pytest.approx(0.1)
    assert found["nrmse"][0] == pytest.approx(0.1 / 0.5)
    assert found["psnr_db"][0] == pytest.approx(20)
    same = fidelity(true, true)
    assert (same["mae"][0], same["psnr_db"][0], same["ssim"][0]) == pytest.approx((0, 100, 1))


def test_psnr_is_torchmetrics():
    true, made = pictures(), pictures(seed=1)
    expected = peak_signal_noise_ratio(
        torch.from_numpy(made), torch.from_numpy(true), data_range=1.0, reduction="none", dim=(1, 2)
    )
    assert fidelity(made, true)["psnr_db"] == pytest.approx(expected.numpy())


def test_a_mask_looks_inside_alone():
    true = pictures(2)
    made, mask = true.copy(), np.zeros((2, 24, 24), bool)
    mask[:, :8, :8] = True
    made[:, 16:, 16:] = 0
    inside, whole = fidelity(made, true, mask), fidelity(made, true)
    assert inside["mae"].max() == 0
    assert inside["ssim"] == pytest.approx(1, abs=1e-6)
    assert whole["ssim"].max() < 1
    assert fidelity(made, true, np.ones_like(mask))["mae"] == pytest.approx(whole["mae"])
    with pytest.raises(ValueError, match="mask is empty"):
        fidelity(made, true, np.zeros_like(mask))


def test_volumes_have_the_ssim_of_torchmetrics():
    true, made = np.random.default_rng(0).uniform(size=(2, 2, 14, 15, 16))
    expected = structural_similarity_index_measure(
        torch.from_numpy(made)[:, None], torch.from_numpy(true)[:, None], data_range=1.0, reduction="none"
    )
    assert ssim(made, true) == pytest.approx(expected.numpy(), abs=1e-6)


def test_volumes_are_measured_like_pictures():
    true = np.random.default_rng(0).uniform(size=(2, 12, 14, 16))
    found = fidelity(np.clip(true + 0.05, 0, 2), true)
    assert found["mae"] == pytest.approx(0.05)
    assert found["ssim"].shape == (2,)
    assert ssim(true, true) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"both must be \[N,H,W\] or \[N,D,H,W\]"):
        fidelity(true, true[:1])


def test_lpips_says_that_its_weights_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert lpips(pictures(), pictures()) is None


def test_copying_the_last_image_says_nothing_about_change():
    last, true = pictures(), pictures(seed=1)
    copied = change_fidelity(last, last, true)
    assert copied["relative_error"] == pytest.approx(1)
    assert copied["rank_error"] == pytest.approx(0.5)
    assert copied["auroc"] == pytest.approx(0.5)
    perfect = change_fidelity(last, true, true)
    assert perfect["relative_error"] == pytest.approx(0)
    assert perfect["rank_error"] == pytest.approx(0, abs=1e-9)
    assert perfect["auroc"] == pytest.approx(1)
    assert perfect["delta_ssim"] == pytest.approx(1)
    assert (copied["delta_ssim"] < 0.9).all()
    opposite = change_fidelity(last, 2 * last - true, true)
    assert opposite["relative_error"] == pytest.approx(2)
    assert opposite["rank_error"] == pytest.approx(1)
    assert opposite["auroc"] == pytest.approx(0, abs=1e-9)


def test_change_by_hand():
    last, true = np.full((1, 16, 16), 0.5), np.full((1, 16, 16), 0.5)
    true[0, 0], true[0, 1], true[0, 2] = 0.6, 0.4, 0.51  # 16 brighter pixels, 16 darker ones, 16 below the threshold
    made = last.copy()
    made[0, 0, :8], made[0, 2] = 0.55, 0.9  # half of the brighter ones are said, the darker ones are not; row 2 does not count
    found = change_fidelity(last, made, true)
    assert found["auroc"][0] == pytest.approx(0.5 * 1 + 0.5 * 0.5)  # a pair with a said pixel is right, the others are ties
    d, error = np.sqrt(32 * 0.1**2 + 16 * 0.01**2), np.sqrt(8 * 0.05**2 + 24 * 0.1**2 + 16 * 0.39**2)
    assert found["relative_error"][0] == pytest.approx(error / d)


def test_what_did_not_change_has_no_rank():
    last = pictures(1)
    still = change_fidelity(last, last + 0.1, last + 0.001)
    assert np.isnan(still["rank_error"][0]) and np.isnan(still["auroc"][0])
    brighter = change_fidelity(last, last + 0.1, last + 0.1 * pictures(1, seed=3) + 0.05)
    assert np.isfinite(brighter["rank_error"][0]) and np.isnan(brighter["auroc"][0])  # nothing became darker
    with pytest.raises(ValueError, match=r"three times \[N,\*S\]"):
        change_fidelity(last, last[0], last)
