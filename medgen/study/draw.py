"""Which cases a study shows: drawn by its seed, spread over arms and patients, balanced, with training cases kept out of the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np

from medgen.seeds import stable_seed
from medgen.study.material import Candidate, Pool
from medgen.study.protocol import Arm, Protocol, ProtocolError, Section
from medgen.study.tasks import FEWEST_FILMS, MOST_FILMS, TASKS


class Length(NamedTuple):
    """How many pictures every item of a section shows, of the past and after it."""

    past: int
    future: int


ONE = Length(0, 1)


@dataclass(frozen=True)
class Draft:
    """One item before it has pictures. `partner`: the other of a pair. `repeat_of`: the draft that this one repeats.

    `foreign`: the report of another patient, shown as if it were this one's (arm "mismatched").
    """

    section: Section
    arm: Arm
    main: Candidate
    length: Length
    partner: Candidate | None = None
    same: bool | None = None
    training: bool = False
    repeat_of: int | None = None
    foreign: str | None = None

    @property
    def patients(self) -> frozenset[str]:
        """Whom it shows."""
        return frozenset(c.patient for c in (self.main, self.partner) if c is not None)


def draw(protocol: Protocol, pools: Mapping[str, Pool]) -> list[Draft]:
    """Every item of the study, section by section: training, cases, repeats.

    Raises `ProtocolError` with every section and arm that has too few cases: how many are there, how many are needed.
    """
    drawn, problems = _Drawing(protocol.seed), list[str]()
    drafts: dict[str, list[Draft]] = {}
    for training in (True, False):  # training first: its cases are shown nowhere else
        for section in protocol.sections:
            arms = [pools[arm.name] for arm in protocol.arms_of(section)]
            try:
                length = _length(section, arms)
                drafts.setdefault(section.name, []).extend(_section(drawn, section, arms, length, training))
            except ProtocolError as error:
                problems += str(error).splitlines()
    if problems:
        raise ProtocolError("\n".join(dict.fromkeys(problems)))
    listed: list[Draft] = []
    for section in protocol.sections:
        listed += drafts[section.name]
        cases = [i for i, draft in enumerate(listed) if draft.section is section and not draft.training]
        arm_of = {i: listed[i].arm.name for i in cases}
        again = _shared(cases, arm_of, round(section.repeats * len(cases)), drawn.rng("repeats", section.name))
        listed += [replace(listed[i], repeat_of=i) for i in again]
    return listed


class _Drawing:
    """What has been shown so far, so that patients and images come again only when there are no others."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.uses: Counter[object] = Counter()
        self.reserved: set[object] = set()

    def rng(self, *what: object) -> np.random.Generator:
        return np.random.default_rng(stable_seed("study draw", self.seed, *what))

    def worn(self, candidate: Candidate) -> int:
        return self.uses[candidate.patient] + self.uses[candidate.future[-1].path]

    def use(self, candidate: Candidate, training: bool) -> None:
        self.uses[candidate.patient] += 1
        self.uses[candidate.future[-1].path] += 1
        if training:
            self.reserved.add(candidate.future[-1].path)

    def ranked(self, candidates: Sequence[Candidate], section: str, *what: object) -> list[Candidate]:
        """Those not used in training, the least shown first, in seeded order; what was sampled for another section last."""
        free = [c for c in candidates if c.future[-1].path not in self.reserved]
        order = self.rng(section, *what).permutation(len(free))
        return sorted((free[i] for i in order), key=lambda c: (c.section not in (None, section), self.worn(c)))

    def take(self, candidates: Sequence[Candidate], count: int, section: str, *what: object) -> list[Candidate]:
        """Up to `count`, no patient twice as long as there are others."""
        left, taken, seen = self.ranked(candidates, section, *what), list[Candidate](), Counter[str]()

        def shown(candidate: Candidate) -> tuple[bool, int]:
            return candidate.section not in (None, section), seen[candidate.patient] + self.worn(candidate)

        while left and len(taken) < count:
            least, rest = min(map(shown, left)), list[Candidate]()
            for candidate in left:
                if len(taken) < count and shown(candidate) == least:
                    taken.append(candidate)
                    seen[candidate.patient] += 1
                else:
                    rest.append(candidate)
            left = rest
        return taken


# ---------------------------------------------------------------- one section


def _section(drawn: _Drawing, section: Section, pools: list[Pool], length: Length, training: bool) -> list[Draft]:
    task = TASKS[section.task]
    paired = task.shows == "pair" and task.contrast
    real = next((pool for pool in pools if pool.arm.source == "real"), None)
    shown = [pool for pool in pools if pool is not real] if paired else pools
    total = section.training if training else section.cases
    where = (section.name, "training" if training else "cases")
    # Who gets one more, where the arms cannot have the same: by the seed.
    counts = _evenly(total, len(shown), drawn.rng(*where, "arms"))
    eligible = {pool.arm.name: [c for c in pool.candidates if _fits(section, c, length)] for pool in pools}
    chosen = _cases(drawn, section, shown, eligible, counts, training)
    drafts = [Draft(section, pool.arm, c, length, training=training) for pool in shown for c in chosen[pool.arm.name]]
    if paired and real is not None:
        return _with_partners(drawn, drafts, eligible[real.arm.name], real, where)
    if section.task == "same_patient":
        return _same_or_not(drawn, drafts, eligible, where)
    return [_mismatched(drawn, draft, eligible, where) if draft.arm.source == "mismatched" else draft for draft in drafts]


