"""A case file is read strictly: whatever is wrong is named with its line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medgen.sampling.cases import Case, CaseError, TextConditions, read_cases, trajectory_name, write_cases

GOOD = {"case_id": "a", "prompt": "No effusion.", "seed": 7, "n": 2}


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_case_keeps_its_fields_and_carries_what_it_does_not_know(tmp_path: Path) -> None:
    path = write(
        tmp_path / "cases.jsonl", GOOD, "", {**GOOD, "case_id": "b", "negative_prompt": "blur", "pair_id": 3, "variant": "left"}
    )
    first, second = read_cases(path, TextConditions)
    assert first == Case("a", 7, 2, TextConditions(prompt="No effusion."))
    assert second.conditions.negative_prompt == "blur" and second.extra == {"pair_id": 3, "variant": "left"}


def test_cases_written_are_the_cases_read(tmp_path: Path) -> None:
    cases = [Case("a", 2**63 - 1, 3, TextConditions(prompt="Épanchement à gauche"), {"truth": {"ml": 1.5}})]
    path = tmp_path / "again.jsonl"
    path.write_text(write_cases(cases))
    assert read_cases(path, TextConditions) == cases


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["line 2", "not valid JSON"]),
        ("[1]", ["line 2", "JSON object", "list"]),
        ('{"case_id": "b", "case_id": "c", "prompt": "x", "seed": 1}', ["line 2", "'case_id'", "given twice"]),
        ({"case_id": "b", "seed": 1}, ["line 2", "'prompt'", "missing"]),
        ({"case_id": "b", "prompt": "x"}, ["line 2", "'seed'", "missing"]),
        ({**GOOD, "case_id": "b", "prompt": " \n"}, ["line 2", "'prompt'", "empty"]),
        ({**GOOD, "case_id": "b", "prompt": None}, ["line 2", "'prompt'", "string"]),
        ({**GOOD, "case_id": "b", "seed": -1}, ["line 2", "'seed'", "0", "-1"]),
        ({**GOOD, "case_id": "b", "seed": 2**63}, ["line 2", "'seed'", "less than"]),
        ({**GOOD, "case_id": "b", "seed": True}, ["line 2", "'seed'", "integer"]),
        ({**GOOD, "case_id": "b", "seed": 1.0}, ["line 2", "'seed'", "integer"]),
        ({**GOOD, "case_id": "b", "n": 0}, ["line 2", "'n'", "greater"]),
        ({**GOOD, "case_id": "b", "negativ_prompt": "x"}, ["line 2", "'negativ_prompt'", "did you mean 'negative_prompt'"]),
        ({**GOOD, "case_id": "b", "synthetic": False}, ["line 2", "'synthetic'", "reserved"]),
        ({**GOOD, "case_id": "b", "dose": float("nan")}, ["line 2", "NaN"]),
        ('{"case_id": "b", "prompt": "\\ud800", "seed": 1}', ["line 2", "UTF-8"]),
        (GOOD, ["'case_id'", "'a'", "twice"]),
        ({**GOOD, "case_id": "A"}, ["'case_id'", "'A'", "twice"]),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, words: list[str]) -> None:
    path = write(tmp_path / "cases.jsonl", GOOD, line)
    with pytest.raises(CaseError) as error:
        read_cases(path, TextConditions, reserved={"synthetic"})
    assert all(word in str(error.value) for word in ["cases.jsonl", *words]), error.value


@pytest.mark.parametrize("name", ["../a", "a/b", "a\\b", "/etc/x", ".hidden", "", "a b", "a\n", "C:x", "x" * 129, "é", 3])
def test_an_id_that_is_no_safe_file_name_is_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(CaseError, match=r"line 1: field 'case_id'"):
        read_cases(write(tmp_path / "cases.jsonl", {**GOOD, "case_id": name}), TextConditions)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"case_id": "\xff"}\n', b"\x00\x01" * 50, b"[" * 200_000])
def test_a_file_that_holds_no_cases_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cases.jsonl").write_bytes(content)
    with pytest.raises(CaseError, match=r"cases\.jsonl"):
        read_cases(tmp_path / "cases.jsonl", TextConditions)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="No such file"):
        read_cases(tmp_path / "none.jsonl", TextConditions)


def test_noise_depends_on_seed_and_number_only() -> None:
    left, right = (Case(name, 5, 2, TextConditions(prompt=f"{name} effusion")) for name in ("left", "right"))
    assert left.noise_seed(1) == right.noise_seed(1)
    assert len({left.noise_seed(0), left.noise_seed(1), Case("left", 6, 2, left.conditions).noise_seed(0)}) == 3


def test_file_names_never_collide() -> None:
    cases = [Case(name, 0, 1001, TextConditions(prompt="x")) for name in ("a", "a_001", "a_0")]
    names = [trajectory_name(case, index) for case in cases for index in (0, 1, 1000)]
    assert len(set(names)) == len(names)
