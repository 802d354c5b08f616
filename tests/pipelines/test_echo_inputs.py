"""From ECGs as they come to conditions of a clip: time, phase, flags; and the windows of a long clip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from medgen.data.ecg import ECG, ECGError, ECGPreparation, cut
from medgen.digital.ecg import simulate_ecg
from medgen.digital.rhythm import draw_rhythm
from medgen.models.echo_conditioner import CONDITIONS, EchoConditions
from medgen.pipelines.echo_inputs import clip_count, echo_conditions, guided_conditions, part_of, still_frames, windows

PREPARATION = ECGPreparation()


@pytest.fixture(scope="module")
def ecg() -> ECG:
    """Thirty seconds of a regular heart."""
    rhythm = draw_rhythm(1, "sinus", 75, 0.0, 30.0, 0.02)
    return simulate_ecg(rhythm, 1, start=0.0, end=30.0)[0]


def conditions(ecg: Any, **options: Any) -> tuple[EchoConditions, list[tuple[str, ...]]]:
    given: dict[str, Any] = {"clips": 1, "num_frames": 40, "fps": 20.0, "start_seconds": 10.0, "preparation": PREPARATION}
    given |= options
    return echo_conditions(ecg, given.pop("ejection_fraction", None), given.pop("view", None), **given)


def test_thirty_seconds_of_ecg_for_two_seconds_of_video(ecg: ECG) -> None:
    given, flags = conditions(ecg)
    assert flags == [()]
    assert given.ecg is not None and given.ecg.shape == (1, 12, round((39 / 20 + 2) * PREPARATION.rate))
    assert given.lead_mask.all() and given.sample_mask.all() and not given.phase.isnan().any()
    assert given.ejection_fraction.isnan().all() and given.view.tolist() == [-1] and given.fps.tolist() == [20]


def test_a_later_start_moves_signal_and_phase_by_as_much(ecg: ECG) -> None:
    now, later = conditions(ecg)[0], conditions(ecg, start_seconds=10.4)[0]
    samples, frames = round(0.4 * PREPARATION.rate), round(0.4 * 20)
    torch.testing.assert_close(later.ecg[..., :-samples], now.ecg[..., samples:], atol=0.02, rtol=0)  # filters see other ends
    torch.testing.assert_close(later.phase[:, :-frames], now.phase[:, frames:], atol=0.05, rtol=0)
    assert (later.phase[:, :, :2] - now.phase[:, :, :2]).abs().max() > 0.5


def test_a_cut_recording_gives_the_same_as_the_whole(ecg: ECG) -> None:
    whole, part = conditions(ecg)[0], conditions(cut(ecg, 6.0, 12.0))[0]
    torch.testing.assert_close(part.phase, whole.phase, atol=0.05, rtol=0)


def test_an_ecg_that_covers_a_part_of_the_clip_is_masked_and_flagged(ecg: ECG) -> None:
    given, flags = conditions(cut(ecg, 9.0, 2.0))
    recorded = given.sample_mask[0].nonzero()[:, 0] / PREPARATION.rate - 1
    assert float(recorded.min()) == pytest.approx(-1, abs=0.01) and float(recorded.max()) == pytest.approx(1, abs=0.02)
    assert any("ends 0.9" in flag for flag in flags[0])


def test_an_ecg_of_another_time_is_an_error(ecg: ECG) -> None:
    with pytest.raises(ECGError, match=r"seconds 40 to .* were not recorded: the ECG runs from 0 to 30 s"):
        conditions(ecg, start_seconds=40.0)


def test_some_clips_with_an_ecg_and_some_without(ecg: ECG) -> None:
    given, flags = conditions([ecg, None], clips=2, ejection_fraction=[None, 40.0], view=["A2C", None], start_seconds=[3.0, 0.0])
    assert given.lead_mask.any(1).tolist() == [True, False] and given.phase.isnan().any(2).any(1).tolist() == [False, True]
    assert given.view.tolist() == [1, -1] and given.ejection_fraction[1] == 40 and flags[1] == ()


def test_one_lead_and_another_rate(ecg: ECG) -> None:
    single = ECG(ecg.signal[1:2, ::2], ("II",), ecg.rate / 2)
    given, _ = conditions(single)
    assert given.lead_mask[0].nonzero().tolist() == [[1]]
    torch.testing.assert_close(given.phase, conditions(ecg)[0].phase, atol=0.15, rtol=0)


def test_the_part_of_a_window_is_what_its_own_request_would_give(ecg: ECG) -> None:
    long = conditions(ecg, num_frames=80)[0]
    part, own = part_of(long, 30, 40, PREPARATION.rate), conditions(ecg, start_seconds=11.5)[0]
    torch.testing.assert_close(part.times, own.times)
    assert part.ecg.shape == own.ecg.shape
    torch.testing.assert_close(part.ecg, own.ecg, atol=0.02, rtol=0)
    torch.testing.assert_close(part.phase, own.phase, atol=0.05, rtol=0)


@pytest.mark.parametrize("total", [1, 31, 32, 33, 50, 64, 100, 257])
def test_windows_cover_everything_once_more_than_the_overlap(total: int) -> None:
    made = 0
    for start, known in windows(total, 32, 8):
        assert start + known == made and (known >= 8 or start == 0)
        made = start + min(32, total)
    assert made == total


def test_guidance_of_all_together_or_each_alone() -> None:
    assert guided_conditions(3) == ((3.0,), [CONDITIONS])
    assert guided_conditions({"ecg": 2, "view": 1}) == ((2.0, 1.0), [("ecg",), ("view",)])
    assert guided_conditions({})[0] == (1.0,)
    with pytest.raises(ValueError, match="guidance_scale for 'first_frame': there are ecg"):
        guided_conditions({"first_frame": 2.0})


def test_stills_are_checked() -> None:
    assert still_frames(torch.rand(8, 8), 3, 8).shape == (3, 1, 8, 8)
    assert still_frames(torch.ones(1, 1, 8, 8), 1, 8).max() == 1 and still_frames(torch.zeros(1, 8, 8), 1, 8).min() == -1
    for wrong, message in (
        (torch.rand(2, 1, 9, 8), r"shape \[2, 1, 9, 8\]: expected \[2, 1, 8, 8\]"),
        (torch.rand(2, 3, 8, 8), "shape"),
        (255 * torch.ones(2, 1, 8, 8), "grey values from 0 to 1"),
        (torch.full((2, 1, 8, 8), np.nan), "grey values from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            still_frames(wrong, 2, 8)


def test_how_many_clips_were_asked_for(ecg: ECG) -> None:
    assert clip_count(ecg, None, "A4C", 0.0, None) == 1
    assert clip_count([ecg] * 3, 50.0, "A4C", 0.0, None) == 3
    assert clip_count(None, None, None, 0.0, torch.rand(2, 1, 8, 8)) == 2
    assert clip_count(None, None, None, 0.0, None, generators=[torch.Generator()] * 4) == 4
    with pytest.raises(ValueError, match=r"lists of \[2, 3\] values"):
        clip_count([ecg] * 3, [50.0, 60.0], None, 0.0, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ejection_fraction": 0.55}, r"a fraction\? 55 percent"),
        ({"ejection_fraction": 120.0}, "up to 100"),
        ({"view": "apical"}, "view 'apical': expected one of A4C"),
        ({"view": ["A4C", "A2C"]}, "view: 2 values for 1 clips"),
    ],
)
def test_refusals(ecg: ECG, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditions(ecg, **options)


def test_a_flat_ecg_is_an_error(ecg: ECG) -> None:
    with pytest.raises(ECGError, match="no usable lead"):
        conditions(ECG(np.zeros_like(ecg.signal), ecg.leads, ecg.rate))
