"""The film meter: how many millimetres of heart, lungs, fluid and disease every ray of a chest film crosses.

It judges generated films: millilitres, cubic millimetres and the cardiothoracic ratio come from its maps. It sees one film at a
time, so that a smooth course over visits is the films' own doing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from medgen.models.folded_unet import FoldedUNet

EXTENTS = ("heart", "lungs", "pleural_effusion", "consolidation", "nodule", "edema")
"""The maps, in this order, in thickness files and in what the meter returns."""
EDGE_MM = 15.0
"""A ray passes through heart or lungs where the meter sees more than this much of them: well above its noise; `ratio` makes up for it."""
FLOOR_MM = 3.0
"""Less than this much of a finding on a ray is noise."""
IDENTITY_GRID = 8
"""Cells along a side of the heart and lung maps by which a person is known again."""
_FINDINGS = slice(2, None)  # of EXTENTS
_SCALE_MM = (60.0, 80.0, 40.0, 40.0, 20.0, 10.0)  # typical values: what a logit of 1 roughly means
_PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"


class FilmMeter(FoldedUNet):
    """Films [N,1,H,W] in [-1,1] → mm maps [N,6,H/2,W/2] ≥ 0 of `EXTENTS`; H, W multiples of `patch_size * 2 ** (levels - 1)`.

    `field_mm` is the width of the film at the detector. A map's sum times the pixel's area is a volume; `calibration` (one factor
    per extent, fitted to the training films) corrects it; `ratio` (slope and offset) the cardiothoracic ratio. `patients` says who it
    learned from.

    Its features are for telling persons apart, not findings: coarse maps of heart and lungs, projected to `identity_dim` directions in
    which patients differ most by the measure of one patient's visits (fitted at export; 0: not projected).
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        patch_size: int = 4,
        channels: Sequence[int] = (32, 48, 64, 96),
        norm_groups: int = 8,
        field_mm: float = 315.0,
        calibration: Sequence[float] = (1.0,) * len(EXTENTS),
        ratio: Sequence[float] = (1.0, 0.0),
        identity_dim: int = 0,
        patients: str = "",
    ) -> None:
        if patch_size % 2:
            raise ValueError(f"patch_size must be even (maps are half as large as the film), got {patch_size}")
        if len(calibration) != len(EXTENTS):
            raise ValueError(f"{len(calibration)} calibration factors for the {len(EXTENTS)} extents {', '.join(EXTENTS)}")
        super().__init__(image_size, patch_size, channels, norm_groups, outputs=len(EXTENTS), unfold=patch_size // 2)
        self.identity = nn.Linear(2 * IDENTITY_GRID**2, identity_dim) if identity_dim else nn.Identity()

    @property
    def feature_dim(self) -> int:
        return int(self.config["identity_dim"]) or 2 * IDENTITY_GRID**2

    def forward(self, films: Tensor) -> Tensor:
        return self.thickness_and_features(films)[0]

    def thickness_and_features(self, films: Tensor) -> tuple[Tensor, Tensor]:
        """mm maps [N,6,H/2,W/2], and features [N,feature_dim]."""
        logits, _ = self.with_features(films)
        scale = torch.tensor(_SCALE_MM, device=logits.device, dtype=logits.dtype).view(1, -1, 1, 1)
        maps = logits * scale
        if not self.training:  # no squashing while it learns: most rays cross none of most findings, and a softplus dies there
            findings = maps[:, _FINDINGS]
            maps = torch.cat([maps[:, : _FINDINGS.start].clamp(min=0), findings * (findings > FLOOR_MM)], 1)
        return maps, cast(Tensor, self.identity(silhouette(maps)))

    def features(self, films: Tensor) -> Tensor:
        """Features [N,feature_dim] of films [N,1,H,W] in [-1,1], by which a person is known again."""
        return self.thickness_and_features(films)[1]

    def volumes(self, maps: Tensor) -> Tensor:
        """mL of every extent [N,6], from mm maps [N,6,h,w] of whole films."""
        factors = torch.tensor(cast("Sequence[float]", self.config["calibration"]), device=maps.device, dtype=maps.dtype)
        return volumes_ml(maps, float(self.config["field_mm"])) * factors

    @torch.no_grad()
    def measure(self, films: Tensor) -> dict[str, Tensor]:
        """The biomarkers of `medgen.data.visit_records.BIOMARKERS`, each [N], of films [N,1,H,W] in [-1,1].

        The ratio is NaN where there is no lung to be seen.
        """
        return self.biomarkers(self(films).float())

    def biomarkers(self, maps: Tensor) -> dict[str, Tensor]:
        """The same from the maps [N,6,h,w] that the film gave."""
        ml = dict(zip(EXTENTS, self.volumes(maps).unbind(1), strict=True))
        slope, offset = cast("Sequence[float]", self.config["ratio"])
        filled = sum(ml[name] for name in ("pleural_effusion", "consolidation", "nodule", "edema"))
        return {
            "pleural_effusion_ml": ml["pleural_effusion"],
            "consolidation_ml": ml["consolidation"],
            "edema_ml": ml["edema"],
            "nodule_mm3": ml["nodule"] * 1000,
            "cardiothoracic_ratio": slope * cardiothoracic_ratio(maps[:, 0], maps[:, 1]) + offset,
            "aerated_lung_ml": (ml["lungs"] - filled).clamp(min=0),
        }


def silhouette(maps: Tensor) -> Tensor:
    """Heart and lungs in decimetres on a coarse grid, [N,2·8²], of mm maps [N,6,h,w]: anatomy, hardly disease."""
    return functional.adaptive_avg_pool2d(maps[:, : _FINDINGS.start], IDENTITY_GRID).flatten(1) / 100


def volumes_ml(maps: Tensor, field_mm: float) -> Tensor:
    """Sums of mm maps [N,K,h,w] over a film `field_mm` wide, as mL [N,K]."""
    return maps.sum((2, 3)) * (field_mm / maps.shape[-1]) ** 2 / 1000


def cardiothoracic_ratio(heart: Tensor, lungs: Tensor) -> Tensor:
    """Greatest width of the heart over greatest inner width of the thorax [N], from their mm maps [N,h,w]; NaN without lungs.

    Edges lie where the thickest ray of a column passes `EDGE_MM`, interpolated between columns.
    """
    return _width(heart) / _width(lungs).where((lungs > EDGE_MM).flatten(1).any(1), torch.nan)


def _width(maps: Tensor) -> Tensor:
    """Columns [N] from the first to the last crossing of `EDGE_MM` by the column maxima of [N,h,w]."""
    profile = functional.pad(maps.amax(1), (1, 1))  # [N,w+2], zero at both ends
    inside = profile > EDGE_MM

    def edge(values: Tensor, within: Tensor) -> Tensor:
        first = within.float().argmax(1, keepdim=True).clamp(min=1)
        outer, inner = values.gather(1, first - 1)[:, 0], values.gather(1, first)[:, 0]
        return first[:, 0] - (inner - EDGE_MM) / (inner - outer).clamp(min=1e-6)

    span = profile.shape[1] - 1 - edge(profile, inside) - edge(profile.flip(1), inside.flip(1))
    return torch.where(inside.any(1), span, torch.zeros_like(span))


def load_film_meter(source: str | Path = "digital_progression_judge", device: torch.device | str | None = None) -> FilmMeter:
    """The meter in a folder, or a shipped one by name, in float32 and evaluation mode. Raises `FileNotFoundError` if it is not there."""
    folder = Path(source) if (Path(source) / "config.json").is_file() else _PRETRAINED / str(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no film meter at {source} (neither a folder with config.json nor a shipped model); train one: "
            "medgen train film-meter --config configs/film_meter/digital_progression.yaml"
        )
    model = FilmMeter.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    assert isinstance(model, FilmMeter)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def as_row(readings: Mapping[str, Tensor], index: int) -> dict[str, float]:
    """The biomarkers of one film out of `measure`'s answer."""
    return {name: float(values[index]) for name, values in readings.items()}
