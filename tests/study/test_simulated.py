"""Simulated readers: what they were given is what the analysis finds, they are marked everywhere, and a seed is a seed."""

import csv
import json
import math
from statistics import NormalDist

import numpy as np
import pytest

from medgen.study.analyze import analyze
from medgen.study.responses import COLUMNS, ResponseError, read_key, read_pack, read_responses
from medgen.study.simulated import Skill, level, rows, simulate, simulated_readers
from medgen.study.statistics.signal_detection import detection
from medgen.study.tasks import CONFIDENCE

PHI = NormalDist().cdf
ALIKE = {"d_prime_sd": 0.0, "criterion_sd": 0.0}


@pytest.fixture
def study(make_study):
    """A built pack with session files, as the builder writes them."""

    def build(**given):
        made = make_study(**given)
        for item in made.items.values():
            item["questions"] = [{**q, "confidence": q["id"] in ("origin", "which", "same")} for q in item["questions"]]
        made.build()
        (made.pack / "orders").mkdir()
        for reader, order in made.orders.items():
            half = len(order) // 2
            (made.pack / "orders" / f"{reader}.json").write_text(
                json.dumps({"order": order, "sessions": [half, len(order) - half]})
            )
        made.opened = read_pack(made.pack)
        made.truth = read_key(made.key_file, made.opened)
        return made

    return build


def said(study, skill, seed=0, missing=0.0):
    """Rows of all readers as (reader, item, question) -> (answer, confidence)."""
    drawn = simulated_readers(study.opened, study.truth, skill, seed=seed)
    return {
        (row[2], row[5], row[7]): (row[8], row[9]) for reader in drawn for row in rows(study.opened, study.truth, reader, missing)
    }, drawn


def test_each_readers_d_prime_and_criterion_are_found_in_95_percent_of_intervals(study):
    """Known: each reader's own d′ and criterion. 300 readers, 120 cases each; 93-97 % means 280 to 291 of 300 (2 SE: 275-296)."""
    made = study(readers=10, cases=120, repeats=0)
    inside = {"d_prime": 0, "criterion": 0}
    errors = []
    for seed in range(30):
        answers, drawn = said(made, Skill(d_prime=1.2), seed)
        for reader in drawn:
            yes = {kind: [answers[reader.name, item, "origin"][0] == "synthetic" for item, t in made.truth.items() if t["source"] == kind]
                   for kind in ("synthetic", "real")}  # fmt: skip
            found = detection(sum(yes["synthetic"]), len(yes["synthetic"]), sum(yes["real"]), len(yes["real"]))
            inside["d_prime"] += found.d_prime.low <= reader.d_prime <= found.d_prime.high
            inside["criterion"] += found.criterion.low <= reader.criterion <= found.criterion.high
            errors.append(found.d_prime.value - reader.d_prime)
    assert 275 <= inside["d_prime"] <= 296 and 275 <= inside["criterion"] <= 296
    assert abs(np.mean(errors)) < 0.05


def test_ratings_rise_with_skill_to_the_auc_it_implies(study):
    """Φ(d′/√2), a little less for a scale of twelve steps; the interval through readers and cases holds it."""
    made = study(readers=8, cases=200, repeats=0)
    answers, _ = said(made, Skill(d_prime=1.5, d_prime_sd=0.0, criterion_sd=0.4))
    cells = np.array([[answers[reader, item, "origin"] for reader in made.readers] for item in made.truth])
    says = (cells[..., 0] == "synthetic").astype(float)
    sure = cells[..., 1].astype(float)
    assert set(np.unique(sure)) == set(range(CONFIDENCE[0], CONFIDENCE[1] + 1))
    truth = np.array([t["source"] == "synthetic" for t in made.truth.values()])
    ratings = np.where(says == 1, sure, -sure)
    from medgen.study.measures import _mrmc_auc  # the number that the report gives

    mean = _mrmc_auc(ratings, truth).interval()
    assert mean.low <= PHI(1.5 / math.sqrt(2)) - 0.005 <= mean.high and mean.high - mean.low < 0.15


def test_repeats_agree_as_often_as_the_noise_that_comes_back(study):
    made = study(readers=20, cases=60, repeats=60)
    pairs = [(t["repeat_of"], item) for item, t in made.truth.items() if t["repeat_of"]]

    def agreement(**skill):
        answers, drawn = said(made, Skill(d_prime=0.0, **ALIKE, **skill))
        return np.mean([answers[r.name, a, "origin"][0] == answers[r.name, b, "origin"][0] for a, b in pairs for r in drawn])

    # Two normals of correlation r fall on one side of 0 with 1/2 + asin(r)/π (Sheppard 1899); 1200 pairs: 2 SE = .03
    assert agreement(case_share=0.0, repeat_share=0.6) == pytest.approx(0.5 + math.asin(0.6) / math.pi, abs=0.03)
    assert agreement(case_share=0.0, repeat_share=0.0) == pytest.approx(0.5, abs=0.03)
    assert agreement(case_share=0.3, repeat_share=1.0) == 1.0


