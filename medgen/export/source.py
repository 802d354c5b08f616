"""What a release is made from: a folder that `medgen sample` finished, every line and file of it checked before anything is written.

A release must hold nothing of a patient. So only what the sampler generated is ever read here (no known visits, no source films), each file
must be the one that was sampled (its hash, and the marks inside it), and ids are replaced by ones that follow from no patient's.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Kind = Literal["film", "edit", "visits", "volumes", "clip"]
KINDS: dict[Kind, str] = {
    "film": "films from text",
    "edit": "severity edits",
    "visits": "forecast films",
    "volumes": "forecast volumes",
    "clip": "echo clips",
}
METADATA = "metadata.jsonl"
_NEEDED = {"file_name": str, "case_id": str, "trajectory": int, "seed": int, "noise_seed": int, "model": str, "model_sha256": str}
_MARKED = ("case_id", "trajectory", "noise_seed", "model_sha256")  # what a file itself says of its origin


class ExportError(ValueError):
    """Something that cannot be released, or a folder that cannot be written; the message says what, where, and what to do."""


@dataclass(frozen=True)
class Picture:
    """One generated image of a trajectory: its file, time in the series' unit (visits), round (edits), and what it was asked to show."""

    file: str
    number: int = 0
    time: float | None = None
    prompt: str = ""
    counterfactual: bool = False


