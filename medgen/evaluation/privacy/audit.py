"""`medgen audit`: every attack on what a text-to-image pipeline knows of its training patients, with one table of what was found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from medgen import __version__
from medgen.data.latent_cache import Progress
from medgen.data.records import Manifest, Split
from medgen.data.report_text import PromptConfig
from medgen.evaluation.images import EvaluationError, ImageSet, read_generated, reference_set
from medgen.evaluation.privacy import report
from medgen.evaluation.privacy.copying import Copying, copying
from medgen.evaluation.privacy.extraction import Extraction, extraction
from medgen.evaluation.privacy.membership import Membership, membership
from medgen.evaluation.privacy.predictor import NoisePredictor, load_predictor
from medgen.evaluation.privacy.re_identification import ReIdentification, re_identification
from medgen.evaluation.privacy.subjects import Step, Subjects, draw_subjects, read_apart
from medgen.evaluation.privacy.text_noise import TextNoise, text_noise
from medgen.evaluation.text_to_cxr import plain
from medgen.sampling.cases import Case, TextConditions
from medgen.sampling.request import choose_device
from medgen.sampling.text_to_cxr import sample
from medgen.seeds import stable_seed

Part = Literal["membership", "text_noise", "extraction", "copying", "re_identification"]
SplitName = Literal["train", "val", "test", "all"]


@dataclass(frozen=True)
class Settings:
    """What decides an audit's numbers besides models and films."""

    patients: int
    captions: int
    n: int
    films: int
    levels: tuple[float, ...]
    draws: int
    path_steps: int
    steps: int | None
    guidance: float | None
    prompts: dict[str, Any]
    seed: int


def audit(
    pipeline: str | Path,
    train: Path,
    heldout: Path,
    out: Path,
    reference: str | Path | None = None,
    sections: Literal["impression", "findings", "both", "mixed"] = "both",
    view: bool = True,
    patients: int = 60,
    captions: int = 6,
    n: int = 50,
    films: int = 60,
    levels: tuple[float, ...] = (0.2, 0.4, 0.6),
    draws: int = 3,
    path_steps: int = 10,
    steps: int | None = None,
    guidance: float | None = None,
    train_split: SplitName = "train",
    heldout_split: SplitName = "test",
    skip: tuple[Part, ...] = (),
    seed: int = 0,
    device: str | None = None,
    no_real_images: bool = False,
    progress: bool = True,
) -> Path:
    """Attack a text-to-image pipeline as someone would who wants to know its patients. Writes audit.json and index.html, returns the page.

    The same command again continues where it was stopped; a part whose models, films and settings are unchanged is not measured again.

    Args:
        pipeline: a shipped pipeline's name or a folder (medgen's own, Stable Diffusion, PixArt, Sana).
        train: manifest that the pipeline was trained on.
        heldout: manifest of patients of the same kind whom it never saw; may be the same file, another split.
        out: folder of the results.
        reference: pipeline that never saw either side, best the one that was fine-tuned: makes the membership attack much sharper.
        sections: which part of a report became the caption, as in the training recipe (data.prompts.sections).
        view: whether captions began with the view, as in the training recipe (data.prompts.view).
        patients: how many patients of each side the attacks look at.
        captions: training captions that are asked for again and again.
        n: generations of each of them.
        films: training captions (of other patients each) of which one film is drawn, for the search for copies.
        levels: noise levels of the membership attack.
        draws: draws of noise at each level.
        path_steps: steps of the sampler's path along which the captions' pull is measured.
        steps: sampling steps; the pipeline's own if not given.
        guidance: guidance scale; the pipeline's own if not given.
        train_split: which split of `train` was learned from.
        heldout_split: which split of `heldout` was not.
        skip: parts to leave out; the report says that they were not measured.
        seed: of every draw: patients, captions, noise, resamples.
        device: cpu, cuda, ...; the best there is if not given.
        no_real_images: leave every image of a real patient out of the page.
        progress: progress lines on the terminal.

    Raises `ManifestError`, `EvaluationError` or `PipelineError` (all `ValueError`) before anything is measured.
    """
    members, strangers = read_apart(train, heldout, _split(train_split), _split(heldout_split))
    prompts = PromptConfig(sections=sections, view=view)
    settings = Settings(
        patients, captions, n, films, levels, draws, path_steps, steps, guidance, prompts.model_dump(mode="json"), seed
    )
    run = Run(Path(pipeline), reference, members, strangers, prompts, settings, out, str(choose_device(device)), progress)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {name: run.part(name) if name not in skip else "left out by --skip" for name in PARTS}
    rows = report.rows(results)
    facts = run.facts
    _write(out / "audit.json", json.dumps({"facts": facts, "table": plain(rows), "parts": plain(results)}, indent=1))
    page = out / "index.html"
    pairs: dict[str, Any] = {
        name: result.pairs for name, result in results.items() if isinstance(result, Copying | ReIdentification)
    }
    nearest = report.Nearest(pairs, run.generated, run.known) if pairs else None
    _write(page, report.render(rows, results, facts, run.train, out, nearest, real_images=not no_real_images))
    return page


