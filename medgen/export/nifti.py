"""`medgen export nifti`: sampled volumes as a BIDS derivative: values and affine as sampled, a JSON sidecar that says what made them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from medgen import __version__
from medgen.export.dicom import place_of
from medgen.export.dicom_volume import Modality, modality_of, read_stored
from medgen.export.release import STATEMENT, Release, exported, provenance
from medgen.export.source import ExportError, Made, Picture, only, read_generated

_README = "README"


def export(generated: Path, out: Path, modality: Modality | None = None, progress: bool = True) -> None:
    """Export sampled volumes as NIfTI in a BIDS derivative: a session a visit, provenance in sidecars, marked synthetic.

    The same command again continues an interrupted folder. OUT.sources.jsonl, beside the release, names the samples.

    Args:
        generated: a folder that `medgen sample progression` wrote with a pipeline of volumes.
        out: folder of the data set.
        modality: what the volumes are; if not given, those in HU are CT and the others MR.
        progress: a progress line on the terminal; --no-progress hides it.
    """
    made = only(read_generated(generated), ("volumes",), "NIfTI volumes")
    release = Release(out, "nifti", made, {"modality": modality})
    work = {picture.file: (one, picture) for one in made for picture in one.pictures}
    for item in exported(work, len(work), "NIfTI", progress):
        if not release.has(item):
            release.write(item, _files(*work[item], modality), [item])
    release.finish(list(work), {"layout": "BIDS derivative"}, _described(made))
    print(f"{len(work)} volumes of {len({one.identity for one in made})} synthetic patients in {out}")


def volume_bytes(made: Made, picture: Picture) -> bytes:
    """The volume's file, written anew: values and affine as sampled, nothing else of the old header."""
    from medgen.data.volumes import write_volume

    path, line = made.folder / picture.file, made.line
    values, affine = read_stored(path)
    said = f"SYNTHETIC {line['model']} {line['model_sha256'][:12]} seed {line['noise_seed']}"
    with tempfile.TemporaryDirectory() as scratch:
        return write_volume(Path(scratch) / "v.nii.gz", values.transpose(2, 1, 0), affine, values.dtype, said).read_bytes()


def sidecar(made: Made, picture: Picture, modality: Modality) -> dict[str, Any]:
    """What a volume's JSON says: that it is synthetic, of which model and seed, when it is meant to be, and in which unit."""
    line, place = made.line, place_of(made, picture)
    return {
        "Synthetic": True,
        "Statement": STATEMENT,
        "Modality": modality,
        "Units": "HU" if modality == "CT" else "arbitrary",
        "Comment": place.comments,
        "Time": picture.time,
        "TimeUnit": line.get("time_unit"),
        "Counterfactual": picture.counterfactual,
        "Model": line["model"],
        "ModelSHA256": line["model_sha256"],
        "Seed": line["seed"],
        "NoiseSeed": line["noise_seed"],
        "NumInferenceSteps": line.get("num_inference_steps"),
        "GuidanceScale": line.get("guidance_scale"),
    }


def _files(made: Made, picture: Picture, asked: Modality | None) -> dict[str, bytes]:
    try:
        modality = asked or modality_of(read_stored(made.folder / picture.file)[0])
        content = volume_bytes(made, picture)
    except ExportError as error:
        raise ExportError(f"{made.folder / picture.file}: {error}") from None
    subject, phase = _label(made, picture), made.line.get("time_unit") == "phase"
    session = f"ses-{1 if phase else picture.number + 1:02d}"
    run = f"_run-{picture.number + 1:02d}" if phase else ""
    stem = f"{subject}/{session}/anat/{subject}_{session}{run}_desc-synthetic_{modality}"
    told = json.dumps(sidecar(made, picture, modality), indent=2) + "\n"
    return {f"{stem}.nii.gz": content, f"{stem}.json": told.encode()}


def _label(made: Made, picture: Picture) -> str:
    """BIDS labels are letters and digits only."""
    return "sub-" + place_of(made, picture).patient_id.replace("-", "")


def _described(made: list[Made]) -> dict[str, bytes]:
    """The files of the whole data set: its description, its participants, its README."""
    generators = [
        {"Name": entry["model"], "Description": f"generative model, SHA-256 {entry['model_sha256']}"}
        for entry in provenance(made)["generators"]
    ]
    description = {
        "Name": "Synthetic volumes made by medgen",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "medgen", "Version": __version__, "Description": "generated and exported"}, *generators],
        "HowToAcknowledge": STATEMENT,
    }
    people = {
        _label(one, picture): place_of(one, picture) for one in made for picture in sorted(one.pictures, key=lambda p: -p.number)
    }
    rows = ["participant_id\tage\tsex\tsynthetic"]
    for label, place in people.items():
        age = "n/a" if place.age is None else f"{min(place.age, 90):.0f}"
        rows.append(f"{label}\t{age}\t{place.sex or 'n/a'}\ttrue")
    return {
        "dataset_description.json": (json.dumps(description, indent=2) + "\n").encode(),
        "participants.tsv": ("\n".join(rows) + "\n").encode(),
        _README: f"{STATEMENT}\nEvery volume's .json names its model and seed. Sessions are visits of one course.\n".encode(),
    }
