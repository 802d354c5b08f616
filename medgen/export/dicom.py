"""`medgen export dicom`: sampled films, forecasts, edits, clips and volumes as DICOM files, marked synthetic, ready for a workstation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from medgen.data.dicom import View, dx_dataset
from medgen.data.dicom_marks import Origin, Place, encoded
from medgen.export.dicom_clip import clip_file
from medgen.export.dicom_ecg import ecg_file, why_not
from medgen.export.dicom_volume import Modality, modality_of, read_stored, series_files
from medgen.export.recordings import recording_of
from medgen.export.release import Release, exported
from medgen.export.source import ExportError, Made, Picture, read_film, read_generated


def export(
    generated: Path,
    out: Path,
    ecg_root: Path | None = None,
    view: View | None = None,
    pixel_mm: float | None = None,
    modality: Modality | None = None,
    progress: bool = True,
) -> None:
    """Export samples as DICOM: DX films, US multi-frame clips with their 12-lead ECG, CT and MR series; each marked synthetic many times.

    The same command again continues an interrupted folder. Patients' ids and dates are made up; OUT.sources.jsonl, beside the release and
    not in it, says which sample each file was made from. These files show that they are synthetic: never give them to blinded readers.

    Args:
        generated: a folder that `medgen sample` wrote.
        out: folder of the DICOM files, one folder a synthetic patient, with `release.json` and `SHA256SUMS`.
        ecg_root: folder below which the ECGs of the clips' cases lie; they go beside the clips if their headers say SYNTHETIC.
        view: projection of films whose case does not say it; otherwise just "frontal".
        pixel_mm: size of a pixel of films (at the detector) or clips, where it is known; otherwise none is claimed for clips, and a
            350 mm field for films, where DICOM requires one.
        modality: what volumes are; if not given, those in HU are CT and the others MR.
        progress: a progress line on the terminal; --no-progress hides it.
    """
    if pixel_mm is not None and not 0.01 <= pixel_mm <= 10:
        raise ExportError(f"--pixel-mm {pixel_mm:g}: a pixel of a film or clip measures 0.01 to 10 mm")
    made = read_generated(generated)
    asked = Asked(ecg_root, view, pixel_mm, modality)
    settings = {"ecgs": ecg_root is not None, "view": view, "pixel_mm": pixel_mm, "modality": modality}
    release, left_out = Release(out, "dicom", made, settings), list[str]()
    work = {picture.file: (one, picture) for one in made for picture in one.pictures}
    for item in exported(work, len(work), "DICOM", progress):
        if not release.has(item):
            release.write(item, dict(_files(*work[item], asked, left_out)), [item])
    about = {
        "classes": sorted(
            {name.rsplit("/", 1)[1].split("-")[0].split(".")[0] for names in release.items().values() for name in names}
        )
    }
    release.finish(list(work), about)
    for reason in dict.fromkeys(left_out):
        print(f"ECG not released: {reason}")
    print(
        f"{sum(map(len, release.items().values()))} DICOM files of {len({one.identity for one in made})} synthetic patients in {out}"
    )


@dataclass(frozen=True)
class Asked:
    """The options of `export` that change what a file says."""

    ecg_root: Path | None = None
    view: View | None = None
    pixel_mm: float | None = None
    modality: Modality | None = None


def _files(made: Made, picture: Picture, asked: Asked, left_out: list[str]) -> Iterator[tuple[str, bytes]]:
    """Names below the release and contents of all that one generated image becomes."""
    place, line = place_of(made, picture), made.line
    origin = Origin(line["model"], line["model_sha256"], line["noise_seed"])
    where, path = f"{place.patient_id}/{picture.number:02d}", made.folder / picture.file
    try:
        if made.kind == "volumes":
            values, affine = read_stored(path)
            modality = asked.modality or modality_of(values)
            told = replace(place, series_description=f"SYNTHETIC {modality}, {_moment(made, picture)}")
            for number, content in enumerate(series_files(values, affine, modality, origin, told, made.identity), 1):
                yield f"{where}/{modality}-{number:04d}.dcm", content
        elif made.kind == "clip":
            yield f"{where}/US.dcm", _clip(made, path, origin, place, asked)
            recording, reason = recording_of(made, asked.ecg_root)
            reason = why_not(recording) if recording is not None else reason
            if recording is None or reason:
                left_out.append(reason)
            else:
                beside = replace(place, series_id=f"{place.series_id}/ECG", record_id=f"{place.record_id}/ECG", series_number=2)
                yield f"{where}/ECG.dcm", ecg_file(recording, beside, origin.uid("study", place.study_id))
        else:
            view = _view(made) or asked.view
            told = replace(place, series_description=f"SYNTHETIC {view or 'frontal'} chest{_told(made, picture)}")
            yield f"{where}/DX.dcm", encoded(dx_dataset(read_film(path), origin, told, view, asked.pixel_mm))
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from None


def _clip(made: Made, path: Path, origin: Origin, place: Place, asked: Asked) -> bytes:
    from medgen.data.video import VideoError, read_video

    try:
        frames, fps = read_video(path)
    except VideoError as error:
        raise ExportError(str(error)) from None
    line = made.line
    ef = f", ejection fraction {line['ejection_fraction']:g} % asked" if line.get("ejection_fraction") is not None else ""
    told = replace(place, series_description=f"SYNTHETIC echo {line.get('view') or ''}".strip(),
                   comments=f"Echo clip generated from an ECG{ef}.")  # fmt: skip
    return clip_file(frames, fps, origin, told, line, asked.pixel_mm)


def place_of(made: Made, picture: Picture) -> Place:
    """Where an image stands: its visits are studies of one synthetic patient, phases and edits images of one study."""
    patient = made.identity + ("-CF" if picture.counterfactual else "")
    visit = picture.number if made.line.get("time_unit") in ("days", "order") else 0
    days = _days(made, picture)
    age, sex = made.covariates.get("age"), made.covariates.get("sex")
    comments = {"film": picture.prompt, "edit": _edited(picture), "clip": ""}.get(made.kind, _forecast(made, picture))
    try:
        day = (made.first_day + timedelta(days=days)).strftime("%Y%m%d")
    except OverflowError:
        raise ExportError(f"{picture.file}: {_moment(made, picture)} is on no calendar") from None
    edit = made.kind == "edit"  # its rounds are one series; a visit or a phase is a series of its own
    return Place(
        patient, f"{patient}/{visit}", f"{patient}/{0 if edit else picture.number}", f"{patient}/{picture.number}",
        number=picture.number if edit else 1, series_number=1 if edit else picture.number + 1, study_number=str(visit + 1),
        date=day, made_up_date=True,
        age=None if not isinstance(age, int | float) else max(0.0, age + days / 365.25), sex=sex if sex in ("F", "M") else None,
        study_description=f"SYNTHETIC {_STUDIES[made.kind]}{_told(made, picture)}", comments=comments,
    )  # fmt: skip


_STUDIES = {"film": "chest radiograph", "edit": "severity edit", "visits": "visit", "volumes": "visit", "clip": "echocardiogram"}


def _days(made: Made, picture: Picture) -> int:
    """Days after time 0 of the series. An order without a calendar gets a day each, phases of one beat the same day."""
    unit = made.line.get("time_unit")
    return round(picture.time or 0) if unit == "days" else picture.number if unit == "order" else 0


def _moment(made: Made, picture: Picture) -> str:
    unit = {"days": "day", "order": "visit", "phase": "phase"}.get(str(made.line.get("time_unit")), "time")
    return f"{unit} {picture.time or 0:.6g}"


def _told(made: Made, picture: Picture) -> str:
    if made.kind == "edit":
        return f", round {picture.number}"
    return f", {_moment(made, picture)}" if picture.time is not None else ""


def _forecast(made: Made, picture: Picture) -> str:
    """The dates are not those of whoever's visits the model saw, and what it was told of them is not repeated here."""
    said = f"A possible future made by a generative model, not an observation: {_moment(made, picture)}; the dates are made up."
    if picture.counterfactual:
        said += " With one thing changed: the model's response, not a causal effect."
    return said


def _edited(picture: Picture) -> str:
    return (
        f"{picture.prompt} Round {picture.number} of an edit of severity: no time, not a forecast. Edited from a film that is not in this "
        "release; keep this image as that film is to be kept."
    )


def _view(made: Made) -> View | None:
    """The projection as the line says it, or the last known visit."""
    past: Sequence[Any] = made.line.get("past") or ()
    said = made.line.get("view") or (past[-1].get("view") if past else None)
    return said if said in ("PA", "AP") else None