@dataclass(frozen=True)
class Run:
    """One audit: what it is about, and its parts, each measured once and kept below `out`/parts."""

    pipeline: Path
    other: str | Path | None
    members: Manifest
    strangers: Manifest
    prompts: PromptConfig
    settings: Settings
    out: Path
    device: str
    progress: bool

    @cached_property
    def predictor(self) -> NoisePredictor:
        return load_predictor(self.pipeline, self.device)

    @cached_property
    def reference(self) -> NoisePredictor | None:
        return None if self.other is None else load_predictor(self.other, self.device)

    @cached_property
    def train(self) -> Subjects:
        return draw_subjects(self.members, self.predictor, self.prompts, self.settings.patients, self.settings.seed)

    @cached_property
    def heldout(self) -> Subjects:
        return draw_subjects(self.strangers, self.predictor, self.prompts, self.settings.patients, self.settings.seed)

    @cached_property
    def generated(self) -> ImageSet:
        """One film of each of some training captions, from the sampler; a stopped run continues."""
        s, folder = self.settings, self.out / "generated"
        captions = sorted(set(self.train.prompts), key=lambda text: (stable_seed("drawn", s.seed, text), text))[: s.films]
        cases = [
            Case(f"film-{number:04d}", stable_seed("audit", s.seed, number), 1, TextConditions(prompt=text))
            for number, text in enumerate(captions)
        ]
        sample(self.pipeline, folder, cases=cases, steps=s.steps, guidance=s.guidance, device=self.device, progress=self.progress)
        return read_generated(folder)

    @cached_property
    def known(self) -> ImageSet:
        """Every training film."""
        return reference_set(self.members, self.predictor.preprocessing.size)

    @cached_property
    def unseen(self) -> ImageSet:
        """Every held-out film."""
        return reference_set(self.strangers, self.predictor.preprocessing.size)

    @property
    def facts(self) -> dict[str, Any]:
        """What the numbers rest on, for whoever reads them later."""
        return {
            "pipeline": _spoken(self.pipeline),
            "pipeline_sha256": self.predictor.fingerprint,
            "reference": None if self.other is None else _spoken(Path(self.other)),
            "reference_sha256": None if self.reference is None else self.reference.fingerprint,
            **{
                f"{side}_{what}": value
                for side, manifest, subjects in (
                    ("training", self.members, self.train),
                    ("heldout", self.strangers, self.heldout),
                )
                for what, value in (
                    ("set", manifest.name),
                    ("manifest_sha256", manifest.sha256),
                    ("patients", len({r.patient_id for r in manifest.records})),
                    ("patients_audited", len(set(subjects.patients))),
                    ("films_audited", len(subjects)),
                )
            },
            **dataclasses.asdict(self.settings),
            "medgen": __version__,
        }

    def part(self, name: Part) -> Any:
        """Its result, read where it was measured before; a sentence where it could not be measured."""
        kind, measure = PARTS[name]
        key = hashlib.sha256(json.dumps([name, self.facts], sort_keys=True).encode()).hexdigest()[:24]
        path, adapter = self.out / "parts" / f"{name}-{key}.json", TypeAdapter(kind)
        if not path.is_file():
            self.say(f"{name.replace('_', ' ')}: measuring")
            try:
                found = measure(self)
            except EvaluationError as error:
                self.say(f"{name.replace('_', ' ')}: not measured: {error}")
                return str(error)
            path.parent.mkdir(exist_ok=True)
            _write(path, json.dumps(adapter.dump_python(found, mode="python")))  # NaN stays NaN
        return adapter.validate_python(json.loads(path.read_text()))

    def counted(self, text: str, total: int) -> Step:
        """A line on stderr now and then."""
        line = Progress(text, total, quiet=not self.progress)

        def step(more: int) -> None:
            for _ in range(more):
                line.step()

        return step

    def say(self, text: str) -> None:
        if self.progress:
            print(text, file=sys.stderr, flush=True)


def _membership(run: Run) -> Membership:
    models = 1 if run.reference is None else 2
    step = run.counted("membership: denoising films", models * (len(run.train) + len(run.heldout)))
    s = run.settings
    return membership(run.predictor, run.train, run.heldout, run.reference, s.levels, s.draws, s.seed, step)


def _text_noise(run: Run) -> TextNoise:
    total = len(set(run.train.prompts)) + len(set(run.heldout.prompts))
    step = run.counted("text noise: captions along the sampler's path", total)
    return text_noise(run.predictor, run.train, run.heldout, run.settings.path_steps, seed=run.settings.seed, step=step)


def _extraction(run: Run) -> Extraction:
    s, out = run.settings, run.out / "extraction"
    return extraction(
        run.pipeline, run.train, run.heldout, out, s.captions, s.n, s.seed, s.steps, s.guidance, run.device, run.progress
    )


def _copying(run: Run) -> Copying:
    return copying(run.generated, run.known, run.unseen, run.out / "features", run.settings.seed, device=run.device)


def _re_identification(run: Run) -> ReIdentification:
    sides = (run.generated, run.known, run.unseen)
    return re_identification(*sides, run.out / "features", run.settings.seed, device=run.device)


PARTS: Mapping[Part, tuple[Any, Callable[[Run], Any]]] = {
    "membership": (Membership, _membership),
    "text_noise": (TextNoise, _text_noise),
    "extraction": (Extraction, _extraction),
    "copying": (Copying, _copying),
    "re_identification": (ReIdentification, _re_identification),
}


def _spoken(pipeline: Path) -> str:
    """A pipeline's name on the page: a training run keeps its pipeline in RUN/export."""
    return pipeline.resolve().parent.name if pipeline.name == "export" else pipeline.name


def _split(name: SplitName) -> Split | None:
    return None if name == "all" else name


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
