"""Answers that cannot be trusted are refused with their file and row; what is harmless is put right and said."""

import csv
import json

import pytest

from medgen.study.responses import ResponseError, read_key, read_pack, read_responses, safe_cell, write_csv


@pytest.fixture
def study(make_study):
    return make_study().build().read_by_guessers()


def refusal(study, *names):
    with pytest.raises(ResponseError) as caught:
        read_responses([study.folder / name for name in names], read_pack(study.pack))
    return str(caught.value)


def test_untouched_answers_are_read(study):
    answers, notes = read_responses([study.write()], read_pack(study.pack))
    assert len(answers) == 3 * 28 and notes == []
    assert answers[0].value in ("real", "synthetic") and answers[0].row == 2


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("pack_sha256", "f" * 64, "not in this one"),
        ("study_id", "other", "study 'other', but the pack is of study 's1'"),
        ("reader", "r99", "unknown reader 'r99'"),
        ("item", "deadbeef", "unknown item 'deadbeef'"),
        ("answer", "maybe", "none of its options (real, synthetic)"),
        ("question", "age", "no question 'age'"),
        ("task", "artefact", "is of task 'real_or_synthetic'"),
        ("position", "27", "stands at position 4"),
        ("position", "-1", "not a whole number"),
        ("ms", "fast", "ms 'fast'"),
        ("confidence", "very", "confidence 'very' is not a number"),
        ("timestamp", "yesterday", "not an ISO date"),
    ],
)
def test_an_edited_row_is_named(study, field, value, says):
    study.rows[4][field] = value
    study.write("edited.csv")
    assert "edited.csv, row 6: " in (message := refusal(study, "edited.csv"))
    assert says in message


def test_every_problem_is_told_at_once(study):
    study.rows[0]["answer"], study.rows[9]["ms"] = "?", "?"
    study.write()
    message = refusal(study, "answers.csv")
    assert "row 2" in message and "row 11" in message


def test_mixed_viewer_versions_are_refused(study):
    study.rows[50]["viewer_version"] = "2"
    study.write()
    assert "different viewer versions: '1' (first in" in refusal(study, "answers.csv")


def test_the_same_file_twice_is_counted_once_and_said(study):
    study.write("a.csv"), study.write("b.csv")
    answers, notes = read_responses([study.folder / "a.csv", study.folder / "b.csv"], read_pack(study.pack))
    assert len(answers) == 84
    assert "84 rows repeat answers already read" in notes[0]


def test_two_people_under_one_name_are_refused(study):
    study.write("a.csv")
    other = [
        dict(row, answer="real" if row["answer"] == "synthetic" else "synthetic") for row in study.rows if row["reader"] == "r2"
    ]
    study.write("b.csv", other)
    message = refusal(study, "a.csv", "b.csv")
    assert "b.csv, row 2: reader 'r2' already answered 'origin'" in message and "differently; keep one file per reader" in message
    assert message.endswith("and 8 more")


def test_not_a_response_file(study):
    (study.folder / "x.csv").write_text("a,b\n1,2\n")
    assert "row 1: not the columns of a response file" in refusal(study, "x.csv")
    (study.folder / "y.csv").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(study, "y.csv")
    study.write()
    (study.folder / "z.csv").write_text((study.folder / "answers.csv").read_text() + "one,two\n")
    assert "2 cells instead of 13" in refusal(study, "z.csv")


def test_a_changed_pack_is_refused(study):
    page = study.pack / "index.html"
    page.write_text(page.read_text().replace("Hand-made", "Changed"))
    with pytest.raises(ResponseError, match="index.html was changed after the pack was built"):
        read_pack(study.pack)


@pytest.mark.parametrize("change", ["truth", "pack", "not a key"])
def test_a_wrong_key_is_refused(study, change):
    key = json.loads(study.key_file.read_text())
    if change == "truth":
        next(iter(key["items"].values()))["source"] = "synthetic"
    elif change == "pack":
        key["pack_sha256"] = "0" * 64
    else:
        key = ["real", "synthetic"]
    study.key_file.write_text(json.dumps(key))
    expected = {"truth": "salted SHA-256 differs", "pack": "key of another pack", "not a key": "not an answer key"}[change]
    with pytest.raises(ResponseError, match=expected):
        read_key(study.key_file, read_pack(study.pack))


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_becomes_a_formula(text, tmp_path):
    write_csv(tmp_path / "out.csv", ["a"], [[text]])
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(csv.reader(file))[1][0] == "'" + text


def test_numbers_stay_numbers():
    assert [safe_cell(value) for value in (-0.5, "-3", 2, None, "plain")] == ["-0.5", "-3", "2", "", "plain"]
