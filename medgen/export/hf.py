"""`medgen export hf`: samples as a Hugging Face dataset folder: files, metadata, a card that says what they are not, Croissant."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from medgen import __version__
from medgen.export.croissant import croissant
from medgen.export.dicom import place_of
from medgen.export.mp4 import container_notes
from medgen.export.nifti import volume_bytes
from medgen.export.release import STATEMENT, Release, exported, provenance
from medgen.export.source import KINDS, ExportError, Kind, Made, Picture, read_film, read_generated
from medgen.sampling.pictures import stored_png

DATA, TABLE = "data", "data/metadata.jsonl"
_TASKS: dict[Kind, str] = {
    "film": "text-to-image",
    "edit": "image-to-image",
    "visits": "image-to-image",
    "volumes": "other",
    "clip": "other",
}
_BUILDERS: dict[Kind, str] = {"film": "imagefolder", "edit": "imagefolder", "visits": "imagefolder", "volumes": "niftifolder",
                              "clip": "videofolder"}  # fmt: skip
_SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))
# What a row takes over from a sample's line. Anything else (past visits, reports, the user's own fields) may be a patient's.
_KEPT = ("trajectory", "seed", "noise_seed", "model", "model_sha256", "num_inference_steps", "guidance_scale", "scheduler")
_KEPT_OF: dict[Kind, tuple[str, ...]] = {
    "film": ("negative_prompt", "view"), "edit": ("finding", "side", "direction"), "visits": (), "volumes": (),
    "clip": ("view", "ejection_fraction", "num_frames", "fps", "heart_rate", "r_peaks"),
}  # fmt: skip


def export(generated: Path, out: Path, name: str | None = None, license: str = "other", progress: bool = True) -> None:
    """Export samples as a Hugging Face dataset folder with its card and Croissant description; `load_dataset(OUT)` reads it.

    Values are exactly those that were sampled (PNG, FFV1 in AVI, NIfTI). The same command again continues an interrupted folder.
    OUT.sources.jsonl, beside the release, names the samples. Texts (prompts) are released: check that you may.

    Args:
        generated: a folder that `medgen sample` wrote.
        out: folder of the data set: `data/`, `README.md`, `croissant.json`.
        name: the data set's name; "Synthetic" and what it holds if not given.
        license: as the Hub spells it (cc-by-4.0, ...); "other" says that none is stated yet.
        progress: a progress line on the terminal; --no-progress hides it.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{1,60}", license):
        raise ExportError(f"--license {license!r}: expected one of the Hub's identifiers, for example cc-by-4.0, or other")
    made = read_generated(generated)
    kinds = list(dict.fromkeys(one.kind for one in made))
    if len({_BUILDERS[kind] for kind in kinds}) > 1:
        raise ExportError(f"{generated} mixes {' and '.join(KINDS[kind] for kind in kinds)}; a data set is of one kind")
    name = name or f"Synthetic {KINDS[kinds[0]]}"
    release = Release(out, "hf", made, {"name": name, "license": license})
    work = {picture.file: (one, picture) for one in made for picture in one.pictures}
    for item in exported(work, len(work), "dataset", progress):
        if not release.has(item):
            release.write(item, {f"{DATA}/{_file_name(*work[item])}": _content(*work[item])}, [item])
    rows = [row(one, picture) for one, picture in work.values()]
    table = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows).encode()
    sums = {file: digest for files in release.items().values() for file, digest in files.items()}
    described = croissant(name, license, _description(made, kinds), rows, table, sums)
    further = {TABLE: table, "README.md": card(name, license, made, rows), "croissant.json": described}
    release.finish(list(work), {"name": name, "license": license}, further)
    print(f"{len(rows)} {KINDS[kinds[0]]} in {out}: read README.md before you publish it")


def row(made: Made, picture: Picture) -> dict[str, Any]:
    """The metadata of one file: what it was asked to show, and what made it."""
    place, line = place_of(made, picture), made.line
    found = {
        "file_name": _file_name(made, picture),
        "synthetic": True,
        "patient_id": place.patient_id,
        "age": None if place.age is None else round(min(place.age, 90.0), 1),
        "sex": place.sex,
    }
    if made.kind in ("film", "edit"):
        found["prompt"] = picture.prompt
    if made.kind == "edit":
        found["round"] = picture.number
    if picture.time is not None:
        found |= {"visit": picture.number, "time": picture.time, "time_unit": line.get("time_unit"),
                  "counterfactual": picture.counterfactual}  # fmt: skip
    return {**found, **{key: line.get(key) for key in (*_KEPT_OF[made.kind], *_KEPT)}}


