"""The re-identification network's task: two films of each patient → vectors that are near for one patient and far for two.

Both films are changed at random as a copy might be (mirrored, cropped, turned, brightened, noised), so that a changed copy is found too.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from medgen.config import Config, ConfigError
from medgen.data.dataset import CXRDataset
from medgen.data.images import ImagePreprocessing
from medgen.data.records import Manifest, read_manifest
from medgen.models.siamese import Backbone, SiameseNetwork
from medgen.seeds import stable_seed
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CXRData, split_of

FALSE_MATCHES = 0.001  # share of pairs of different patients below the threshold that is stored with the network


class ReIdentificationModel(Config):
    """Shape of the network; see `SiameseNetwork`."""

    backbone: Backbone = "small"
    channels: tuple[int, ...] = (24, 48, 96, 128)
    dim: int = Field(128, ge=8)


class CopyAugmentation(Config):
    """Random changes of every film; 0 switches one off."""

    flip: float = Field(0.5, ge=0, le=1, description="share of patients of whom both films are mirrored")
    zoom: float = Field(0.3, ge=0, lt=1, description="largest enlargement, as a share; a quarter as much smaller")
    shift: float = Field(0.08, ge=0, le=0.5, description="largest shift, as a share of the film's side")
    rotation: float = Field(6.0, ge=0, le=30, description="largest turn, degrees")
    gamma: float = Field(0.4, ge=0, lt=1, description="largest change of the contrast's exponent, as a share")
    noise: float = Field(0.2, ge=0, description="largest standard deviation of added noise, on the scale [-1,1]")


class ReIdentificationRecipe(Config):
    """`medgen train re-identification --config ...`."""

    data: CXRData
    model: ReIdentificationModel = ReIdentificationModel()
    augmentation: CopyAugmentation = CopyAugmentation()
    temperature: float = Field(0.1, gt=0, description="of the contrastive loss")
    train: TrainConfig


class PatientPairs(Dataset[dict[str, Any]]):
    """{"id": patient, "films" [2,1,H,W] in [-1,1]} of every patient; which two of several films depends on (epoch, patient).

    A patient with one film gives it twice: augmentation makes two of it.
    """

    def __init__(self, data: CXRData, manifest: Manifest) -> None:
        self.films = CXRDataset(manifest, data.preprocessing, prompts=None, cache=data.cache)
        self.patients = list(films_of_patients(manifest).items())
        self.epoch, self.fingerprint = 0, manifest.sha256

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> dict[str, Any]:
        patient, films = self.patients[index]
        rng = np.random.default_rng(stable_seed("two films", self.epoch, patient))
        chosen = rng.permutation(films)[:2] if len(films) > 1 else films * 2
        return {"id": patient, "films": torch.stack([self.films[int(i)]["image"] for i in chosen])}


def films_of_patients(manifest: Manifest) -> dict[str, list[int]]:
    """Indices of every patient's records."""
    found: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(manifest.records):
        found[record.patient_id].append(index)
    return dict(found)


class ReIdentificationTask:
    """Task: normalised temperature-scaled cross-entropy (Chen et al. 2020) between the films of a batch, by patient."""

    name = "re-identification"

    def __init__(self, recipe: ReIdentificationRecipe) -> None:
        self.recipe = recipe
        train = split_of(recipe.data, "train")
        assert train is not None  # `split_of` raises where a manifest has no training split
        patients = films_of_patients(train)
        if len(patients) < 2:
            raise ConfigError(
                f"{recipe.data.manifest}: its train split is of {len(patients)} patient; telling patients apart needs more"
            )
        if all(len(films) < 2 for films in patients.values()):
            raise ConfigError(
                f"{recipe.data.manifest}: no patient of its train split has two films, so there is no pair to learn from"
            )
        self.patients = f"{train.name} ({train.sha256[:12]})"

    def modules(self) -> dict[str, nn.Module]:
        return {"model": SiameseNetwork(image_size=self.recipe.data.preprocessing.size, **self.recipe.model.model_dump())}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        manifest = split_of(self.recipe.data, split)
        return [] if manifest is None else PatientPairs(self.recipe.data, manifest)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """films [B,2,1,H,W] in [-1,1] of B patients."""
        return {"ids": [str(item["id"]) for item in items], "films": torch.stack([item["films"] for item in items])}

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        model, films = modules[which], batch["films"]
        if model.training:
            films = augment(films, self.recipe.augmentation, generator)
        vectors = model(films.flatten(0, 1)).float()
        _, patient = np.unique(np.repeat(batch["ids"], 2), return_inverse=True)
        loss, first = contrastive(vectors, torch.from_numpy(patient).to(vectors.device), self.recipe.temperature)
        return loss, {"nearest_is_own": first}

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        return {}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The network in float16, with a threshold from the validation split, and a card with what it does on val and test."""
        model, splits = modules["model"], {}
        assert isinstance(model, SiameseNetwork)
        for split in ("val", "test"):
            records = read_manifest(self.recipe.data.manifest).records
            if any(record.split == split for record in records):
                splits[split] = self._verified(model, read_manifest(self.recipe.data.manifest, split))
        if "val" not in splits:
            raise ConfigError(f"{self.recipe.data.manifest} has no 'val' split: the network's threshold needs one")
        shape = {name: value for name, value in model.config.items() if not name.startswith("_")}
        shipped = SiameseNetwork.from_config({**shape, "threshold": splits["val"]["threshold"], "patients": self.patients})
        shipped.load_state_dict(model.state_dict())
        nn.Module.half(shipped)
        shipped.save_pretrained(folder)
        (folder / "validation.json").write_text(json.dumps(splits, indent=1))
        (folder / "README.md").write_text(model_card(splits, self.recipe.data.preprocessing, self.patients))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        return None  # nothing frozen

    @torch.no_grad()
    def _verified(self, model: SiameseNetwork, manifest: Manifest) -> dict[str, Any]:
        data, size = self.recipe.data, self.recipe.train.batch_size
        films = CXRDataset(manifest, data.preprocessing, prompts=None, cache=data.cache)
        device, parts = next(model.parameters()).device, []
        for start in range(0, len(films), size):
            batch = torch.stack([films[i]["image"] for i in range(start, min(start + size, len(films)))])
            parts.append(model(batch.to(device)).float().cpu())
        return verification(torch.cat(parts), [record.patient_id for record in manifest.records])


def contrastive(vectors: Tensor, patient: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss of unit vectors [N,dim] of `patient` [N], and the share whose nearest other film is of the same patient.

    Every film of the same patient is a positive (Khosla et al. 2020); films without one carry no loss.
    """
    alike = vectors @ vectors.T / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    alike = alike.masked_fill(itself, -torch.inf)
    own = (patient[:, None] == patient) & ~itself
    known = own.any(1)
    logged = functional.log_softmax(alike, 1).masked_fill(~own, 0.0).sum(1) / own.sum(1).clamp(min=1)
    first = own.gather(1, alike.argmax(1, keepdim=True))[:, 0]
    count = known.sum().clamp(min=1)
    return -logged[known].sum() / count, (first[known].float().sum() / count).detach()


