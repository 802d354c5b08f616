"""A study's protocol: what is claimed, which arms are compared, what readers are asked. Strict YAML, frozen into the pack.

`medgen study sample` makes what its arms need, `medgen study build` the pack. Problems are said before anything is drawn.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from medgen.config import Config, load_config
from medgen.data.records import Split
from medgen.study.tasks import KINDS, TASKS, Kind, Task

Source = Literal["synthetic", "real", "copy", "mismatched"]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class ProtocolError(ValueError):
    """A protocol that cannot be carried out with what is there; one line per problem, with what would be right."""


class Material(Config):
    """Digital patients as the reference where there is no data: what `medgen study sample` makes without --reference."""

    kind: Kind
    patients: int = Field(ge=1, le=100_000)
    steps: int | None = Field(None, ge=1, description="denoising steps of the pipelines; their own if not given")


class Arm(Config):
    """Where one arm's images come from.

    `synthetic`: a folder that `medgen sample` wrote; `real`: a manifest; `copy`: a manifest too, its images a control arm of their own;
    `mismatched`: real films beside the report of another patient, the control arm of text_alignment: who finds that these fit, too, has
    not looked.
    """

    name: Name
    source: Source
    kind: Kind | None = Field(None, description="what its images are; that of the material if there is only one")
    generated: str | None = Field(None, description="folder of a synthetic arm; --generated/NAME, or --generated, if not given")
    pipeline: str | None = Field(None, description="pipeline (name or folder) that `medgen study sample` makes the arm with")
    reference: str | None = Field(
        None, description="manifest of a real arm, or of the patients of a synthetic one; --reference else"
    )
    splits: tuple[Split, ...] = Field(("test",), min_length=1, description="whose real images: the generator must not know them")


class ExtraQuestion(Config):
    """A question of the study's own after the task's; or, with the id of one of the task's, other words for it."""

    id: Name
    label: Text
    kind: Literal["scale", "choice", "number", "text"] = "text"
    options: tuple[Text, ...] = ()
    min: float | None = None
    max: float | None = None
    min_label: str | None = None
    max_label: str | None = None
    required: bool = False
    before_reveal: bool = False

    @model_validator(mode="after")
    def _answerable(self) -> Self:
        if self.kind == "choice" and len(set(self.options)) < 2:
            raise ValueError("a choice needs at least two different options")
        if self.kind == "scale" and (self.min is None or self.max is None or not self.min < self.max):
            raise ValueError("a scale needs min and max, min below max")
        return self


class Section(Config):
    """One task on one set of cases. `cases` are shared out evenly between the arms; repeats and training come on top."""

    name: Name
    task: str
    cases: int = Field(ge=1, le=10_000)
    arms: tuple[str, ...] | None = Field(
        None, description="names of arms; all arms of a kind that the task can show, if not given"
    )
    balance: str | None = Field(
        None, description="each arm has its values alike: sex, view, or a finding such as pleural_effusion"
    )
    paired: bool = Field(
        False, description="the same patients in every arm (a case of each), instead of different ones where possible"
    )
    repeats: float = Field(0.0, ge=0, le=0.5, description="share of cases shown a second time, unannounced and far away")
    training: int = Field(0, ge=0, le=100, description="cases with feedback that come first and are not analysed")
    questions: tuple[ExtraQuestion, ...] = ()

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.task not in TASKS:
            near = difflib.get_close_matches(self.task, TASKS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"section {self.name!r}: unknown task {self.task!r}{hint} Known: {', '.join(TASKS)}")
        return self


class Media(Config):
    """How images are shown, in all arms alike."""

    size: int | None = Field(None, ge=32, le=4096, description="px of the square; the section's smallest image if not given")
    fit: Literal["pad", "crop"] = Field("pad", description="how a picture becomes square: as the generator was trained")
    intensity: Literal["stored", "percentile"] = Field(
        "stored", description="grey range: the file's (DICOM: its window) or 0.5-99.5 %"
    )
    fps: float | None = Field(None, ge=1, le=120, description="frames per second of clips; the section's slowest if not given")
    seconds: float | None = Field(None, gt=0, le=60, description="length of clips; the section's shortest if not given")
    slices: int = Field(24, ge=2, le=512, description="slices of a volume's stack")
    ecg: bool = Field(True, description="the ECG under a clip, where every clip of the section has one")


