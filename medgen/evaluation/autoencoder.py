"""`medgen evaluate autoencoder`: how much of a held-out film or volume survives compression to latents and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.utils import save_image

from medgen.data.records import Split, manifest_kind, read_manifest
from medgen.data.visit_images import VisitImages, VisitPreprocessing
from medgen.data.visit_records import VisitSeries
from medgen.evaluation.images import EvaluationError, load_square, reference_set
from medgen.evaluation.statistics import Floats, Indices, group_bootstrap
from medgen.models.autoencoder import decode, encode_moments, load_autoencoder, spatial_dims_of
from medgen.tasks.autoencoder import as_pictures, visit_preprocessing

SMALLEST_SET = 8


@dataclass(frozen=True)
class HeldOut:
    """Images [1,*S] in [-1,1] by number, and whose they are."""

    name: str
    size: int | Sequence[int]
    groups: tuple[str, ...]
    load: Callable[[int], Tensor]

    def stack(self, indices: Sequence[int]) -> Tensor:
        """[B,1,*S]"""
        return torch.stack([self.load(index) for index in indices])


def evaluate_autoencoder(
    autoencoder: Path,
    reference: Path,
    out: Path,
    size: int | None = None,
    split: Literal["train", "val", "test", "all"] = "test",
    batch_size: int = 8,
    seed: int = 0,
) -> Path:
    """PSNR and SSIM of reconstructions from the posterior mean, with 95 % intervals over patients: metrics.json and worst.png.

    Args:
        autoencoder: model folder (of diffusers' AutoencoderKL kin, or of volumes), also the vae folder of a pipeline.
        reference: manifest of held-out patients: films, or visit series (prepared as the autoencoder's training visits were).
        out: folder for metrics.json and worst.png (original, reconstruction, ten times the difference; worst six; of volumes the
            middle coronal slice).
        size: pixels; the autoencoder's own sample size by default.
        split: which split of the manifest.
        batch_size: images at a time.
        seed: of the resamples.
    """
    model = load_autoencoder(autoencoder)
    images = held_out(model, autoencoder, reference, None if split == "all" else split, size)
    count = len(images.groups)
    if count < SMALLEST_SET:
        raise EvaluationError(f"{reference} holds {count} images in split {split!r}; at least {SMALLEST_SET} are needed")
    parts = []
    for start in range(0, count, batch_size):
        batch = images.stack(range(start, min(start + batch_size, count)))
        parts.append(reconstruction_quality(batch, reconstruct(model, batch)))
    psnr, ssim = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    results = {}
    for name, values in (("psnr_db", psnr), ("ssim", ssim)):
        (estimate,) = group_bootstrap(partial(_mean_of, values.astype(np.float64)), images.groups, seed)
        results[name] = {**estimate.as_dict(), "worst": float(values.min())}
    out.mkdir(parents=True, exist_ok=True)
    _picture_worst(model, images.stack(np.argsort(psnr)[:6].tolist()), out / "worst.png")
    facts = {"autoencoder": str(autoencoder), "reference": images.name, "split": split, "size": images.size, "images": count}
    path = out / "metrics.json"
    path.write_text(json.dumps({**facts, **results}, indent=1))
    return path


def held_out(model: ModelMixin, folder: Path, reference: Path, split: Split | None, size: int | None) -> HeldOut:
    """The images of the manifest `reference`, as the autoencoder of `folder` sees them. Raises `EvaluationError`."""
    dims, own = spatial_dims_of(model), model.config["sample_size"]
    if manifest_kind(reference) == VisitSeries.kind:
        settings: dict[str, Any] = (
            visit_preprocessing(folder) or VisitPreprocessing.model_validate({"dim": dims, "size": own})
        ).model_dump()
        if size is not None:
            settings |= {"size": size, "image": {**settings["image"], "size": size}}
        preprocessing = VisitPreprocessing.model_validate(settings)
        visits = VisitImages(read_manifest(reference, split, record=VisitSeries), preprocessing)
        groups = tuple(series.patient_id for series, _ in visits.visits)
        return HeldOut(visits.manifest.name, preprocessing.size, groups, lambda index: torch.as_tensor(visits[index]["image"]))
    if dims == 3:
        raise EvaluationError(f"{folder} is an autoencoder of volumes, {reference} lists no visit series")
    films, side = reference_set(read_manifest(reference, split)), size or int(own)
    return HeldOut(films.name, side, films.groups, lambda index: load_square(films.paths[index], side, side))


@torch.inference_mode()
def reconstruct(model: ModelMixin, images: Tensor) -> Tensor:
    """Images [B,1,*S] in [-1,1] through the posterior mean and back."""
    return decode(model, encode_moments(model, images)[0])


def reconstruction_quality(images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM of every image [B,1,*S], two [B]; the range of values is 2."""
    axes = tuple(range(1, images.ndim))
    psnr = peak_signal_noise_ratio(reconstructions, images, data_range=(-1.0, 1.0), reduction="none", dim=axes)
    ssim = structural_similarity_index_measure(reconstructions, images, data_range=2.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return psnr, ssim


def _mean_of(values: Floats, rows: Indices) -> Floats:
    return np.array([values[rows].mean()])


def _picture_worst(model: ModelMixin, images: Tensor, path: Path) -> None:
    copies = reconstruct(model, images)
    difference = (10 * (images - copies).abs() - 1).clamp(-1, 1)
    pictures = as_pictures(torch.cat([images, copies, difference]))
    save_image(pictures, path, nrow=len(images), value_range=(-1, 1), normalize=True)
