"""A search ends in a page; killed at any moment it goes on as if nothing had happened; what is known is not trained again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
from medgen.memcontrol.trials import Bench, read_results


def test_a_search_ends_in_a_page_with_its_baselines_and_the_chosen_mask(finished: Path) -> None:
    results = read_results(finished)
    assert [one.trial.kind for one in searched(results)] == ["search"] * 3
    assert {"start", "full", "deduplicated"} < {one.trial.kind for one in results}
    choice = chosen(results)
    assert choice is not None and choice.confirmed is not None
    assert choice.confirmed.memorisation != choice.scores.memorisation  # other noise, other patients
    page = (finished / "report.html").read_text()
    assert "attention to the text" in page and "full + duplicates removed" in page and "<svg" in page
    front = json.loads((finished / "pareto.json").read_text())
    assert [one["name"] for one in front] == [one.trial.name for one in pareto(searched(results))]
    assert all((finished / "trials" / one["name"] / "difference.safetensors").is_file() for one in front)


def test_killed_with_sigkill_the_same_command_goes_on_to_the_same_trials(finished: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "search"
    command = f"from pathlib import Path; from medgen.memcontrol.search import search; search(Path({str(config)!r}))"
    process = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 1000
    while not (out / "trials" / "00001" / ".lock").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "report.html").exists() and (out / "trials" / "start" / "trial.json").is_file()

    search(config)
    whole, resumed = read_results(finished), read_results(out)
    assert [(one.trial, one.values) for one in resumed] == [(one.trial, one.values) for one in whole]
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
    first, again, other = (scorer.score(start.predictor, purpose) for purpose in ("search", "search", "confirmation"))  # type: ignore[arg-type]
    assert (
        first.norms == again.norms and first.loss_validation == again.loss_validation
    )  # no caption is dropped, no noise drawn anew
    assert min(first.norms) > 0 and first.membership == 0.5  # nobody is known better than before
    assert first.norms != other.norms and len(other.loss_validation) == 20
    assert not set(scorer.patients["search"]) & set(scorer.patients["confirmation"])


def test_a_folder_belongs_to_one_search(finished: Path, films: Path) -> None:
    with pytest.raises(ConfigError, match=r"inner.repeats: 2 there, 3 now"):
        search(finished / "config.yaml", ("inner.repeats=3",))


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


@pytest.mark.parametrize("name", ["digital_chest", "stable_diffusion"])
def test_the_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_config(MemControlConfig, Path(__file__).resolve().parents[2] / "configs" / "memcontrol" / f"{name}.yaml")
    assert recipe.search.learning_rate[0] < recipe.search.learning_rate[1]