class Protocol(Config):
    """The whole study. `margin`: what counts as equal, as a share (0.1: within 10 points); stated before reading, never after."""

    study_id: Name
    title: Text
    seed: int = Field(0, ge=0)
    hypotheses: Text
    margin: float = Field(gt=0, lt=0.5)
    readers: int | tuple[Name, ...] = Field(description="how many, or their ids")
    design: Literal["crossed", "split_plot"] = Field(
        "crossed",
        description="every reader reads every case; or groups of readers share the cases, each group all arms of its patients",
    )
    groups: int = Field(1, ge=1, description="groups of readers in a split plot")
    sessions: int = Field(1, ge=1, le=6, description="sittings; a repeat and a patient's second image come in another one")
    washout_days: int = Field(0, ge=0, le=3650, description="days between sittings")
    instructions: str = Field("", description="what else readers are told, as paragraphs")
    material: tuple[Material, ...] | Material | None = None
    media: Media = Media()
    arms: tuple[Arm, ...] = Field(min_length=1)
    sections: tuple[Section, ...] = Field(min_length=1)

    @property
    def reader_ids(self) -> tuple[str, ...]:
        """Names of the readers: as given, or reader-01, reader-02, ..."""
        if isinstance(self.readers, int):
            return tuple(f"reader-{i + 1:02d}" for i in range(self.readers))
        return self.readers

    @property
    def materials(self) -> tuple[Material, ...]:
        """What digital patients are to be made, at most one set of each kind."""
        return () if self.material is None else (self.material,) if isinstance(self.material, Material) else self.material

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def kind(self, arm: Arm) -> Kind:
        """What an arm's images are: as it says, or the only material's kind, or chest."""
        return arm.kind or (self.materials[0].kind if len(self.materials) == 1 else "chest")

    def arms_of(self, section: Section) -> tuple[Arm, ...]:
        """The arms that a section compares, in the protocol's order."""
        if section.arms is not None:
            return tuple(arm for arm in self.arms if arm.name in section.arms)
        fitting = (arm for arm in self.arms if self.kind(arm) in TASKS[section.task].kinds)
        return tuple(arm for arm in fitting if arm.source != "mismatched" or section.task == "text_alignment")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problems = [*_of_readers(self), *_of_arms(self), *(said for s in self.sections for said in _of_section(self, s))]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def read_protocol(path: Path) -> Protocol:
    """The protocol in a YAML file. Raises `medgen.config.ConfigError` with every problem and its key."""
    return load_config(Protocol, path)


def find_manifest(protocol: Protocol, arm: Arm, reference: Path | None) -> Path:
    """The manifest of an arm's patients: its own, else `reference`: a manifest, or a folder with manifest.parquet or KIND/manifest.parquet.

    Raises `ProtocolError` that says where it was looked for.
    """
    given = Path(arm.reference) if arm.reference is not None else reference
    if given is None:
        raise ProtocolError(f"arm {arm.name!r} needs a manifest of patients: give --reference, or `reference` in the protocol")
    places = [given] if given.is_file() else [given / protocol.kind(arm) / "manifest.parquet", given / "manifest.parquet"]
    return _first(places, f"arm {arm.name!r}: no manifest")


def find_generated(arm: Arm, generated: Path | None) -> Path:
    """The folder of a synthetic arm: its own, else `generated`/NAME, else `generated` itself. It must hold metadata.jsonl."""
    given = Path(arm.generated) if arm.generated is not None else None
    if given is None and generated is None:
        raise ProtocolError(f"arm {arm.name!r} needs a folder of samples: give --generated, or `generated` in the protocol")
    places = [given] if given is not None else [generated / arm.name, generated] if generated is not None else []
    return _first([place / "metadata.jsonl" for place in places], f"arm {arm.name!r}: no samples (`medgen study sample`)").parent


