"""Text to chest X-ray: cases in, marked images and their provenance out. `medgen sample text-to-cxr` calls `sample`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from medgen import __version__
from medgen.data.dicom import write_dx
from medgen.sampling.cases import (
    Case,
    CaseError,
    TextConditions,
    Trajectory,
    check_cases,
    parse_case,
    read_cases,
    with_conditions,
    write_cases,
)
from medgen.sampling.gates import Gate, load_gates, spoken, spoken_all
from medgen.sampling.output import OutputFolder
from medgen.sampling.pictures import BitDepth, contact_sheet, png_bytes, quantise
from medgen.sampling.request import CONTACT_SHEET, RESERVED, Dtype, Sampled, choose_device, resolve_settings
from medgen.sampling.sampler import Job, Lanes, Shard, jobs_of, run
from medgen.sampling.schedulers import named_scheduler
from medgen.sampling.source import find_pipeline, load_pipeline

TextCase = Case[TextConditions]
# From Python also a list of cases; on a command line a file.
CasesArgument = Annotated[str | Path | Sequence[TextCase] | None, tyro.conf.arg(constructor=Path, metavar="FILE")]
# From Python also gates; on a command line folders or names.
GatesArgument = Annotated[Sequence[str | Path | Gate], tyro.conf.arg(constructor=tuple[str, ...], metavar="GATE ...")]
_RESERVED = RESERVED | {"bit_depth"}


def sample(
    pipeline: str | Path,
    out: str | Path,
    prompt: str | None = None,
    cases: CasesArgument = None,
    n: int = 1,
    seed: int = 0,
    negative_prompt: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    batch_size: int = 8,
    bit_depth: BitDepth = 8,
    dicom: bool = False,
    gates: GatesArgument = (),
    retries: int = 3,
    shard: str | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    threads: int = 1,
    progress: bool = True,
) -> Sampled:
    """Sample chest X-rays from text. The same command again continues an interrupted folder and does nothing on a finished one.

    Args:
        pipeline: a shipped pipeline's name (`digital_chest`) or a pipeline folder (for example a training run's `OUT/export`).
        out: folder of the PNGs, `metadata.jsonl` and `contact_sheet.png`.
        prompt: sample this text `n` times from `seed`; or give `cases`.
        cases: JSON-lines file of cases (`{"case_id", "prompt", "seed", "n", "negative_prompt"}`), or `Case` objects.
        n: images of `prompt`.
        seed: noise seed of `prompt`; the same seed under another prompt starts from the same noise.
        negative_prompt: what the images should not show; for cases, of those that have none of their own.
        steps: denoising steps; the pipeline's own number if not given.
        guidance: classifier-free guidance scale; the pipeline's own if not given.
        scheduler: short name (flow models: euler, heun, dpm++, unipc; diffusion models: ddim, ddpm, euler, heun, dpm++, pndm, ...).
        batch_size: images in flight at once; never changes an image on a CPU.
        bit_depth: 8 or 16 bits of grey in the PNGs.
        dicom: also write each image as a DICOM DX file, marked synthetic.
        gates: what an image must pass to be written: folders of gates (`medgen audit gate` makes a privacy gate) or `quality`.
        retries: further attempts, each from other noise, at an image that a gate rejected; after the last one it is missing.
        shard: this process's part of the work, "0/3" for the first of three; read from torchrun's environment if not given.
        device: cpu, cuda, cuda:1, ...; the best there is if not given.
        dtype: precision of the network.
        threads: CPU threads of each image; more suits one large model on many cores.
        progress: a progress line on the terminal; --no-progress hides it.

    Raises `CaseError`, `PipelineError`, `OutputError` or `SamplingError` (all `ValueError`), before anything is sampled where possible.
    """
    given, asked = _cases(prompt, cases, n, seed, negative_prompt), load_gates(gates)
    part, where = Shard.parse(shard), choose_device(device)
    lanes = Lanes(where, batch_size, threads)
    source = find_pipeline(pipeline)
    loaded = load_pipeline(source, getattr(torch, dtype), where)
    if scheduler is not None:
        loaded.scheduler = named_scheduler(scheduler, loaded.scheduler)
    _check_lengths(given, loaded)
    settings = resolve_settings(source, loaded, steps, guidance) | {"dtype": dtype, "bit_depth": bit_depth} | lanes.settings
    folder = OutputFolder(Path(out), f"{part.index}-of-{part.count}")
    gating = {"gates": {gate.name: gate.describe() | {"validated": gate.validated} for gate in asked}, "retries": retries}
    folder.claim({**settings, "dicom": dicom, **(gating if asked else {})}, write_cases(given))
    work = TextSampling(settings, bit_depth, dicom, {gate.name: gate.validated for gate in asked})
    new = run(loaded, given, work.draw, work.files, work.metadata, folder, lanes, part, progress, gates=asked, retries=retries)
    names = [f"{job.name}.png" for job in jobs_of(given)]
    complete = folder.merge(names, lambda lines: _summary(Path(out), lines), retries if asked else None)
    if not asked:
        return Sampled(Path(out), new, len(names), complete)
    missing = folder.given_up(retries)
    said = tuple(spoken(gate.name, gate.validated) for gate in asked)
    lost = tuple(name.removesuffix(".png") for name in names if name in missing)
    return Sampled(Path(out), new, len(names), complete, "images", said, len(folder.rejected()), lost)


@dataclass(frozen=True)
class TextSampling:
    """The task's part of sampling: how a batch is drawn, what a trajectory's files hold, and its metadata line."""

    settings: dict[str, Any]
    bit_depth: BitDepth
    dicom: bool
    gates: Mapping[str, bool] = field(default_factory=dict)  # name: validated

    def draw(self, pipeline: Any, jobs: Sequence[Job[TextConditions]]) -> list[Trajectory[TextConditions]]:
        asked = [job.case.conditions for job in jobs]
        images = pipeline(
            prompt=[conditions.prompt for conditions in asked],
            negative_prompt=[conditions.negative_prompt or "" for conditions in asked],
            num_inference_steps=self.settings["num_inference_steps"],
            guidance_scale=self.settings["guidance_scale"],
            generator=[job.generator() for job in jobs],
            output_type="np",
        ).images
        # Colour pipelines (fine-tuned Stable Diffusion) say grey three times, with small differences.
        grey = np.asarray(images, dtype=np.float32).mean(axis=-1)
        return [Trajectory(job.case, job.index, frame[None], np.zeros(1)) for job, frame in zip(jobs, grey)]

    def metadata(self, job: Job[TextConditions]) -> dict[str, Any]:
        case = job.case
        return {
            "file_name": f"{job.name}.png",
            "case_id": case.case_id,
            "trajectory": job.index,
            "seed": case.seed,
            "noise_seed": job.noise_seed,
            "prompt": case.conditions.prompt,
            "negative_prompt": case.conditions.negative_prompt,
            "synthetic": True,
            **({"attempt": job.attempt} if self.gates else {}),
            **self.settings,
            **case.extra,
        }

    def files(self, trajectory: Trajectory[TextConditions]) -> dict[str, bytes]:
        line = self.metadata(Job(trajectory.case, trajectory.index, trajectory.attempt))
        notes = {
            "Synthetic": "true",
            "Comment": "Synthetic image made by a generative model: no patient is shown.",
            "Software": f"medgen {__version__}",
            **{key: str(line[key]) for key in ("model", "model_sha256", "case_id", "trajectory", "seed", "noise_seed")},
        }
        if self.gates:
            notes["Passed gates"] = ", ".join(spoken(name, validated) for name, validated in self.gates.items())
        files = {line["file_name"]: png_bytes(trajectory.frames[0], self.bit_depth, notes)}
        if self.dicom:
            files[f"{trajectory.name}.dcm"] = self._dicom(trajectory, line)
        return files

    def _dicom(self, trajectory: Trajectory[TextConditions], line: dict[str, Any]) -> bytes:
        # UIDs follow from the ids, and the ids from the settings: the same case at another guidance is another instance.
        settings = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:12]
        if trajectory.attempt:
            settings += f"/attempt {trajectory.attempt}"
        with tempfile.TemporaryDirectory() as scratch:
            path = write_dx(
                Path(scratch) / "image.dcm",
                quantise(trajectory.frames[0], 16),
                patient_id=line["case_id"][-60:],
                study_id=f"{trajectory.name}/{settings}",
                record_id=f"{trajectory.name}/{settings}",
                model=line["model"],
                model_hash=line["model_sha256"],
                seed=line["noise_seed"],
                description=line["prompt"],
            )
            return path.read_bytes()


def _cases(
    prompt: str | None, cases: str | Path | Sequence[TextCase] | None, n: int, seed: int, negative_prompt: str | None
) -> list[TextCase]:
    if (prompt is None) == (cases is None):
        raise CaseError("give either a prompt or a file of cases")
    if prompt is not None:
        given = [parse_case({"case_id": "prompt", "prompt": prompt, "seed": seed, "n": n}, TextConditions)]
    elif isinstance(cases, str | Path):
        given = read_cases(cases, TextConditions, _RESERVED)
    else:
        given = list(cases or ())
        check_cases(given)
    if negative_prompt is None:
        return given
    return [
        case if case.conditions.negative_prompt is not None else with_conditions(case, negative_prompt=negative_prompt)
        for case in given
    ]


def _check_lengths(cases: Sequence[TextCase], pipeline: Any) -> None:
    """Refuse a prompt that the text encoder would cut: what it does not read, the image cannot follow."""
    tokenizer = pipeline.tokenizer
    limit = tokenizer.model_max_length
    for case in cases:
        for name in ("prompt", "negative_prompt"):
            text = getattr(case.conditions, name)
            count = len(tokenizer(text, truncation=False, verbose=False)["input_ids"]) if text else 0
            if count > limit:
                raise CaseError(
                    f"case {case.case_id!r}, field {name!r}: {count} tokens, but the text encoder of this pipeline reads {limit}; "
                    "shorten it (an impression says it shorter than the findings)"
                )


def _summary(folder: Path, lines: list[dict[str, Any]]) -> dict[str, bytes]:
    return {CONTACT_SHEET: contact_sheet([_captioned(folder, line) for line in lines])} if lines else {}


def _captioned(folder: Path, line: dict[str, Any]) -> tuple[Path, str]:
    gated = f" [gates: {spoken_all(line['gates'])}]" if "gates" in line else ""
    return folder / line["file_name"], f"{line['case_id']} #{line['trajectory']}:{gated} {line['prompt']}"
