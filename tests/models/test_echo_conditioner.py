"""ECG tokens stand at their real seconds, whatever leads there are; every condition can be left out by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medgen.config import ConfigError
from medgen.models.echo_conditioner import (
    CONDITIONS,
    EchoConditioner,
    EchoConditionerConfig,
    EchoConditions,
    build_conditioner,
)

RATE, FRAMES, SAMPLES = 100.0, 6, 230
ECG_TOKENS = 23


@pytest.fixture(scope="module")
def conditioner() -> EchoConditioner:
    torch.manual_seed(0)
    return EchoConditioner(rate=RATE, width=16, depth=1, heads=2).eval()


def conditions(clips: int = 2) -> EchoConditions:
    g = torch.Generator().manual_seed(1)
    return EchoConditions(
        times=torch.arange(FRAMES).expand(clips, -1) / 20,
        ecg=torch.randn(clips, 12, SAMPLES, generator=g),
        lead_mask=torch.ones(clips, 12, dtype=torch.bool),
        sample_mask=torch.ones(clips, SAMPLES, dtype=torch.bool),
        ecg_start=torch.full((clips,), -1.0),
        phase=torch.randn(clips, FRAMES, 4, generator=g),
        ejection_fraction=torch.linspace(30, 60, clips),
        view=torch.arange(clips) % 4,
        fps=torch.full((clips,), 20.0),
    )


def test_a_token_for_every_tenth_of_a_second_at_its_second(conditioner: EchoConditioner) -> None:
    context, times, mask, features, feature_mask = conditioner(conditions())
    assert context.shape == (2, ECG_TOKENS + 3, 16) and mask.all()
    torch.testing.assert_close(times[0, :ECG_TOKENS], torch.arange(ECG_TOKENS) * 0.1 - 0.95)
    assert times[:, ECG_TOKENS:].isnan().all()
    assert features.shape == (2, FRAMES, conditioner.feature_dim) and feature_mask.all()


def test_a_later_ecg_moves_its_tokens_and_nothing_else(conditioner: EchoConditioner) -> None:
    given = conditions()
    context, times, *_ = conditioner(given)
    shifted, later, *_ = conditioner(replace(given, ecg_start=given.ecg_start + 0.3))
    torch.testing.assert_close(shifted, context)
    torch.testing.assert_close(later[:, :ECG_TOKENS], times[:, :ECG_TOKENS] + 0.3)


def test_what_is_masked_has_no_influence(conditioner: EchoConditioner) -> None:
    given = conditions()
    leads, samples = given.lead_mask.clone(), given.sample_mask.clone()
    leads[:, 3:], samples[:, 100:140] = False, False
    masked = replace(given, lead_mask=leads, sample_mask=samples)
    other = masked.ecg.clone()
    other[:, 3:], other[..., 100:140] = torch.nan, 77.0
    expected, got = conditioner(masked), conditioner(replace(masked, ecg=other))
    torch.testing.assert_close(got[0], expected[0])
    assert expected[2][0, :ECG_TOKENS].tolist() == [not 10 <= i < 14 for i in range(ECG_TOKENS)]
    assert (expected[0] - conditioner(given)[0]).abs().max() > 1e-3


def test_a_single_lead_speaks_with_the_strength_of_twelve(conditioner: EchoConditioner) -> None:
    given = conditions()
    alone = replace(given, lead_mask=torch.eye(12, dtype=torch.bool)[[1, 7]])
    context, _, mask, *_ = conditioner(alone)
    assert mask.all() and context[:, :ECG_TOKENS].std() > 0.5 * conditioner(given)[0][:, :ECG_TOKENS].std()


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_can_be_left_out_alone_for_some_clips(conditioner: EchoConditioner, name: str) -> None:
    given = conditions()
    _, _, mask, features, _ = conditioner(given.drop({name: torch.tensor([True, False])}))
    gone = [name for name, lost in zip(("ecg", "ejection_fraction", "view", "fps"), ~mask[0, [0, -3, -2, -1]]) if lost]
    assert gone == [name] and mask[1].all()
    assert bool((features[0, :, :5] == 0).all()) == (name == "ecg")
    assert bool((features[0, :, 5:] == 0).all()) == (name == "ejection_fraction")
    torch.testing.assert_close(features[1], conditioner(given)[3][1])


def test_nothing_known_is_all_masked_and_finite(conditioner: EchoConditioner) -> None:
    given = conditions()
    for bare in (given.drop(CONDITIONS), EchoConditions(times=given.times)):
        context, _, mask, features, feature_mask = conditioner(bare)
        assert not mask.any() and not feature_mask.any()
        assert context.isfinite().all() and features.isfinite().all()


def test_a_clip_does_not_depend_on_its_neighbours(conditioner: EchoConditioner) -> None:
    given = conditions()
    one = EchoConditions(**{name: value[1:] for name, value in vars(given).items() if value is not None})
    without = given.drop({"ecg": torch.tensor([True, False])})
    for together in (given, without):
        torch.testing.assert_close(conditioner(together)[0][1:], conditioner(one)[0])


def test_some_leads_are_kept_at_least_one_and_never_a_missing_one() -> None:
    given = conditions(200)
    given = replace(given, lead_mask=given.lead_mask & (torch.arange(12) < 6))
    rows = torch.arange(200) % 2 == 0
    kept = given.some_leads(rows, torch.Generator().manual_seed(0)).lead_mask
    assert not kept[:, 6:].any() and (kept.sum(1) >= 1).all()
    assert (kept[~rows].sum(1) == 6).all() and set(kept[rows].sum(1).tolist()) == set(range(1, 7))


def test_gradients_reach_every_weight(conditioner: EchoConditioner) -> None:
    given = conditions()
    hidden = given.drop({"ecg": torch.tensor([True, False])})
    (conditioner(hidden)[0] ** 2).sum().backward()
    assert [name for name, p in conditioner.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    conditioner.zero_grad()


def test_saved_and_loaded_it_is_the_same(conditioner: EchoConditioner, tmp_path: Path) -> None:
    conditioner.save_pretrained(tmp_path)
    loaded = build_conditioner(EchoConditionerConfig(), RATE, str(tmp_path)).eval()
    assert torch.equal(loaded(conditions())[0], conditioner(conditions())[0])
    with pytest.raises(ConfigError, match=r"data\.ecg\.rate: 250 Hz"):
        build_conditioner(EchoConditionerConfig(), 250.0, str(tmp_path))


def test_refusals() -> None:
    given = conditions()
    with pytest.raises(ValueError, match="no condition 'heart'"):
        given.drop(["heart"])
    with pytest.raises(ValueError, match="must not pass for data"):
        EchoConditions(times=given.times, ecg=given.ecg)
    with pytest.raises(ValueError, match="fps is of 3 clips, times of 2"):
        replace(given, fps=torch.ones(3))
    with pytest.raises(ConfigError, match="conditioner: width 16 / heads 3"):
        build_conditioner(EchoConditionerConfig(width=16, heads=3), RATE)


def test_a_published_encoder_is_heard_beside_our_own() -> None:
    torch.manual_seed(0)
    conditioner = EchoConditioner(rate=RATE, width=16, depth=1, heads=2, encoder_dim=5).eval()
    moments = torch.tensor([[0.25, 0.75], [0.25, torch.nan]])
    given = replace(conditions(), encoded=torch.randn(2, 2, 5), encoded_times=moments)
    context, times, mask, *_ = conditioner(given)
    assert context.shape[1] == ECG_TOKENS + 2 + 3
    assert times[0, ECG_TOKENS : ECG_TOKENS + 2].tolist() == [0.25, 0.75]
    assert mask[:, ECG_TOKENS : ECG_TOKENS + 2].tolist() == [[True, True], [True, False]]
    assert not conditioner(given.drop(["ecg"]))[2][:, : ECG_TOKENS + 2].any()
    with pytest.raises(ValueError, match="built without a published ECG encoder"):
        EchoConditioner(rate=RATE, width=16, depth=1, heads=2)(given)