def _first(places: list[Path], missing: str) -> Path:
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ProtocolError(f"{missing} at {' or '.join(map(str, places))}")
    return found


def _of_readers(protocol: Protocol) -> Iterable[str]:
    readers = protocol.reader_ids
    if not readers:
        yield "readers: at least one"
    if len(set(readers)) < len(readers):
        yield "readers: each id once"
    if protocol.washout_days and protocol.sessions == 1:
        yield f"washout_days {protocol.washout_days} with one session: nothing lies between; set sessions: 2 or washout_days: 0"
    if protocol.design == "split_plot" and not 2 <= protocol.groups <= len(readers):
        yield f"groups: a split plot has 2 to {len(readers)} groups of its {len(readers)} readers, not {protocol.groups}"
    if protocol.design == "crossed" and protocol.groups != 1:
        yield f"groups {protocol.groups}: only a split plot has groups (design: split_plot)"


def _of_arms(protocol: Protocol) -> Iterable[str]:
    names = [arm.name for arm in protocol.arms]
    yield from (f"arms: {name!r} is there twice" for name in sorted({n for n in names if names.count(n) > 1}))
    kinds = [material.kind for material in protocol.materials]
    yield from (f"material: {kind!r} is there twice" for kind in KINDS if kinds.count(kind) > 1)
    for arm in protocol.arms:
        if arm.source != "synthetic" and (arm.generated or arm.pipeline):
            yield f"arm {arm.name!r} is {arm.source}: it has a reference, no generated folder and no pipeline"
        if len(kinds) > 1 and arm.kind is None:
            yield f"arm {arm.name!r}: say its kind ({', '.join(kinds)})"


def _of_section(protocol: Protocol, section: Section) -> Iterable[str]:
    where, task = f"section {section.name!r}", TASKS[section.task]
    if sum(other.name == section.name for other in protocol.sections) > 1:
        yield f"{where} is there twice"
    if unknown := sorted(set(section.arms or ()) - {arm.name for arm in protocol.arms}):
        yield f"{where}: unknown arms {', '.join(unknown)}; the protocol has {', '.join(arm.name for arm in protocol.arms)}"
        return
    arms = protocol.arms_of(section)
    kinds = {protocol.kind(arm) for arm in arms}
    if len(kinds) != 1:
        what = "several kinds of images (" + ", ".join(sorted(kinds)) + ")" if kinds else "no arm that its task can show"
        yield f"{where}: {what}; name its arms"
    elif not kinds <= set(task.kinds):
        yield f"{where}: task {task.name} is made from {' or '.join(task.kinds)}, not from {', '.join(kinds)}"
    if task.name != "text_alignment":
        yield from (
            f"{where}: arm {a.name!r} is mismatched, which is for text_alignment" for a in arms if a.source == "mismatched"
        )
    yield from _of_contrast(where, section, task, arms)


def _of_contrast(where: str, section: Section, task: Task, arms: tuple[Arm, ...]) -> Iterable[str]:
    real, made = [a for a in arms if a.source == "real"], [a for a in arms if a.source == "synthetic"]
    if task.contrast and (not real or not made):
        yield f"{where}: task {task.name} needs a real and a synthetic arm; it has {', '.join(a.source for a in arms) or 'none'}"
    if task.shows == "pair" and task.contrast and len(real) != 1:
        yield f"{where}: task {task.name} pairs every other arm with one real arm; it has {len(real)}"
    if section.cases < len(arms):
        yield f"{where}: {section.cases} cases for {len(arms)} arms"
    own = {q["id"]: q for q in task.asks(())}
    for question in section.questions:
        if question.id in own and question.kind not in (own[question.id]["kind"], "text"):
            yield f"{where}: question {question.id!r} of task {task.name} is a {own[question.id]['kind']}, not a {question.kind}"
