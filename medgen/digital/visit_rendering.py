"""One visit of a digital patient: from the severities of a course to the body, its film or volume, and what is measured of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.affines import from_matvec

from medgen.data.visit_records import BIOMARKERS
from medgen.digital.anatomy import HEART, Anatomy
from medgen.digital.chest import MASK_MM, edit_body, edited_body
from medgen.digital.courses import MAX_DIAMETER_MM, PRESENT, Track
from medgen.digital.findings import FLUID_HU, Edit, add_breasts, apply_finding, relative_place
from medgen.digital.patient import Acquisition, FilmView, Finding, Patient, Study
from medgen.digital.projection import attenuation, develop, project_posed
from medgen.digital.warps import DEPTH_STEP_MM, FIELD_MM, Body, warp
from medgen.seeds import stable_seed

EXTENTS = ("heart", "lungs", "pleural_effusion", "consolidation", "nodule", "edema")
AERATED_HU = -500.0
_FAINT = {"pleural_effusion": 0.0, "consolidation": -0.30, "edema": -0.42, "nodule": 0.0, "cardiomegaly": -0.38}
"""Where a course's severity 0 lies on the chest finding's scale, which begins where a finding is seen: there is nothing of it left."""
_DISPLACING = 0.55  # severity from which an effusion pushes the mediastinum
_GRID = (PRESENT, 0.12, 0.25, 0.45, _DISPLACING, 0.75, 0.95)
POSE_SD = {"rotation_deg": 1.0, "tilt_deg": 0.6, "inspiration_mm": 2.0, "shift_mm": 1.5, "exposure": 0.02, "contrast": 0.03}
"""Standard deviations of what changes from one visit of a patient to the next without being disease."""
CTR_POSE_SD = 0.006  # what that change of pose does to the cardiothoracic ratio of the same heart (measured)


@dataclass(frozen=True)
class Rendered:
    """One visit. `image`: film [H,W] in [0,1] or volume [R,A,S] int16 HU; `affine` [4,4] (3D); `thickness` uint8 [6,H/2,W/2] mm (2D)."""

    image: np.ndarray
    truth: dict[str, float]
    thickness: np.ndarray | None = None
    affine: np.ndarray | None = None


def base_acquisition(patient: Patient) -> Acquisition:
    """How this patient's films are usually taken: a view for life, a habitual pose and breath."""
    rng = np.random.default_rng(stable_seed("visit habits", patient.seed))
    view: FilmView = "PA" if rng.random() < 0.7 else "AP"
    turn, tilt, breath, down, across = rng.normal(0, (1.5, 0.8, 2.5, 3.0, 3.0))
    breath += 1.5 if view == "PA" else -4.0
    return Acquisition(view, float(turn), float(tilt), float(breath), (float(down), float(across)))


def visit_acquisition(base: Acquisition, patient: Patient, visit: int) -> Acquisition:
    """The acquisition of visit number `visit`: the habitual one, changed a little (`POSE_SD`)."""
    key = stable_seed("visit acquisition", patient.seed, visit)
    rng = np.random.default_rng(key)
    jitter = {name: float(rng.normal(0, sd)) for name, sd in POSE_SD.items()}
    return replace(
        base,
        rotation_deg=base.rotation_deg + jitter["rotation_deg"],
        tilt_deg=base.tilt_deg + jitter["tilt_deg"],
        inspiration_mm=base.inspiration_mm + jitter["inspiration_mm"],
        shift_mm=(base.shift_mm[0] + jitter["shift_mm"], base.shift_mm[1] + float(rng.normal(0, POSE_SD["shift_mm"]))),
        exposure=base.exposure + jitter["exposure"],
        contrast=base.contrast + jitter["contrast"],
        noise=float(rng.uniform(0.003, 0.008)),
        seed=key,
    )


def findings_at(tracks: Sequence[Track], x: np.ndarray, places: dict[str, tuple[float, float, float]]) -> tuple[Finding, ...]:
    """The chest findings of `tracks` at severities `x` [D]; what is below `PRESENT` is absent."""
    found = []
    for track, severity in zip(tracks, map(float, x), strict=True):
        if severity < PRESENT:
            continue
        faint = _FAINT[track.name]
        diameter = severity * MAX_DIAMETER_MM if track.name == "nodule" else None
        found.append(
            Finding(
                track.name,
                faint + (1 - faint) * severity,
                track.side,
                track.lobe,
                diameter,
                seed=track.seed,
                place=places.get(track.key),
            )
        )
    return tuple(found)


