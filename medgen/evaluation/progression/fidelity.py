"""How near a forecast image comes to the true one: errors, PSNR, SSIM, LPIPS of pictures and volumes alike.

None of it means anything alone: copying the last image scores well where little changes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from medgen.evaluation.statistics import Floats

_PEAK_DB = 100.0  # of two images that are the same


def fidelity(predicted: ArrayLike, true: ArrayLike, mask: NDArray[np.bool_] | None = None) -> dict[str, Floats]:
    """nrmse, mae, psnr_db and ssim, each [N], of images [N,*S] in [0,1] (2D or 3D); with `mask` [N,*S] inside it alone.

    nrmse: root mean squared error over the range (greatest minus least value) of the true image. psnr_db: of a range of 1, at most
    100 dB. ssim: Wang et al. 2004, Gaussian windows of 1.5 voxels.
    """
    made, wanted = _pair(predicted, true)
    inside = np.ones(wanted.shape, bool) if mask is None else np.broadcast_to(mask, wanted.shape)
    if not inside.reshape(len(inside), -1).any(1).all():
        raise ValueError("the mask is empty for some of the images")
    axes = tuple(range(1, wanted.ndim))
    error = np.where(inside, made - wanted, 0.0)
    count = inside.sum(axis=axes)
    mse = (error**2).sum(axis=axes) / count
    spread = wanted.max(axis=axes) - wanted.min(axis=axes)
    return {
        "nrmse": np.sqrt(mse) / np.maximum(spread, 1e-6),
        "mae": np.abs(error).sum(axis=axes) / count,
        "psnr_db": np.minimum(-10 * np.log10(np.maximum(mse, 1e-30)), _PEAK_DB),
        "ssim": ssim(made, wanted, None if mask is None else inside),
    }


def ssim(first: ArrayLike, second: ArrayLike, mask: NDArray[np.bool_] | None = None) -> Floats:
    """Structural similarity [N] of [N,*S] whose values span 1; the mean over `mask` where there is one."""
    if np.ndim(first) == 4:
        return _volume_ssim(*_pair(first, second), mask)
    a, b = (torch.from_numpy(values)[:, None] for values in _pair(first, second))
    if mask is None:
        found = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
        assert isinstance(found, Tensor)
        return found.reshape(-1).double().numpy()
    _, whole = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    local = whole.reshape(b[:, 0].shape).double().numpy()
    axes = tuple(range(1, local.ndim))
    return np.asarray(np.where(mask, local, 0).sum(axis=axes) / mask.sum(axis=axes))


def _volume_ssim(a: Floats, b: Floats, mask: NDArray[np.bool_] | None) -> Floats:
    """The same of volumes [N,D,H,W]: torchmetrics' dense 11³ windows take seconds a volume, three passes along the axes do not."""

    def smooth(values: Floats) -> Floats:
        return np.asarray(ndimage.gaussian_filter(values, (0, 1.5, 1.5, 1.5), mode="mirror", truncate=3.5))

    mean_a, mean_b = smooth(a), smooth(b)
    spread = smooth(a * a) - mean_a**2 + smooth(b * b) - mean_b**2
    shared = smooth(a * b) - mean_a * mean_b
    local = (2 * mean_a * mean_b + 0.01**2) * (2 * shared + 0.03**2)
    local = local / ((mean_a**2 + mean_b**2 + 0.01**2) * (spread + 0.03**2))
    axes = (1, 2, 3)
    if mask is not None:
        return np.asarray(np.where(mask, local, 0).sum(axis=axes) / mask.sum(axis=axes))
    return np.asarray(local.mean(axis=axes))


def lpips(predicted: ArrayLike, true: ArrayLike) -> Floats | None:
    """LPIPS (Zhang et al. 2018, AlexNet) [N] of pictures [N,H,W] in [0,1]; None where torchvision's AlexNet weights are not on the machine.

    Nothing is downloaded: put alexnet-owt-7be5be79.pth into torch.hub's checkpoints folder first.
    """
    if not (Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth").is_file():
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as measure

    a, b = (torch.from_numpy(values).float()[:, None].expand(-1, 3, -1, -1).clamp(0, 1) for values in _pair(predicted, true))
    with torch.inference_mode():
        scores = [float(measure(a[i : i + 1], b[i : i + 1], net_type="alex", normalize=True)) for i in range(len(a))]
    return np.array(scores)


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if a.shape != b.shape or a.ndim not in (3, 4):
        raise ValueError(f"both must be [N,H,W] or [N,D,H,W], got {list(a.shape)} and {list(b.shape)}")
    return a, b
