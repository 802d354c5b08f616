"""Where a pipeline comes from: a shipped name or a folder; loaded without unpickling, known by the hash of its weights."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
_INDEX = "model_index.json"
# Every other class is one of diffusers.
_OWN = {
    "TextToCXRPipeline": "medgen.pipelines.text_to_cxr",
    "ECGToEchoPipeline": "medgen.pipelines.ecg_to_echo",
    "MaskedECGToEchoPipeline": "medgen.pipelines.masked_ecg_to_echo",
    "ProgressionPipeline": "medgen.pipelines.progression",
}
_DECISIVE = {".safetensors", ".json", ".txt", ".model"}  # weights, component configs, vocabularies
_PICKLED = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"}


class PipelineError(ValueError):
    """A pipeline that cannot be found or used; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class PipelineSource:
    """A pipeline folder, the name it goes by in metadata, and one SHA-256 over its weights and component configurations."""

    name: str
    folder: Path
    sha256: str


def shipped_pipelines() -> list[str]:
    """Names of the pipelines that come with medgen."""
    return sorted(path.parent.name for path in PRETRAINED.glob(f"*/{_INDEX}"))


def find_pipeline(name_or_folder: str | Path) -> PipelineSource:
    """Find a pipeline by shipped name or by folder (a folder given with a separator, or that exists, is a folder).

    Raises `PipelineError` if there is none, if it is incomplete, or if its weights are pickled.
    """
    text = str(name_or_folder)
    shipped = PRETRAINED / text
    if text in shipped_pipelines():
        return PipelineSource(text, shipped, _fingerprint(shipped))
    folder = Path(text)
    if not folder.exists():
        names = shipped_pipelines()
        near = difflib.get_close_matches(text, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PipelineError(
            f"no pipeline {text!r}: neither a folder nor one of the shipped ones ({', '.join(names) or 'none'}){hint}"
        )
    if not (folder / _INDEX).is_file():
        raise PipelineError(
            f"{folder} is not a pipeline folder: it has no {_INDEX} (a training run keeps its pipeline in OUT/export)"
        )
    return PipelineSource(folder.resolve().name, folder, _fingerprint(folder))


def load_pipeline(source: PipelineSource, dtype: Any, device: Any) -> Any:
    """Load a medgen or diffusers pipeline for inference: safetensors only, nothing fetched, progress bars off."""
    import diffusers
    import transformers

    # Their bars for loading would stand above the one for sampling.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        class_name = json.loads((source.folder / _INDEX).read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise PipelineError(f"{source.folder / _INDEX} is damaged: {error}") from None
    loader = getattr(import_module(_OWN[class_name]) if class_name in _OWN else diffusers, str(class_name), None)
    if loader is None:
        raise PipelineError(
            f"{source.folder / _INDEX} asks for a pipeline class {class_name!r} that neither medgen nor diffusers has"
        )
    try:
        pipeline = loader.from_pretrained(str(source.folder), dtype=dtype, use_safetensors=True, local_files_only=True)
    except Exception as error:  # whatever the libraries raise on a damaged folder, the reader needs to know which folder
        raise PipelineError(f"the pipeline in {source.folder} does not load: {type(error).__name__}: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _fingerprint(folder: Path) -> str:
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    pickled = [path for path in files if path.suffix in _PICKLED]
    if not any(path.suffix == ".safetensors" for path in files):
        reason = f"{pickled[0].relative_to(folder)} is pickled, which is never opened" if pickled else "there are none"
        raise PipelineError(f"{folder} has no safetensors weights: {reason}; save it again with save_pretrained")
    whole = hashlib.sha256()
    for path in [folder / _INDEX, *(path for path in files if path.suffix in _DECISIVE)]:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
        whole.update(f"{path.relative_to(folder).as_posix()} {digest.hexdigest()}\n".encode())
    return whole.hexdigest()