def fix_places(body: Body, tracks: Sequence[Track], worst: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Where nodules and consolidations sit for life, by track: chosen in `body` with room for the `worst` [D] they will be."""
    wanted = findings_at(tracks, np.maximum(worst, PRESENT), {})
    return {
        track.key: relative_place(body, finding)
        for track, finding in zip(tracks, wanted, strict=True)
        if track.name in ("nodule", "consolidation")
    }


class HabitualBody:
    """A patient's body in the habitual pose, warped again only when a finding displaces what is around it.

    The small change of pose from film to film is put into the lines of sight, where it costs nothing (`project_posed`).
    """

    def __init__(self, patient: Patient, base: Acquisition, size: int, anatomy: Anatomy) -> None:
        self.patient, self.base, self.size, self.anatomy = patient, base, size, anatomy
        self._displacing: tuple[Finding, ...] | None = None
        self._body: Body
        self._ratio: float

    def body(self, findings: Sequence[Finding] = ()) -> Body:
        """A body to edit (edits replace its tensors, they do not write into them), with the displacements of `findings` only."""
        displacing = tuple(
            f for f in findings if f.name == "cardiomegaly" or (f.name == "pleural_effusion" and f.severity > _DISPLACING)
        )
        if displacing != self._displacing:
            self._body = warp(self.anatomy, self.patient, displacing, self.base, self.size)
            add_breasts(self._body, self.patient.breast_mm)
            self._displacing, self._ratio = displacing, cardiothoracic_ratio(*_extents(self._body, {}, self.base)[:2])
        return copy.copy(self._body)

    def ratio(self, findings: Sequence[Finding] = ()) -> float:
        """Its cardiothoracic ratio on a film."""
        self.body(findings)
        return self._ratio


def render_film(study: Study, habit: HabitualBody) -> Rendered:
    """The film of `study`'s only acquisition with its thickness maps; the truth is the body's, whatever the pose of the day."""
    (acquisition,) = study.acquisitions
    body = habit.body(study.findings)
    edits = edit_body(body, study.findings)
    film = develop(_project(attenuation(body.hu)[None], body.spacing_mm, acquisition, habit.base)[0], acquisition)
    rays = _extents(body, edits, acquisition, habit.base)
    truth = _truth(edits) | {"cardiothoracic_ratio": habit.ratio(study.findings), "aerated_lung_ml": _aerated(body)}
    return Rendered(film.numpy(), truth, rays.round().clamp(0, 255).to(torch.uint8).numpy())


def _project(volumes: torch.Tensor, spacing: tuple[float, float, float], now: Acquisition, usual: Acquisition) -> torch.Tensor:
    shift = (now.shift_mm[0] - usual.shift_mm[0], now.shift_mm[1] - usual.shift_mm[1])
    turn, tilt = now.rotation_deg - usual.rotation_deg, now.tilt_deg - usual.tilt_deg
    return project_posed(volumes, spacing, now.view, turn, tilt, shift, now.inspiration_mm - usual.inspiration_mm)


def render_volume(study: Study, size: int, anatomy: Anatomy) -> Rendered:
    """The edited CT of the whole thorax, `size` voxels along each axis, axes to the patient's right, front and head."""
    (acquisition,) = study.acquisitions
    body, edits = edited_body(study, acquisition, 2 * size, anatomy)
    for key, group in edits.items():
        _seal(body, key, group)
    rays = _extents(body, {}, acquisition)
    volume, inside, spacing = to_cube(body, size)
    truth = _truth(edits) | {
        "cardiothoracic_ratio": cardiothoracic_ratio(rays[0], rays[1]),
        "aerated_lung_ml": float(((volume < AERATED_HU) & inside).sum()) * float(np.prod(spacing)) / 1000,
    }
    affine = from_matvec(np.diag(spacing), -np.array(spacing) * (size - 1) / 2)
    return Rendered(volume.numpy().astype(np.int16), truth, affine=affine)


def _seal(body: Body, key: str, edits: Sequence[Edit]) -> None:
    """Fill the rim of partial volume between fluid (or airless lung) and the wall, which films do not show and slices do."""
    if not key.startswith(("pleural_effusion", "consolidation")):
        return
    lungs = body.lungs["left"] | body.lungs["right"]
    for edit in edits:
        near = F.max_pool3d(edit.weight[None, None], 3, 1, 1)[0, 0] * ~lungs * (body.label > 0)
        body.hu = torch.where(body.hu < FLUID_HU, torch.lerp(body.hu, torch.full_like(body.hu, FLUID_HU), near), body.hu)


def to_cube(body: Body, size: int) -> tuple[torch.Tensor, torch.Tensor, tuple[float, float, float]]:
    """HU and body mask [R,A,S] of the field around the lungs' middle, and the voxels' spacing in mm (about equal on all axes)."""
    depth = round(FIELD_MM / DEPTH_STEP_MM)
    missing = depth - body.hu.shape[0]
    pad = (0, 0, 0, 0, missing // 2, missing - missing // 2)  # negative: crop
    hu = F.pad(body.hu, pad, value=-1000.0)
    inside = F.pad((body.label > 0).float(), pad)
    cube = F.interpolate(torch.stack([hu, inside])[None], size=(size,) * 3, mode="area")[0]
    cube = cube.permute(0, 3, 1, 2).flip(1, 2, 3)  # [Y back, Z down, X left] -> right, front, head
    pitch = FIELD_MM / size
    return cube[0].round().clamp(-1024, 3000), cube[1] > 0.5, (pitch, depth * DEPTH_STEP_MM / size, pitch)


def _extents(body: Body, edits: dict[str, list[Edit]], now: Acquisition, usual: Acquisition | None = None) -> torch.Tensor:
    """Millimetres of each of `EXTENTS` that every ray crosses: [6,H/2,W/2]. `usual`: how `body` was posed, if not as `now`."""
    present: dict[str, torch.Tensor] = {
        "heart": (body.label == HEART).float(),
        "lungs": (body.lungs["left"] | body.lungs["right"]).float(),
    }
    for key, group in edits.items():
        name = next(n for n in EXTENTS if key.startswith(n))
        for edit in group:
            extent = edit.weight if edit.extent is None else edit.extent
            present[name] = present[name] + extent if name in present else extent
    y, z, x = body.spacing_mm
    volumes = torch.cat([F.avg_pool3d(volume[None], 2) for volume in present.values()])
    found = dict(zip(present, _project(volumes, (2 * y, 2 * z, 2 * x), now, usual or now), strict=True))
    return torch.stack([found.get(name, torch.zeros_like(found["heart"])) for name in EXTENTS])


def _truth(edits: dict[str, list[Edit]]) -> dict[str, float]:
    truth: dict[str, float] = dict.fromkeys(BIOMARKERS, 0.0)
    for key, group in edits.items():
        name = next(n for n in EXTENTS if key.startswith(n))
        ml = sum(edit.numbers["ml"] for edit in group)
        if name == "nodule":
            truth["nodule_mm3"] += 1000 * ml
            truth[f"{key}_mm"] = group[0].numbers["mm"]
        else:
            truth[f"{name}_ml"] += ml
            truth[f"{key}_ml"] = ml
    return truth


def _aerated(body: Body) -> float:
    return float(((body.hu < AERATED_HU) & (body.label > 0)).sum()) * body.voxel_ml


def cardiothoracic_ratio(heart: torch.Tensor, lungs: torch.Tensor) -> float:
    """Greatest width of the heart over greatest inner width of the thorax, from their thickness [H,W] in mm, finer than a pixel."""
    return _width(heart) / _width(lungs)


def _width(thickness: torch.Tensor) -> float:
    """Distance in pixels between the outermost columns where some ray crosses `MASK_MM`, interpolated between columns."""
    profile = F.pad(thickness.amax(0), (1, 1))
    inside = (profile > MASK_MM).nonzero().flatten()
    if len(inside) == 0:
        return float("nan")
    first, last = int(inside[0]), int(inside[-1])

    def beyond(at: int, out: int) -> float:
        a, b = float(profile[at]), float(profile[out])
        return (a - MASK_MM) / (a - b)

    return last - first + beyond(first, first - 1) + beyond(last, last + 1)


@dataclass(frozen=True)
class BiomarkerTable:
    """What severity means for one patient in the habitual pose. `amounts` [D,G]: mL or mm³ at severities `_GRID`; `aerated` [D,G]:
    the part of the lungs' air that is left; `ctr` [D,G]: what each adds to the healthy ratio `ctr0`; `breath`: relative change of lung
    volume per mm of inspiration, 0 where the truth is that of the habitual pose (films)."""

    tracks: tuple[Track, ...]
    amounts: np.ndarray
    aerated: np.ndarray
    ctr: np.ndarray
    ctr0: float
    aerated0_ml: float
    breath: float

    def biomarkers(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Severities [M,T,D] -> [M,T,len(BIOMARKERS)]; `rng` draws the poses of the visits where they matter (volumes)."""
        found = {name: np.zeros(x.shape[:2]) for name in BIOMARKERS}
        lung = 1 + self.breath * rng.normal(0, POSE_SD["inspiration_mm"], size=x.shape[:2])
        ratio, lost, left = np.full(x.shape[:2], self.ctr0), np.zeros(x.shape[:2]), np.ones(x.shape[:2])
        for d, track in enumerate(self.tracks):
            here = x[..., d] >= PRESENT
            kept = np.where(here, np.interp(x[..., d], _GRID, self.aerated[d]), 1.0)
            ratio = ratio + np.where(here, np.interp(x[..., d], _GRID, self.ctr[d]), 0.0)
            if track.name == "nodule":  # volumes are cubes: interpolate between their roots
                found["nodule_mm3"] += np.where(here, np.interp(x[..., d], _GRID, np.cbrt(self.amounts[d])) ** 3, 0.0)
            elif track.name != "cardiomegaly":
                found[f"{track.name}_ml"] += np.where(here, np.interp(x[..., d], _GRID, self.amounts[d]), 0.0) * lung
            if track.name == "edema":  # all through the lungs: of what the others leave
                left = left * kept
            else:
                lost = lost + (1 - kept)
        found["aerated_lung_ml"] = self.aerated0_ml * np.clip(1 - lost, 0, None) * left * lung
        found["cardiothoracic_ratio"] = ratio + (CTR_POSE_SD if self.breath else 0.0) * rng.normal(size=ratio.shape)
        return np.stack([found[name] for name in BIOMARKERS], -1)


def biomarker_table(
    habit: HabitualBody, tracks: tuple[Track, ...], places: dict[str, tuple[float, float, float]], cube: int | None = None
) -> BiomarkerTable:
    """Measure a patient: each disease alone, at every severity of the grid, without taking a film.

    `cube`: as `render_volume` of this size does, which counts aerated voxels in the volume and takes the pose of the day for real.
    """

    def aerated(body: Body) -> float:
        if cube is None:
            return _aerated(body)
        volume, inside, spacing = to_cube(body, cube)
        return float(((volume < AERATED_HU) & inside).sum()) * float(np.prod(spacing)) / 1000

    healthy = habit.body()
    air, ratio, breath = aerated(healthy), habit.ratio(), 0.0
    amounts, ctr = np.zeros((2, len(tracks), len(_GRID)))
    kept = np.ones_like(ctr)
    for d, track in enumerate(tracks):
        for g, severity in enumerate(_GRID):
            (finding,) = findings_at((track,), np.array([severity]), places)
            edited = habit.body((finding,))
            ctr[d, g] = habit.ratio((finding,)) - ratio
            if track.name != "cardiomegaly":
                edit = apply_finding(edited, finding)
                assert edit is not None
                if cube is not None:
                    _seal(edited, track.key, [edit])
                amounts[d, g] = edit.numbers["ml"] * (1000 if track.name == "nodule" else 1)
            kept[d, g] = aerated(edited) / air
    if cube is not None:
        deeper = replace(habit.base, inspiration_mm=habit.base.inspiration_mm + 4)
        breath = (_lung_voxels(warp(habit.anatomy, habit.patient, (), deeper, habit.size)) / _lung_voxels(healthy) - 1) / 4
    return BiomarkerTable(tracks, amounts, kept, ctr, ratio, air, breath)


def _lung_voxels(body: Body) -> float:
    return float((body.lungs["left"] | body.lungs["right"]).sum())