def _cases(
    drawn: _Drawing,
    section: Section,
    pools: list[Pool],
    eligible: Mapping[str, list[Candidate]],
    counts: list[int],
    training: bool,
) -> dict[str, list[Candidate]]:
    """The main candidate of every item, by arm."""
    chosen: dict[str, list[Candidate]] = {}
    problems, shown = list[str](), set[object]()
    common = set.intersection(*({c.patient for c in eligible[pool.arm.name]} for pool in pools)) if section.paired else None
    quotas = {} if training or section.balance is None else _quotas(drawn, section, pools, eligible, counts)
    for pool, count in zip(pools, counts, strict=True):
        name = pool.arm.name
        usable = [c for c in eligible[name] if c.future[-1].path not in shown and (common is None or c.patient in common)]
        what = ("training" if training else "cases", "pair" if section.paired else name)
        if name in quotas:
            found = [
                c
                for v, n in quotas[name].items()
                for c in drawn.take([c for c in usable if c.value(str(section.balance)) == v], n, section.name, *what, v)
            ]
        else:
            found = drawn.take(usable, count, section.name, *what)
        if common is not None:  # later arms show the same patients as the first
            common = {c.patient for c in found} if name == pools[0].arm.name else common
        if len(found) < count:
            problems.append(_too_few(section, pool, count, len(found), len(eligible[name]), training, common is not None))
        chosen[name] = found
        shown |= set() if section.paired else {c.future[-1].path for c in found}
        for candidate in found:  # at once: the next arm prefers other patients
            drawn.use(candidate, training)
    if problems:
        raise ProtocolError("\n".join(problems))
    return chosen


def _too_few(section: Section, pool: Pool, needed: int, there: int, fitting: int, training: bool, paired: bool) -> str:
    what = "training cases" if training else "cases"
    source = f"{len(pool.candidates)} in {pool.where}"
    if pool.listed > len(pool.candidates):
        source += f" (of {pool.listed} records those in split {', '.join(pool.arm.splits)})"
    notes = [f"{fitting} fit the task {section.task}"]
    notes += ["patients of all arms only"] if paired else []
    return (
        f"section {section.name!r}, arm {pool.arm.name!r}: {needed} {what} needed, {there} left: {source}, {'; '.join(notes)}; "
        "cases of training and of other arms are not shown twice. Ask for fewer cases, or give more"
    )


def _quotas(
    drawn: _Drawing, section: Section, pools: list[Pool], eligible: Mapping[str, list[Candidate]], counts: list[int]
) -> dict[str, dict[str, int]]:
    """How many of each value of the balanced field every arm shows: the same in all of them, as even as they allow."""
    there = {
        pool.arm.name: Counter(c.value(str(section.balance)) for c in drawn.ranked(eligible[pool.arm.name], section.name))
        for pool in pools
    }
    values = sorted({value for counter in there.values() for value in counter} - {"unknown"})
    caps = {value: min(counter[value] for counter in there.values()) for value in values}
    listed = "; ".join(f"{arm}: " + ", ".join(f"{v} {n}" for v, n in sorted(counter.items())) for arm, counter in there.items())
    if sum(cap > 0 for cap in caps.values()) < 2:
        raise ProtocolError(f"section {section.name!r}: cannot be balanced by {section.balance!r}, the arms have {listed}")
    order = [values[i] for i in drawn.rng(section.name, "balance").permutation(len(values))]
    quotas = {}
    for pool, count in zip(pools, counts, strict=True):
        quota = dict.fromkeys(order, 0)
        for _ in range(count):
            open_ = [value for value in order if quota[value] < caps[value]]
            if not open_:
                raise ProtocolError(
                    f"section {section.name!r}, arm {pool.arm.name!r}: {count} cases balanced by {section.balance!r} are needed, but the "
                    f"arms have {listed}"
                )
            quota[min(open_, key=lambda value: quota[value])] += 1
        quotas[pool.arm.name] = quota
    return quotas


# ---------------------------------------------------------------- pairs


