"""Severity editing: films in, rounds of a severity out, with strips and provenance. `medgen sample severity` calls `sample`.

Severity, not time: a round is a degree of a finding. Nothing here says when a patient gets there, or whether. (For visits at dates:
`medgen sample progression`.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from medgen import __version__
from medgen.data.images import ImagePreprocessing
from medgen.models.autoencoder import downsampling
from medgen.pipelines.severity_editing import ROUNDS, AwayFrom, EditSettings, Inversion, SeverityEditingPipeline, on_the_way
from medgen.sampling.cases import CaseError, Trajectory, check_cases, parse_case, read_cases, write_cases
from medgen.sampling.output import OutputFolder
from medgen.sampling.pictures import BitDepth, png_bytes
from medgen.sampling.recaptioner import model_recaptioner, recaption
from medgen.sampling.request import CONTACT_SHEET, RESERVED, Dtype, Sampled, choose_device, resolve_settings
from medgen.sampling.sampler import Job, Lanes, SamplingError, Shard, jobs_of, run
from medgen.sampling.severity_cases import Inputs, SeverityAsked, SeverityCase, inspect
from medgen.sampling.severity_pictures import NOT_A_FORECAST, picture_bytes, severity_sheet, severity_strip
from medgen.sampling.source import find_pipeline, load_pipeline

# From Python also a list of cases; on a command line a file.
CasesArgument = Annotated[str | Path | Sequence[SeverityCase] | None, tyro.conf.arg(constructor=Path, metavar="FILE")]
_FACTS = {"source_prompt", "finding", "side", "direction", "degrees", "stages_by", "roi_share", "image_sha256", "roi_sha256", "task",
          "frames", "roi_file", "autoencoder_file", "strength", "outside", "inside", "inversion", "refinements", "recaptioner",
          "paste_back", "away_from", "chained", "resolution_guidance_scale",
          "bit_depth"}  # fmt: skip
RESOLVING = 2 / 3  # of the guidance scale: guidance towards "moderate" from "large" otherwise first adds to the finding
TASK = "severity editing: no time, not a forecast"
_DERIVED = "Synthetic edit of a film: whoever's film it was made from, the outcome is to be kept like that film."
_NOTES = {"Synthetic": "true", "Comment": f"{NOT_A_FORECAST} {_DERIVED}", "Software": f"medgen {__version__}"}


def sample(
    pipeline: str | Path,
    out: str | Path,
    image: Path | None = None,
    target: str | None = None,
    report: str = "",
    roi: Path | None = None,
    stages: tuple[str, ...] = (),
    cases: CasesArgument = None,
    root: Path | None = None,
    n: int = 1,
    seed: int = 0,
    rounds: int = ROUNDS,
    strength: float = EditSettings.strength,
    outside: float = EditSettings.outside,
    inside: float = EditSettings.inside,
    inversion: Inversion | None = None,
    refinements: int = EditSettings.refinements,
    away_from: AwayFrom = EditSettings.away_from,
    chained: bool = EditSettings.chained,
    paste_back: bool = EditSettings.paste_back,
    recaptioner: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    resolution_guidance: float | None = None,
    batch_size: int = 4,
    bit_depth: BitDepth = 8,
    shard: str | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    threads: int = 1,
    progress: bool = True,
) -> Sampled:
    """Edit films towards a severity, round by round. No time, not a forecast. The same command again continues or does nothing.

    Each edit is a strip NAME.png (source, rounds, difference), its frames NAME_00.png (the source at the model's size), NAME_01.png, ...,
    NAME_roi.png, NAME_autoencoder.png (what the autoencoder makes of the source) and a line of `metadata.jsonl`.

    Args:
        pipeline: a shipped pipeline's name (`digital_chest`), or the folder of a medgen or diffusers text-to-image pipeline.
        out: folder of the strips, frames, `metadata.jsonl` and `contact_sheet.png`.
        image: the film (PNG, JPEG, TIFF, DICOM); or give `cases`.
        target: what the last round shall show, one finding: "large left pleural effusion", "no pleural effusion".
        report: what the film shows now; without it, a film without the target's finding (or with a large one, if it shall go).
        roi: image that is not black where editing is allowed; everywhere if not given.
        stages: instead of a target, a prompt of your own for every round.
        cases: JSON-lines file of cases (`{"case_id", "seed", "n", "image", "target", "report", "roi", "stages"}`), or `Case` objects.
        root: folder below which the files of the cases lie; the folder of the cases file if not given.
        n: edits of `image`; more than one needs `--inversion noise`, true inversion has nothing random.
        seed: of the noise.
        rounds: edits one after the other, and stage prompts from now to the target.
        strength: share of the noise schedule that every round goes back (PIE's gamma).
        outside: share of the change that is kept outside the ROI (PIE's beta 1).
        inside: share of the change, counted from the source, that is kept inside the ROI (PIE's beta 2).
        inversion: flow or ddim walks back from the film on the model's own path; noise draws noise as PIE's release.
        refinements: evaluations per inverted step; 1 is the usual approximation.
        away_from: guide away from the prompt of the source, or from the empty one (as PIE).
        chained: start a round from the one before (as PIE); otherwise each starts from the source, and no error adds up.
        paste_back: keep the film itself outside the ROI; --no-paste-back: what the autoencoder decodes, as PIE.
        recaptioner: folder of a local instruction-tuned language model that writes the stages; rules do if not given.
        steps: steps of the whole noise schedule; the pipeline's own number if not given.
        guidance: classifier-free guidance scale; the pipeline's own if not given.
        resolution_guidance: the same where a finding shall get less; two thirds of `guidance` if not given (more holds it back).
        batch_size: edits in flight at once; never changes an edit on a CPU.
        bit_depth: 8 or 16 bits of grey in the frames.
        shard: this process's part of the work, "0/3" for the first of three; read from torchrun's environment if not given.
        device: cpu, cuda, cuda:1, ...; the best there is if not given.
        dtype: precision of the network.
        threads: CPU threads of each edit; more suits one large model on many cores.
        progress: a progress line on the terminal; --no-progress hides it.

    Raises `CaseError`, `PipelineError`, `OutputError` or `SamplingError` (all `ValueError`), before anything is edited where possible.
    """
    asked = {"image": image, "roi": roi, "report": report or None, "target": target, "stages": stages or None}
    given, root = _cases({key: value for key, value in asked.items() if value is not None}, cases, root, n, seed)
    part, where = Shard.parse(shard), choose_device(device)
    lanes = Lanes(where, batch_size, threads)
    source = find_pipeline(pipeline)
    loaded = load_pipeline(source, getattr(torch, dtype), where)
    try:
        editor = SeverityEditingPipeline(loaded)
    except ValueError as error:
        raise SamplingError(f"{source.folder}: {error}") from None
    _check_numbers(given, rounds, strength, outside, inside, refinements, inversion, editor.kind)
    edit = {"strength": strength, "outside": outside, "inside": inside, "inversion": inversion or editor.kind,
            "refinements": refinements, "away_from": away_from, "chained": chained, "paste_back": paste_back}  # fmt: skip
    facts = {"task": TASK, "recaptioner": "rules" if recaptioner is None else recaptioner.resolve().name}
    settings = resolve_settings(source, loaded, steps, guidance) | facts | edit | {"dtype": dtype, "bit_depth": bit_depth}
    less = settings["guidance_scale"] * RESOLVING if resolution_guidance is None else resolution_guidance
    if less < 0:
        raise SamplingError(f"resolution_guidance must be at least 0, not {less}")
    settings |= {"resolution_guidance_scale": round(float(less), 6)} | lanes.settings
    write = recaption if recaptioner is None else model_recaptioner(recaptioner)
    geometry = _preprocessing(loaded)
    inputs = {case.case_id: inspect(case, root, geometry, write, rounds) for case in given}
    _check_lengths(inputs, loaded)
    folder = OutputFolder(Path(out), f"{part.index}-of-{part.count}")
    folder.claim({**settings, "rounds": rounds, "inputs_sha256": _digest(inputs)}, write_cases(given))
    work = SeveritySampling(settings, inputs, bit_depth)
    new = run(editor, given, work.draw, work.files, work.metadata, folder, lanes, part, progress)
    names = [f"{job.name}.png" for job in jobs_of(given)]
    complete = folder.merge(names, lambda lines: {CONTACT_SHEET: _sheet(Path(out), lines)})
    return Sampled(Path(out), new, len(names), complete, "edits")


@dataclass(frozen=True)
class SeveritySampling:
    """The task's part of sampling: how a batch is edited, what an edit's files hold, and its metadata line."""

    settings: dict[str, Any]
    inputs: Mapping[str, Inputs]
    bit_depth: BitDepth

    def draw(self, editor: SeverityEditingPipeline, jobs: Sequence[Job[SeverityAsked]]) -> list[Trajectory[SeverityAsked]]:
        """Frames [R+2,H,W]: source, rounds, and the source as the autoencoder gives it back."""
        drawn: list[Trajectory[SeverityAsked]] = []
        for job in jobs:  # cases differ in their number of stages
            one = self.inputs[job.case.case_id]
            known = self.settings | {"guidance_scale": self._guidance(one)}
            settings = EditSettings(**{field.name: known[field.name] for field in fields(EditSettings)})
            result = editor(one.film, [one.stages.prompts], [one.stages.source], one.roi, settings, [job.generator()])
            frames = torch.cat([result.frames[0], result.autoencoder]).float().cpu().numpy()
            drawn.append(Trajectory(job.case, job.index, frames, np.arange(len(frames), dtype=np.float64)))
        return drawn

    def _guidance(self, one: Inputs) -> float:
        return float(self.settings["resolution_guidance_scale" if one.stages.direction < 0 else "guidance_scale"])

    def metadata(self, job: Job[SeverityAsked]) -> dict[str, Any]:
        case, one = job.case, self.inputs[job.case.case_id]
        prompts = [one.stages.source, *one.stages.prompts]
        ways = [1.0, *(round(on_the_way(prompts, number)[0][0], 4) for number in range(1, len(prompts)))]
        frames = [
            {"file_name": f"{job.name}_{i:02d}.png", "round": i, "prompt": text, "way": way, "synthetic": i > 0}
            for i, (text, way) in enumerate(zip(prompts, ways))
        ]
        roi = None if one.roi is None else f"{job.name}_roi.png"
        autoencoder = f"{job.name}_autoencoder.png"
        return {
            "file_name": f"{job.name}.png",
            "frames": frames,
            "roi_file": roi,
            "autoencoder_file": autoencoder,
            "files": [*(frame["file_name"] for frame in frames), *([roi] if roi else []), autoencoder],
            "case_id": case.case_id,
            "trajectory": job.index,
            "seed": case.seed,
            "noise_seed": case.noise_seed(job.index),
            **case.conditions.model_dump(mode="json"),
            **one.facts(),
            "synthetic": True,
            **self.settings,
            "guidance_scale": self._guidance(one),
            **case.extra,
        }

    def files(self, trajectory: Trajectory[SeverityAsked]) -> dict[str, bytes]:
        line, one = self.metadata(Job(trajectory.case, trajectory.index)), self.inputs[trajectory.case.case_id]
        origin = ("model", "model_sha256", "case_id", "trajectory", "seed", "noise_seed", "image_sha256")
        notes = {**_NOTES, **{key: str(line[key]) for key in origin}}
        frames, files = trajectory.frames, {}
        for values, frame in zip(frames, line["frames"]):
            said = {"Severity": f"round {frame['round']}: {frame['prompt']}"}
            kept = {**notes, **said} if frame["synthetic"] else {"Comment": "The source film at the model's size.", **said}
            files[frame["file_name"]] = png_bytes(values, self.bit_depth, kept)
        region = None if one.roi is None else one.roi[0, 0].numpy()
        if region is not None:
            files[line["roi_file"]] = png_bytes(region.astype(np.float32), 8, {"Comment": "Region where editing was allowed."})
        files[line["autoencoder_file"]] = png_bytes(frames[-1], self.bit_depth, notes | {"Comment": "The autoencoder's source."})
        title = f"{line['case_id']} #{line['trajectory']}   {line['model']}, {line['inversion']} inversion, {_asked(line)}"
        prompts = [_caption(frame) for frame in line["frames"]]
        # The frames first: a strip without its frames would look finished.
        files[line["file_name"]] = picture_bytes(severity_strip(frames[:-1], region, prompts, title), notes)
        return files


def _digest(inputs: Mapping[str, Inputs]) -> str:
    told = [{**one.facts(), "prompts": one.stages.prompts} for one in inputs.values()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _sheet(out: Path, lines: Sequence[Mapping[str, Any]]) -> bytes:
    return picture_bytes(severity_sheet([out / line["file_name"] for line in lines]), _NOTES)


def _caption(frame: Mapping[str, Any]) -> str:
    return frame["prompt"] if frame["way"] == 1 else f"{frame['way']:.0%} of the way to: {frame['prompt']}"


def _asked(line: Mapping[str, Any]) -> str:
    return f"asked: {line['target']}" if line["target"] else "stages of the user's own"


def _cases(
    asked: dict[str, Any], cases: str | Path | Sequence[SeverityCase] | None, root: Path | None, n: int, seed: int
) -> tuple[list[SeverityCase], Path | None]:
    """The cases, and the folder below which their files must lie (None: they are the caller's own words, anywhere)."""
    if bool(asked) == (cases is not None):
        raise CaseError('give either a film (--image FILE --target "large left pleural effusion") or a file of cases')
    if asked:
        values = {key: str(value) if isinstance(value, Path) else value for key, value in asked.items()}
        return [parse_case({"case_id": "edit", **values, "seed": seed, "n": n}, SeverityAsked)], None
    if isinstance(cases, str | Path):
        return read_cases(cases, SeverityAsked, RESERVED | _FACTS), root or Path(cases).parent
    given = list(cases or ())
    check_cases(given)
    return given, root


def _check_numbers(
    cases: Sequence[SeverityCase], rounds: int, strength: float, outside: float, inside: float, refinements: int,
    inversion: Inversion | None, kind: Inversion,
) -> None:  # fmt: skip
    for name, value, low in (("strength", strength, 1e-6), ("outside", outside, 0.0), ("inside", inside, 0.0)):
        if not low <= value <= 1:
            raise SamplingError(f"{name} must lie between 0 and 1, not {value}")
    for name, count in (("rounds", rounds), ("refinements", refinements)):
        if count < 1:
            raise SamplingError(f"{name} must be at least 1, not {count}")
    if inversion not in (None, "noise", kind):
        raise SamplingError(f"inversion {inversion!r}: this pipeline's schedule takes {kind!r} or 'noise'")
    if inversion != "noise" and (several := next((case for case in cases if case.n > 1), None)):
        raise CaseError(
            f"case {several.case_id!r}, field 'n': {several.n} equal edits; true inversion draws nothing (use --inversion noise)"
        )


def _preprocessing(pipeline: Any) -> ImagePreprocessing:
    """The geometry and intensities of the pipeline's training images; of a diffusers pipeline its sample size."""
    if "preprocessing" in pipeline.config:
        return ImagePreprocessing.model_validate(dict(pipeline.config.preprocessing))
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    return ImagePreprocessing(size=int(network.config.sample_size) * downsampling(pipeline.vae))


def _check_lengths(inputs: Mapping[str, Inputs], pipeline: Any) -> None:
    """Refuse a prompt that the text encoder would cut: what it does not read, the edit cannot follow."""
    tokenizer = pipeline.tokenizer
    for case_id, one in inputs.items():
        for text in (one.stages.source, *one.stages.prompts):
            count = len(tokenizer(text, truncation=False, verbose=False)["input_ids"])
            if count > tokenizer.model_max_length:
                raise CaseError(
                    f"case {case_id!r}: {text[:60]!r}... has {count} tokens, but the text encoder of this pipeline reads "
                    f"{tokenizer.model_max_length}; give the report's impression only"
                )
