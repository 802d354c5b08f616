"""The film meter's task: films of digital follow-ups with mm maps → a folder that reads millilitres off generated films.

Augmentation changes exposure, contrast, noise and sharpness, never where anything lies or how large it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from pydantic import Field
from scipy.linalg import eigh
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from medgen.config import Config, ConfigError
from medgen.data.images import load_image
from medgen.data.records import Manifest, read_manifest
from medgen.data.visit_records import BIOMARKERS, Visit, VisitSeries
from medgen.models.film_meter import EXTENTS, FilmMeter, cardiothoracic_ratio, silhouette, volumes_ml
from medgen.tasks.base import TrainConfig
from medgen.tasks.segmenter import MachineAugmentation, augment

MAP_MM = (60.0, 80.0, 30.0, 20.0, 5.0, 10.0)  # an error of so many mm on a ray costs the same in every map of EXTENTS
IDENTITY_DIM = 48
VOLUME_ML = (250.0, 1500.0, 200.0, 200.0, 20.0, 150.0)  # and so many mL on a film
_TRUTH = {"pleural_effusion_ml": 1.0, "consolidation_ml": 1.0, "nodule_mm3": 1e-3, "edema_ml": 1.0}  # of EXTENTS[2:], to mL


class FilmMeterData(Config):
    """Films to learn from: visits whose `extra["thickness"]` names a .npz with `mm` uint8 [6,H/2,W/2] of `EXTENTS`."""

    manifest: Path = Field(..., description="a manifest of visit series (2D) with splits train and val")
    size: int = Field(128, ge=16, description="side of the films in pixels")
    field_mm: float = Field(315.0, gt=0, description="width of the film at the detector")


class FilmMeterModel(Config):
    """Shape of the network; see `FilmMeter`."""

    patch_size: int = Field(4, gt=0)
    channels: tuple[int, ...] = (32, 48, 64, 96)
    norm_groups: int = Field(8, gt=0)


class FilmMeterRecipe(Config):
    """`medgen train film-meter --config ...`."""

    data: FilmMeterData
    model: FilmMeterModel = FilmMeterModel()
    augmentation: MachineAugmentation = MachineAugmentation(contrast=0.12, brightness=0.1, noise=0.05, blur=0.5)
    volume_weight: float = Field(
        0.02,
        ge=0,
        description="weight of the error of whole volumes; it pulls all rays at once, so that 0.5 would drown the maps",
    )
    train: TrainConfig


class MeasuredFilms(Dataset[dict[str, Any]]):
    """{"id", "film" [1,S,S] in [-1,1], "mm" [6,S/2,S/2] float32} of every imaged visit that has a thickness file.

    Raises `ConfigError` where no visit has one.
    """

    def __init__(self, manifest: Manifest[VisitSeries], data: FilmMeterData) -> None:
        self.visits = [(series, visit) for series in manifest.records for visit in series.imaged if "thickness" in visit.extra]
        if not self.visits:
            raise ConfigError(
                f"{data.manifest}: none of the visits of its {len(manifest)} series has a thickness file "
                '(extra["thickness"], which `medgen digital progression --dim 2` writes)'
            )
        self.root, self.data, self.fingerprint = manifest.root, data, manifest.sha256

    def __len__(self) -> int:
        return len(self.visits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        series, visit = self.visits[index]
        maps = read_thickness(self.root / str(visit.extra["thickness"]), self.data.size // 2)
        film = load_image(self.root / str(visit.image), self.data.size)
        return {"id": f"{series.record_id}/{visit.visit_id}", "film": film, "mm": in_the_body(maps, visit, self.data.field_mm)}


def read_thickness(path: Path, side: int) -> Tensor:
    """`mm` of a thickness file, float32 [6,side,side]. Raises `ConfigError` for another shape or type."""
    with np.load(path, allow_pickle=False) as arrays:
        mm = arrays.get("mm")
    if mm is None or mm.shape != (len(EXTENTS), side, side) or mm.dtype != np.uint8:
        found = "no array mm" if mm is None else f"mm {mm.dtype} {list(mm.shape)}"
        raise ConfigError(f"{path} holds {found}; expected uint8 {[len(EXTENTS), side, side]}: {', '.join(EXTENTS)}")
    return torch.from_numpy(mm).float()


def in_the_body(maps: Tensor, visit: Visit, field_mm: float) -> Tensor:
    """mm maps [6,h,w] that sum to the visit's true volumes, as far as `visit.truth` has them; the heart's stay as they are.

    A film magnifies what is far from the detector, and AP more than PA: the raw sums are 20 to 40 % too large. Lungs become what
    is aerated and what fills the rest.
    """
    seen = volumes_ml(maps[None], field_mm)[0]
    filled = [float(visit.truth.get(name, torch.nan)) * unit for name, unit in _TRUTH.items()]
    lungs = float(visit.truth.get("aerated_lung_ml", torch.nan)) + sum(filled)
    true = torch.tensor([torch.nan, lungs, *filled])
    factors = torch.where((seen > 0.5) & (true > 0), true / seen.clamp(min=0.5), torch.ones(len(true)))
    return maps * factors.clamp(0.5, 1.5)[:, None, None]


class FilmMeterTask:
    """Task: squared error of the mm on every ray, and how far the volumes that they add up to are off."""

    name = "film-meter"

    def __init__(self, recipe: FilmMeterRecipe) -> None:
        self.recipe = recipe
        self.manifest = read_manifest(recipe.data.manifest, "train", record=VisitSeries)

    def modules(self) -> dict[str, nn.Module]:
        shape = self.recipe.model.model_dump()
        return {"model": FilmMeter(image_size=self.recipe.data.size, field_mm=self.recipe.data.field_mm, **shape)}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        if split == "train":
            return MeasuredFilms(self.manifest, self.recipe.data)
        if all(record.split != "val" for record in read_manifest(self.recipe.data.manifest, record=VisitSeries).records):
            return []
        return MeasuredFilms(read_manifest(self.recipe.data.manifest, "val", record=VisitSeries), self.recipe.data)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """films [B,1,S,S] in [-1,1], mm [B,6,S/2,S/2], ids."""
        films, mm = (torch.stack([item[key] for item in items]) for key in ("film", "mm"))
        return {"ids": [str(item["id"]) for item in items], "films": films, "mm": mm}

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        model, films, true = modules[which], batch["films"], batch["mm"]
        assert isinstance(model, FilmMeter)
        if model.training:
            films = augment(films, self.recipe.augmentation, generator)
        seen = model(films).float()
        rays, volumes = losses(seen, true, self.recipe.data.field_mm)
        errors = (
            (volumes_ml(seen.detach(), self.recipe.data.field_mm) - volumes_ml(true, self.recipe.data.field_mm)).abs().mean(0)
        )
        logs = {"rays": rays.detach(), "volumes": volumes.detach()}
        logs |= {f"{name}_ml": error for name, error in zip(EXTENTS, errors, strict=True)}
        return rays + self.recipe.volume_weight * volumes, cast("dict[str, float | Tensor]", logs)

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        return {}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The meter in float16, calibrated on the training films; a model card with its errors on the validation patients."""
        model = modules["model"]
        assert isinstance(model, FilmMeter)
        validation = self.dataset("val")
        if not len(validation):
            raise ConfigError(f"{self.recipe.data.manifest} has no 'val' split: the judge's errors need one")
        fitted, weight, bias = self._fitted(model, self.dataset("train"))
        patients = f"{self.manifest.name} ({self.manifest.sha256[:12]})"
        fields = {key: value for key, value in model.config.items() if not key.startswith("_")}  # not diffusers' private ones
        shipped = FilmMeter.from_config({**fields, **fitted, "identity_dim": len(weight), "patients": patients})
        shipped.load_state_dict({**model.state_dict(), "identity.weight": weight, "identity.bias": bias})
        shipped = shipped.to(next(model.parameters()).device).eval()
        facts = {"films": len(validation), "biomarkers": self._agreement(shipped, validation)}
        facts["calibration"] = dict(zip(EXTENTS, fitted["calibration"], strict=True))
        nn.Module.half(shipped)  # diffusers' own `half` warns about modules to keep in float32, of which there are none
        shipped.save_pretrained(folder)
        (folder / "validation.json").write_text(json.dumps(facts, indent=1))
        (folder / "README.md").write_text(model_card(facts, self.recipe, self.manifest.name))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        return None  # nothing frozen

    @torch.no_grad()
    def _fitted(self, model: FilmMeter, data: MeasuredFilms) -> tuple[dict[str, list[float]], Tensor, Tensor]:
        """What the configuration gains: a factor for each extent's mL, and the line from the ratio as seen to the true one.

        Also weight [F,D] and bias [F] of the projection by which persons are told apart.
        """
        seen, true, ratios, persons = [], [], [], []
        for batch in self._batches(data):
            maps = model(batch["films"].to(model.device)).float()
            seen.append(volumes_ml(maps, self.recipe.data.field_mm).cpu())
            true.append(volumes_ml(batch["mm"], self.recipe.data.field_mm))
            ratios.append(cardiothoracic_ratio(maps[:, 0], maps[:, 1]).cpu())
            persons.append(silhouette(maps).cpu())
        found = torch.cat(ratios).double().numpy()
        wanted = np.array([float(visit.truth.get("cardiothoracic_ratio", np.nan)) for _, visit in data.visits])
        known = np.isfinite(found) & np.isfinite(wanted)
        line = np.polyfit(found[known], wanted[known], 1) if known.sum() > 2 and found[known].std() > 0 else (1.0, 0.0)
        fitted = {"calibration": calibration(torch.cat(seen), torch.cat(true)), "ratio": [round(float(v), 5) for v in line]}
        return fitted, *identity_projection(torch.cat(persons), [series.patient_id for series, _ in data.visits])

    def _agreement(self, model: FilmMeter, data: MeasuredFilms) -> dict[str, dict[str, float | None]]:
        """MAE and correlation of every biomarker with the visits' truth; None where the truth does not vary."""
        parts = [model.measure(batch["films"].to(model.device)) for batch in self._batches(data)]
        truths = [visit.truth for _, visit in data.visits]
        result: dict[str, dict[str, float | None]] = {}
        for name in BIOMARKERS:
            seen = torch.cat([part[name] for part in parts]).double().cpu().numpy()
            true = np.array([float(truth.get(name, np.nan)) for truth in truths])
            known = np.isfinite(seen) & np.isfinite(true)
            if not known.any():
                continue
            varies = known.sum() > 2 and seen[known].std() > 0 and true[known].std() > 0
            r = float(np.corrcoef(seen[known], true[known])[0, 1]) if varies else None
            result[name] = {"mae": float(np.abs(seen - true)[known].mean()), "r": r, "mean": float(true[known].mean())}
        return result

    def _batches(self, data: MeasuredFilms) -> Any:
        size = max(self.recipe.train.batch_size, 32)
        for start in range(0, len(data), size):
            yield self.collate([data[i] for i in range(start, min(start + size, len(data)))])


