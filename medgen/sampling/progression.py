"""Progression: past visits in, many futures at any dates out, each with its strip. `medgen sample progression` calls `sample`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import tyro
from PIL import Image

from medgen import __version__
from medgen.data.video import write_video
from medgen.data.visit_images import load_visit
from medgen.data.volumes import load_volume, write_volume
from medgen.sampling.cases import CaseError, Trajectory, check_cases, read_cases, with_conditions, write_cases
from medgen.sampling.output import OutputFolder
from medgen.sampling.pictures import BitDepth, png_bytes
from medgen.sampling.progression_cases import Inputs, Mode, ProgressionAsked, ProgressionCase, Reads, inspect, moment
from medgen.sampling.progression_judge import Judge, Reading, in_words
from medgen.sampling.progression_pictures import (
    NOT_CAUSAL,
    Course,
    Shown,
    difference_map,
    film_strip,
    futures_sheet,
    movie,
    picture_bytes,
)
from medgen.sampling.progression_request import Requested
from medgen.sampling.request import CONTACT_SHEET, RESERVED, Dtype, Sampled, choose_device, resolve_settings
from medgen.sampling.sampler import Job, Lanes, SamplingError, Shard, jobs_of, run
from medgen.sampling.source import PipelineSource, find_pipeline, load_pipeline

# From Python also a list of cases; on a command line a file.
CasesArgument = Annotated[str | Path | Sequence[ProgressionCase] | None, tyro.conf.arg(constructor=Path, metavar="FILE")]
_FACTS = {
    "frames",
    "counterfactual_frames",
    "video",
    "difference",
    "change",
    "dates",
    "flags",
    "judge",
    "judge_sha256",
    "bit_depth",
}
_SECONDS = 1.0  # that a movie shows each visit


def sample(
    pipeline: str | Path,
    out: str | Path,
    reference: Path | None = None,
    record: str | None = None,
    until: float | None = None,
    past: tuple[str, ...] = (),
    times: tuple[str | float, ...] = (),
    events: tuple[str, ...] = (),
    covariates: tuple[str, ...] = (),
    mode: Mode | None = None,
    without_event: str | None = None,
    with_event: str | None = None,
    with_covariate: str | None = None,
    cases: CasesArgument = None,
    root: Path | None = None,
    n: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | dict[str, float] | None = None,
    context_noise: float | None = None,
    judge: str | None = None,
    bit_depth: BitDepth = 8,
    pictures: bool = True,
    batch_size: int = 4,
    shard: str | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    threads: int = 1,
    progress: bool = True,
) -> Sampled:
    """Sample a patient's next visits. The same command again continues an interrupted folder and does nothing on a finished one.

    Each future is a strip NAME.png with the known visits, frames NAME_00.png, ... (volumes: .nii.gz), NAME.mp4 and a line of
    `metadata.jsonl`. Its frames are one draw: they belong together.

    Args:
        pipeline: a shipped pipeline's name (`digital_progression`) or a pipeline folder (for example a training run's `OUT/export`).
        out: folder of the frames, strips, `metadata.jsonl` and `contact_sheet.png`.
        reference: manifest of visit series; the visits, events and covariates of its series `record` are what is known.
        record: record id in `reference`.
        until: only visits of the record up to this time are known; all if not given.
        past: instead of a record, known visits as TIME=FILE, for example `0=first.png 40=second.png`.
        times: wanted times: `90` in the series' own time, `+30` after the last known visit. Before it, frames between are asked for.
        events: further treatments, past or planned, as NAME@TIME or NAME@+TIME[=VALUE], for example `drainage@+5`.
        covariates: what is known of the patient (over the record's), for example `age=63 sex=F`.
        mode: joint (all frames at once) or autoregressive (one after the other); for cases, of those that have none of their own.
        without_event: also sample each future from the same noise without the treatments of this name, and map the difference.
        with_event: the same, with one more treatment (as in `events`).
        with_covariate: the same, with another value, for example `smoker=no` (`smoker=unknown` leaves it out).
        cases: JSON-lines file of cases (`{"case_id", "seed", "n", "past", "times", "events", "covariates", "mode", "counterfactual"}`),
            or `Case` objects.
        root: folder below which the images of the cases lie; the folder of the cases file if not given.
        n: futures of the patient.
        seed: noise seed; the same seed under another treatment or time starts from the same noise.
        steps: denoising steps; the pipeline's own number if not given.
        guidance: guidance scale, one for all (`2`) or one per condition (`events 2 covariates 1`); the pipeline's own if not given.
        context_noise: autoregressive: noise on what was generated before, in latent units; the pipeline's own if not given.
        judge: name or folder of a film meter (`digital_progression_judge`) that reads biomarkers off every film into the metadata.
        bit_depth: 8 or 16 bits of grey in the frames.
        pictures: strips, movies and difference maps; --no-pictures writes frames and metadata only (thousands of futures to be measured).
        batch_size: futures in flight at once on a CPU; never changes a future. An accelerator takes them one by one.
        shard: this process's part of the work, "0/3" for the first of three; read from torchrun's environment if not given.
        device: cpu, cuda, cuda:1, ...; the best there is if not given.
        dtype: precision of the network.
        threads: CPU threads of each future; more suits one large model on many cores.
        progress: a progress line on the terminal; --no-progress hides it.

    Raises `CaseError`, `PipelineError`, `OutputError` or `SamplingError` (all `ValueError`), before anything is sampled where possible.
    """
    asked = Requested(
        reference, record, until, past, times, events, covariates, mode, without_event, with_event, with_covariate
    )  # fmt: skip
    given, root = _cases(asked, cases, root, n, seed)
    part, where = Shard.parse(shard), choose_device(device)
    lanes = Lanes(where, batch_size if where.type == "cpu" else 1, threads)
    source = find_pipeline(pipeline)
    loaded = load_pipeline(source, getattr(torch, dtype), where)
    settings = _settings(source, loaded, steps, guidance, context_noise)
    reads = Reads.of(loaded)
    reader = _judge(judge, reads, where)
    settings |= {"dtype": dtype, "bit_depth": bit_depth} | lanes.settings
    settings |= {"judge": reader and reader.name, "judge_sha256": reader and reader.sha256}
    inputs = {case.case_id: inspect(case, root, reads) for case in given}
    folder = OutputFolder(Path(out), f"{part.index}-of-{part.count}")
    files = hashlib.sha256(json.dumps([inputs[case.case_id].sha256 for case in given]).encode()).hexdigest()
    folder.claim({**settings, "pictures": pictures, "input_files_sha256": files}, write_cases(given))
    work = ProgressionSampling(settings, inputs, bit_depth, pictures, reader)
    new = run(loaded, given, work.draw, work.files, work.metadata, folder, lanes, part, progress, work.measured)
    names = [work.metadata(job)["file_name"] for job in jobs_of(given)]
    complete = folder.merge(names, lambda lines: {CONTACT_SHEET: _sheet(Path(out), inputs, lines)})
    return Sampled(Path(out), new, len(names), complete, "futures")


@dataclass(frozen=True)
class Future(Trajectory[ProgressionAsked]):
    """One future: frames [T,*S] at times [T] (twice, where the second half answers the counterfactual), and what it continues.

    past [K,*S] in [0,1]: the known visits as the pipeline sees them. Readings, if there is a judge: one dict for each frame.
    """

    past: np.ndarray
    past_readings: Sequence[Reading] = ()
    readings: Sequence[Reading] = ()


@dataclass(frozen=True)
class ProgressionSampling:
    """The task's part of sampling: how a future is drawn, what its files hold, and its metadata line. `inputs` by case id."""

    settings: dict[str, Any]
    inputs: Mapping[str, Inputs]
    bit_depth: BitDepth
    pictures: bool = True
    judge: Judge | None = None

    def draw(self, pipeline: Any, jobs: Sequence[Job[ProgressionAsked]]) -> list[Trajectory[ProgressionAsked]]:
        return [self._draw(pipeline, job) for job in jobs]

    def _draw(self, pipeline: Any, job: Job[ProgressionAsked]) -> Future:
        inputs, asked = self.inputs[job.case.case_id], job.case.conditions
        past = inputs.read_past()
        frames, times = [], []
        for changed in (False, True) if asked.counterfactual is not None else (False,):
            result = pipeline(
                inputs.history(past, changed),
                times=list(asked.times),
                mode=asked.mode or "joint",
                num_inference_steps=self.settings["num_inference_steps"],
                guidance_scale=self.settings["guidance_scale"],
                context_noise=self.settings["context_noise"],
                generator=[job.generator()],  # a change starts from the same noise
                output_type="np",
            )
            frames.append(np.asarray(result.frames[0]))
            times.append(np.asarray(asked.times, dtype=np.float64))
        known, made = past[:, 0].numpy(), np.concatenate(frames)
        return Future(job.case, job.index, made, np.concatenate(times), known, self._read(known), self._read(made))

    def _read(self, frames: np.ndarray) -> list[Reading]:
        return self.judge.read(frames, self.bit_depth) if self.judge is not None and np.isfinite(frames).all() else []

    def metadata(self, job: Job[ProgressionAsked]) -> dict[str, Any]:
        case, inputs = job.case, self.inputs[job.case.case_id]
        kind = ".png" if inputs.reads.preprocessing.dim == 2 else ".nii.gz"
        frames = self._frames(job, inputs, "", kind)
        changed = self._frames(job, inputs, "_cf", kind) if case.conditions.counterfactual is not None else []
        # Without pictures a future is known by its first frame.
        named = {"file_name": f"{job.name}.png", "video": f"{job.name}.mp4"}
        line = {
            **(named if self.pictures else {"file_name": frames[0]["file_name"]}),
            "frames": frames,
            "case_id": case.case_id,
            "trajectory": job.index,
            "seed": case.seed,
            "noise_seed": case.noise_seed(job.index),
            **inputs.facts(),
            "synthetic": True,
            **self.settings,
            **case.extra,
        }
        if changed:
            line |= {"counterfactual_frames": changed, "change": inputs.asked.change_in_words(), "change_means": NOT_CAUSAL}
            line |= {"difference": f"{job.name}_difference.png"} if self.pictures else {}
        files = [frame["file_name"] for frame in (*frames, *changed)]
        line["files"] = files + [line[name] for name in ("video", "difference") if name in line]
        return line

    def measured(self, trajectory: Trajectory[ProgressionAsked]) -> dict[str, Any]:
        """What the judge read, where the metadata list the images."""
        future = cast(Future, trajectory)
        if self.judge is None:
            return {}
        line = self.metadata(Job(future.case, future.index))
        count = len(line["frames"])
        read = {"past": future.past_readings, "frames": future.readings[:count], "counterfactual_frames": future.readings[count:]}
        return {
            key: [{**entry, "biomarkers": dict(row)} for entry, row in zip(line[key], rows, strict=True)]
            for key, rows in read.items()
            if key in line
        }

    def files(self, trajectory: Trajectory[ProgressionAsked]) -> dict[str, bytes]:
        future = cast(Future, trajectory)
        inputs, line = self.inputs[future.case.case_id], self.metadata(Job(future.case, future.index))
        notes = {
            "Synthetic": "true",
            "Comment": "Made by a generative model from earlier visits: a possible future, not an image of a patient.",
            "Software": f"medgen {__version__}",
            **{key: str(line[key]) for key in ("model", "model_sha256", "case_id", "trajectory", "seed", "noise_seed")},
        }
        files = {}
        with tempfile.TemporaryDirectory() as scratch:
            entries = [*line["frames"], *line.get("counterfactual_frames", ())]
            for entry, frame in zip(entries, future.frames, strict=True):
                told = {**notes, "Time": moment(entry["time"], inputs.reads.time_unit)}
                files[entry["file_name"]] = self._frame(frame, inputs, told, Path(scratch))
            if not self.pictures:
                return {name: files[name] for name in reversed(files)}  # the first frame last: see below
            known, asked, changed = _shown(future, inputs)
            course = _course(line, inputs)
            if changed:
                picture = difference_map(asked, changed, course, line["change"])
                files[line["difference"]] = picture_bytes(picture, {**notes, "Change": f"{line['change']}: {NOT_CAUSAL}"})
            shown = np.repeat(movie([*known, *asked], course), 2, axis=0)  # some players skip a single picture
            said = {"title": "SYNTHETIC progression", "comment": json.dumps(notes), "encoder": f"medgen {__version__}"}
            files[line["video"]] = write_video(Path(scratch) / "movie.mp4", shown, 2 / _SECONDS, "libx264", said).read_bytes()
        # The strip last: with it a future would look finished.
        return {**files, line["file_name"]: picture_bytes(film_strip([*known, *asked], course), notes)}

    def _frames(self, job: Job[ProgressionAsked], inputs: Inputs, mark: str, kind: str) -> list[dict[str, Any]]:
        return [
            {"file_name": f"{job.name}{mark}_{i:02d}{kind}", "time": time, "date": day}
            for i, (time, day) in enumerate(zip(job.case.conditions.times, inputs.dates, strict=True))
        ]

    def _frame(self, frame: np.ndarray, inputs: Inputs, notes: Mapping[str, str], scratch: Path) -> bytes:
        """A frame's file: PNG, or NIfTI on the grid of the last known visit in its stored values (HU) where the window is known."""
        if frame.ndim == 2:
            return png_bytes(frame, self.bit_depth, notes)
        preprocessing = inputs.reads.preprocessing
        affine = load_volume(inputs.images[-1], preprocessing.size, preprocessing.volume).affine
        values = preprocessing.volume.restored(torch.from_numpy(frame * 2 - 1))
        kind = np.int16 if preprocessing.volume.intensity == "window" else np.float32
        said = f"SYNTHETIC {notes['model']} {notes['model_sha256'][:12]} seed {notes['noise_seed']}"
        return write_volume(scratch / "frame.nii.gz", values, affine, kind, said).read_bytes()


def _settings(
    source: PipelineSource,
    pipeline: Any,
    steps: int | None,
    guidance: float | Mapping[str, float] | None,
    context_noise: float | None,
) -> dict[str, Any]:
    if "time_unit" not in pipeline.config:
        raise SamplingError(f"{source.folder} holds a {type(pipeline).__name__}, which forecasts no visits")
    noise = float(pipeline.config.context_noise if context_noise is None else context_noise)
    if not 0 <= noise < 100:
        raise SamplingError(f"context_noise must be between 0 and 100, not {noise}")
    return resolve_settings(source, pipeline, steps, guidance) | {"context_noise": noise}


def _judge(name: str | None, reads: Reads, device: torch.device) -> Judge | None:
    if name is not None and reads.preprocessing.dim == 3:
        raise SamplingError("a judge reads films, but this pipeline makes volumes; `medgen evaluate progression` measures those")
    return None if name is None else Judge.load(name, device)


def _cases(
    asked: Requested, cases: str | Path | Sequence[ProgressionCase] | None, root: Path | None, n: int, seed: int
) -> tuple[list[ProgressionCase], Path | None]:
    """The cases, and the folder below which their images must lie (None: they are the caller's own words, anywhere)."""
    if cases is None:
        case, below = asked.case(n, seed)
        return [case], below
    if asked != Requested(mode=asked.mode):
        raise CaseError("give either a file of cases, or a record or images with their times and treatments")
    if isinstance(cases, str | Path):
        given, root = read_cases(cases, ProgressionAsked, RESERVED | _FACTS), root or Path(cases).parent
    else:
        given = list(cases)
        check_cases(given)
    if asked.mode is None:
        return given, root
    return [case if case.conditions.mode else with_conditions(case, mode=asked.mode) for case in given], root


def _course(line: Mapping[str, Any], inputs: Inputs) -> Course:
    said = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in line["covariates"].items()]
    title = f"{line['case_id']}   future {line['trajectory']}   " + ", ".join(said)
    return Course(title, inputs.reads.time_unit, [(event.name, event.time) for event in inputs.asked.events])


