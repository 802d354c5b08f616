"""What gates rejected, by gate and by what the prompts ask for: a gate that rejects one group more often biases the set.

Rejection is counted over attempts. A group's rate is compared with the rate of all other attempts (Fisher's exact test, Holm's
correction over all groups of a gate); attempts at one film share a prompt, so a small p overstates the evidence a little.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import fisher_exact

from medgen.augmentation.captions import kind_of
from medgen.data.records import FindingLabel
from medgen.evaluation.statistics import Estimate, wilson

BIASED_P = 0.05


@dataclass(frozen=True)
class GroupRejection:
    """How often one gate rejected attempts at films of one group, against `others`; `p` is corrected for all groups of the gate."""

    gate: str
    group: str
    attempts: int
    rejected: Estimate
    others: Estimate
    p: float

    @property
    def biased(self) -> bool:
        """Whether the gate rejects this group more often than the rest, beyond chance."""
        return bool(self.p < BIASED_P and self.rejected.value > self.others.value)

    def __str__(self) -> str:
        return (
            f"gate {self.gate} rejected {self.rejected.value:.0%} [{self.rejected.low:.0%}, {self.rejected.high:.0%}] of "
            f"{self.attempts} attempts at {self.group.replace('_', ' ')}, and {self.others.value:.0%} of the others (p {self.p:.2g})"
        )


Attempt = tuple[frozenset[str], Mapping[str, bool]]  # groups of the film; by gate, whether the attempt passed


def groups_of(case: Mapping[str, Any]) -> frozenset[str]:
    """The groups that a case's prompt puts its film in: findings with their side, view, and sex where the prompt says it."""
    present = [label for label in case["labels"] if label["state"] == "present"]
    names = {label["name"] for label in present} | {f"{x['name']}, {x['side']}" for x in present if x["side"]}
    names |= {f"view {case['view']}"} | ({kind_of(FindingLabel(**label) for label in case["labels"])} - {"abnormal"})
    return frozenset(names | ({f"sex {case['sex']}"} if case["person_in_prompt"] else set()))


def attempts_of(
    cases: Mapping[str, Mapping[str, Any]], kept: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]
) -> list[Attempt]:
    """Every attempt, from the lines of metadata.jsonl and rejected.jsonl; `cases` by id."""
    return [
        (groups_of(cases[line["case_id"]]), {name: bool(facts["passed"]) for name, facts in line.get("gates", {}).items()})
        for line in [*kept, *rejected]
    ]


def rejections(attempts: Sequence[Attempt]) -> list[GroupRejection]:
    """Rejection rates of every gate and group, the most rejected first."""
    found: list[GroupRejection] = []
    for gate in sorted({name for _, verdicts in attempts for name in verdicts}):
        seen = [(groups, not verdicts[gate]) for groups, verdicts in attempts if gate in verdicts]
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for groups, bad in seen:
            for group in groups:
                counts[group][0] += bad
                counts[group][1] += 1
        found += _of_gate(gate, counts, sum(bad for _, bad in seen), len(seen))
    return sorted(found, key=lambda one: (one.gate, -one.rejected.value, one.group))


def _of_gate(gate: str, counts: Mapping[str, Sequence[int]], bad: int, total: int) -> list[GroupRejection]:
    raw = {}
    for group, (mine, n) in counts.items():
        rest = (bad - mine, total - n)
        if rest[1]:
            raw[group] = float(fisher_exact([[mine, n - mine], [rest[0], rest[1] - rest[0]]]).pvalue)
    found, least = [], 0.0
    for rank, group in enumerate(sorted(raw, key=raw.__getitem__)):
        least = max(least, min(1.0, raw[group] * (len(raw) - rank)))
        mine, n = counts[group]
        found.append(GroupRejection(gate, group, n, wilson(mine, n), wilson(bad - mine, total - n), least))
    return found
