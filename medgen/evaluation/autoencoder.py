"""`medgen evaluate autoencoder`: how much of a held-out film survives compression to latents and back."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.utils import save_image

from medgen.data.records import read_manifest
from medgen.evaluation.images import EvaluationError, ImageSet, batches, load_square, reference_set
from medgen.evaluation.statistics import Floats, Indices, group_bootstrap
from medgen.models.autoencoder import PatchAutoencoderKL, decode, encode_moments, load_autoencoder

SMALLEST_SET = 8


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
        autoencoder: model folder (of diffusers' AutoencoderKL kin), also the vae folder of a pipeline.
        reference: manifest of held-out patients.
        out: folder for metrics.json and worst.png (original, reconstruction, ten times the difference; worst six).
        size: pixels; the autoencoder's own sample size by default.
        split: which split of the manifest.
        batch_size: images at a time.
        seed: of the resamples.
    """
    model = load_autoencoder(autoencoder)
    size = size or int(model.config["sample_size"])
    images = reference_set(read_manifest(reference, None if split == "all" else split), size)
    if len(images) < SMALLEST_SET:
        raise EvaluationError(f"{reference} holds {len(images)} images in split {split!r}; at least {SMALLEST_SET} are needed")
    parts = [reconstruction_quality(batch, reconstruct(model, batch)) for batch in batches(images, size, batch_size)]
    psnr, ssim = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    results = {}
    for name, values in (("psnr_db", psnr), ("ssim", ssim)):
        (estimate,) = group_bootstrap(partial(_mean_of, values.astype(np.float64)), images.groups, seed)
        results[name] = {**estimate.as_dict(), "worst": float(values.min())}
    out.mkdir(parents=True, exist_ok=True)
    _picture_worst(model, images.take(np.argsort(psnr)[:6].tolist()), size, out / "worst.png")
    facts = {"autoencoder": str(autoencoder), "reference": images.name, "split": split, "size": size, "images": len(images)}
    path = out / "metrics.json"
    path.write_text(json.dumps({**facts, **results}, indent=1))
    return path


@torch.inference_mode()
def reconstruct(model: PatchAutoencoderKL, images: Tensor) -> Tensor:
    """Images [B,1,H,W] in [-1,1] through the posterior mean and back."""
    return decode(model, encode_moments(model, images)[0])


def reconstruction_quality(images: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM of every image, two [B]; the range of values is 2."""
    psnr = peak_signal_noise_ratio(reconstructions, images, data_range=(-1.0, 1.0), reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(reconstructions, images, data_range=2.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return psnr, ssim


def _mean_of(values: Floats, rows: Indices) -> Floats:
    return np.array([values[rows].mean()])


def _picture_worst(model: PatchAutoencoderKL, images: ImageSet, size: int, path: Path) -> None:
    films = torch.stack([load_square(image, size) for image in images.paths])
    copies = reconstruct(model, films)
    difference = (10 * (films - copies).abs() - 1).clamp(-1, 1)
    save_image(torch.cat([films, copies, difference]), path, nrow=len(films), value_range=(-1, 1), normalize=True)