def _file_name(made: Made, picture: Picture) -> str:
    suffix = ".nii.gz" if made.kind == "volumes" else Path(picture.file).suffix
    number = "" if made.kind in ("film", "clip") else f"_{picture.number:02d}"
    return f"{place_of(made, picture).patient_id}{number}{suffix}"


def _content(made: Made, picture: Picture) -> bytes:
    """The file written anew, values untouched, without the case ids that the sample's own marks name."""
    path = made.folder / picture.file
    if made.kind == "volumes":
        return volume_bytes(made, picture)
    if made.kind == "clip":
        return _frames(made, path)
    keys = ("model", "model_sha256", "seed", "noise_seed")
    notes = {
        "Synthetic": "true",
        "Comment": STATEMENT,
        "Software": f"medgen {__version__}",
        "patient": place_of(made, picture).patient_id,
    }
    return stored_png(read_film(path), {**notes, **{key: str(made.line[key]) for key in keys}})


def _frames(made: Made, path: Path) -> bytes:
    from medgen.data.video import VideoError, read_video, write_video

    try:
        frames, fps = read_video(path)
    except VideoError as error:
        raise ExportError(str(error)) from None
    with tempfile.TemporaryDirectory() as scratch:
        return write_video(Path(scratch) / "clip.avi", frames, fps, "ffv1", container_notes(made)).read_bytes()


def card(name: str, license: str, made: Sequence[Made], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """README.md: YAML that the Hub reads, then what the data are, how they were made, and what they must not be used for."""
    kinds = list(dict.fromkeys(one.kind for one in made))
    head = {
        "pretty_name": name,
        "license": license,
        "language": ["en"],
        "task_categories": list(dict.fromkeys(_TASKS[kind] for kind in kinds)),
        "size_categories": [next((label for most, label in _SIZES if len(rows) < most), "10M<n<100M")],
        "annotations_creators": ["machine-generated"],
        "tags": ["synthetic", "medical", "medgen", *(KINDS[kind].replace(" ", "-") for kind in kinds)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": f"{DATA}/**"}]}],
    }
    if license == "other":
        head["license_name"] = "not-stated"
    generators = "\n".join(
        f"| {g['model']} | `{g['model_sha256']}` | {g['scheduler']}, {g['num_inference_steps']} steps | "
        f"{json.dumps(g['guidance_scale'])} | medgen {g['medgen']}, torch {g['torch']}, {g['dtype']}, {g['device']} |"
        for g in provenance(made)["generators"]
    )
    stated = "" if license != "other" else "\n**No license is stated yet**: state one before publishing.\n"
    text = f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {name}

**{STATEMENT}**

{_description(made, kinds)} Exported with medgen {__version__}.
{stated}
## How they were made
| model | SHA-256 of its weights and configuration | sampler | guidance | software |
|---|---|---|---|---|
{generators}

Each row of `{TABLE}` has its `seed` and `noise_seed`: the same model, settings and seed give the same file again.
{len({one.line["noise_seed"] for one in made})} noise seeds, {len({one.identity for one in made})} synthetic patients, whose ids
are made up; ages above 89 are written as 90. `SHA256SUMS` lists every file; `croissant.json` describes them for machines
(`rai:hasSyntheticData`).

## What they are not
{_limits(kinds)}
"""
    return text.encode()


def _description(made: Sequence[Made], kinds: Sequence[Kind]) -> str:
    files = sum(len(one.pictures) for one in made)
    return (
        f"{files} {' and '.join(KINDS[kind] for kind in kinds)} made by {', '.join(sorted({one.line['model'] for one in made}))}."
    )


def _limits(kinds: Sequence[Kind]) -> str:
    """What a user must know, by kind."""
    said = [
        "Not for diagnosis, and not for judging a device for it.",
        "Not anonymous by being synthetic: a generative model can repeat what it was trained on. Whether this one does is not validated.",
        "They carry the errors and biases of the model and of its training data; what was asked for (prompt, ejection fraction, date) "
        "need not be what is shown.",
        "Real and synthetic data must stay apart in any evaluation: `synthetic` is true in every row.",
    ]
    if "visits" in kinds or "volumes" in kinds:
        said.append("Visits are possible futures of one draw, not observations; their times count from the origin of an unnamed series. "
                    "Those marked `counterfactual` show the model's response to one change, not a causal effect.")  # fmt: skip
    if "edit" in kinds:
        said.append(
            "Each is an edit of a film that is not in this data set: keep it as that film is to be kept. Rounds are degrees, not time."
        )
    if "clip" in kinds:
        said.append(
            "The ECGs that drove the clips are not part of this folder (`medgen export wfdb`); a pixel's size is not known."
        )
    if "film" in kinds or "visits" in kinds:
        said.append("A pixel's size is not known: nothing can be measured in millimetres.")
    return "\n".join(f"- {line}" for line in said)
