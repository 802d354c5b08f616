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

from medgen.data.duplicates import first_of_each, thumbnails
from medgen.evaluation.privacy.predictor import NoisePredictor
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.masks import Adaptation
from medgen.memcontrol.rewards import Scorer, Scores, split_patients
from medgen.memcontrol.task import DIFFERENCE, FineTuning, MaskedTextToCXR, predictor_with
from medgen.stopping import STOP, StopRequested
from medgen.training.loop import train

RESULT = "trial.json"


@dataclass(frozen=True)
class Trial:
    """A fine-tuning that is wanted. `kind`: "start" (none at all), a baseline's name, or "search"."""

    name: str
    kind: str
    adaptation: Adaptation | None
    learning_rate: float


@dataclass(frozen=True)
class Result:
    """A finished one. `trained` counts parameters, `seconds` of the process's CPU time; `repeat` is 0 in the search."""

    trial: Trial
    trained: int
    share: float
    seconds: float
    scores: Scores
    repeat: int = 0

    @property
    def values(self) -> tuple[float, float]:
        """The objectives: memorisation, quality."""
        return self.scores.memorisation, self.scores.quality


class Bench:
    """Where trials of one search are done: OUT/trials/NAME/ with trial.json and the change of the weights; repeats in OUT/repeats/."""

    def __init__(self, config: MemControlConfig, scorer: Scorer) -> None:
        self.config, self.scorer = config, scorer

    def run(self, trial: Trial, repeat: int = 0) -> Result | None:
        """Its result: read, or trained and scored now. None where another process is at it.

        `repeat` 1, 2, ...: trained anew, with other patients memorised, and scored by what chose nothing. What was chosen by a score
        looks better in it than it is.

        Raises `StopRequested` after a stop signal; the same trial then goes on from its last checkpoint, or starts again.
        """
        out = self.config.out
        folder = out / "repeats" / f"{trial.name}-{repeat}" if repeat else out / "trials" / trial.name
        with held(folder) as mine:
            if (folder / RESULT).is_file():
                return read_result(folder)
            if not mine:
                return None
            STOP.check()
            started, task = time.process_time(), None
            if trial.adaptation is not None:
                task = self._train(trial, folder / "run", repeat)
            scores = self.scorer.score(self._predictor(task), repeat)
            trained = 0 if task is None else sum(p.numel() for p in task.network.parameters() if p.requires_grad)
            total = sum(p.numel() for p in self.scorer.start.network.parameters())
            result = Result(trial, trained, trained / total, time.process_time() - started, scores, repeat)
            if task is not None:
                temporary = folder / f".{DIFFERENCE}.tmp"
                shutil.copyfile(folder / "run" / "export" / DIFFERENCE, temporary)
                temporary.replace(folder / DIFFERENCE)
            # Last: a trial is finished when this file is there, and everything else was before it.
            write_json(folder / RESULT, asdict(result))
            shutil.rmtree(folder / "run", ignore_errors=True)
            return result

    def _predictor(self, task: MaskedTextToCXR | None) -> NoisePredictor:
        start = self.scorer.start
        return start.predictor if task is None or task.model is None else predictor_with(start, task.model)

    def _train(self, trial: Trial, run: Path, repeat: int) -> MaskedTextToCXR:
        assert trial.adaptation is not None
        words = self.config.inner.random_words if trial.kind == "random_words" else 0
        settings = self.config.inner_train(run, trial.learning_rate, repeat)
        base = self.scorer.start.task(settings, self.config.inner.caption_dropout, words)
        task = MaskedTextToCXR(base, trial.adaptation, self._rows(trial.kind, repeat))
        recorded = FineTuning(memcontrol=self.config.of_a_trial, adaptation=trial.adaptation, random_words=words, train=settings)
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # a line per trial is told by the search; its steps are in run/metrics.jsonl
            result = train(task, settings, recorded)
        if result.stopped:
            raise StopRequested
        return task

    def _rows(self, kind: str, repeat: int) -> list[int]:
        """Rows of the training manifest that a trial learns: the memorised patients' repeated, the others once."""
        manifest, memorised, others = split_patients(self.config, repeat)
        rows = memorised * self.config.inner.repeats + others
        if kind != "deduplicated":
            return rows
        first = first_of_each(thumbnails([manifest.image_path(manifest.records[row]) for row in rows]))
        return [row for i, row in enumerate(rows) if first[i] == i]


def read_result(folder: Path) -> Result:
    """The finished trial in `folder`."""
    values = json.loads((folder / RESULT).read_text())
    wanted = dict(values.pop("trial"))
    adaptation = wanted.pop("adaptation")
    trial = Trial(**wanted, adaptation=None if adaptation is None else Adaptation.model_validate(adaptation))
    values |= {"trial": trial, "scores": Scores(**values["scores"])}
    return Result(**values)


def read_results(out: Path) -> list[Result]:
    """Every finished trial of the search in `out`, in the order of their names."""
    return [read_result(path.parent) for path in sorted((out / "trials").glob(f"*/{RESULT}"))]


def read_repeats(out: Path) -> list[Result]:
    """Every finished training of the confirmation, in the order of names and repeats."""
    return [read_result(path.parent) for path in sorted((out / "repeats").glob(f"*/{RESULT}"))]


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