def losses(seen: Tensor, true: Tensor, field_mm: float) -> tuple[Tensor, Tensor]:
    """Squared error of mm maps [B,6,h,w] ray by ray in units of `MAP_MM`; smooth L1 of their volumes in units of `VOLUME_ML`.

    Squared, not absolute: the median of a map that is empty on most rays is an empty map.
    """
    scale = torch.tensor(MAP_MM, device=seen.device).view(1, -1, 1, 1)
    unit = torch.tensor(VOLUME_ML, device=seen.device)
    rays = functional.mse_loss(seen / scale, true / scale)
    return rays, functional.smooth_l1_loss(volumes_ml(seen, field_mm) / unit, volumes_ml(true, field_mm) / unit)


def calibration(seen: Tensor, true: Tensor) -> list[float]:
    """Factors of the least-squares lines through the origin from `seen` to `true`, both mL [N,6]; 1 where nothing was seen."""
    weight = (seen**2).sum(0)
    factors = torch.where((weight > 1) & ((true > 0).sum(0) > 0), (seen * true).sum(0) / weight.clamp(min=1e-6), 1.0)
    return [round(float(factor), 4) for factor in factors]


def identity_projection(seen: Tensor, patients: Sequence[str], dim: int = IDENTITY_DIM) -> tuple[Tensor, Tensor]:
    """Weight [dim,D] and bias [dim] of the `dim` directions in which patients differ most, in units of how one patient's films differ.

    Linear discriminant analysis (Fisher 1936) of `seen` [N,D] by the generalised eigenvectors of the covariance between and within
    patients; the latter is shrunk by 2 % (scikit-learn's solver would keep only as many directions as there are patients less one).
    """
    values, owners = seen.double().numpy(), np.array(patients)
    dim, mean = min(dim, values.shape[1]), values.mean(0)
    names, member = np.unique(owners, return_inverse=True)
    means = np.stack([values[member == i].mean(0) for i in range(len(names))])
    rest = values - means[member]
    within = rest.T @ rest / max(len(values) - len(names), 1)
    size = float(np.trace(within)) / values.shape[1]
    within = 0.98 * within + 0.02 * size * np.eye(len(within)) if size > 0 else np.eye(len(within))
    between = (means - mean).T @ (means - mean) / max(len(names) - 1, 1)
    vectors = eigh(between, within)[1][:, ::-1][:, :dim].T  # largest ratios first; vᵀ W v = 1
    return torch.from_numpy(vectors.copy()).float(), torch.from_numpy(-vectors @ mean).float()