def _shown(future: Future, inputs: Inputs) -> tuple[list[Shown], list[Shown], list[Shown]]:
    """The known visits, the frames as asked, and those of the counterfactual, with what the judge read."""
    count = len(inputs.asked.times)

    def words(rows: Sequence[Reading], i: int) -> list[str]:
        return in_words(rows[i]) if rows else []

    known = [
        Shown(image, seen.time, day, False, words(future.past_readings, i))
        for i, (image, seen, day) in enumerate(zip(future.past, inputs.asked.past, inputs.past_dates))
    ]
    made = [
        Shown(frame, float(time), inputs.dates[i % count], True, words(future.readings, i))
        for i, (frame, time) in enumerate(zip(future.frames, future.times))
    ]
    return known, made[:count], made[count:]


def _sheet(out: Path, inputs: Mapping[str, Inputs], lines: Sequence[dict[str, Any]]) -> bytes:
    """Patients down, futures across: the last known visit, then the last frame of each future."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_case.setdefault(line["case_id"], []).append(line)
    rows = []
    for case_id, of_case in list(by_case.items())[:12]:
        one = inputs[case_id]
        end = one.asked.times[-1]
        index = max((i for i, seen in enumerate(one.asked.past) if seen.time <= end), default=0)
        known = load_visit(one.images[index], one.reads.preprocessing)[0].numpy() / 2 + 0.5
        last = Shown(known, one.asked.past[index].time, one.past_dates[index])
        futures = [Shown(_opened(out / line["frames"][-1]["file_name"], one), end, one.dates[-1], True) for line in of_case[:6]]
        rows.append((f"{case_id}: {len(one.asked.past)} known visits, {len(of_case)} futures", last, futures))
    unit = next(iter(inputs.values())).reads.time_unit
    left_out = f"; {len(by_case) - len(rows)} more patients not shown" if len(by_case) > len(rows) else ""
    return picture_bytes(futures_sheet(rows, unit, left_out), {"Synthetic": "true"})


def _opened(path: Path, inputs: Inputs) -> np.ndarray:
    """A frame's file as [*S] in [0,1]."""
    if inputs.reads.preprocessing.dim == 3:
        return load_visit(path, inputs.reads.preprocessing)[0].numpy() / 2 + 0.5
    with Image.open(path) as image:
        values = np.asarray(image)
    return values / np.float32(65535 if values.dtype == np.uint16 else 255)
