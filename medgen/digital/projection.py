"""X-ray films of a body: cone-beam projection as one batch of matrix products, then what detector and display do to it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F

from medgen.digital.patient import Acquisition
from medgen.digital.site import SITES, Site
from medgen.digital.warps import FIELD_MM, axis_mm, diaphragm_ramp
from medgen.seeds import generator

WATER_PER_MM = 0.0195  # linear attenuation of water near 70 keV effective (NIST XCOM: 0.193 /cm)
SOURCE_DETECTOR_MM = {"PA": 1800.0, "AP": 1100.0}
DETECTOR_GAP_MM = 30.0  # from the skin to the detector


def attenuation(hu: torch.Tensor) -> torch.Tensor:
    """Linear attenuation in 1/mm from Hounsfield units; bone attenuates more than its HU at a film's softer spectrum."""
    relative = (1 + hu / 1000).clamp(min=0)
    return WATER_PER_MM * (relative + 0.2 * (hu - 150).clamp(0, 1200) / 1000)


def project(volumes: torch.Tensor, spacing_mm: tuple[float, float, float], view: str) -> torch.Tensor:
    """Line integrals along the rays of `view` for volumes [B,Y,Z,X] with `spacing_mm` -> [B,Z,X], in the volumes' unit times mm.

    The rays of a cone beam meet each coronal slice magnified by its distance to the detector, so a projection is a sum of
    rescaled slices (shear-warp factorisation, Lacroute & Levoy 1994), and rescaling is two matrix products.
    """
    rows, columns = _rescaling(tuple(volumes.shape[1:]), spacing_mm, view)
    scaled = torch.matmul(torch.matmul(rows, volumes), columns)
    return scaled.sum(1) * spacing_mm[0]


def project_posed(
    volumes: torch.Tensor,
    spacing_mm: tuple[float, float, float],
    view: str,
    turn_deg: float,
    tilt_deg: float,
    shift_mm: tuple[float, float],
    breath_mm: float,
) -> torch.Tensor:
    """`project` of a body that stands and breathes a little differently, without moving its voxels: small poses only.

    To first order a turn about the long axis shears columns with depth, a deeper breath stretches the lower rows, a shift moves both:
    all are where a film's pixel looks in a slice. A tilt turns the film, which commutes with the cone beam.
    """
    y, z, x = volumes.shape[1:]
    rows, columns = _lines_of_sight((y, z, x), spacing_mm, view, math.sin(math.radians(turn_deg)), shift_mm, breath_mm)
    film = torch.matmul(torch.matmul(rows, volumes), columns).sum(1) * spacing_mm[0]
    cos, sin = math.cos(math.radians(tilt_deg)), math.sin(math.radians(tilt_deg))
    turn = torch.tensor([[[cos, sin, 0.0], [-sin, cos, 0.0]]])  # of (x, z)
    grid = F.affine_grid(turn, [1, 1, *film.shape[1:]], align_corners=False)
    return F.grid_sample(film[None], grid, padding_mode="border", align_corners=False)[0]


@lru_cache(maxsize=32)
def _rescaling(shape: tuple[int, int, int], spacing: tuple[float, float, float], view: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _lines_of_sight(shape, spacing, view, 0.0, (0.0, 0.0), 0.0)


def _lines_of_sight(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    view: str,
    shear: float,
    shift_mm: tuple[float, float],
    breath_mm: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolation matrices [Y,Z,Z] and [Y,X,X]: film pixel <- voxel, one pair for every depth."""
    depth = axis_mm(shape[0], spacing[0])
    to_detector = depth - depth[0] if view == "PA" else depth[-1] - depth  # PA: the detector touches the chest's front
    distance = SOURCE_DETECTOR_MM[view]
    magnification = distance / (distance - to_detector - DETECTOR_GAP_MM)

    def seen(count: int) -> torch.Tensor:  # [Y,count] mm in every slice
        return axis_mm(count, FIELD_MM / count)[None] / magnification[:, None]

    def matrices(mm: torch.Tensor, step: float) -> torch.Tensor:
        count = mm.shape[1]
        position = mm / step + (count - 1) / 2  # in voxels
        return (1 - (position[..., None] - torch.arange(count)).abs()).clamp(min=0)

    z, x = seen(shape[1]) + shift_mm[0], seen(shape[2]) + shift_mm[1] + shear * depth[:, None]
    z = z - breath_mm * diaphragm_ramp(z)
    return matrices(z, spacing[1]), matrices(x, spacing[2]).transpose(1, 2).contiguous()


def develop(integral: torch.Tensor, acquisition: Acquisition, site: Site = SITES["A"]) -> torch.Tensor:
    """Film [Z,X] in [0,1] (bright = dense) from line integrals [Z,X]: scatter, detector noise, tone curve, edge enhancement."""
    size = integral.shape[-1]
    primary = torch.exp(-integral)
    scatter = site.scatter * _blur(primary, 0.12 * size)
    log_signal = -torch.log(_detected(primary + scatter, acquisition.seed, site) + 1e-4)
    chest = log_signal[integral > 0.5] if bool((integral > 0.5).any()) else log_signal.flatten()
    low, high = torch.quantile(chest[:: max(1, chest.numel() // 4096)], torch.tensor(site.percentiles)).tolist()
    tone = (log_signal - low) / (high - low) * 0.72 + 0.14
    coarse, fine = site.edges
    tone = tone + coarse * (tone - _blur(tone, 0.05 * size)) + fine * (tone - _blur(tone, 0.012 * size))
    tone = (tone - 0.5) * acquisition.contrast + 0.5 + acquisition.exposure
    noise = torch.randn(integral.shape, generator=generator("film noise", acquisition.seed))
    tone = tone + acquisition.noise * (128 / size) ** -0.5 * noise
    if site.sigmoid:
        tone = torch.sigmoid(4 * (tone - 0.5) / site.sigmoid)
    # a film never clips abruptly: shoulder and toe
    film = torch.where(
        tone > 0.85,
        0.85 + 0.15 * torch.tanh((tone - 0.85) / 0.15),
        torch.where(tone < 0.1, 0.1 * torch.exp((tone - 0.1) / 0.1), tone),
    ).clamp(0, 1)
    return film * _shutter(size, acquisition.seed, site.collimation_mm) if site.collimation_mm else film


def _detected(signal: torch.Tensor, seed: int, site: Site) -> torch.Tensor:
    """What a site's detector makes of the `signal` [Z,X] (1 = open beam): its point spread, then its noise."""
    pixel_mm = FIELD_MM / signal.shape[-1]
    if site.blur_mm:
        signal = _blur(signal, site.blur_mm / pixel_mm)
    if site.quanta:
        variance = signal / site.quanta + site.electronic**2  # in 1 mm2; averaging over a pixel's area divides it
        draw = torch.randn(signal.shape, generator=generator("detector noise", seed))
        signal = (signal + variance.sqrt() / pixel_mm * draw).clamp(min=0)
    return signal


def _shutter(size: int, seed: int, most_mm: float) -> torch.Tensor:
    """Black edges [Z,X] of a collimated film: 0 outside, 1 inside, each side drawn between nothing and `most_mm`."""
    draw = torch.rand(2, 2, generator=generator("collimation", seed)) * most_mm
    mm = (torch.arange(size) + 0.5) * FIELD_MM / size
    rows, columns = (((mm > first) & (FIELD_MM - mm > last)).float() for first, last in draw)
    return rows[:, None] * columns


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = max(1, int(2.5 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(image[None, None], (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[0, 0]
