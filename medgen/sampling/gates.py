"""Gates: what a sampled image must pass before it is written. A rejected image is drawn again from other noise, or goes missing.

A gate sees one image at a time, so that its verdict depends on no batch and no shard. A task without gates samples as it always did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from medgen.sampling.cases import Case, Trajectory

GATE_FILE = "gate.json"
NOT_VALIDATED = "not validated"
_KINDS = {
    "privacy": ("medgen.sampling.privacy_gate", "PrivacyGate"),
    "quality": ("medgen.sampling.quality_gate", "QualityGate"),
}
"""The `gate` that a gate folder's gate.json names, or the name alone → module, class with `load(folder: Path | None)`."""


class GateError(ValueError):
    """A gate that cannot be found or used; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Verdict:
    """What a gate says about one image; `score` is what it compared with its threshold, `reason` a sentence for the log."""

    passed: bool
    score: float
    reason: str


@runtime_checkable
class Gate(Protocol):
    """Decides which images may be written. `check` is called from several threads at once, and must not depend on the past."""

    name: str
    validated: bool

    def describe(self) -> dict[str, Any]:
        """JSON values that decide the verdicts (hashes of weights and index, no paths), among them `threshold`.

        They are part of the sampling request: a folder begun with another gate is refused.
        """
        ...

    def check(self, images: Tensor, cases: Sequence[Case[Any]]) -> list[Verdict]:
        """One verdict for each of `images` [B,1,H,W] float32 in [-1,1], asked for by `cases` (B of them)."""
        ...


@dataclass(frozen=True)
class Judged:
    """All gates' verdicts on one image."""

    passed: bool
    gates: dict[str, dict[str, Any]]

    def line(self) -> dict[str, Any]:
        """{name: {score, threshold, validated}}, as the metadata carry it."""
        return {name: {key: value for key, value in facts.items() if key != "reason"} for name, facts in self.gates.items()}


def judge(gates: Sequence[Gate], trajectory: Trajectory[Any]) -> Judged:
    """Ask every gate about the first frame of `trajectory`."""
    image = torch.from_numpy(np.ascontiguousarray(trajectory.frames[:1], dtype=np.float32))[None].clamp(0, 1) * 2 - 1
    passed, facts = True, {}
    for gate in gates:
        (verdict,) = gate.check(image, [trajectory.case])
        passed &= verdict.passed
        facts[gate.name] = {
            "passed": verdict.passed,
            "score": round(float(verdict.score), 6),
            "threshold": gate.describe()["threshold"],
            "validated": gate.validated,
            "reason": verdict.reason,
        }
    return Judged(passed, facts)


def load_gates(sources: Sequence[str | Path | Gate] | str | Path) -> list[Gate]:
    """Gates from objects, gate folders (with a gate.json) or names. Raises `GateError`, also where two have one name."""
    if isinstance(sources, str | Path):  # one, without a list around it
        sources = [sources]
    gates = [source if isinstance(source, Gate) else load_gate(source) for source in sources]
    names = [gate.name for gate in gates]
    for name in names:
        if names.count(name) > 1:
            raise GateError(f"two gates are named {name!r}; give each once")
    return gates


def load_gate(source: str | Path) -> Gate:
    """The gate in a folder, or one that needs no folder by its name. Raises `GateError`."""
    folder = Path(source)
    if str(source) in _KINDS and not folder.exists():
        return _loaded(str(source), None)
    if not (folder / GATE_FILE).is_file():
        raise GateError(
            f"no gate {str(source)!r}: neither a folder with a {GATE_FILE} (`medgen audit gate` makes one) nor one of "
            + ", ".join(_KINDS)
        )
    try:
        kind = json.loads((folder / GATE_FILE).read_text())["gate"]
    except (ValueError, KeyError, TypeError) as error:
        raise GateError(f"{folder / GATE_FILE} is damaged: {error}") from None
    if kind not in _KINDS:
        raise GateError(f"{folder / GATE_FILE} is of the unknown kind {kind!r}; there are {', '.join(_KINDS)}")
    return _loaded(kind, folder)


def _loaded(kind: str, folder: Path | None) -> Gate:
    module, name = _KINDS[kind]
    gate: Gate = getattr(import_module(module), name).load(folder)
    return gate


def spoken(name: str, validated: bool) -> str:
    """A gate's name as outputs say it."""
    return name if validated else f"{name} ({NOT_VALIDATED})"


def spoken_all(gates: Mapping[str, Mapping[str, Any]]) -> str:
    """The same of a metadata line's `gates`."""
    return ", ".join(spoken(name, bool(facts["validated"])) for name, facts in gates.items())