@dataclass(frozen=True)
class Made:
    """One trajectory of a sampled folder: its line of `metadata.jsonl`, and which of its files are generated images."""

    folder: Path
    line: Mapping[str, Any]
    kind: Kind
    pictures: tuple[Picture, ...]

    @cached_property
    def identity(self) -> str:
        """The synthetic patient's id: from everything the line says (with hashes of what is in no release), so it leads back to nobody."""
        return "SYN-" + hashlib.sha256(json.dumps(self.line, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def first_day(self) -> date:
        """A made-up day on which time 0 lies: real dates, shifted or not, do not leave. The intervals between visits stay."""
        return date(2101, 1, 1) + timedelta(days=int(self.identity[4:], 16) % (90 * 365))

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that a release is made from."""
        return tuple(picture.file for picture in self.pictures)

    def digests(self) -> dict[str, str]:
        """SHA-256 of those files as they are now."""
        return {name: file_sha256(self.folder / name) for name in self.files}

    @property
    def covariates(self) -> Mapping[str, Any]:
        """What the sampler was told of the patient, or the line itself where a case said it there."""
        found = self.line.get("covariates")
        return found if isinstance(found, Mapping) else {key: self.line[key] for key in ("age", "sex") if key in self.line}


def read_generated(folder: Path) -> list[Made]:
    """All trajectories of a finished folder of `medgen sample`, checked: marked synthetic, files there, unchanged and below the folder.

    Raises `ExportError`, naming line and file.
    """
    folder = Path(folder)
    made, names = [], set[str]()
    for number, line in _lines(folder):
        try:
            one = _made(folder, line)
            if line["file_name"] in names:
                raise ExportError(f"{line['file_name']!r} is there twice")
            names.add(line["file_name"])
            for picture in one.pictures:
                _check_file(folder, picture.file, line)
        except ExportError as error:
            raise ExportError(f"{folder / METADATA}, line {number}: {error}") from None
        made.append(one)
    return made


def _lines(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    path = folder / METADATA
    if not path.is_file():
        raise ExportError(_why_not(folder))
    for number, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise ExportError(f"{path}, line {number} is damaged: it is no JSON object")
        yield number, line
    if not path.stat().st_size:
        raise ExportError(f"{path} is empty: there is nothing to release")


def _why_not(folder: Path) -> str:
    """Why a folder without metadata is no source of a release."""
    manifests = [folder] if folder.is_file() else sorted(folder.glob("manifest.*"))
    if manifests:
        return f"{manifests[0]} lists records of a data set, and a release holds only what `medgen sample` generated: give its folder"
    if not folder.is_dir():
        return f"there is no folder {folder}: give one that `medgen sample` wrote"
    if list(folder.glob(".metadata-*.jsonl")):
        return f"sampling into {folder} has not finished: run the same `medgen sample` again (all shards), then export"
    return f"{folder} has no {METADATA}: it is not a folder that `medgen sample` wrote"


def _made(folder: Path, line: dict[str, Any]) -> Made:
    if line.get("synthetic") is not True:
        raise ExportError('it does not say "synthetic": true, and only what a model generated may be released')
    for key, wanted in _NEEDED.items():
        if not isinstance(line.get(key), wanted) or isinstance(line[key], bool):
            raise ExportError(
                f"field {key!r} is missing or no {wanted.__name__}: without it, where the image comes from is not known"
            )
    if not re.fullmatch(r"[0-9a-f]{64}", line["model_sha256"]):
        raise ExportError(f"model_sha256 {line['model_sha256'][:80]!r} is no SHA-256")
    try:
        kind, pictures = _pictures(line)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ExportError(f"its list of frames is damaged ({type(error).__name__}: {error})") from None
    return Made(folder, line, kind, pictures)


def _pictures(line: Mapping[str, Any]) -> tuple[Kind, tuple[Picture, ...]]:
    """What kind of sample a line describes, and its generated images."""
    if "frames_file" in line:
        return "clip", (Picture(line["frames_file"]),)
    if "frames" not in line:
        return "film", (Picture(line["file_name"], prompt=str(line.get("prompt") or "")),)
    frames = line["frames"]
    if "round" in frames[0]:  # round 0 is the source: somebody's film
        rounds = [f for f in frames if f["round"] > 0 and f.get("synthetic") is True]
        return "edit", tuple(Picture(f["file_name"], int(f["round"]), prompt=str(f["prompt"])) for f in rounds)
    asked = [(frame, False) for frame in frames] + [(frame, True) for frame in line.get("counterfactual_frames", ())]
    pictures = [
        Picture(frame["file_name"], i % len(frames), float(frame["time"]), counterfactual=changed)
        for i, (frame, changed) in enumerate(asked)
    ]
    if not all(abs(picture.time or 0) < math.inf for picture in pictures):
        raise ValueError("a time is no finite number")
    return ("volumes" if pictures[0].file.endswith(".nii.gz") else "visits"), tuple(pictures)


def _check_file(folder: Path, name: str, line: Mapping[str, Any]) -> None:
    """Refuse a file that is missing, lies elsewhere, or is not what was sampled."""
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise ExportError(f"the file name {name!r} leads out of the folder")
    path = folder / name
    if not path.is_file():
        raise ExportError(f"its file {name} is missing: run the same `medgen sample` again, which makes it anew")
    known = line["sha256"].get(name) if isinstance(line.get("sha256"), Mapping) else None
    if known is not None and known != file_sha256(path):
        raise ExportError(f"{name} has changed since it was sampled (another SHA-256): sample it again")
    try:
        wrong = _contradiction(path, line)
    except Exception as error:  # a damaged file fails in any way it likes
        raise ExportError(f"{name} cannot be read ({type(error).__name__}): damaged, or another format") from None
    if wrong:
        raise ExportError(f"{name} {wrong}: it is not the file that was sampled, and is not released")


def _contradiction(path: Path, line: Mapping[str, Any]) -> str:
    """How a file's own mark differs from its line; "" if it does not."""
    if path.name.endswith(".nii.gz"):
        expected = f"SYNTHETIC {line['model']} {line['model_sha256'][:12]} seed {line['noise_seed']}"
        return "" if _described(path) == expected[:79] else "does not say that it is synthetic and of this model and seed"
    if path.suffix == ".png":
        with Image.open(path) as image:
            said = dict(getattr(image, "text", {}))
        synthetic = said.get("Synthetic") == "true"
    else:
        comment = _comment(path)
        found = re.search(r"\{.*\}", comment)
        synthetic, said = comment.startswith("Synthetic") and found is not None, json.loads(found[0]) if found else {}
    if not synthetic:
        return "does not say that it is synthetic"
    wrong = [key for key in _MARKED if str(said.get(key)) != str(line[key])]
    return f"says another {wrong[0]} ({said.get(wrong[0])})" if wrong else ""


def _described(path: Path) -> str:
    """What a NIfTI header says: it has room for 79 letters."""
    import nibabel

    return bytes(nibabel.load(path).header["descrip"].item()).decode("ascii", "replace")


def _comment(path: Path) -> str:
    import av

    with av.open(str(path)) as container:
        return next((value for key, value in container.metadata.items() if key.lower() == "comment"), "")


def read_film(path: Path) -> NDArray[Any]:
    """A grey PNG as it is stored, `[H, W]` uint8 or uint16."""
    with Image.open(path) as image:
        if image.mode not in ("L", "I;16"):
            raise ExportError(f"{path} is a picture of mode {image.mode}; a film is grey, of 8 or 16 bits")
        values = np.asarray(image)
    return values.astype(np.uint16) if image.mode == "I;16" else values


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def only(made: Sequence[Made], kinds: Sequence[Kind], what: str) -> list[Made]:
    """Those of `made` that are of one of `kinds`. Raises `ExportError` if there is none."""
    found = [one for one in made if one.kind in kinds]
    if not found:
        there = ", ".join(dict.fromkeys(KINDS[one.kind] for one in made))
        raise ExportError(
            f"{made[0].folder} holds {there}, and {what} {'are' if what.endswith('s') else 'is'} made from "
            f"{' or '.join(KINDS[kind] for kind in kinds)}"
        )
    return found
