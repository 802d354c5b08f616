"""From the CT's anatomy to one patient's body in one breath and pose: smooth warps, applied before anything is edited.

A warp is written the way it is applied: for every point of the new volume (mm), where in the CT it comes from (mm).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from medgen.digital.anatomy import LEFT_LUNG, RIGHT_LUNG, Anatomy
from medgen.digital.patient import Acquisition, Finding, Patient
from medgen.seeds import generator

FIELD_MM = 315.0  # width and height of the film at the detector
DEPTH_STEP_MM = 4.0
_COARSE = 4  # the displacement is smooth: it is computed on every fourth voxel and interpolated


@dataclass
class Body:
    """One patient's volume, edited in place by findings. Axes [Y depth, Z rows, X columns] as in `Anatomy`; HU and mm."""

    hu: torch.Tensor
    label: torch.Tensor
    pleura_mm: torch.Tensor
    spacing_mm: tuple[float, float, float]

    @cached_property
    def axes_mm(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Coordinates of the voxels' centres along y, z and x, each shaped to broadcast over the volume."""
        y, z, x = (axis_mm(n, s) for n, s in zip(self.hu.shape, self.spacing_mm, strict=True))
        return y[:, None, None], z[None, :, None], x[None, None, :]

    @cached_property
    def lungs(self) -> dict[str, torch.Tensor]:
        """Masks of the lungs before any edit."""
        return {
            "left": (self.label >= LEFT_LUNG[0]) & (self.label <= LEFT_LUNG[-1]),
            "right": (self.label >= RIGHT_LUNG[0]) & (self.label <= RIGHT_LUNG[-1]),
        }

    @property
    def voxel_ml(self) -> float:
        y, z, x = self.spacing_mm
        return y * z * x / 1000


def axis_mm(count: int, spacing: float) -> torch.Tensor:
    """Coordinates of `count` voxel centres `spacing` apart, centred on zero."""
    return (torch.arange(count) - (count - 1) / 2) * spacing


def warp(anatomy: Anatomy, patient: Patient, findings: tuple[Finding, ...], acquisition: Acquisition, size: int) -> Body:
    """The body of `patient`, posed and breathing as in `acquisition`, with the displacements (not yet the densities) of `findings`."""
    pitch = FIELD_MM / size
    depth = int(anatomy.hu.shape[0] * anatomy.spacing_mm[0] * patient.scale[0] / DEPTH_STEP_MM)
    shape, spacing = (depth, size, size), (DEPTH_STEP_MM, pitch, pitch)
    coarse = [torch.linspace(float(a[0]), float(a[-1]), -(-n // _COARSE)) for n, a in _axes(shape, spacing)]
    points = torch.stack(torch.meshgrid(*coarse, indexing="ij"), dim=-1)
    source = _source_points(points, anatomy, patient, findings, acquisition)
    origin, step = torch.tensor(anatomy.origin_mm), torch.tensor(anatomy.spacing_mm)
    extent = torch.tensor(anatomy.hu.shape) - 1
    grid = (((source - origin) / step) / extent * 2 - 1).flip(-1)  # grid_sample wants x, z, y in [-1, 1]
    grid = F.interpolate(grid.permute(3, 0, 1, 2)[None], size=shape, mode="trilinear", align_corners=True)[0].permute(1, 2, 3, 0)[
        None
    ]
    hu, pleura = F.grid_sample(anatomy.smooth, grid, mode="bilinear", padding_mode="border", align_corners=True)[0]
    label = F.grid_sample(anatomy.label[None, None].float(), grid, mode="nearest", padding_mode="border", align_corners=True)[
        0, 0
    ]
    return Body(hu, label.to(torch.uint8), pleura, spacing)


def _axes(shape: tuple[int, ...], spacing: tuple[float, ...]) -> list[tuple[int, torch.Tensor]]:
    return [(n, axis_mm(n, s)) for n, s in zip(shape, spacing, strict=True)]


def _source_points(
    points: torch.Tensor, anatomy: Anatomy, patient: Patient, findings: tuple[Finding, ...], acquisition: Acquisition
) -> torch.Tensor:
    """Points (y, z, x) in mm of the new body -> points in mm of the CT."""
    y, z, x = points.unbind(-1)
    z, x = z + acquisition.shift_mm[0] + 5.0, x + acquisition.shift_mm[1]
    turn, tilt = (torch.deg2rad(torch.tensor(a)) for a in (acquisition.rotation_deg, acquisition.tilt_deg))
    y, x = y * turn.cos() - x * turn.sin(), y * turn.sin() + x * turn.cos()
    z, x = z * tilt.cos() - x * tilt.sin(), z * tilt.sin() + x * tilt.cos()
    y, z, x = y / patient.scale[0], z / patient.scale[1], x / patient.scale[2]
    y, z, x = (a + d for a, d in zip((y, z, x), _smooth_field(points.shape[:3], patient), strict=True))
    x = x + _mediastinal_shift(y, z, x, findings)
    z = z - _diaphragm_shift(z, x, findings, acquisition)
    return _scale_heart(torch.stack([y, z, x], -1), anatomy, patient, findings)


def _smooth_field(shape: torch.Size, patient: Patient) -> torch.Tensor:
    """A random displacement (3 components, mm) with features of about 8 cm: no two patients have the same ribs and hila."""
    noise = torch.randn(1, 3, 5, 6, 6, generator=generator("deformation", patient.seed))
    field = F.interpolate(noise, size=tuple(shape), mode="trilinear", align_corners=True)[0]
    for axis in (1, 2, 3):  # trilinear interpolation has creases: smooth them out
        field = F.avg_pool3d(
            field[None], [1 + 4 * (axis == a) for a in (1, 2, 3)], 1, [2 * (axis == a) for a in (1, 2, 3)], False, False
        )[0]
    return field * patient.deformation_mm * torch.tensor([0.8, 1.0, 1.0]).view(3, 1, 1, 1)


def _mediastinal_shift(y: torch.Tensor, z: torch.Tensor, x: torch.Tensor, findings: tuple[Finding, ...]) -> torch.Tensor:
    """Large effusions and pneumothoraces push the mediastinum away, collapse pulls it over (mm to sample from; spine stays)."""
    total = 0.0
    for f in findings:
        away = -1.0 if f.side == "left" else 1.0  # +x is the patient's left; a right-sided process pushes to +x
        if f.name == "pleural_effusion":
            total += away * 16 * max(f.severity - 0.55, 0) / 0.45
        elif f.name == "pneumothorax":
            total += away * 12 * max(f.severity - 0.5, 0) / 0.5
        elif f.name == "atelectasis" and not f.linear:
            total -= away * (6 + 16 * f.severity)
    if total == 0.0:
        return torch.zeros_like(x)
    central = torch.exp(-((x / 75) ** 2)) * torch.sigmoid((40 - y) / 10) * torch.sigmoid((z + 110) / 15)
    return -total * central


def diaphragm_ramp(z: torch.Tensor) -> torch.Tensor:
    """How much of a breath a point `z` mm below the lungs' middle moves with: nothing at the apex, all of it at the diaphragm."""
    ramp = ((z + 70) / 115).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _diaphragm_shift(z: torch.Tensor, x: torch.Tensor, findings: tuple[Finding, ...], acquisition: Acquisition) -> torch.Tensor:
    """Downward displacement of the diaphragm in mm: breath, hyperinflation (flat and low), volume loss (high, one side)."""
    ramp = diaphragm_ramp(z)
    shift = torch.full_like(x, acquisition.inspiration_mm)
    for f in findings:
        if f.name == "hyperinflation":
            domes = torch.exp(-(((x.abs() - 62) / 38) ** 2))
            shift = shift + (12 + 16 * f.severity) * (0.5 + 0.9 * domes)
        elif f.name == "atelectasis":
            side = torch.sigmoid((x if f.side == "left" else -x) / 14)
            rise = (4 + 5 * f.severity) if f.linear else (8 + 24 * f.severity) * (1.0 if f.lobe == "lower" else 0.55)
            shift = shift - rise * side
    return shift * ramp


def _scale_heart(points: torch.Tensor, anatomy: Anatomy, patient: Patient, findings: tuple[Finding, ...]) -> torch.Tensor:
    """Widen (cardiomegaly) or narrow the heart about its centre; the effect fades out towards spine, sternum and apex."""
    scale = patient.heart_scale
    for f in findings:
        if f.name == "cardiomegaly":
            scale *= 1.16 + 0.42 * f.severity
        elif f.name == "hyperinflation":
            scale *= 1 - 0.1 * f.severity
    centre = anatomy.heart_centre_mm
    offset = points - centre
    reach = torch.tensor([75.0, 75.0, 95.0]) * max(scale, 1.0)
    near = (1 - ((offset / reach) ** 2).sum(-1)).clamp(0, 1)
    near = (near * 1.7).clamp(max=1.0)
    near = (near * near * (3 - 2 * near))[..., None]
    axis = torch.tensor([0.35, 0.55, 1.0])  # mostly sideways: depth and height are bounded by sternum, spine and diaphragm
    return centre + offset * (1 + near * axis * (1 / scale - 1))
