"""Findings, written into a body's Hounsfield units in 3D, before projection. Each returns its mask and its numbers.

Densities and shapes follow the radiographic descriptions of the Fleischner glossary (Bankier et al., Radiology 2024): fluid
settles with a meniscus, a pneumothorax is air outside a visceral line without vessels, collapse takes volume away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from medgen.digital.anatomy import LOBES
from medgen.digital.patient import Finding
from medgen.digital.warps import Body
from medgen.seeds import generator

FLUID_HU, SOFT_TISSUE_HU = 15.0, 40.0
SIGN = {"left": 1.0, "right": -1.0}  # of x towards the named side


@dataclass(frozen=True)
class Edit:
    """What a finding did: `weight` [Y,Z,X] in [0,1] says how much of each voxel it takes; `numbers` are the truth.

    `extent` [Y,Z,X] adds up to the truth in mL where `weight` does not (oedema: fluid is a part of every voxel it takes).
    """

    weight: torch.Tensor
    numbers: dict[str, float]
    extent: torch.Tensor | None = None


def apply_finding(body: Body, finding: Finding) -> Edit | None:
    """Edit `body.hu` in place. Returns None for findings that are displacement only (cardiomegaly), done by the warp."""
    edit = EDITS.get(finding.name)
    return edit(body, finding) if edit else None


def pleural_effusion(body: Body, f: Finding) -> Edit:
    """Fluid at the lung base whose surface climbs along the chest wall; `severity` 1 is about two thirds of the hemithorax."""
    y, z, _ = body.axes_mm
    lung = body.lungs[f.side or "left"]
    # gravity fills the lowest point first; capillarity and the lung's recoil raise the surface near the pleura (the meniscus)
    climb = 34 * torch.exp(-body.pleura_mm / 9) + 0.10 * y
    height = (z + climb)[lung]
    level = torch.quantile(height[:: max(1, height.numel() // 20000)], 1 - (0.035 + 0.62 * f.severity**1.3))
    weight = torch.sigmoid((z + climb - level) / 2.0) * lung
    remaining = lung & (weight < 0.5)
    body.hu = torch.where(remaining, body.hu + 110 * f.severity, body.hu)  # the lung above is compressed
    body.hu = torch.lerp(body.hu, torch.full_like(body.hu, FLUID_HU), weight)
    return Edit(weight, {"ml": _ml(body, weight)})


def pneumothorax(body: Body, f: Finding) -> Edit:
    """Air between chest wall and lung, widest at the apex, bounded by a thin visceral line; the lung shrinks and darkens less."""
    side = f.side or "left"
    _, z, x = body.axes_mm
    lung = body.lungs[side]
    centre = _centroid(body, lung)
    outward = SIGN[side] * (x - centre[2]) / 70 - (z - centre[1]) / 75  # lateral and up, not towards hilum or diaphragm
    reach = torch.sigmoid(4.0 * (outward - 0.75 + 0.75 * f.severity)) * (9 + 38 * f.severity)
    beyond = reach - body.pleura_mm  # > 0: outside the visceral pleura
    weight = torch.sigmoid(beyond / 1.2) * lung * (reach > 2)
    line = torch.exp(-((beyond / 1.5) ** 2)) * lung * torch.sigmoid((reach - 5) / 1.5)
    kept = 1 - _ml(body, weight) / max(_ml(body, lung.float()), 1e-6)
    collapsed = -1000 + (body.hu + 1000) / max(kept, 0.4)  # the same tissue in less room
    body.hu = torch.where(lung & (body.hu < -500), collapsed.clamp(max=-300), body.hu)
    wall = (body.hu > -500) & (body.pleura_mm < 4)  # partial volume with the chest wall stays wall
    body.hu = torch.where(wall, body.hu, torch.lerp(body.hu, torch.full_like(body.hu, -1000.0), weight))
    body.hu = torch.maximum(body.hu, torch.lerp(torch.full_like(body.hu, -1000.0), torch.full_like(body.hu, -300.0), line))
    return Edit(weight, {"ml": _ml(body, weight), "rim_mm": float((reach * lung).max()), "lung_fraction": 1 - kept})


def consolidation(body: Body, f: Finding) -> Edit:
    """Patchy, confluent airspace filling of one lobe with air bronchograms."""
    lobe = body.label == _lobe(f)
    weight = _patch(body, lobe, f, fraction=0.22 + 0.7 * f.severity, cells=8, edge=0.10)
    bronchograms = _noise(body, f.seed + 1, 16) > 1.3
    density = torch.where(bronchograms, torch.tensor(-550.0), torch.tensor(SOFT_TISSUE_HU - 30))
    body.hu = torch.lerp(body.hu, torch.maximum(density, body.hu), weight * (0.72 + 0.25 * f.severity))
    return Edit(weight, {"ml": _ml(body, weight)})


def nodule(body: Body, f: Finding) -> Edit:
    """A rounded opacity with a slightly lobulated edge, whole in the lung; up to 30 mm a nodule, above a mass."""
    radius = (f.diameter_mm or 20.0) / 2
    y, z, x = body.axes_mm
    centre = _middle(body, f)
    distance = ((y - centre[0]) ** 2 + (z - centre[1]) ** 2 + (x - centre[2]) ** 2).sqrt()
    lobulated = radius * (1 + 0.10 * _noise(body, f.seed, 9).clamp(-2, 2))
    weight = torch.sigmoid((lobulated - distance) / 1.1) * (body.pleura_mm > 0)
    body.hu = torch.lerp(body.hu, torch.full_like(body.hu, 90.0), weight)
    return Edit(weight, {"mm": 2 * radius, "ml": _ml(body, weight)})


def _middle(body: Body, f: Finding) -> list[float]:
    """The coordinates (y, z, x) in mm of the middle of a nodule or consolidation: its stored place, else one drawn from its seed."""
    lobe = body.label == _lobe(f)
    if f.place is not None:
        centre, spread = _frame(body, lobe)
        return [c + p * s for c, p, s in zip(centre, f.place, spread, strict=True)]
    if f.name == "nodule":  # room for the whole nodule, and not hidden behind the heart or below the dome
        radius = (f.diameter_mm or 20.0) / 2
        _, z, x = body.axes_mm
        visible = lobe & (body.pleura_mm > min(radius * 0.8, 0.8 * float((body.pleura_mm * lobe).max())))
        visible = visible & (x.abs() > 42) & (z < 25) & (z > -105)
        lobe = visible if bool(visible.any()) else lobe
    places = lobe.nonzero()
    if len(places) == 0:
        raise ValueError(f"no {f.side} {f.lobe} lobe in the body for {f.name}")
    purpose = "nodule" if f.name == "nodule" else "patch"
    pick = places[int(torch.randint(len(places), (1,), generator=generator(purpose, f.seed)))]
    return [float(axis.flatten()[i]) for axis, i in zip(body.axes_mm, pick.tolist(), strict=True)]


def relative_place(body: Body, f: Finding) -> tuple[float, float, float]:
    """Where `f` would be drawn in `body`, relative to its lobe: store it as `Finding.place`, and other poses and sizes agree."""
    centre, spread = _frame(body, body.label == _lobe(f))
    y, z, x = ((m - c) / s for m, c, s in zip(_middle(body, f), centre, spread, strict=True))
    return (y, z, x)


def _frame(body: Body, region: torch.Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation in mm of the voxels of `region` along y, z and x."""
    mean, spread = [], []
    total = float(region.sum())
    for axis, others in zip(body.axes_mm, ((1, 2), (0, 2), (0, 1)), strict=True):
        counts, at = region.sum(others).float(), axis.flatten()
        mean.append(float((counts * at).sum()) / total)
        spread.append((float((counts * (at - mean[-1]) ** 2).sum()) / total) ** 0.5)
    return mean, spread


