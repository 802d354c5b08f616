"""X-ray films of a body: cone-beam projection as one batch of matrix products, then what detector and display do to it."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from medgen.digital.patient import Acquisition
from medgen.digital.warps import FIELD_MM, axis_mm
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


@lru_cache(maxsize=32)
def _rescaling(shape: tuple[int, int, int], spacing: tuple[float, float, float], view: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Interpolation matrices [Y,Z,Z] and [Y,X,X]: film pixel <- voxel, one pair for every depth."""
    depth = axis_mm(shape[0], spacing[0])
    to_detector = depth - depth[0] if view == "PA" else depth[-1] - depth  # PA: the detector touches the chest's front
    distance = SOURCE_DETECTOR_MM[view]
    magnification = distance / (distance - to_detector - DETECTOR_GAP_MM)

    def matrices(count: int, step: float) -> torch.Tensor:
        pixel = axis_mm(count, FIELD_MM / count)
        position = pixel[None] / magnification[:, None] / step + (count - 1) / 2  # in voxels
        return (1 - (position[..., None] - torch.arange(count)).abs()).clamp(min=0)

    return matrices(shape[1], spacing[1]), matrices(shape[2], spacing[2]).transpose(1, 2).contiguous()


def develop(integral: torch.Tensor, acquisition: Acquisition) -> torch.Tensor:
    """Film [Z,X] in [0,1] (bright = dense) from line integrals [Z,X]: scatter, detector noise, tone curve, edge enhancement."""
    size = integral.shape[-1]
    primary = torch.exp(-integral)
    scatter = 0.06 * _blur(primary, 0.12 * size)
    log_signal = -torch.log(primary + scatter + 1e-4)
    chest = log_signal[integral > 0.5] if bool((integral > 0.5).any()) else log_signal.flatten()
    low, high = torch.quantile(chest[:: max(1, chest.numel() // 4096)], torch.tensor([0.03, 0.96])).tolist()
    tone = (log_signal - low) / (high - low) * 0.72 + 0.14
    tone = tone + 0.55 * (tone - _blur(tone, 0.05 * size)) + 0.35 * (tone - _blur(tone, 0.012 * size))
    tone = (tone - 0.5) * acquisition.contrast + 0.5 + acquisition.exposure
    noise = torch.randn(integral.shape, generator=generator("film noise", acquisition.seed))
    tone = tone + acquisition.noise * (128 / size) ** -0.5 * noise
    # a film never clips abruptly: shoulder and toe
    return torch.where(
        tone > 0.85,
        0.85 + 0.15 * torch.tanh((tone - 0.85) / 0.15),
        torch.where(tone < 0.1, 0.1 * torch.exp((tone - 0.1) / 0.1), tone),
    ).clamp(0, 1)


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = max(1, int(2.5 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(image[None, None], (radius, radius, radius, radius), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[0, 0]
