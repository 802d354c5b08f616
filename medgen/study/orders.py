"""In which order each reader sees which items: another one for everybody, repeats and a patient's other images far away.

Orders come from the pack's salt, so that nobody without the sources can rebuild them. Nothing here looks at an item's arm except to share
arms out evenly over sessions and groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from medgen.study.draw import Draft
from medgen.study.protocol import Protocol

Rng = Callable[..., np.random.Generator]
_TRIES = 40


@dataclass(frozen=True)
class Order:
    """One reader's items (places in the list of drafts) in order; `sessions`: how many of them each session has."""

    items: tuple[int, ...]
    sessions: tuple[int, ...]


def orders(protocol: Protocol, drafts: Sequence[Draft], rng: Rng) -> dict[str, Order]:
    """Every reader's order. Each session goes section by section as the protocol lists them; training precedes its section."""
    related = _related(drafts)
    readers = protocol.reader_ids
    group_of = _groups_of_readers(readers, protocol.groups, rng("groups"))
    blocks = _blocks(drafts, related, protocol.groups, rng("blocks"))
    return {
        reader: _order(
            protocol, drafts, [i for i in range(len(drafts)) if blocks[i] in (None, group_of[reader])], related, rng, reader
        )
        for reader in readers
    }


def _related(drafts: Sequence[Draft]) -> list[int]:
    """For every item the number of its family: items that share a patient (repeats among them) are to be kept apart."""
    parent = list(range(len(drafts)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, draft in enumerate(drafts):
        for patient in sorted(draft.patients):
            parent[root(i)] = root(first.setdefault(patient, i))
    return [root(i) for i in range(len(drafts))]


def _groups_of_readers(readers: Sequence[str], groups: int, rng: np.random.Generator) -> dict[str, int]:
    order = rng.permutation(len(readers))
    return {readers[reader]: place % groups for place, reader in enumerate(order)}


def _blocks(drafts: Sequence[Draft], related: Sequence[int], groups: int, rng: np.random.Generator) -> list[int | None]:
    """Which group of readers reads an item (None: all): families stay together, so every group reads all arms of its patients."""
    blocks: list[int | None] = [None] * len(drafts)
    if groups == 1:
        return blocks
    families: dict[int, list[int]] = defaultdict(list)
    for i, draft in enumerate(drafts):
        if not draft.training:
            families[related[i]].append(i)
    load: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * groups)
    names = list(families)
    by_size = sorted((names[i] for i in rng.permutation(len(names))), key=lambda name: -len(families[name]))
    for name in by_size:  # the largest first, each where its sections and arms have the fewest
        kinds = [(drafts[i].section.name, drafts[i].arm.name) for i in families[name]]
        block = min(rng.permutation(groups).tolist(), key=lambda g: sum(load[kind][g] for kind in kinds))
        for i, kind in zip(families[name], kinds, strict=True):
            blocks[i] = block
            load[kind][block] += 1
    return blocks


def _order(protocol: Protocol, drafts: Sequence[Draft], items: list[int], related: Sequence[int], rng: Rng, reader: str) -> Order:
    session_of = _sessions(drafts, items, related, protocol.sessions, rng("sessions", reader))
    ordered, counts = list[int](), list[int]()
    for session in range(protocol.sessions):
        before = len(ordered)
        for section in protocol.sections:
            of_section = [i for i in items if drafts[i].section is section and session_of[i] == session]
            training = [i for i in of_section if drafts[i].training]
            ordered += [training[j] for j in rng("training", reader, section.name).permutation(len(training))]
            cases = [i for i in of_section if not drafts[i].training]
            ordered += _apart(cases, related, rng("order", reader, section.name, session))
        counts.append(len(ordered) - before)
    return Order(tuple(_first_before_repeat(ordered, drafts)), tuple(counts))


def _sessions(
    drafts: Sequence[Draft], items: Sequence[int], related: Sequence[int], sessions: int, rng: np.random.Generator
) -> dict[int, int]:
    """Which session shows which item: a family in different ones, sections and arms shared out evenly; training in the first."""
    chosen = {i: 0 for i in items if drafts[i].training}
    families: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i in items:
        if not drafts[i].training:
            families[drafts[i].section.name, related[i]].append(i)
    load: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * sessions)
    total: dict[str, list[int]] = defaultdict(lambda: [0] * sessions)
    names = list(families)
    for name in sorted((names[i] for i in rng.permutation(len(names))), key=lambda name: -len(families[name])):
        seen = [0] * sessions
        for i in (families[name][j] for j in rng.permutation(len(families[name]))):
            kind = (drafts[i].section.name, drafts[i].arm.name)
            session = min(rng.permutation(sessions).tolist(), key=lambda s: (seen[s], load[kind][s], total[name[0]][s]))
            chosen[i] = session
            seen[session] += 1
            load[kind][session] += 1
            total[name[0]][session] += 1
    return chosen


def _apart(items: Sequence[int], related: Sequence[int], rng: np.random.Generator) -> list[int]:
    """A random order whose related items are at least a third of it apart; less where that cannot be (min-conflicts search)."""
    families: dict[int, list[int]] = defaultdict(list)
    for i in items:
        families[related[i]].append(i)
    pairs = [pair for family in families.values() for pair in combinations(family, 2)]
    order = [items[j] for j in rng.permutation(len(items))]
    gap = len(items) // 3
    while pairs and gap > 1:
        for _ in range(_TRIES):
            place = {item: position for position, item in enumerate(order)}
            close = [pair for pair in pairs if abs(place[pair[0]] - place[pair[1]]) < gap]
            if not close:
                return order
            for one, other in close:
                moved = (one, other)[int(rng.integers(2))]
                place = {item: position for position, item in enumerate(order)}
                _move(order, place, moved, families, related, gap, rng)
        gap -= max(1, gap // 8)
    return order


def _move(
    order: list[int], place: Mapping[int, int], item: int, families: Mapping[int, list[int]], related: Sequence[int], gap: int,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Swap `item` with one that can stand at its place, to where it is far from its own; nothing if there is no such place."""

    def conflicts(who: int, at: int, without: int) -> int:
        return sum(abs(place[o] - at) < gap for o in families[related[who]] if o not in (who, without))

    here = place[item]
    there = rng.permutation(len(order))[:64].tolist()  # a sample is enough, and keeps large studies fast
    best = min(there, key=lambda at: conflicts(item, at, order[at]) + conflicts(order[at], here, item))
    order[here], order[best] = order[best], order[here]


def _first_before_repeat(ordered: list[int], drafts: Sequence[Draft]) -> list[int]:
    """The item that the key calls the repeat comes second for everybody: the analysis counts the first showing."""
    place = {item: position for position, item in enumerate(ordered)}
    for item in list(ordered):
        first = drafts[item].repeat_of
        if first is not None and place[first] > place[item]:
            a, b = place[first], place[item]
            ordered[a], ordered[b] = item, first
            place[first], place[item] = b, a
    return ordered
