"""Everything a protocol's synthetic arms need, sampled: digital patients if there is no reference, then each arm by its pipeline.

OUT/<arm>/ is what `medgen sample` writes for that arm, OUT/cases.jsonl what was asked, OUT/reference/ the digital patients. Killed, it
goes on; done, it is done; and the files are the same whatever the shards (see `medgen.sampling.output`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from medgen.data.records import SPLITS, read_manifest
from medgen.sampling.output import OutputFolder
from medgen.sampling.source import PipelineSource, find_pipeline
from medgen.study.material import RECORD_OF
from medgen.study.protocol import Arm, Material, Protocol, ProtocolError, find_manifest, read_protocol
from medgen.study.sampling_cases import Line, arm_cases

if TYPE_CHECKING:
    from medgen.digital.patient import FilmView
    from medgen.sampling.request import Sampled

VISITS = (4, 8)  # of a digital follow-up: a past, and later films enough to be put in order
MANY = 50  # patients from which on more processes are worth their start (each imports torch)


@dataclass(frozen=True)
class StudySamples:
    """What one call did: `arms` by name, what each says of itself; `complete` when all of them are there; `command` goes on."""

    arms: Mapping[str, str]
    complete: bool
    command: str

    def __str__(self) -> str:
        lines = [f"{name}: {said}" for name, said in self.arms.items()]
        return "\n".join([*lines, f"next: {self.command}" if self.complete else "the rest is up to the other shards"])


def sample(
    protocol: Path,
    out: Path,
    reference: Path | None = None,
    shard: str | None = None,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    threads: int = 1,
    progress: bool = True,
) -> StudySamples:
    """Sample all that a protocol's synthetic arms need from their pipelines. The same command again continues, or does nothing.

    Without a reference the protocol's `material` is made first: digital patients in OUT/reference/. Then every synthetic arm that names a
    pipeline gets as many cases as its sections ask for (reports, ECGs, past visits of the reference's patients), sampled into OUT/<arm>/.

    Args:
        protocol: the study's protocol (YAML).
        out: folder of the arms.
        reference: manifest of the patients that the cases are drawn from, or a folder of such; else an arm's own, else digital patients.
        shard: this process's part of the work, "0/3" for the first of three; read from torchrun's environment if not given.
        device: cpu, cuda, cuda:1, ...; the best there is if not given.
        dtype: precision of the networks.
        threads: CPU threads of each image; more suits one large model on many cores.
        progress: progress lines of the samplers on the terminal; --no-progress hides them.
    """
    study = read_protocol(protocol)
    arms = [arm for arm in study.arms if arm.source == "synthetic" and arm.pipeline is not None]
    if not arms:
        raise ProtocolError(f"{protocol}: no synthetic arm names a pipeline; give one, for example `pipeline: digital_chest`")
    sources = {arm.name: find_pipeline(str(arm.pipeline)) for arm in arms}
    console = Console(stderr=True, quiet=not progress, highlight=False)
    made = reference is None and bool(study.materials)
    if reference is None and made:
        reference = _material(study, out, console)
    # Digital patients of this study are nobody's training data: all splits serve.
    cases = arm_cases(study, arms, reference, SPLITS if made else None)
    settings = _settings(study, arms, sources, reference)
    lines = [{"arm": name, **line} for name, of_arm in cases.items() for line in of_arm]
    OutputFolder(out).claim(settings, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    said, complete = {}, True
    for arm in arms:
        folder, count = out / arm.name, len(cases[arm.name])
        if _finished(folder, count):
            said[arm.name] = f"all {count} were already there"
            continue
        console.print(f"{arm.name}: {count} cases from {arm.pipeline}")
        options = {"shard": shard, "device": device, "dtype": dtype, "threads": threads, "progress": progress}
        root = find_manifest(study, arm, reference).parent
        result = _sample_arm(study, arm, cases[arm.name], folder, root, options)
        said[arm.name], complete = str(result), complete and result.complete
    return StudySamples(said, complete, _command(protocol, out, reference))


def _command(protocol: Path, out: Path, reference: Path | None) -> str:
    given = f" --reference {reference}" if reference is not None else ""
    return f"medgen study build --protocol {protocol} --generated {out}{given} --out {out.parent / (out.name + '-pack')}"


# ---------------------------------------------------------------- digital patients


def _material(study: Protocol, out: Path, console: Console) -> Path:
    """The folder of digital patients, made by whichever process comes first while the others wait."""
    folder = out / "reference"
    for material in study.materials:
        place = folder if len(study.materials) == 1 else folder / material.kind
        place.mkdir(parents=True, exist_ok=True)
        with _alone(place / ".lock"):
            if not (place / "manifest.parquet").is_file():
                console.print(f"{material.patients} digital patients ({material.kind}) into {place}")
                _make(material, place, study.seed)
        _check(material, place / "manifest.parquet", study.seed)
    return folder


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """A lock that a kill releases."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(material: Material, out: Path, seed: int) -> None:
    processes = None if material.patients >= MANY else 1
    if material.kind == "chest":
        from medgen.digital.chest import write_dataset as chest

        views: tuple[FilmView, ...] = ("PA", "AP")  # both, as the shipped pipeline makes both
        chest(out, material.patients * len(views), seed, views=views, processes=processes)
    elif material.kind == "echo":
        from medgen.digital.echo import write_dataset as echo

        echo(out, material.patients, seed, processes=processes)
    else:
        from medgen.digital.progression import write_dataset as follow_ups

        follow_ups(out, material.patients, seed, visits=VISITS, futures=1, processes=processes)


def _check(material: Material, path: Path, seed: int) -> None:
    """Refuse patients of another protocol."""
    manifest = read_manifest(path, record=RECORD_OF[material.kind])
    patients = len({record.patient_id for record in manifest.records})
    begun = json.loads(manifest.source[manifest.source.index("{") :]) if "{" in manifest.source else {}
    if (patients, begun.get("seed")) != (material.patients, seed):
        raise ProtocolError(
            f"{path} lists {patients} digital patients of seed {begun.get('seed')}, but the protocol asks for {material.patients} of seed "
            f"{seed}; choose another --out, or delete that folder"
        )


# ---------------------------------------------------------------- arms


def _settings(
    study: Protocol, arms: Sequence[Arm], sources: Mapping[str, PipelineSource], reference: Path | None
) -> dict[str, Any]:
    """What the samples follow from, besides the cases."""
    manifests = {arm.name: find_manifest(study, arm, reference) for arm in arms}
    return {
        "study_id": study.study_id,
        "seed": study.seed,
        "arms": {arm.name: [sources[arm.name].name, sources[arm.name].sha256, _steps(study, arm)] for arm in arms},
        "reference_sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in manifests.items()},
    }


def _steps(study: Protocol, arm: Arm) -> int | None:
    """Denoising steps that the material asks for; None: the pipeline's own."""
    return next((material.steps for material in study.materials if material.kind == study.kind(arm)), None)


def _finished(folder: Path, count: int) -> bool:
    """Whether an arm is complete, told without loading its pipeline."""
    return (folder / "metadata.jsonl").is_file() and len(OutputFolder(folder).finished()) == count


def _sample_arm(
    study: Protocol, arm: Arm, lines: Sequence[Line], folder: Path, root: Path, options: Mapping[str, Any]
) -> Sampled:
    """One arm by the sampler of its kind, which alone knows what a line asks for."""
    from medgen.sampling.cases import TextConditions, parse_case

    pipeline, steps, kind = str(arm.pipeline), _steps(study, arm), study.kind(arm)
    if kind == "chest":
        from medgen.sampling.text_to_cxr import sample as films

        return films(pipeline, folder, cases=[parse_case(line, TextConditions) for line in lines], steps=steps, **options)
    if kind == "echo":
        from medgen.sampling.ecg_to_echo import sample as clips
        from medgen.sampling.echo_cases import EchoAsked

        return clips(pipeline, folder, cases=[parse_case(line, EchoAsked) for line in lines], root=root, steps=steps, **options)
    from medgen.sampling.progression import sample as futures
    from medgen.sampling.progression_cases import ProgressionAsked

    asked = [parse_case(line, ProgressionAsked) for line in lines]
    return futures(pipeline, folder, cases=asked, root=root, steps=steps, pictures=False, **options)
