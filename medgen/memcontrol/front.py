"""Which of a search's results matter: the Pareto front, the mask that is chosen from it, and what that is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from medgen.memcontrol.trials import Result


def pareto(results: Sequence[Result]) -> list[Result]:
    """Those that no other one beats in one objective without losing in the other, least memorisation first."""

    def beaten(one: Result) -> bool:
        return any(other.values != one.values and all(a <= b for a, b in zip(other.values, one.values)) for other in results)

    return sorted((one for one in results if not beaten(one)), key=lambda one: one.values)


def searched(results: Sequence[Result]) -> list[Result]:
    """The masked trials."""
    return [one for one in results if one.trial.kind == "search"]


def best_of(results: Sequence[Result], kind: str) -> Result | None:
    """A baseline at the rate that gave the best quality."""
    return min((one for one in results if one.trial.kind == kind), key=lambda one: one.scores.quality, default=None)


def chosen(results: Sequence[Result]) -> Result | None:
    """The least memorising mask whose quality is not worse than that of full fine-tuning at its best rate.

    Where there is none, the point of the front nearest to the best of both objectives, each scaled to the front's range.
    """
    front = pareto(searched(results))
    if not front:
        return None
    for one in front:
        if as_good_as_full(results, one):
            return one
    low = [min(one.values[i] for one in front) for i in range(2)]
    high = [max(one.values[i] for one in front) for i in range(2)]

    def distance(one: Result) -> float:
        return sum(((value - least) / ((most - least) or 1.0)) ** 2 for value, least, most in zip(one.values, low, high))

    return min(front, key=distance)


def as_good_as_full(results: Sequence[Result], one: Result | None) -> bool:
    """Whether its quality is not worse than that of full fine-tuning at its best rate."""
    full = best_of(results, "full")
    return one is not None and full is not None and one.scores.quality <= full.scores.quality


def worth_confirming(results: Sequence[Result]) -> list[Result]:
    """The start, every baseline at its best rate, and the chosen mask."""
    kinds = dict.fromkeys(one.trial.kind for one in results if one.trial.kind != "search")
    found = [best_of(results, kind) for kind in kinds]
    return [one for one in (*found, chosen(results)) if one is not None]