def edema(body: Body, f: Finding) -> Edit:
    """Bat-wing haze around the hila, worse at the bases, with fuller vessels; both lungs."""
    y, z, x = body.axes_mm
    lungs = body.lungs["left"] | body.lungs["right"]
    hilar = torch.exp(-(((x.abs() - 38) / 46) ** 2) - ((z - 5) / 75) ** 2 - ((y - 5) / 90) ** 2)
    texture = (1 + 0.35 * _noise(body, f.seed, 14)).clamp(0.2, 2)
    weight = ((0.12 + hilar) * (1 + 0.4 * (z / 100).clamp(-1, 1)) * texture * lungs).clamp(0, 1)
    vessels = ((body.hu + 780) / 400).clamp(0, 1)
    haze = weight * (230 + 520 * f.severity) + vessels * (100 + 250 * f.severity)
    body.hu = torch.where(lungs, torch.maximum(body.hu, (body.hu + haze).clamp(max=SOFT_TISSUE_HU)), body.hu)
    fluid = weight * (0.23 + 0.52 * f.severity)
    return Edit(weight * (weight > 0.25), {"ml": _ml(body, fluid)}, fluid)


def atelectasis(body: Body, f: Finding) -> Edit:
    """Airless lung: a dense, shrunken lobe (the warp takes the volume away), or one to three plates above the diaphragm."""
    side = f.side or "left"
    y, z, x = body.axes_mm
    lung = body.lungs[side]
    if not f.linear:
        lobe = (body.label == _lobe(f)) & lung
        # a lobe collapses towards the hilum: what is far from the midline stays aerated by its neighbours
        medial = torch.sigmoid(((36 + 44 * f.severity) - x.abs()) / 7)
        away = (
            torch.sigmoid((z - 8 + 30 * (1 - f.severity)) / 9)
            if f.lobe == "lower"
            else torch.sigmoid((-35 + 30 * f.severity - z) / 9)
        )
        weight = lobe * medial * away
        body.hu = torch.lerp(body.hu, torch.full_like(body.hu, SOFT_TISSUE_HU), weight * (0.75 + 0.25 * f.severity))
        return Edit(weight, {"ml": _ml(body, weight)})
    draw = generator("plates", f.seed)
    base = float(torch.quantile((z.expand_as(lung)[lung])[::50], 0.80))
    weight = torch.zeros_like(body.hu)
    for k in range(1 + round(2 * f.severity)):
        r = torch.rand(3, generator=draw).tolist()
        tilt = SIGN[side] * (0.10 + 0.25 * r[0])
        middle = base - 8 - 15 * k - 6 * r[1]
        bow = 0.0012 * (x - SIGN[side] * 65) ** 2
        plate = torch.exp(-(((z - middle - tilt * (x - SIGN[side] * 65) - bow) / (1.8 + 1.4 * f.severity)) ** 2))
        inner = torch.exp(-(((x - SIGN[side] * (58 + 20 * r[2])) / (26 + 16 * f.severity)) ** 4)) * torch.exp(
            -(((y - 5) / 60) ** 4)
        )
        weight = torch.maximum(weight, plate * inner)
    weight = weight * lung
    body.hu = torch.lerp(body.hu, torch.full_like(body.hu, -180.0), weight)
    return Edit(weight, {"ml": _ml(body, weight)})