def _with_partners(
    drawn: _Drawing, drafts: list[Draft], real: list[Candidate], pool: Pool, where: tuple[str, str]
) -> list[Draft]:
    """Each with a real image beside it: of the same patient if there is one, else of like sex and view."""
    done: list[Draft] = []
    taken: set[object] = {draft.main.future[-1].path for draft in drafts}
    for draft in drafts:
        free = [c for c in drawn.ranked(real, *where, "partner", len(done)) if c.future[-1].path not in taken]
        if not free:
            raise ProtocolError(_too_few(draft.section, pool, len(drafts), len(done), len(real), draft.training, False))
        partner = max(free, key=lambda c: (c.patient == draft.main.patient, _alike(c, draft.main)))  # the first of the best
        taken.add(partner.future[-1].path)
        drawn.use(partner, draft.training)
        done.append(replace(draft, partner=partner))
    return done


def _same_or_not(
    drawn: _Drawing, drafts: list[Draft], eligible: Mapping[str, list[Candidate]], where: tuple[str, str]
) -> list[Draft]:
    """Half of every arm's pairs with a later film of another patient of the same arm, of like sex and view."""
    done = list[Draft]()
    for name in dict.fromkeys(draft.arm.name for draft in drafts):
        own = [draft for draft in drafts if draft.arm.name == name]
        rng = drawn.rng(*where, name, "same")
        others = set(rng.permutation(len(own))[: (len(own) + int(rng.integers(2))) // 2].tolist())
        taken = {draft.main.patient for draft in own}
        for i, draft in enumerate(own):
            if i not in others:
                done.append(replace(draft, same=True))
                continue
            ranked = drawn.ranked(eligible[name], *where, name, i)
            free = [c for c in ranked if c.patient != draft.main.patient]
            if not free:
                raise ProtocolError(f"section {draft.section.name!r}, arm {name!r}: two patients are needed for a pair of two")
            partner = max(free, key=lambda c: (c.patient not in taken, _alike(c, draft.main)))
            taken.add(partner.patient)
            drawn.use(partner, draft.training)
            done.append(replace(draft, partner=partner, same=False))
    return done


def _mismatched(drawn: _Drawing, draft: Draft, eligible: Mapping[str, list[Candidate]], where: tuple[str, str]) -> Draft:
    """With the report of another patient that says something else of at least one finding."""
    own = draft.main.findings
    for other in drawn.ranked(eligible[draft.arm.name], *where, "foreign text", draft.main.name):
        said = {name: state for name, state in other.findings.items() if state != "uncertain"}
        if other.patient != draft.main.patient and any(own.get(name, "absent") != state for name, state in said.items()):
            return replace(draft, foreign=other.text)
    arm = draft.arm.name
    raise ProtocolError(
        f"section {draft.section.name!r}, arm {arm!r}: no other patient's report contradicts that of {draft.main.case_id}"
    )


def _alike(one: Candidate, other: Candidate) -> int:
    return sum(one.facts.get(key) == other.facts.get(key) for key in ("sex", "view") if key in other.facts)


# ---------------------------------------------------------------- what fits a task


def _fits(section: Section, candidate: Candidate, length: Length) -> bool:
    if section.task == "text_alignment":
        return any(state != "uncertain" for state in candidate.findings.values())
    if section.task == "ejection_fraction":
        return candidate.ejection_fraction is not None
    return _holds(candidate, length)


def _holds(candidate: Candidate, length: Length) -> bool:
    """Enough visits: a synthetic course has known ones and generated ones, a real one is cut where it suits."""
    if candidate.past:
        return len(candidate.past) >= length.past and len(candidate.future) >= length.future
    return len(candidate.future) >= sum(length)


def _length(section: Section, pools: Sequence[Pool]) -> Length:
    """The most pictures an item can show that every arm has in enough cases, the same in all of them."""
    shows = TASKS[section.task].shows
    options: Iterable[Length] = [ONE]
    if section.task == "same_patient":
        options = [Length(1, 1)]
    elif shows == "films":
        options = [Length(0, n) for n in range(MOST_FILMS, FEWEST_FILMS - 1, -1)]
    elif shows == "course":
        options = [Length(m, k) for m, k in ((3, 3), (3, 2), (2, 3), (2, 2), (2, 1), (1, 2), (1, 1))]
    listed = list(options)
    needed = -(-(section.cases + section.training) // len(pools))
    for length in listed:
        if all(sum(_holds(c, length) for c in pool.candidates) >= needed for pool in pools):
            return length
    return listed[-1]  # what is missing is said when cases are drawn


# ---------------------------------------------------------------- shares


def _evenly(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    counts = np.full(parts, total // parts)
    counts[rng.permutation(parts)[: total % parts]] += 1
    return [int(count) for count in counts]


def _shared(items: Sequence[int], group: Mapping[int, str], count: int, rng: np.random.Generator) -> list[int]:
    """`count` of `items` at random, as evenly from every group as possible."""
    groups: dict[str, list[int]] = {}
    for i in rng.permutation(len(items)):
        groups.setdefault(group[items[i]], []).append(items[i])
    names = [sorted(groups)[i] for i in rng.permutation(len(groups))]
    turns = (groups[name].pop() for name in cycle(names) if groups[name]) if groups else iter(())
    return sorted(islice(turns, min(count, len(items))))
