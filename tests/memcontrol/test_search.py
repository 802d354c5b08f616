"""A search ends in a page; killed at any moment it goes on as if nothing had happened; what is known is not trained again."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from medgen.config import ConfigError, load_config
from medgen.data.records import read_manifest, write_manifest
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.front import chosen, pareto, searched
from medgen.memcontrol.rewards import Scorer
from medgen.memcontrol.search import Searcher, search
from medgen.memcontrol.task import Start
from medgen.memcontrol.trials import Bench, read_repeats, read_results


def test_a_search_ends_in_a_page_with_its_baselines_and_the_chosen_mask(finished: Path) -> None:
    results = read_results(finished)
    assert [one.trial.kind for one in searched(results)] == ["search"] * 3
    assert {"start", "full", "deduplicated"} < {one.trial.kind for one in results}
    choice = chosen(results)
    assert choice is not None
    again = {one.trial.name: one for one in read_repeats(finished)}
    assert again.keys() == {"full-0.01", choice.trial.name}
    assert again[choice.trial.name].values != choice.values  # other patients memorised, other noise, other strangers
    page = (finished / "report.html").read_text()
    assert "attention to the text" in page and "full + duplicates removed" in page and "<svg" in page
    front = json.loads((finished / "pareto.json").read_text())
    assert [one["name"] for one in front] == [one.trial.name for one in pareto(searched(results))]
    assert all((finished / "trials" / one["name"] / "difference.safetensors").is_file() for one in front)


def test_killed_with_sigkill_the_same_command_goes_on_to_the_same_trials(finished: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "search"
    # A fork of this process: an interpreter that imports torch anew takes longer than the search.
    running = multiprocessing.get_context("fork").Process(target=search, args=(config,))
    running.start()
    while not (out / "trials" / "00001" / ".lock").exists() and running.is_alive():
        time.sleep(0.005)
    running.kill()
    running.join()
    assert running.exitcode == -signal.SIGKILL
    assert not (out / "report.html").exists() and (out / "trials" / "start" / "trial.json").is_file()

    search(config)
    whole, resumed = read_results(finished), read_results(out)
    assert [(one.trial, one.values) for one in resumed] == [(one.trial, one.values) for one in whole]
    assert [one.values for one in read_repeats(out)] == [one.values for one in read_repeats(finished)]
    study = optuna.load_study(study_name="memcontrol", storage=f"sqlite:///{out / 'study.db'}")
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))

    before = (out / "trials" / "00001" / "trial.json").stat().st_mtime_ns
    search(config)  # finished: nothing is trained again
    assert (out / "trials" / "00001" / "trial.json").stat().st_mtime_ns == before


def test_a_known_mask_and_an_empty_one_are_pruned(settings: dict[str, Any]) -> None:
    config = MemControlConfig.model_validate(settings)
    config.out.mkdir()
    start = Start.of(config)
    layers = ("blocks.0.space", "blocks.1.space")
    searcher = Searcher(config, Bench(config, Scorer(config, start)), layers)
    for choice, rate in (((True, False), 1e-2), ((True, False), 1.05e-2), ((False, False), 1e-2)):
        searcher.study.enqueue_trial({**dict(zip(layers, choice)), "learning_rate": rate})
    done = [searcher._do(searcher.study.ask()) for _ in range(3)]
    assert done[0] is not None and done[0].trial.adaptation is not None
    assert done[0].trial.adaptation.layers == ("blocks.0.space",)
    assert done[1:] == [None, None]


def test_scores_are_a_function_of_the_weights_alone(settings: dict[str, Any]) -> None:
    config = MemControlConfig.model_validate(settings | {"inner": settings["inner"] | {"caption_dropout": 0.9}})
    start = Start.of(config)
    scorer = Scorer(config, start)
    first, again, other = (scorer.score(start.predictor, repeat) for repeat in (0, 0, 1))
    assert first == again  # no caption is dropped, no noise drawn anew
    assert first.loss_gap == 0 and first.membership == 0.5 and first.text_noise > 0  # nobody is known better than before
    assert first.text_noise != other.text_noise and first.quality != other.quality


def test_the_confirmation_has_other_patients_than_the_search(settings: dict[str, Any]) -> None:
    config = MemControlConfig.model_validate(settings)
    scorer = Scorer(config, Start.of(config))
    for (search_half, other_half), count in ((scorer.validation, 20), (scorer.unseen, 4)):
        assert len(search_half.prompts) == len(other_half.prompts) == count
        assert not set(search_half.patients) & set(other_half.patients)
    assert set(scorer.seen(0).patients) != set(scorer.seen(1).patients)
    assert not set(scorer.seen(0).patients) & {name for half in scorer.unseen for name in half.patients}


def test_a_loss_gap_needs_patients_never_seen(settings: dict[str, Any], films: Path) -> None:
    manifest = read_manifest(films)
    records = [record for record in manifest.records if record.split != "test"]
    without = write_manifest(records, films.parent / "no_strangers.parquet", name="no test", source="test")
    config = MemControlConfig.model_validate(settings | {"data": settings["data"] | {"manifest": without}})
    with pytest.raises(ConfigError, match="a loss_gap needs patients never seen, and .* has no record in split test"):
        Scorer(config, Start.of(config))


def test_a_folder_belongs_to_one_search(finished: Path, films: Path) -> None:
    with pytest.raises(ConfigError, match=r"inner.repeats: 2 there, 3 now"):
        search(finished / "config.yaml", ("inner.repeats=3",))


def test_an_interrupted_trial_goes_on_when_more_is_asked_of_its_search(finished: Path) -> None:
    begun, more, other = (
        load_config(MemControlConfig, finished / "config.yaml", overrides).of_a_trial
        for overrides in ((), ("search.trials=9", "baselines.methods=[norm]", "confirmation.repeats=5"), ("inner.repeats=3",))
    )
    assert begun == more != other


def test_quality_is_never_measured_on_test_films_nor_on_trained_patients(settings: dict[str, Any], films: Path) -> None:
    manifest = read_manifest(films)
    records = [replace(record, split="test" if record.split == "val" else record.split) for record in manifest.records]
    without = write_manifest(records, films.parent / "without.parquet", name="no val", source="test")
    config = MemControlConfig.model_validate(settings | {"quality": settings["quality"] | {"manifest": without}})
    start = Start.of(config)
    with pytest.raises(ConfigError, match="no record in split val, and quality is never measured on test films"):
        Scorer(config, start)
    records = [replace(record, split="val") for record in manifest.records]
    shared = write_manifest(records, films.parent / "shared.parquet", name="shared", source="test")
    config = MemControlConfig.model_validate(settings | {"quality": settings["quality"] | {"manifest": shared}})
    with pytest.raises(ConfigError, match=r"8 of its val patients are trained on \(first: 'p0'\)"):
        Scorer(config, start)


@pytest.mark.parametrize("name", ["leaky", "stable_diffusion"])
def test_the_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_config(MemControlConfig, Path(__file__).resolve().parents[2] / "configs" / "memcontrol" / f"{name}.yaml")
    assert recipe.search.learning_rate[0] < recipe.search.learning_rate[1]
