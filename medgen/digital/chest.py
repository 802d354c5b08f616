"""Digital chest patients, from a seed to films, reports, masks and truth, written as a manifest like any other data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from medgen import __version__
from medgen.data.records import FINDINGS, CXRRecord, FindingLabel
from medgen.digital.anatomy import HEART, VERSION, Anatomy, load_anatomy
from medgen.digital.findings import Edit, add_breasts, apply_finding
from medgen.digital.patient import Acquisition, FilmView, Finding, Study, draw_acquisition, draw_findings, draw_patient
from medgen.digital.projection import attenuation, develop, project
from medgen.digital.reports import write_report
from medgen.digital.site import SITES, Site, SiteName, site_of
from medgen.digital.warps import FIELD_MM, Body, warp
from medgen.digital.writing import split_of, write_patients
from medgen.seeds import stable_seed

MASK_MM = 2.0  # a pixel belongs to a finding when the ray passes through at least this much of it


@dataclass(frozen=True)
class Film:
    """One film. image [H,W] float32 in [0,1]; mask [H,W] uint8, bit k set where FINDINGS[k] is; truth as in the manifest."""

    image: np.ndarray
    mask: np.ndarray
    truth: dict[str, float]
    acquisition: Acquisition


def draw_study(
    seed: int, index: int, views: Sequence[FilmView] = ("PA", "AP"), focus: str | None = None, site: Site = SITES["A"]
) -> Study:
    """The study of patient `index` in population `seed`: one person, one day, one film per view of the same body.

    `focus` is a finding that the patient has for certain. A site with a share of portable films takes one film, in one of `views`.
    """
    patient = draw_patient(seed, index, site)
    key = stable_seed(seed, index) if site.name == "A" else stable_seed(seed, index, "site", site.name)
    if site.portable_share is not None and len(set(views)) == 2:
        views = ("AP",) if stable_seed("portable", key) / 2**63 < site.portable_share else ("PA",)
    findings = draw_findings(key, focus=focus)
    pose = draw_acquisition(key, views[0], site)
    # both films are taken in the same breath: pose and inspiration are shared, exposure and noise are not
    acquisitions = tuple(
        replace(draw_acquisition(key, view, site), rotation_deg=pose.rotation_deg, tilt_deg=pose.tilt_deg,
                inspiration_mm=pose.inspiration_mm, shift_mm=pose.shift_mm)
        for view in views
    )  # fmt: skip
    return Study(patient, f"{patient.patient_id}-s1", findings, acquisitions, site)


def render(study: Study, size: int = 128, anatomy: Anatomy | None = None) -> list[Film]:
    """Films of `study`, `size` pixels square: the body is warped and edited once per pose and projected for each view."""
    anatomy = anatomy or _anatomy(size)
    films: list[Film] = []
    body: Body | None = None
    edits: dict[str, list[Edit]] = {}
    posed: tuple[object, ...] = ()
    for acquisition in study.acquisitions:
        pose = (acquisition.rotation_deg, acquisition.tilt_deg, acquisition.inspiration_mm, acquisition.shift_mm)
        if body is None or pose != posed:
            body, edits = edited_body(study, acquisition, size, anatomy)
            posed = pose
        films.append(_film(study, body, edits, acquisition))
    return films


@lru_cache(maxsize=2)
def _anatomy(size: int) -> Anatomy:
    return load_anatomy(size)


def edited_body(study: Study, acquisition: Acquisition, size: int, anatomy: Anatomy) -> tuple[Body, dict[str, list[Edit]]]:
    """The body of `study` in the pose of `acquisition`, and what each of its findings did to it, by name (and side)."""
    body = warp(anatomy, study.patient, study.findings, acquisition, size)
    add_breasts(body, study.patient.breast_mm)
    return body, edit_body(body, study.findings)


def edit_body(body: Body, findings: Sequence[Finding]) -> dict[str, list[Edit]]:
    """Write the densities of `findings` into `body`; what each of them did, by name (and side)."""
    edits: dict[str, list[Edit]] = {}
    # lung tissue first, then what lies in it, then what replaces it
    order = ("hyperinflation", "edema", "atelectasis", "consolidation", "nodule", "pleural_effusion", "pneumothorax")
    for finding in sorted((f for f in findings if f.name in order), key=lambda f: order.index(f.name)):
        edit = apply_finding(body, finding)
        if edit is not None:
            edits.setdefault(finding.name if finding.side is None else f"{finding.name}_{finding.side}", []).append(edit)
    return edits


def _film(study: Study, body: Body, edits: dict[str, list[Edit]], acquisition: Acquisition) -> Film:
    image = develop(project(attenuation(body.hu)[None], body.spacing_mm, acquisition.view)[0], acquisition, study.site)
    rays = _thickness(body, edits, acquisition.view)
    mask = torch.zeros(image.shape, dtype=torch.uint8)
    truth: dict[str, float] = {}
    for (name, group), thickness in zip(edits.items(), rays[2:], strict=True):
        kind = next(k for k in FINDINGS if name.startswith(k))
        mask |= (thickness > MASK_MM).to(torch.uint8) << FINDINGS.index(kind)
        for unit in group[0].numbers:
            truth[f"{name}_{unit}"] = round(sum(e.numbers[unit] for e in group), 3)
    if any(f.name == "cardiomegaly" for f in study.findings):
        mask |= (rays[0] > MASK_MM).to(torch.uint8) << FINDINGS.index("cardiomegaly")
    truth["cardiothoracic_ratio"] = round(cardiothoracic_ratio(rays[0] > MASK_MM, rays[1] > MASK_MM), 4)
    for finding in study.findings:
        key = finding.name if finding.side is None else f"{finding.name}_{finding.side}"
        truth[f"{key}_severity"] = round(max(finding.severity, truth.get(f"{key}_severity", 0.0)), 4)
    return Film(image.numpy(), mask.numpy(), truth, acquisition)


def _thickness(body: Body, edits: dict[str, list[Edit]], view: str) -> torch.Tensor:
    """How many mm of heart, lungs and each edit every ray crosses: [2+E,H,W]. Projected at half resolution, to save time."""
    heart, lungs = body.label == HEART, body.lungs["left"] | body.lungs["right"]
    weights = [torch.stack([e.weight for e in group]).sum(0) if len(group) > 1 else group[0].weight for group in edits.values()]
    volumes = torch.cat([F.avg_pool3d(volume[None].float(), 2) for volume in (heart, lungs, *weights)])
    y, z, x = body.spacing_mm
    rays = project(volumes, (2 * y, 2 * z, 2 * x), view)
    return F.interpolate(rays[None], size=body.hu.shape[1:], mode="bilinear")[0]


def cardiothoracic_ratio(heart: torch.Tensor, lungs: torch.Tensor) -> float:
    """Greatest width of the heart over greatest inner width of the thorax, both on the film ([H,W] bool)."""

    def width(mask: torch.Tensor) -> float:
        columns = mask.any(0).nonzero().flatten()
        return float(columns[-1] - columns[0] + 1) if len(columns) else float("nan")

    return width(heart) / width(lungs)


def _write_study(
    index: int,
    out: str,
    seed: int,
    size: int,
    views: tuple[FilmView, ...],
    dicom: bool,
    focus: str | None,
    population: int,
    site: SiteName,
) -> list[CXRRecord]:
    torch.set_num_threads(1)
    study = draw_study(seed, index, views, focus if index >= population else None, SITES[site])
    findings, impression, labels = write_report(study)
    folder = Path(out)
    records = []
    for film in render(study, size):
        record_id = f"{study.study_id}-{film.acquisition.view.lower()}"
        image = f"images/{record_id}.{'dcm' if dicom else 'png'}"
        if dicom:
            _write_dicom(folder / image, film, study, record_id)
        else:
            Image.fromarray((film.image * 255).round().astype(np.uint8)).save(folder / image)
        Image.fromarray(film.mask).save(folder / f"masks/{record_id}.png")
        records.append(_record(study, film, record_id, image, findings, impression, labels))
    return records


def _record(
    study: Study, film: Film, record_id: str, image: str, findings: str, impression: str, labels: tuple[FindingLabel, ...]
) -> CXRRecord:
    site, extra = study.site, {"mask": f"masks/{record_id}.png", "findings": [asdict(f) for f in study.findings]}
    return CXRRecord(
        record_id=record_id,
        patient_id=study.patient.patient_id,
        study_id=study.study_id,
        image=image,
        view=film.acquisition.view,
        findings=findings,
        impression=impression,
        split="test" if site.external else split_of(study.patient.patient_id),
        labels=labels,
        age=study.patient.age,
        sex=study.patient.sex,
        truth=dict(film.truth),
        extra=extra if site.name == "A" else extra | {"site": site.name, "acquisition": asdict(film.acquisition)},
    )


def _write_dicom(path: Path, film: Film, study: Study, record_id: str) -> None:
    from medgen.data.dicom import write_dx

    write_dx(
        path,
        (film.image * 65535).round().astype(np.uint16),
        patient_id=study.patient.patient_id,
        study_id=study.study_id,
        record_id=record_id,
        model="medgen digital chest",
        model_hash=f"{__version__}, anatomy {VERSION}",
        seed=study.patient.seed,
        view=film.acquisition.view,
        age=study.patient.age,
        sex=study.patient.sex,
        pixel_spacing_mm=FIELD_MM / film.image.shape[0],
    )


def write_dataset(
    out: Path,
    n: int,
    seed: int = 0,
    size: int = 128,
    views: Sequence[FilmView] = ("PA", "AP"),
    dicom: bool = False,
    processes: int | None = None,
    focus: str | None = None,
    focus_n: int = 0,
    site: SiteName = "A",
) -> Path:
    """Write `n` films of digital patients below `out` and return the path of `manifest.parquet`.

    The same command again continues where it stopped: finished studies are listed in `progress.jsonl`, which the manifest
    replaces at the end. Beside it lie images/, masks/ (8-bit PNG, bit k set where FINDINGS[k] is) and sheet.png to look at.

    Args:
        out: folder to write into.
        n: how many films.
        seed: of the population; films of a smaller n are the first of a larger one.
        size: width and height in pixels.
        views: films taken of every patient.
        dicom: write 16-bit DICOM (DX) instead of 8-bit PNG.
        processes: how many cores to use; default: all there are.
        focus: a finding of which more examples are wanted than the population has.
        focus_n: films of further patients, after the `n`, who all have the `focus` finding.
        site: the hospital. B has other people, exposure, detector and noise, and films everyone once, 60 % AP; all of its
            patients are in the split "test", because it is there to test on.
    """
    if n < 1 or size < 32 or not set(views) <= {"PA", "AP"}:
        raise ValueError(
            f"n must be at least 1 (got {n}), size at least 32 (got {size}), views among PA and AP (got {', '.join(views)})"
        )
    if (focus is None) != (focus_n <= 0) or focus not in (None, *FINDINGS):
        raise ValueError(f"focus must be one of {', '.join(FINDINGS)}, with its focus_n films; got {focus}, {focus_n}")
    place = site_of(site)
    load_anatomy(size)  # before the workers start: they all find the cache
    for name in ("images", "masks"):
        (out / name).mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "size": size, "views": list(views), "dicom": dicom}
    if focus is not None:
        settings |= {"n": n, "focus": focus}
    if site != "A":
        settings["site"] = site
    each = len(views) if place.portable_share is None else 1  # films of a patient
    population, more = (-(-films // each) for films in (n, focus_n))
    work = partial(
        _write_study,
        out=str(out),
        seed=seed,
        size=size,
        views=tuple(views),
        dicom=dicom,
        focus=focus,
        population=population,
        site=site,
    )
    records = write_patients(
        out,
        population + more,
        work,
        CXRRecord,
        settings,
        name="digital-chest",
        what="studies",
        keep=n + focus_n,
        processes=processes,
    )
    _write_sheet([out / record.image for record in records[:40]], out / "sheet.png")
    return out / "manifest.parquet"


def _write_sheet(images: list[Path], path: Path) -> None:
    """The first films side by side, to look at."""
    from torchvision.utils import make_grid, save_image

    from medgen.data.images import load_image

    save_image(make_grid([load_image(image, None) for image in images], nrow=8, normalize=True, value_range=(-1, 1)), path)
