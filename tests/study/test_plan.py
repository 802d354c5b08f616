"""Plans of studies: power by simulation, the verdict, and agreement with closed forms where there are some."""

import json

import numpy as np
import pytest
from scipy import stats

from medgen.study.plan import MOST_READERS, Study, analyse, plan, right_answers, simulate
from medgen.study.statistics import mrmc

QUICK = {"simulations": 300, "cases": 40}


def study(**given):
    base = {"readers": 8, "cases": 40, "between_reader_sd": 0.156, "margin": 0.1, "design": "crossed", "groups": 2}
    base |= {"claim": "equivalence", "accuracy": 0.5, "chance": 0.5, "case_sd": 0.5}
    return Study(**{**base, **given})


def test_few_readers_cannot_support_equivalence_and_are_told_how_many_could(tmp_path):
    found = plan(readers=5, out=tmp_path / "plan.json", **QUICK)
    assert not found.supports and found.readers_needed > 15
    assert "CANNOT support its claim" in found.verdict and f"about {found.readers_needed} readers" in str(found)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["readers_needed"] == found.readers_needed and saved["study"]["margin"] == 0.1


def test_many_alike_readers_can():
    found = plan(readers=20, between_reader_sd=0.05, cases=100, case_sd=0.2, simulations=300)
    assert found.supports and found.readers_needed is None
    assert "can support its claim" in str(found)


@pytest.mark.parametrize(("readers", "half_width"), [(5, 0.19), (10, 0.11), (17, 0.08)])
def test_half_widths_of_the_anchor(readers, half_width):
    """SD 15.6 points, many cases: ± 19 (5 readers), ± 11 (10), ± 8 (17), as the 17-reader study implies."""
    _, within, _ = simulate(study(readers=readers, cases=300, case_sd=0.0), 300, 0)
    assert within == pytest.approx(half_width, abs=0.015)


def test_power_of_a_difference_agrees_with_the_noncentral_t():
    """No case effects: the reader-level test is a one-sample t test of shares whose SD is known."""
    one = study(readers=10, cases=80, claim="difference", accuracy=0.62, between_reader_sd=0.1, case_sd=0.0)
    sd = np.sqrt(0.1**2 + (0.62 * 0.38 - 0.1**2) / 80)
    shift, cut = 0.12 / (sd / np.sqrt(10)), stats.t.ppf(0.975, 9)
    expected = stats.nct.sf(cut, 9, shift) + stats.nct.cdf(-cut, 9, shift)
    assert simulate(one, 1500, 1)[0] == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("design", ["crossed", "split_plot"])
def test_the_plan_analyses_as_the_analysis_will(design):
    one = study(design=design, readers=6, cases=30)
    right, group = right_answers(one, np.random.default_rng(0), 4)
    values, errors, _ = analyse(right, group)
    for s in range(4):
        whole = np.full((6, 30), np.nan)
        n = right.shape[2]
        for j in range(6):
            start = int(group[j]) * n
            whole[j, start : start + n] = right[s, j]
        mean = mrmc.single(mrmc.share_merit(whole[None]))
        assert mean.value == pytest.approx(values[s], abs=1e-6)
        # the jackknife of a group's cases within all cases differs by (N − 1)/N against (n − 1)/n, no more
        assert mean.standard_error == pytest.approx(errors[1][s], rel=0.02)


@pytest.mark.parametrize("design", ["crossed", "split_plot"])
def test_error_at_the_margin_and_coverage(design):
    """Truth at the margin: at most 5 % (+ noise) of plans claim equivalence."""
    at_margin = study(design=design, accuracy=0.5999, readers=16, between_reader_sd=0.1, cases=60)
    wrong = simulate(at_margin, 1500, 5)[0]
    print(f"{design}: equivalence claimed at the margin {wrong:.3f}")
    assert wrong <= 0.065


def test_more_readers_more_power_more_cases_not_beyond_the_spread():
    few, many = (simulate(study(readers=n), 400, 0)[0] for n in (10, 40))
    assert many > few + 0.2
    more_cases = simulate(study(readers=5, cases=600), 300, 0)[0]
    assert more_cases < 0.3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"readers": 1}, "at least 2"),
        ({"margin": 0.7}, "--margin 0.7"),
        ({"accuracy": 0.65}, "outside the margin"),
        ({"design": "split_plot", "groups": 11, "cases": 80}, "--groups 11"),
        ({"between_reader_sd": 15.6}, "15.6"),
    ],
)
def test_plans_that_make_no_sense_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        plan(**{**QUICK, **given})


def test_no_number_of_readers_helps_against_few_hard_cases():
    found = plan(readers=4, cases=8, case_sd=2.0, margin=0.05, simulations=100)
    assert found.readers_needed is None and f"up to {MOST_READERS}" in found.verdict
