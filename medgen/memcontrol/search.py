"""Which attention layers to fine-tune, and how fast: NSGA-II over masks and learning rates, beside the usual baselines.

OUT/ holds config.yaml, study.db (optuna's), trials/NAME/ (what each fine-tuning reached, and its weights), repeats/NAME-K/ (what was
chosen, trained anew) and report.html. Killed at any moment, the same command goes on, and proposes the masks that it would have
proposed: trial k's draws depend on the seed, k, and the results before it. Several processes may run the same command at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import NSGAIISampler
from optuna.trial import FrozenTrial, TrialState

from medgen.config import ConfigError, load_config, save_config
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.front import worth_confirming
from medgen.memcontrol.masks import Adaptation, Method, attention_layers
from medgen.memcontrol.report import FACTS, report
from medgen.memcontrol.rewards import Scorer
from medgen.memcontrol.task import Start
from medgen.memcontrol.trials import Bench, Result, Trial, held, read_results, write_json
from medgen.seeds import stable_seed
from medgen.stopping import STOP, StopRequested
from medgen.training.guards import EXIT_STOPPED

SAME_RATE = 1.1
"""Two learning rates within this factor of each other are the same one, where masks are equal."""
_MOST_DUPLICATES = 200  # in a row: the space is searched through


def search(config: Path, overrides: tuple[str, ...] = ()) -> Path:
    """Search masks of a pipeline's attention layers for little memorisation at good quality; the same command again continues.

    Args:
        config: the recipe, such as configs/memcontrol/leaky.yaml.
        overrides: `section.field=value`, for example search.trials=100 out=runs/try.

    Returns the report's page. Raises `ConfigError` for a folder of another configuration; exits with 75 after a stop signal.
    """
    settings = load_config(MemControlConfig, config, overrides)
    with STOP.listening():
        try:
            _claim(settings)
            start = Start.of(settings)
            scorer = Scorer(settings, start)
            bench = Bench(settings, scorer)
            facts = {"sha256": start.sha256, "layers": attention_layers(start.network), **scorer.counts}
            write_json(settings.out / FACTS, facts)
            for trial in [Trial("start", "start", None, 0.0), *baselines(settings)]:
                _say(bench.run(trial))
            Searcher(settings, bench, attention_layers(start.network)).run()
            for repeat in range(1, settings.confirmation.repeats + 1):  # all of a repeat, then the next: they are compared
                for one in worth_confirming(read_results(settings.out), settings.confirmation.baselines):
                    _say(bench.run(one.trial, repeat))
        except StopRequested:
            _tell("stopped by a signal; the same command continues")
            raise SystemExit(EXIT_STOPPED) from None
    return report(settings.out)


def baselines(config: MemControlConfig) -> list[Trial]:
    """Every baseline at every rate. Random words and duplicate removal are about data: all weights are trained there."""
    trials = []
    for kind in config.baselines.methods:
        method: Method = "full" if kind in ("random_words", "deduplicated") else kind  # type: ignore[assignment]
        for rate in config.baselines.learning_rates:
            trials.append(Trial(f"{kind}-{rate:.2g}", kind, Adaptation(method=method, rank=config.rank), rate))
    return trials


class Searcher:
    """NSGA-II whose study is a SQLite file: a transaction is there or it is not, also after kill -9."""

    def __init__(self, config: MemControlConfig, bench: Bench, layers: Sequence[str]) -> None:
        self.config, self.bench, self.layers = config, bench, layers
        self._claims = config.out / "claims"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(
            study_name="memcontrol",
            storage=f"sqlite:///{(config.out / 'study.db').resolve()}",
            directions=["minimize", "minimize"],  # memorisation, quality
            load_if_exists=True,
        )

    def run(self) -> None:
        """Trials until `search.trials` are finished or the space holds nothing new."""
        duplicates = 0
        while self._finished() < self.config.search.trials:
            STOP.check()
            if duplicates >= _MOST_DUPLICATES:
                _tell(f"{duplicates} proposals in a row were known: the search ends with {self._finished()} trials")
                return
            duplicates = duplicates + 1 if self._one() is None else 0

    def _finished(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def _one(self) -> Result | None:
        """The next trial, or the first that a killed process left. None where it was a duplicate."""
        with ExitStack() as claim:
            with held(self._claims / "asking", wait=True):  # one process at a time takes a number
                asked = self._take(claim)
            return self._do(asked)

    def _take(self, claim: ExitStack) -> optuna.Trial:
        """A trial whose number is this process's as long as `claim` lasts."""
        for left in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if claim.enter_context(held(self._claims / f"{left.number:05d}")):
                return optuna.trial.Trial(self._seeded(left.number), left._trial_id)
        number = len(self.study.get_trials(deepcopy=False))
        claim.enter_context(held(self._claims / f"{number:05d}"))
        return self._seeded(number).ask()

    def _seeded(self, number: int) -> optuna.Study:
        """The study, with a sampler whose draws depend on the trial's number and on no trial that this process has made before."""
        seed = stable_seed("nsga2", self.config.seed, number) % 2**32
        self.study.sampler = NSGAIISampler(population_size=self.config.search.population, seed=seed)
        return self.study

    def _do(self, asked: optuna.Trial) -> Result | None:
        low, high = self.config.search.learning_rate
        layers = tuple(name for name in self.layers if asked.suggest_categorical(name, [False, True]))
        rate = asked.suggest_float("learning_rate", low, high, log=True)
        if not layers or self._known(layers, rate, asked.number):
            self.study.tell(asked, state=TrialState.PRUNED)
            return None
        adaptation = Adaptation(method=self.config.search.method, layers=layers, rank=self.config.rank)
        result = self.bench.run(Trial(f"{asked.number:05d}", "search", adaptation, rate))
        assert result is not None, "the claim on a trial's number is one on its folder"
        self.study.tell(asked, result.values)
        _say(result)
        return result

    def _known(self, layers: tuple[str, ...], rate: float, number: int) -> bool:
        """Whether an earlier trial had this mask, at (nearly) this rate."""

        def mask(trial: FrozenTrial) -> tuple[str, ...]:
            return tuple(name for name in self.layers if trial.params.get(name))

        states = (TrialState.COMPLETE, TrialState.RUNNING)
        earlier = [t for t in self.study.get_trials(deepcopy=False, states=states) if t.number < number]
        return any(
            mask(t) == layers and abs(math.log(t.params["learning_rate"] / rate)) < math.log(SAME_RATE)
            for t in earlier
            if "learning_rate" in t.params
        )


