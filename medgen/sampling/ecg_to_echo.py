"""ECG to echocardiogram: cases in, videos with their ECG strip and provenance out. `medgen sample ecg-to-echo` calls `sample`."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image

from medgen import __version__
from medgen.data.clips import VideoPreprocessing
from medgen.data.ecg import ECGPreparation
from medgen.data.video import read_video, write_video
from medgen.sampling.cases import CaseError, Trajectory, check_cases, parse_case, read_cases, write_cases
from medgen.sampling.echo_cases import EchoAsked, EchoCase, Inputs, beat_frames, inspect
from medgen.sampling.echo_pictures import film, tile
from medgen.sampling.output import OutputFolder
from medgen.sampling.pictures import contact_sheet, quantise
from medgen.sampling.request import CONTACT_SHEET, RESERVED, Dtype, Sampled, choose_device, resolve_settings
from medgen.sampling.sampler import Job, Lanes, SamplingError, Shard, jobs_of, run
from medgen.sampling.source import PipelineSource, find_pipeline, load_pipeline

# From Python also a list of cases; on a command line a file.
CasesArgument = Annotated[str | Path | Sequence[EchoCase] | None, tyro.conf.arg(constructor=Path, metavar="FILE")]
_FACTS = ("ecg_flags", "heart_rate", "r_peaks", "t_ends", "ecg_sha256", "first_frame_sha256", "frames_file", "seams")


def sample(
    pipeline: str | Path,
    out: str | Path,
    ecg: str | Path | None = None,
    ejection_fraction: float | None = None,
    view: str | None = None,
    first_frame: str | Path | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    ecg_start: float | None = None,
    cases: CasesArgument = None,
    root: Path | None = None,
    n: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | dict[str, float] | None = None,
    batch_size: int = 4,
    shard: str | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    threads: int = 1,
    progress: bool = True,
) -> Sampled:
    """Sample echo clips from an ECG. The same command again continues an interrupted folder and does nothing on a finished one.

    Each clip is NAME.mp4 (H.264, the ECG drawn under it), NAME.avi (its frames, lossless) and a line of `metadata.jsonl`.

    Args:
        pipeline: a shipped pipeline's name (`digital_echo`) or a pipeline folder (for example a training run's `OUT/export`).
        out: folder of the clips, `metadata.jsonl` and `contact_sheet.png`.
        ecg: WFDB record (.hea), DICOM waveform, or a shipped example (`sinus-60`, `sinus-100`, `af`, `pvc`).
        ejection_fraction: percent, for example 55.
        view: A4C, A2C, PLAX or PSAX.
        first_frame: image or video whose first frame the clip starts from.
        num_frames: length of the clip; the pipeline's own if not given, longer ones are joined from windows.
        fps: frames per second; the pipeline's own if not given.
        ecg_start: second of the recording at which the clip starts; one second into it where there is room, if not given.
        cases: JSON-lines file of cases (`{"case_id", "seed", "n"}` and any of the six options above), or `Case` objects.
        root: folder below which the files of the cases lie; the folder of the cases file if not given.
        n: clips of `ecg`, with different hearts.
        seed: noise seed; the same seed under another ECG or ejection fraction starts from the same noise.
        steps: denoising steps; the pipeline's own number if not given.
        guidance: guidance scale, one for all (`2`) or one per condition (`ecg 2 ejection_fraction 3`); the pipeline's own if not given.
        batch_size: clips in flight at once on a CPU; never changes a clip. An accelerator takes them one by one.
        shard: this process's part of the work, "0/3" for the first of three; read from torchrun's environment if not given.
        device: cpu, cuda, cuda:1, ...; the best there is if not given.
        dtype: precision of the network.
        threads: CPU threads of each clip; more suits one large model on many cores.
        progress: a progress line on the terminal; --no-progress hides it.

    Raises `CaseError`, `PipelineError`, `OutputError` or `SamplingError` (all `ValueError`), before anything is sampled where possible.
    """
    conditions = {"ecg": ecg, "ejection_fraction": ejection_fraction, "view": view, "first_frame": first_frame}
    conditions |= {"num_frames": num_frames, "fps": fps, "ecg_start": ecg_start}
    given, root = _cases({key: value for key, value in conditions.items() if value is not None}, cases, root, n, seed)
    part, where = Shard.parse(shard), choose_device(device)
    lanes = Lanes(where, batch_size if where.type == "cpu" else 1, threads)
    source = find_pipeline(pipeline)
    loaded = load_pipeline(source, getattr(torch, dtype), where)
    settings = _settings(source, loaded, steps, guidance) | {"dtype": dtype} | lanes.settings
    preparation = ECGPreparation.model_validate(dict(loaded.config.ecg_preparation))
    own = VideoPreprocessing.model_validate(dict(loaded.config.preprocessing))
    inputs = {case.case_id: inspect(case, root, own, preparation) for case in given}
    folder = OutputFolder(Path(out), f"{part.index}-of-{part.count}")
    files = hashlib.sha256(json.dumps([inputs[case.case_id].sha256 for case in given]).encode()).hexdigest()
    folder.claim({**settings, "input_files_sha256": files}, write_cases(given))
    work = EchoSampling(settings, inputs, {one.clip.frames: loaded.seams(one.clip.frames) for one in inputs.values()})
    new = run(loaded, given, work.draw, work.files, work.metadata, folder, lanes, part, progress)
    names = [f"{job.name}.mp4" for job in jobs_of(given)]
    complete = folder.merge(names, lambda lines: {CONTACT_SHEET: _sheet(Path(out), lines)})
    return Sampled(Path(out), new, len(names), complete, "clips")


@dataclass(frozen=True)
class EchoSampling:
    """The task's part of sampling: how a clip is drawn, what its files hold, and its metadata line.

    `inputs` by case id; `seams` by number of frames: the frames with which a new window begins.
    """

    settings: dict[str, Any]
    inputs: Mapping[str, Inputs]
    seams: Mapping[int, Sequence[int]]

    def draw(self, pipeline: Any, jobs: Sequence[Job[EchoAsked]]) -> list[Trajectory[EchoAsked]]:
        return [self._draw(pipeline, job) for job in jobs]

    def _draw(self, pipeline: Any, job: Job[EchoAsked]) -> Trajectory[EchoAsked]:
        asked, inputs = job.case.conditions, self.inputs[job.case.case_id]
        result = pipeline(
            ecg=inputs.read_ecg(),
            start_seconds=inputs.ecg_start,
            ejection_fraction=asked.ejection_fraction,
            view=asked.view,
            first_frame=inputs.read_first_frame(),
            num_frames=inputs.clip.frames,
            fps=inputs.clip.fps,
            num_inference_steps=self.settings["num_inference_steps"],
            guidance_scale=self.settings["guidance_scale"],
            generator=[job.generator()],
            output_type="np",
        )
        return Trajectory(job.case, job.index, np.asarray(result.frames[0]), np.asarray(result.times[0], dtype=np.float64))

    def metadata(self, job: Job[EchoAsked]) -> dict[str, Any]:
        case = job.case
        return {
            "file_name": f"{job.name}.mp4",
            "frames_file": f"{job.name}.avi",
            "case_id": case.case_id,
            "trajectory": job.index,
            "seed": case.seed,
            "noise_seed": case.noise_seed(job.index),
            **case.conditions.model_dump(mode="json"),
            **self.inputs[case.case_id].facts(),
            "seams": list(self.seams[self.inputs[case.case_id].clip.frames]),
            "synthetic": True,
            **self.settings,
            **case.extra,
        }

    def files(self, trajectory: Trajectory[EchoAsked]) -> dict[str, bytes]:
        line = self.metadata(Job(trajectory.case, trajectory.index))
        origin = {key: line[key] for key in ("model", "model_sha256", "case_id", "trajectory", "seed", "noise_seed")}
        notes = {
            "title": "SYNTHETIC echocardiogram",
            "comment": f"Synthetic video made by a generative model: no patient is shown. {json.dumps(origin)}",
            "encoder": f"medgen {__version__}",
        }
        clip, frames = self.inputs[trajectory.case.case_id], trajectory.frames
        with tempfile.TemporaryDirectory() as scratch:
            shown, lossless = Path(scratch) / "clip.mp4", Path(scratch) / "clip.avi"
            write_video(shown, film(frames, trajectory.times, clip.strip), clip.clip.fps, "libx264", notes)
            write_video(lossless, quantise(frames, 8), clip.clip.fps, "ffv1", notes)
            # The frames first: a film without its frames would look finished.
            return {line["frames_file"]: lossless.read_bytes(), line["file_name"]: shown.read_bytes()}


def _settings(
    source: PipelineSource, pipeline: Any, steps: int | None, guidance: float | Mapping[str, float] | None
) -> dict[str, Any]:
    if "ecg_preparation" not in pipeline.config:
        raise SamplingError(f"{source.folder} holds a {type(pipeline).__name__}, which makes no echo clips")
    return resolve_settings(source, pipeline, steps, guidance)


def _cases(
    asked: dict[str, Any], cases: str | Path | Sequence[EchoCase] | None, root: Path | None, n: int, seed: int
) -> tuple[list[EchoCase], Path | None]:
    """The cases, and the folder below which their files must lie (None: they are the caller's own words, anywhere)."""
    if bool(asked) == (cases is not None):
        raise CaseError("give either conditions (--ecg FILE, --ejection-fraction 55, ...) or a file of cases")
    if asked:
        texts = {key: str(value) for key, value in asked.items() if isinstance(value, Path)}
        return [parse_case({"case_id": "clip", **asked, **texts, "seed": seed, "n": n}, EchoAsked)], None
    if isinstance(cases, str | Path):
        return read_cases(cases, EchoAsked, RESERVED | {*_FACTS}), root or Path(cases).parent
    given = list(cases or ())
    check_cases(given)
    return given, root


def _sheet(out: Path, lines: Sequence[dict[str, Any]]) -> bytes:
    """End-diastole and end-systole of every clip, side by side, as the ECG says when they are."""
    by_path = {out / line["frames_file"]: line for line in lines}

    def opened(path: Path) -> Image.Image:
        line, (frames, _) = by_path[path], read_video(path)
        pair = beat_frames(line["r_peaks"], line["t_ends"], line["num_frames"], line["fps"])
        return tile([frames[number] for number in pair])

    captions = {path: f"{line['case_id']} #{line['trajectory']}: {_caption(line)}" for path, line in by_path.items()}
    return contact_sheet(list(captions.items()), opened, columns=4, width=296)


def _caption(line: dict[str, Any]) -> str:
    said = ["no ECG" if line["ecg"] is None else Path(line["ecg"]).stem]
    said += [f"{line['heart_rate']:.0f} bpm"] if line["heart_rate"] else []
    said += [f"EF {line['ejection_fraction']:g} %"] if line["ejection_fraction"] is not None else []
    return ", ".join([*said, *([line["view"]] if line["view"] else [])])
