"""What there is to know about a digital patient: who they are, what is wrong with them, and how the film was taken.

Everything is drawn from seeds and everything that is drawn is recorded, so that the truth about a film is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from medgen.digital.site import SITES, Site
from medgen.seeds import stable_seed

FilmView = Literal["PA", "AP"]
SIDED = ("pleural_effusion", "pneumothorax", "consolidation", "nodule", "atelectasis")


@dataclass(frozen=True)
class Patient:
    """Anatomy that stays with a person through life. Scales are relative to the CT's; millimetres where named."""

    patient_id: str
    seed: int
    age: float  # years
    sex: Literal["F", "M"]
    scale: tuple[float, float, float]  # depth, height, width
    heart_scale: float
    breast_mm: float
    deformation_mm: float


@dataclass(frozen=True)
class Finding:
    """One abnormality. `severity` in (0, 1] sets its extent; `seed` its place and texture; side and lobe where they apply."""

    name: str
    severity: float
    side: str | None = None  # "left", "right"; a bilateral finding is two
    lobe: str | None = None  # "upper", "middle", "lower"
    diameter_mm: float | None = None  # nodule or mass
    linear: bool = False  # atelectasis: plate-like instead of lobar
    seed: int = 0
    # (y, z, x) of the middle of a nodule or consolidation, in standard deviations of its lobe from the lobe's centre; None: drawn
    # from `seed` among the body's voxels, which another pose of the same body has others of (`findings.relative_place`)
    place: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Acquisition:
    """How the film was taken. None of this is disease."""

    view: FilmView
    rotation_deg: float = 0.0  # about the patient's long axis
    tilt_deg: float = 0.0  # in the plane of the film
    inspiration_mm: float = 0.0  # diaphragm below its position in the CT
    shift_mm: tuple[float, float] = (0.0, 0.0)  # rows, columns
    exposure: float = 0.0  # added to the display brightness, in units of its range
    contrast: float = 1.0
    noise: float = 0.006  # standard deviation in units of the display range
    seed: int = 0


@dataclass(frozen=True)
class Study:
    """A patient on one day: the findings, and the films taken at a site."""

    patient: Patient
    study_id: str
    findings: tuple[Finding, ...] = ()
    acquisitions: tuple[Acquisition, ...] = field(default_factory=tuple)
    site: Site = SITES["A"]


def draw_patient(seed: int, index: int, site: Site = SITES["A"]) -> Patient:
    """Patient number `index` of the population `seed`; nobody is a patient of two sites."""
    elsewhere = "" if site.name == "A" else site.name
    key = stable_seed("digital chest", "patient", f"{seed}{elsewhere}", index)
    rng = np.random.default_rng(key)
    sex: Literal["F", "M"] = "F" if rng.random() < 0.5 else "M"
    size = rng.normal(1.0 if sex == "M" else 0.95, 0.035)
    return Patient(
        patient_id=f"D{seed:03d}{elsewhere}-{index:06d}",
        seed=key,
        age=float(np.clip(rng.normal(*site.age), 18, 95).round()),
        sex=sex,
        scale=(
            float(np.clip(rng.normal(*site.depth), 0.85, 1.28)),
            float(np.clip(size * rng.normal(*site.height), 0.90, 1.06)),
            float(np.clip(size * rng.normal(*site.width), 0.88, 1.06)),
        ),
        heart_scale=float(np.clip(rng.normal(0.86, 0.035), 0.78, 0.94)),
        breast_mm=float(rng.uniform(*site.breast_mm)) if sex == "F" else 0.0,
        deformation_mm=float(rng.uniform(3, 7)),
    )


def draw_findings(seed: int, normal: float = 0.18, focus: str | None = None) -> tuple[Finding, ...]:
    """Findings of one study: none with probability `normal`, else one to three kinds, all kinds about equally frequent.

    With `focus`, that kind is always among them.
    """
    rng = np.random.default_rng(stable_seed("digital chest", "findings", seed))
    if rng.random() < normal and focus is None:
        return ()
    kinds = [
        "pleural_effusion",
        "pneumothorax",
        "consolidation",
        "nodule",
        "cardiomegaly",
        "edema",
        "atelectasis",
        "hyperinflation",
    ]
    chosen = list(rng.choice(kinds, size=rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]), replace=False))
    if focus is not None:  # in the place of the first kind, so that what excludes it goes
        chosen = [focus, *(name for name in chosen[1:] if name != focus)]
    excluded = {"hyperinflation": {"edema", "atelectasis", "cardiomegaly"}, "pneumothorax": {"atelectasis"}}
    findings: list[Finding] = []
    for name in map(str, chosen):
        if any(name in excluded.get(other.name, ()) or other.name in excluded.get(name, ()) for other in findings):
            continue
        findings += _draw_finding(name, rng)
    return tuple(findings)


def _draw_finding(name: str, rng: np.random.Generator) -> list[Finding]:
    def one(side: str | None) -> Finding:
        lobe, diameter, linear = None, None, False
        severity = float(rng.uniform(0.25 if name == "pneumothorax" else 0.12, 1.0))
        if name in ("consolidation", "nodule"):
            lobe = str(rng.choice(["upper", "lower"] if side == "left" else ["upper", "middle", "lower"]))
        elif name == "atelectasis":
            lobe, linear = str(rng.choice(["upper", "lower"], p=[0.3, 0.7])), bool(rng.random() < 0.35)
            lobe = "lower" if linear else lobe
        if name == "nodule":
            diameter = float(np.exp(rng.uniform(np.log(14), np.log(60))))
            severity = min(diameter / 60, 1.0)
        return Finding(name, severity, side, lobe, diameter, linear, seed=int(rng.integers(2**31)))

    if name not in SIDED:
        return [one(None)]
    both = rng.random() < {"pleural_effusion": 0.3, "consolidation": 0.15, "atelectasis": 0.1}.get(name, 0.0)
    return [one(side) for side in (("right", "left") if both else (str(rng.choice(["right", "left"])),))]


def draw_acquisition(seed: int, view: FilmView, site: Site = SITES["A"]) -> Acquisition:
    """Pose, breath and exposure of one film. Portable AP films vary more."""
    rng = np.random.default_rng(stable_seed("digital chest", "acquisition", seed, view))
    loose = 1.0 if view == "PA" else site.loose
    down, spread = site.shift_mm
    return Acquisition(
        view=view,
        rotation_deg=float(rng.normal(0, site.rotation_deg * loose)),
        tilt_deg=float(rng.normal(0, site.tilt_deg * loose)),
        inspiration_mm=float(rng.normal(site.inspiration_mm[view == "AP"], 4)),
        shift_mm=(float(rng.normal(down, spread * loose)), float(rng.normal(0, spread * loose))),
        exposure=float(rng.normal(*site.exposure)),
        contrast=float(np.clip(rng.normal(*site.contrast), 0.8, 1.2)),
        noise=float(rng.uniform(*site.noise)),
        seed=stable_seed(seed, view, "noise"),
    )