def _claim(config: MemControlConfig) -> None:
    """The folder belongs to one configuration; trials, baselines and repeats may be added, and stage 2 is not part of it."""
    path = config.out / "config.yaml"
    if path.is_file():
        free = {"out", "train", "search.trials", "baselines", "confirmation"}
        before, now = (_flat(one, free) for one in (load_config(MemControlConfig, path), config))
        if differing := sorted(key for key in before | now if before.get(key) != now.get(key)):
            lines = [f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing]
            raise ConfigError(
                f"{config.out} holds a search of another configuration:\n" + "\n".join(lines) + "\nChoose another out"
            )
    config.out.mkdir(parents=True, exist_ok=True)
    save_config(config, path)


def _flat(config: MemControlConfig, free: set[str]) -> dict[str, Any]:
    values = config.model_dump(mode="json", exclude={name for name in free if "." not in name})
    flat = {f"{key}.{name}": item for key, value in values.items() if isinstance(value, dict) for name, item in value.items()}
    flat |= {key: value for key, value in values.items() if not isinstance(value, dict)}
    return {key: value for key, value in flat.items() if key not in free}


def _say(result: Result | None) -> None:
    if result is not None:
        trial, scores = result.trial, result.scores
        name = f"{trial.name}, repeat {result.repeat}" if result.repeat else trial.name
        count = len(trial.adaptation.layers or ()) if trial.kind == "search" and trial.adaptation else 0
        opened = f", {count} layers open" if count else ""
        _tell(
            f"{name}: memorisation {scores.memorisation:.4f}, quality {scores.quality:.4f}, membership AUC {scores.membership:.3f} "
            f"(rate {trial.learning_rate:.1e}{opened}, {result.trained} parameters, {result.seconds:.0f} s)"
        )


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