def hyperinflation(body: Body, f: Finding) -> Edit:
    """Lungs that hold too much air: emptier parenchyma and thinned vessels (the warp lowers and flattens the diaphragm)."""
    lungs = body.lungs["left"] | body.lungs["right"]
    body.hu = torch.where(lungs, -1000 + (body.hu + 1000) * (1 - 0.38 * f.severity), body.hu)
    return Edit(lungs.float(), {"ml": _ml(body, lungs.float())})


EDITS: dict[str, Callable[[Body, Finding], Edit]] = {
    "pleural_effusion": pleural_effusion, "pneumothorax": pneumothorax, "consolidation": consolidation, "nodule": nodule,
    "edema": edema, "atelectasis": atelectasis, "hyperinflation": hyperinflation,
}  # fmt: skip


def add_breasts(body: Body, radius_mm: float) -> None:
    """Soft tissue in front of the chest wall, which veils the lower zones of many women's films."""
    if radius_mm <= 0:
        return
    y, z, x = body.axes_mm
    skin = (body.label > 0).float().flatten(1).amax(1)
    front = float(y.flatten()[int(skin.argmax())])
    weight = torch.zeros_like(body.hu)
    for side in SIGN.values():
        r2 = (
            ((x - side * 72) / (radius_mm + 28)) ** 2
            + ((z - 30) / (radius_mm + 26)) ** 2
            + ((y - front - 8) / (radius_mm + 6)) ** 2
        )
        weight = torch.maximum(weight, torch.sigmoid((1 - r2) / 0.12))
    body.hu = torch.where(
        (body.label == 0) & (body.hu < -400), torch.lerp(body.hu, torch.full_like(body.hu, -40.0), weight), body.hu
    )


def _lobe(f: Finding) -> int:
    if f.side == "left" and f.lobe == "middle":
        raise ValueError("the left lung has no middle lobe: use upper or lower")
    return LOBES[f"{f.side} {f.lobe}"]


def _ml(body: Body, weight: torch.Tensor) -> float:
    return float(weight.sum()) * body.voxel_ml


def _centroid(body: Body, mask: torch.Tensor) -> list[float]:
    where = mask.nonzero().float().mean(0)
    return [float(axis.flatten()[round(float(i))]) for axis, i in zip(body.axes_mm, where, strict=True)]


def _noise(body: Body, seed: int, cells: int) -> torch.Tensor:
    """Smooth standard-normal-like noise with `cells` features across the film."""
    depth = max(2, round(cells * body.hu.shape[0] * body.spacing_mm[0] / (body.hu.shape[2] * body.spacing_mm[2])))
    return _texture(tuple(body.hu.shape), depth, cells, seed)


@lru_cache(maxsize=6)  # a patient's next visit has the same textures
def _texture(shape: tuple[int, ...], depth: int, cells: int, seed: int) -> torch.Tensor:
    coarse = torch.randn(1, 1, depth, cells, cells, generator=generator("texture", seed))
    return F.interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0, 0] * 1.5


def _patch(body: Body, region: torch.Tensor, f: Finding, fraction: float, cells: int, edge: float) -> torch.Tensor:
    """An irregular part of `region` that takes about `fraction` of it, grown from a seeded place inside."""
    y, z, x = body.axes_mm
    cy, cz, cx = _middle(body, f)
    closeness = -(((y - cy) / 70) ** 2 + ((z - cz) / 50) ** 2 + ((x - cx) / 50) ** 2).sqrt() + 0.34 * _noise(body, f.seed, cells)
    inside = closeness[region]
    level = torch.quantile(inside[:: max(1, inside.numel() // 20000)], 1 - min(fraction, 0.98))
    return torch.sigmoid((closeness - level) / edge) * region
