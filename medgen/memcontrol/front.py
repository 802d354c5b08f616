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


def chosen(results: Sequence[Result], rival: str = "full") -> Result | None:
    """The least memorising mask whose quality is not worse than that of the rival (a baseline) at its best rate.

    Where there is none, the point of the front nearest to the best of both objectives, each scaled to the front's range.
    """
    front = pareto(searched(results))
    if not front:
        return None
    for one in front:
        if as_good_as(results, one, rival):
            return one
    low = [min(one.values[i] for one in front) for i in range(2)]
    high = [max(one.values[i] for one in front) for i in range(2)]

    def distance(one: Result) -> float:
        return sum(((value - least) / ((most - least) or 1.0)) ** 2 for value, least, most in zip(one.values, low, high))

    return min(front, key=distance)


def as_good_as(results: Sequence[Result], one: Result | None, rival: str = "full") -> bool:
    """Whether its quality is not worse than that of the rival (a baseline) at its best rate."""
    other = best_of(results, rival)
    return one is not None and other is not None and one.scores.quality <= other.scores.quality


def worth_confirming(results: Sequence[Result], baselines: Sequence[str]) -> list[Result]:
    """These baselines at their best rates, and the mask that is chosen against each."""
    found = [best_of(results, kind) for kind in baselines] + [chosen(results, kind) for kind in baselines]
    return list({one.trial.name: one for one in found if one is not None}.values())