def augment(films: Tensor, config: CopyAugmentation, generator: torch.Generator) -> Tensor:
    """`films` [B,K,1,H,W] in [-1,1], each changed by its own draw; mirrored by patient (the first axis)."""
    patients, each = films.shape[:2]
    count, device = patients * each, films.device

    def draw(low: float, high: float, number: int = count) -> Tensor:
        return torch.rand(number, generator=generator, device=device) * (high - low) + low

    mirrored = (draw(0, 1, patients) < config.flip).repeat_interleave(each)
    angle = torch.deg2rad(draw(-config.rotation, config.rotation))
    size = 1 / (1 + draw(-config.zoom / 4, config.zoom))
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 0, 1] = size * angle.cos(), -size * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = size * angle.sin(), size * angle.cos()
    theta[:, 0, 2], theta[:, 1, 2] = (draw(-2 * config.shift, 2 * config.shift) for _ in range(2))
    theta[:, 0] *= torch.where(mirrored, -1.0, 1.0)[:, None]
    whole = films.flatten(0, 1).float()
    grid = functional.affine_grid(theta, list(whole.shape), align_corners=False)
    moved = functional.grid_sample((whole + 1) / 2, grid, padding_mode="border", align_corners=False).clamp(0, 1)
    exponent = torch.exp2(draw(-1, 1) * np.log2(1 + config.gamma))[:, None, None, None]
    noise = torch.randn(whole.shape, generator=generator, device=device) * draw(0, config.noise)[:, None, None, None]
    changed = (moved.clamp(min=1e-4) ** exponent) * 2 - 1 + noise
    return changed.clamp(-1, 1).view_as(films).to(films.dtype)


def verification(vectors: Tensor, patients: list[str]) -> dict[str, Any]:
    """How well distances of unit vectors [N,dim] tell pairs of one patient from pairs of two, over all pairs.

    `rank_1`: share of films whose nearest other film is of the same patient, of those that have one. `threshold`: the distance below
    which `FALSE_MATCHES` of the pairs of different patients lie. Raises `ConfigError` where there is no pair of one kind.
    """
    from sklearn.metrics import roc_auc_score

    _, patient = np.unique(patients, return_inverse=True)
    distance = torch.cdist(vectors, vectors).numpy()
    upper = np.triu_indices(len(distance), 1)
    same, between = (patient[:, None] == patient)[upper], distance[upper]
    if same.all() or not same.any():
        raise ConfigError("verification needs patients with two films, and more than one patient")
    np.fill_diagonal(distance, np.inf)
    paired = np.isin(patient, np.flatnonzero(np.bincount(patient) > 1))
    threshold = float(np.quantile(between[~same], FALSE_MATCHES))
    return {
        "patients": len(set(patients)),
        "films": len(patients),
        "auroc": float(roc_auc_score(same, -between)),
        "rank_1": float((patient[distance.argmin(1)] == patient)[paired].mean()),
        "threshold": threshold,
        "found_at_threshold": float((between[same] < threshold).mean()),
    }


def model_card(splits: dict[str, Any], preprocessing: ImagePreprocessing, patients: str) -> str:
    """Markdown: what the network is for, what it saw, how well it knows a patient again."""
    rows = "\n".join(
        f"| {name} | {r['patients']} | {r['films']} | {r['auroc']:.4f} | {r['rank_1']:.3f} | {r['found_at_threshold']:.3f} |"
        for name, r in splits.items()
    )
    return f"""---
library_name: medgen
tags: [chest-x-ray, re-identification, privacy]
---
# Re-identification network

Turns a frontal chest film into a unit vector that lies near those of the same patient's other films. medgen uses it to look for
training patients in generated films: in the privacy gate (`medgen audit gate`) and in `medgen audit`. It knows patients again **only**
as well as the table says; that it finds nobody proves nothing. **Never use it to identify a person.**

- Trained on: {patients}, split `train`: pairs of films of one patient against other patients (Packhäuser et al. 2022).
- Input: one channel, {preprocessing.size} x {preprocessing.size} pixels, values in [-1, 1]; padded to a square.
- The stored threshold lets {FALSE_MATCHES:.1%} of the pairs of different patients (split `val`) pass as one patient.

| split | patients | films | AUROC, same patient | nearest film is own | same patient below threshold |
|---|---|---|---|---|---|
{rows}
"""
