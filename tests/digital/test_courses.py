"""Disease courses move as documented, treatments show, and simulated futures are calibrated; nothing is rendered here."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import expm

from medgen.data.visit_records import Event
from medgen.digital.courses import (
    KINETICS,
    LN2,
    MAX_DIAMETER_MM,
    PRESENT,
    PROGRESS,
    RESOLVE,
    STAY,
    State,
    Track,
    advance,
    draw_course,
    simulate_futures,
)
from medgen.digital.patient import draw_patient

M = 200


def run(track: Track, x: float, regime: int, days: float, *events: Event) -> np.ndarray:
    start = State(0.0, np.full((M, 1), x), np.full((M, 1), regime))
    return advance((track,), start, days, events, np.random.default_rng(1)).x[:, 0]


def test_drainage_leaves_a_tenth_to_a_third_within_a_day():
    effusion = Track("pleural_effusion", "left")
    drained = run(effusion, 0.7, PROGRESS, 1.2, Event("drainage", 0.2))
    assert 0.05 < np.quantile(drained, 0.05) < np.quantile(drained, 0.95) < 0.33
    assert np.median(run(effusion, 0.7, PROGRESS, 1.2)) > 0.65
    later = run(effusion, 0.7, PROGRESS, 30.0, Event("drainage", 0.2))
    assert 0.15 < np.mean(later > 0.4) < 0.7  # some re-accumulate, some do not


def test_antibiotic_halves_a_pneumonia_in_about_ten_days_after_two():
    pneumonia = Track("consolidation", "right", "lower")
    treated = [np.median(run(pneumonia, 0.3, STAY, days, Event("antibiotic", 0.0))) for days in (2.0, 12.0, 22.0)]
    odds = [x / (1 - x) for x in treated]
    assert odds[1] / odds[0] == pytest.approx(0.5, rel=0.15)
    assert odds[2] / odds[1] < 0.65
    assert np.median(run(pneumonia, 0.3, PROGRESS, 10.0)) > 2 * np.median(
        run(pneumonia, 0.3, PROGRESS, 10.0, Event("antibiotic", 0.0))
    )


def test_diuretic_works_on_oedema_in_days_and_on_effusions_and_hearts_slowly():
    shares = []
    for name, side in (("edema", None), ("pleural_effusion", "left"), ("cardiomegaly", None)):
        off, on = (run(Track(name, side), 0.4, STAY, 5.0, *events) for events in ((), (Event("diuretic", 0.0),)))
        shares.append(np.median(on) / np.median(off))
    assert shares[0] < 0.5 < shares[1] < 0.92 < shares[2] < 1


def test_growing_nodule_doubles_its_volume_in_its_doubling_time():
    track = Track("nodule", "left", "upper", rate=1 / 200)
    grown = run(track, 12 / MAX_DIAMETER_MM, PROGRESS, 200.0)
    assert np.median((grown / (12 / MAX_DIAMETER_MM)) ** 3) == pytest.approx(2, rel=0.1)
    still = run(track, 12 / MAX_DIAMETER_MM, STAY, 200.0)
    assert np.median(still) == pytest.approx(12 / MAX_DIAMETER_MM, rel=0.02)


def test_regimes_persist_and_switch():
    track = Track("pleural_effusion", "left")
    start = State(0.0, np.full((2000, 1), 0.5), np.full((2000, 1), PROGRESS))
    after = advance((track,), start, 25.0, (), np.random.default_rng(2)).regime[:, 0]
    rates = np.array([[-1, 0.5, 0.5], [0.5, -1, 0.5], [0.4, 0.6, -1]]) / np.array(KINETICS[track.name].stays)[:, None]
    shares = [np.mean(after == regime) for regime in (PROGRESS, STAY, RESOLVE)]
    assert shares == pytest.approx(expm(25 * rates)[PROGRESS], abs=0.04)


def test_oedema_halves_in_two_days_whatever_the_step():
    track = Track("edema")
    once = np.median(run(track, 0.3, STAY, 2.5, Event("diuretic", 0.0)))
    events = (Event("diuretic", 0.0), *(Event("antibiotic", t) for t in np.arange(0.1, 2.5, 0.1)))  # only bends of the grid
    often = np.median(run(track, 0.3, STAY, 2.5, *events))
    assert once == pytest.approx(often, rel=0.05)
    assert np.log(0.3 / 0.7) - 1.25 * LN2 <= np.log(once / (1 - once)) <= np.log(0.3 / 0.7) - LN2  # halved in 2 to 2.5 days


@pytest.fixture(scope="module")
def courses():
    return [draw_course(draw_patient(5, i)) for i in range(120)]


def test_same_patient_same_course(courses):
    again = draw_course(draw_patient(5, 3))
    assert again.days == courses[3].days
    assert again.events == courses[3].events
    assert (again.severities == courses[3].severities).all()


def test_visits_are_irregular_and_partly_unchanged(courses):
    counts = [len(c.days) for c in courses]
    assert min(counts) >= 2
    assert max(counts) <= 12
    assert 4 < np.mean(counts) < 6.5
    gaps = np.concatenate([np.diff(c.days) for c in courses])
    assert gaps.min() >= 1
    assert np.quantile(gaps, 0.9) > 200
    moved = np.concatenate(
        [np.abs(np.diff(c.severities, axis=0)).max(1) if c.tracks else np.zeros(len(c.days) - 1) for c in courses]
    )
    assert 0.25 < np.mean(moved < 0.05) < 0.5
    assert all(0 <= e.time < c.days[-1] for c in courses for e in c.events)
    kinds = {track.name for c in courses for track in c.tracks}
    assert kinds == {"pleural_effusion", "consolidation", "edema", "nodule", "cardiomegaly"}
    assert {e.name for c in courses for e in c.events} == {"drainage", "antibiotic", "diuretic"}


def test_covariates_are_partly_missing(courses):
    assert all({"age", "sex"} <= set(c.covariates) for c in courses)
    for name in ("weight_kg", "smoker", "heart_failure"):
        assert 0.4 < np.mean([name in c.covariates for c in courses]) < 0.9


def test_simulated_futures_hold_the_truth_at_the_nominal_rate(courses):
    """The realised course is one more draw from its futures, treatments included: its rank among them is uniform."""
    ranks = []
    for i, course in enumerate(courses):
        if not course.tracks:
            continue
        cut = max(1, len(course.days) // 2)
        futures = simulate_futures(course, cut, 64, i, pool=2)[:, 0]
        truth = course.severities[cut]
        moving = truth > PRESENT  # ranks among what has been cleared are ties
        noise = np.random.default_rng(i).uniform(0, 1e-9, futures.shape)
        ranks += ((futures + noise < truth).mean(0))[moving].tolist()
    ranks = np.array(ranks)
    assert len(ranks) > 80
    for level in (0.5, 0.8, 0.9):
        inside = np.mean((ranks >= 0.5 - level / 2) & (ranks <= 0.5 + level / 2))
        assert inside == pytest.approx(level, abs=0.1)


def test_futures_keep_the_treatments(courses):
    drained = next(
        c for c in courses for e in c.events if e.name == "drainage" and c.days[0] < e.time < c.days[1] - 1 and c.severities[0].max() > 0.4
    )  # fmt: skip
    futures = simulate_futures(drained, 1, 64, 0)[:, 0]
    without = simulate_futures(type(drained)(drained.tracks, drained.days, drained.states, (), (), drained.covariates), 1, 64, 0)[
        :, 0
    ]
    side = next(d for d, t in enumerate(drained.tracks) if t.name == "pleural_effusion")
    assert np.median(futures[:, side]) < 0.7 * np.median(without[:, side])
