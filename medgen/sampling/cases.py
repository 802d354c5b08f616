"""What is asked of a sampler (`Case`, one JSON line each) and what comes back (`Trajectory`).

A case is generic: every task adds its own typed conditions (a prompt; visit dates; an ECG file) to the same id, seed and count.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, ValidationError

from medgen.config import Config
from medgen.seeds import stable_seed


class CaseError(ValueError):
    """A case that cannot be sampled; the message says which file, line and field, and what was expected."""


class Conditions(Config):
    """Base of a task's conditions: the fields of a case line that only this task understands."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text, this is empty")
    return text


Text = Annotated[str, Field(strict=True), AfterValidator(_not_blank)]


class TextConditions(Conditions):
    """What a text-to-image case is conditioned on."""

    prompt: Text
    negative_prompt: Annotated[str, Field(strict=True)] | None = None


class _Common(Config):
    # The id becomes part of a file name: letters, digits, '.', '_' and '-' only, so no separator and no hidden file.
    case_id: Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)]
    n: Annotated[int, Field(strict=True, ge=1)] = 1


C = TypeVar("C", bound=Conditions)


@dataclass(frozen=True)
class Case(Generic[C]):
    """One sampling request: `n` trajectories of `conditions`.

    `extra` holds whatever else the line says (`pair_id`, `variant`, truth to be scored): it is carried to the metadata, untouched.
    """

    case_id: str
    seed: int
    n: int
    conditions: C
    extra: dict[str, Any] = field(default_factory=dict)

    def line(self) -> dict[str, Any]:
        """The case as its JSON line; conditions that are None are left out."""
        return {
            "case_id": self.case_id,
            **self.conditions.model_dump(mode="json", exclude_none=True),
            "seed": self.seed,
            "n": self.n,
            **self.extra,
        }

    def noise_seed(self, trajectory: int) -> int:
        """Seed of all randomness of one trajectory.

        It depends on the case's seed and the trajectory's number, deliberately not on the id or the prompt: two cases with the
        same seed and one word changed start from the same noise, so what differs between their images is due to that word.
        """
        return stable_seed("trajectory", self.seed, trajectory)


@dataclass(frozen=True)
class Trajectory(Generic[C]):
    """One sampled result: frames [T,H,W] float32 in [0,1] at times [T] (days or seconds, as the task says; a single image: 0).

    `attempt` counts the draws that gates rejected before it.
    """

    case: Case[C]
    index: int
    frames: np.ndarray
    times: np.ndarray
    attempt: int = field(default=0, kw_only=True)

    @property
    def name(self) -> str:
        """Stem of the trajectory's files; unique because the last `_` always precedes the trajectory's number."""
        return trajectory_name(self.case, self.index)


def trajectory_name(case: Case[C], index: int) -> str:
    """Stem of the files of trajectory `index` of `case`."""
    return f"{case.case_id}_{index:03d}"


def parse_case(values: Mapping[str, Any], conditions: type[C], reserved: Iterable[str] = ()) -> Case[C]:
    """Check one case line. Raises `CaseError` naming the field and what was expected.

    `reserved` are names that only the sampler may write to the metadata (`synthetic`, `model`), so no case may carry them.
    """
    common_names, condition_names = list(_Common.model_fields), list(conditions.model_fields)
    known = common_names + condition_names
    extra = {key: value for key, value in values.items() if key not in known}
    for key in extra:
        near = difflib.get_close_matches(key, known, 1, cutoff=0.8)
        if near:
            raise CaseError(f"field {key!r}: unknown; did you mean {near[0]!r}?")
        if key in reserved:
            raise CaseError(f"field {key!r}: reserved, the sampler writes it; rename yours")
    try:
        common = _Common.model_validate({key: values[key] for key in common_names if key in values})
        given = conditions.model_validate({key: values[key] for key in condition_names if key in values})
    except ValidationError as error:
        raise CaseError(_explain(error)) from None
    return Case(common.case_id, common.seed, common.n, given, extra)


def read_cases(path: str | Path, conditions: type[C], reserved: Iterable[str] = ()) -> list[Case[C]]:
    """Read a JSON-lines file of cases, strictly: an error names the file, the line, the field and what was expected."""
    path, reserved = Path(path), frozenset(reserved)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CaseError(f"cannot read the cases in {path}: {error.strerror}") from None
    cases = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            cases.append(parse_case(_decode(line), conditions, reserved))
        except CaseError as error:
            raise CaseError(f"{path}, line {number}: {error}") from None
    check_cases(cases, str(path))
    return cases


def check_cases(cases: Sequence[Case[C]], source: str = "the cases") -> None:
    """Refuse an empty list and two cases with one id (also two that differ only in capitals: some file systems cannot)."""
    if not cases:
        raise CaseError(f"{source}: no cases; expected one JSON object per line")
    seen: dict[str, str] = {}
    for case in cases:
        key = case.case_id.casefold()
        if key in seen:
            raise CaseError(
                f"{source}: field 'case_id': {case.case_id!r} occurs twice (first as {seen[key]!r}); expected unique ids"
            )
        seen[key] = case.case_id


def write_cases(cases: Sequence[Case[C]]) -> str:
    """The cases as JSON lines, ready to be read again by `read_cases`."""
    return "".join(json.dumps(case.line(), ensure_ascii=False) + "\n" for case in cases)


def with_conditions(case: Case[C], **changes: Any) -> Case[C]:
    """A copy of `case` with some of its conditions replaced (validated again)."""
    return dataclasses.replace(case, conditions=type(case.conditions).model_validate({**case.conditions.model_dump(), **changes}))


def _decode(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
        # A lone surrogate is legal JSON and illegal text: it could be read but never written to the metadata.
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeError:
        raise CaseError("not valid UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise CaseError(f"not valid JSON ({error.msg}, column {error.colno}); expected one object per line") from None
    except RecursionError:
        raise CaseError("not usable JSON: nested too deeply") from None
    if not isinstance(values, dict):
        raise CaseError(f"expected a JSON object, found {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise CaseError(f"field {next(key for key in keys if keys.count(key) > 1)!r}: given twice")
    return values


def _no_constant(name: str) -> float:
    raise CaseError(f"{name} is not a JSON number")


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"field {name!r}: missing"
    if name == "case_id" and problem["type"] == "string_pattern_mismatch":
        expected = "expected a file-safe id of 1-128 letters, digits, '.', '_' or '-', not starting with '.' or '-'"
    else:
        expected = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected").lower()
    return f"field {name!r}: {expected} (got {str(problem['input'])[:80]!r})"
