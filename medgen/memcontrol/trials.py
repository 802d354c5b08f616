"""One fine-tuning of a search: trained, scored, saved whole or not at all; done only once, by whichever process comes first."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from medgen.data.duplicates import first_of_each, thumbnails
from medgen.evaluation.privacy.predictor import NoisePredictor
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.masks import Adaptation, apply_difference
from medgen.memcontrol.rewards import Scorer, Scores, split_patients
from medgen.memcontrol.task import DIFFERENCE, FineTuning, MaskedTextToCXR, predictor_with
from medgen.stopping import STOP, StopRequested
from medgen.training.loop import train

RESULT, CONFIRMED = "trial.json", "confirmation.json"


@dataclass(frozen=True)
class Trial:
    """A fine-tuning that is wanted. `kind`: "start" (none at all), a baseline's name, or "search"."""

    name: str
    kind: str
    adaptation: Adaptation | None
    learning_rate: float


@dataclass(frozen=True)
class Result:
    """A finished one. `trained` counts parameters, `seconds` of the process's CPU time."""

    trial: Trial
    trained: int
    share: float
    seconds: float
    scores: Scores
    confirmed: Scores | None = None

    @property
    def values(self) -> tuple[float, float]:
        """The objectives: memorisation, quality."""
        return self.scores.memorisation, self.scores.quality


class Bench:
    """Where trials of one search are done: OUT/trials/NAME/ with trial.json and the change of the weights."""

    def __init__(self, config: MemControlConfig, scorer: Scorer) -> None:
        self.config, self.scorer, self.root = config, scorer, config.out / "trials"
        manifest, self._memorised, self._others = split_patients(config)
        self._paths = [manifest.image_path(record) for record in manifest.records]

    def run(self, trial: Trial) -> Result | None:
        """Its result: read, or trained and scored now. None where another process is at it.

        Raises `StopRequested` after a stop signal; the same trial then goes on from its last checkpoint, or starts again.
        """
        folder = self.root / trial.name
        with held(folder) as mine:
            if (folder / RESULT).is_file():
                return read_result(folder)
            if not mine:
                return None
            STOP.check()
            started, task = time.process_time(), None
            if trial.adaptation is not None:
                task = self._train(trial, folder / "run")
            scores = self.scorer.score(self._predictor(task))
            trained = 0 if task is None else sum(p.numel() for p in task.network.parameters() if p.requires_grad)
            total = sum(p.numel() for p in self.scorer.start.network.parameters())
            result = Result(trial, trained, trained / total, time.process_time() - started, scores)
            if task is not None:
                temporary = folder / f".{DIFFERENCE}.tmp"
                shutil.copyfile(folder / "run" / "export" / DIFFERENCE, temporary)
                temporary.replace(folder / DIFFERENCE)
            # Last: a trial is finished when this file is there, and everything else was before it.
            write_json(folder / RESULT, {**asdict(result), "confirmed": None})
            shutil.rmtree(folder / "run", ignore_errors=True)
            return result

    def confirm(self, result: Result) -> Result | None:
        """The same weights scored with other noises and the other half of the validation patients.

        What was chosen by a score looks better in it than it is; this score chose nothing. None where another process is at it.
        """
        folder, trial = self.root / result.trial.name, result.trial
        with held(folder) as mine:
            if (folder / CONFIRMED).is_file():
                return read_result(folder)
            if not mine:
                return None
            STOP.check()
            task = None
            if trial.adaptation is not None:
                task = self._task(trial, folder / "run")
                task.model = task.base.modules()["model"].to(self.scorer.start.predictor.device)
                apply_difference(task.network, trial.adaptation, load_file(folder / DIFFERENCE))
            write_json(folder / CONFIRMED, asdict(self.scorer.score(self._predictor(task), "confirmation")))
            return read_result(folder)

    def _predictor(self, task: MaskedTextToCXR | None) -> NoisePredictor:
        start = self.scorer.start
        return start.predictor if task is None or task.model is None else predictor_with(start, task.model)

    def _task(self, trial: Trial, run: Path) -> MaskedTextToCXR:
        config, words = self.config, self.config.inner.random_words if trial.kind == "random_words" else 0
        base = self.scorer.start.task(config.inner_train(run, trial.learning_rate), config.inner.caption_dropout, words)
        assert trial.adaptation is not None
        return MaskedTextToCXR(base, trial.adaptation, self._rows(trial.kind))

    def _train(self, trial: Trial, run: Path) -> MaskedTextToCXR:
        task = self._task(trial, run)
        settings = self.config.inner_train(run, trial.learning_rate)
        words = task.base.recipe.data.prompts.random_words
        assert trial.adaptation is not None
        recorded = FineTuning(memcontrol=self.config, adaptation=trial.adaptation, random_words=words, train=settings)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # a line per trial is told by the search; its steps are in run/metrics.jsonl
            result = train(task, settings, recorded)
        if result.stopped:
            raise StopRequested
        return task

    def _rows(self, kind: str) -> list[int]:
        """Rows of the training manifest that a trial learns: the memorised patients' repeated, the others once."""
        rows = self._memorised * self.config.inner.repeats + self._others
        if kind != "deduplicated":
            return rows
        first = first_of_each(thumbnails([self._paths[row] for row in rows]))
        return [row for i, row in enumerate(rows) if first[i] == i]


def read_result(folder: Path) -> Result:
    """The finished trial in `folder`, with its confirmation if there is one."""
    values = json.loads((folder / RESULT).read_text())
    wanted = dict(values.pop("trial"))
    adaptation = wanted.pop("adaptation")
    trial = Trial(**wanted, adaptation=None if adaptation is None else Adaptation.model_validate(adaptation))
    values |= {"trial": trial, "scores": Scores(**values["scores"])}
    if (folder / CONFIRMED).is_file():
        values["confirmed"] = Scores(**json.loads((folder / CONFIRMED).read_text()))
    return Result(**values)


def read_results(out: Path) -> list[Result]:
    """Every finished trial of the search in `out`, in the order of their names."""
    return [read_result(path.parent) for path in sorted((out / "trials").glob(f"*/{RESULT}"))]


@contextmanager
def held(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process now holds `folder` (it waits for that, if asked to): the lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True


def write_json(path: Path, values: Any) -> None:
    """Complete or absent, and on the disk before this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        json.dump(values, file, indent=1, default=lambda value: value.model_dump(mode="json"))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
