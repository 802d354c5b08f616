"""Stage 2: a mask that a search found, trained on every training film by the one loop; ends in an ordinary pipeline folder."""

from __future__ import annotations

from pathlib import Path

from medgen.config import ConfigError, load_config
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.front import chosen
from medgen.memcontrol.task import FineTuning, MaskedTextToCXR, Start
from medgen.memcontrol.trials import Result, read_results
from medgen.training.guards import EXIT_STOPPED
from medgen.training.loop import train as run_loop


def train(search: Path, out: Path | None = None, trial: str | None = None, overrides: tuple[str, ...] = ()) -> Path:
    """Fine-tune on all training films with a mask that a search found; the same command again continues.

    The export is a pipeline folder like any other (LoRA merged in): sample and audit it as such. A low score in the search is a promise
    about short trainings; `medgen audit` measures what this one kept of its patients.

    Args:
        search: the folder of a search.
        out: folder of the run; the search's train.out if not given.
        trial: which of its trials, such as 00012 or lora-0.001; the report's choice if not given.
        overrides: `section.field=value`, for example train.steps=2000.

    Returns the pipeline's folder. Raises `ConfigError` where the search has no such trial.
    """
    overrides = (*overrides, f"train.out={out}") if out is not None else overrides
    config = load_config(MemControlConfig, search / "config.yaml", overrides)
    result = pick(read_results(search), trial, search)
    assert result.trial.adaptation is not None
    settings = config.train.model_copy(update={"learning_rate": result.trial.learning_rate})
    words = config.inner.random_words if result.trial.kind == "random_words" else 0
    recorded = FineTuning(memcontrol=config, adaptation=result.trial.adaptation, random_words=words, train=settings)
    base = Start.of(config).task(settings, config.inner.caption_dropout, words)
    done = run_loop(MaskedTextToCXR(base, result.trial.adaptation), settings, recorded)
    if done.stopped:
        raise SystemExit(EXIT_STOPPED)
    return settings.out / "export"


def pick(results: list[Result], name: str | None, search: Path) -> Result:
    """The trial of that name, or the chosen one. Raises `ConfigError` naming those that there are."""
    trained = [one for one in results if one.trial.adaptation is not None]
    if name is None:
        found = chosen(results)
        if found is None:
            raise ConfigError(
                f"{search} holds no finished trial yet; run `medgen memcontrol search`, or name a baseline with --trial"
            )
        return found
    for one in trained:
        if one.trial.name == name:
            return one
    raise ConfigError(f"{search} has no trial {name!r}; it has {', '.join(one.trial.name for one in trained) or 'none'}")