def test_a_pair_shows_root_two_as_much_as_one_picture(study):
    made = study(readers=20, cases=100, repeats=0, task="two_alternative")
    answers, _ = said(made, Skill(d_prime=1.0, **ALIKE, case_share=0.0))
    right = np.mean([answer == made.truth[item]["correct"]["which"] for (_, item, _), (answer, _) in answers.items()])
    assert right == pytest.approx(PHI(1.0 / math.sqrt(2)), abs=0.02)


@pytest.mark.parametrize(
    ("task", "number", "expected"),
    [
        ("text_alignment", lambda a, t: a == t["correct"]["effusion"], 0.9),
        ("ejection_fraction", lambda a, t: float(a) - t["correct"]["ef"], -2.0),
        ("progression_order", lambda a, t: json.loads(a)[0] == "a", None),
        ("artefact", lambda a, t: len(json.loads(a)), (0.7 + 0.2) / 2),
    ],
)  # fmt: skip
def test_other_tasks_have_the_errors_they_were_given(study, task, number, expected):
    made = study(readers=20, cases=20, repeats=0, task=task)
    answers, _ = said(made, Skill(case_share=0.0, ef_bias_sd=0.0))
    mean = np.mean([number(answer, made.truth[item]) for (_, item, _), (answer, _) in answers.items()])
    if expected is None:
        assert 0.4 < mean < 0.95  # better than a third, not perfect
    else:
        assert mean == pytest.approx(expected, abs=0.06 if task != "ejection_fraction" else 0.8)


def test_ratings_follow_the_log_odds_asked_for(study):
    made = study(readers=30, cases=60, repeats=0, task="likert_realism")
    answers, _ = said(made, Skill(log_odds=-1.2, log_odds_sd=0.0, rating_sd=0.0, case_share=0.0))
    high = {kind: np.mean([int(a) >= 3 for (_, i, _), (a, _) in answers.items() if made.truth[i]["source"] == kind])
            for kind in ("synthetic", "real")}  # fmt: skip
    odds = {kind: math.log(share / (1 - share)) for kind, share in high.items()}
    assert odds["synthetic"] - odds["real"] == pytest.approx(-1.2, abs=0.25)


def test_files_are_those_of_a_viewer_and_say_that_they_are_simulated(study, capsys):
    made = study(readers=3, cases=20, repeats=4)
    out = made.folder / "answers"
    simulate(made.pack, made.key_file, out, missing=0.1)
    files = sorted(out.glob("*.csv"))
    assert [file.name for file in files] == ["simulated-r1.csv", "simulated-r2.csv", "simulated-r3.csv"]
    with files[0].open(newline="") as file:
        found = list(csv.DictReader(file))
    assert tuple(found[0]) == COLUMNS and {row["session"] for row in found} == {"simulated-1", "simulated-2"}
    answers, notes = read_responses(files, made.opened)
    assert not notes and len({(a.reader, a.item) for a in answers}) < 72
    assert "SIMULATED" in (out / "README.md").read_text() and "SIMULATED" in capsys.readouterr().out
    assert json.loads((out / "simulated_readers.json").read_text())["SIMULATED"]
    analyze(made.pack, tuple(files), made.key_file, made.folder / "report")
    assert "made by a program, not by people" in (made.folder / "report" / "report.html").read_text()


def test_same_seed_same_bytes_and_readers_do_not_depend_on_each_other(study):
    made = study(readers=3, cases=12, repeats=2)
    for name, given in {"a": {}, "b": {}, "c": {"seed": 1}, "one": {"readers": ("r2",)}}.items():
        simulate(made.pack, made.key_file, made.folder / name, **given)
    texts = {name: (made.folder / name / "simulated-r2.csv").read_bytes() for name in ("a", "b", "c", "one")}
    assert texts["a"] == texts["b"] == texts["one"] != texts["c"]


def test_their_answers_cannot_be_mixed_with_a_persons(study):
    made = study(readers=2, cases=12, repeats=0)
    simulate(made.pack, made.key_file, made.folder / "out", readers=("r1",))
    item = made.orders["r2"][0]
    made.answer("r2", item, "origin", "real", 3)
    with pytest.raises(ResponseError, match="different viewer versions"):
        read_responses([made.folder / "out" / "simulated-r1.csv", made.write()], made.opened)


@pytest.mark.parametrize(
    ("given", "message"), [({"readers": ("r9",)}, "no reader 'r9'"), ({"missing": 1.0}, "from 0 to below 1")]
)
def test_a_wrong_request_is_said(study, given, message):
    made = study(readers=2, cases=8, repeats=0)
    with pytest.raises(ResponseError, match=message):
        simulate(made.pack, made.key_file, made.folder / "out", **given)


def test_impossible_skill_is_refused():
    with pytest.raises(ValueError, match="case_share is 1.5"):
        Skill(case_share=1.5)


def test_without_skill_every_level_of_confidence_is_as_frequent():
    z = NormalDist()
    found = [level(z.inv_cdf((i + 0.5) / 600), 6) for i in range(600)]
    assert [found.count(n) for n in range(1, 7)] == [100] * 6
