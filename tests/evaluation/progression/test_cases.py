"""The standard cases: nothing of the future is in them, pairs differ in one thing, and the truth they carry is the simulator's."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from medgen.data.visit_records import Event, Visit, VisitSeries
from medgen.evaluation.images import EvaluationError
from medgen.evaluation.progression.cases import write_progression_cases
from medgen.evaluation.progression.patients import Futures, Patient, agreed, primary, read_patients, spreads
from medgen.evaluation.progression.treatments import digital_course, responses
from medgen.sampling.cases import read_cases
from medgen.sampling.progression_cases import ProgressionAsked


@pytest.fixture(scope="module")
def lines(cases):
    found = defaultdict(list)
    for line in map(json.loads, cases.read_text().splitlines()):
        found[line["purpose"]].append(line)
    return found


@pytest.fixture(scope="module")
def patients(reference):
    return {patient.record_id: patient for patient in read_patients(reference, None)}


def test_the_sampler_reads_them(cases):
    assert len(read_cases(cases, ProgressionAsked)) == len(cases.read_text().splitlines())


def test_forecasts_are_given_the_visits_before_the_cut_and_nothing_after(lines, patients, cases):
    for line in lines["forecast"]:
        patient = patients[line["record_id"]]
        cut = patient.series.extra.get("futures_cut", len(patient.series.visits) // 2)
        days = [visit.time for visit in patient.series.visits]
        assert [visit["time"] for visit in line["past"]] == days[:cut]
        assert line["times"] == days[cut:]
        assert line["n"] == 4
        for visit, own in zip(line["past"], patient.past, strict=True):
            given, stored = (np.asarray(Image.open(p)) for p in (cases.parent / visit["image"], patient.root / str(own.image)))
            assert (given == stored).all()


def test_planned_treatments_are_told(lines, patients):
    for line in lines["forecast"]:
        assert [event["time"] for event in line["events"]] == [event.time for event in patients[line["record_id"]].series.events]


def test_pairs_share_patient_noise_and_past(lines):
    for purpose in ("longer_gap", "treatment", "rollout"):
        pairs = defaultdict(list)
        for line in lines[purpose]:
            pairs[line["pair_id"]].append(line)
        assert pairs or purpose == "treatment"
        for a, b in pairs.values():
            assert a["seed"] == b["seed"] and a["past"] == b["past"] and a["variant"] != b["variant"]


def test_a_longer_gap_asks_where_the_futures_agree(lines, patients):
    assert lines["longer_gap"]
    for line in lines["longer_gap"]:
        if line["variant"] == "long":
            values = patients[line["record_id"]].futures
            at = int(np.abs(values.times - line["times"][0]).argmin())
            assert np.sign(line["truth_change"]) == line["direction"]
            short = next(x for x in lines["longer_gap"] if x["pair_id"] == line["pair_id"] and x["variant"] == "short")
            assert short["times"][0] < line["times"][0] == pytest.approx(values.times[at])


def test_missing_cases_lack_a_third_of_the_past(lines, patients):
    for line in lines["missing"]:
        whole = len(patients[line["record_id"]].past)
        assert line["removed"] == max(1, round(whole / 3)) == whole - len(line["past"])
        assert line["last_kept"] == (line["past"][-1]["time"] == patients[line["record_id"]].past[-1].time)


def test_rollouts_have_twelve_steps_both_ways(lines):
    assert {line["mode"] for line in lines["rollout"]} == {"joint", "autoregressive"}
    assert all(len(line["times"]) == 12 and line["times"][0] > line["past"][-1]["time"] for line in lines["rollout"])


def test_between_asks_for_both_ends_and_for_calm_between_them(lines, patients):
    for line in lines["between"]:
        first, last = (visit["time"] for visit in line["past"])
        assert line["times"][0] == first and line["times"][-1] == last and len(line["times"]) == 7
        assert not any(first < event.time <= last for event in patients[line["record_id"]].series.events)


def test_the_same_seed_writes_the_same_cases(tmp_path, reference, cases):
    sizes = {"trajectories": 4, "controls": 6, "pairs": 2, "rollouts": 1, "split": None}
    assert write_progression_cases(reference, tmp_path / "again", **sizes).read_text() == cases.read_text()


def test_numbers_that_make_no_sense_are_refused(tmp_path, reference):
    with pytest.raises(EvaluationError, match="at least 1"):
        write_progression_cases(reference, tmp_path, trajectories=0)


def _patient(values, last=100.0, name="pleural_effusion_ml", events=(), id="X"):
    visits = tuple(Visit(f"v{i}", float(10 * i), "a.png", truth={name: last}) for i in range(3))
    series = VisitSeries(id, id, id, visits, "cxr", 2, "days", "test", events, extra={"futures_cut": 2})
    return Patient(series, None, Futures(np.array([20.0]), {name: np.asarray(values, dtype=float)[:, None]}))  # type: ignore[arg-type]


def test_the_primary_biomarker_is_what_the_futures_expect_to_move():
    patient = _patient([300, 280, 320])
    assert primary(patient, {"pleural_effusion_ml": 100.0, "edema_ml": 1.0}) == "pleural_effusion_ml"
    assert primary(patient, {"edema_ml": 1.0}) is None


@pytest.mark.parametrize(("change", "way"), [([80, 90, 70], 1), ([-80, -60, -70], -1), ([200, -100, 60], 0), ([10, 10, 10], 0)])
def test_a_direction_needs_size_and_agreement(change, way):
    assert agreed(np.array(change, dtype=float), 100.0) == way


def test_a_treatment_needs_something_to_act_on_and_no_recent_one():
    spread = {"pleural_effusion_ml": 100.0}
    (response,) = responses(_patient([1, 2]), spread)
    assert (response.event.name, response.direction, response.change) == ("drainage", -1, None)
    assert not list(responses(_patient([1, 2], last=20.0), spread))
    assert not list(responses(_patient([1, 2], events=(Event("drainage", 5.0),)), spread))


def test_a_digital_patients_course_is_found_again(patients):
    courses = [digital_course(patient) for patient in patients.values()]
    assert all(course is not None for course in courses)


def test_spreads_are_over_all_visits(patients):
    spread = spreads(list(patients.values()))
    values = [v.truth["cardiothoracic_ratio"] for p in patients.values() for v in p.series.visits]
    assert spread["cardiothoracic_ratio"] == pytest.approx(np.std(values))