def model_card(facts: dict[str, Any], recipe: FilmMeterRecipe, manifest_name: str) -> str:
    """Markdown: what the meter is for, what it saw, how far it is off."""
    rows = "\n".join(
        f"| {name} | {BIOMARKERS[name] or 'ratio'} | {r['mean']:.4g} | {r['mae']:.3g} | {'' if r['r'] is None else format(r['r'], '.4f')} |"
        for name, r in facts["biomarkers"].items()
    )
    return f"""---
library_name: medgen
tags: [chest-x-ray, measurement, evaluation]
---
# Film meter

Reads how many millimetres of {", ".join(EXTENTS).replace("_", " ")} every ray of a frontal chest film crosses, and from these maps
volumes and the cardiothoracic ratio. medgen uses it as the independent judge of forecast films. It learned from digital patients,
whose truth is known: it says nothing about real ones. **Not for clinical use.**

- Trained on: {manifest_name}, split `train`; checked on {facts["films"]} films of other patients (split `val`).
- Input: one channel, {recipe.data.size} x {recipe.data.size} pixels, values in [-1, 1], {recipe.data.field_mm:g} mm wide at the detector.
- Output: mm at half the resolution; volumes are calibrated by one factor per map, fitted to the training films.

| biomarker | unit | mean | MAE (val) | r (val) |
|---|---|---|---|---|
{rows}
"""
