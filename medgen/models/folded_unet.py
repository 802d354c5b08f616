"""The small U-Net behind the judges that read images: convolutions on folded pixels, never at full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional


class FoldedUNet(ModelMixin, ConfigMixin):
    """Images [N,1,H,W] → maps [N,`outputs`,H·unfold/patch,W·unfold/patch] and features; H, W multiples of `patch_size * 2 ** (levels - 1)`.

    A U-Net (Ronneberger et al. 2015) whose `patch_size`² pixels become channels before the first convolution; `unfold`² channels
    become pixels after the last one. Coordinates tell top from bottom and left from right. No batch statistics: an image's maps
    depend on that image alone. Subclasses register their own configuration with `image_size`, `patch_size`, `channels`.
    """

    config_name = "config.json"

    def __init__(
        self, image_size: int, patch_size: int, channels: Sequence[int], norm_groups: int, outputs: int, unfold: int
    ) -> None:
        super().__init__()
        if any(width % norm_groups for width in channels):
            raise ValueError(f"every entry of channels {tuple(channels)} must be a multiple of norm_groups={norm_groups}")
        side = patch_size * 2 ** (len(channels) - 1)
        if image_size % side:
            raise ValueError(f"image_size {image_size} must be a multiple of {side} (patch_size and {len(channels)} levels)")
        widths = list(channels)
        self.unfold = unfold
        self.down = nn.ModuleList(
            _block(before, width, norm_groups) for before, width in zip([patch_size**2 + 2, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _block(low + high, high, norm_groups) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], outputs * unfold**2, 3, padding=1)

    @property
    def feature_dim(self) -> int:
        widths = cast("Sequence[int]", self.config["channels"])
        return widths[0] + widths[-1]

    def with_features(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Maps, and features [N,feature_dim]: spatial means of the finest level (texture) and of the coarsest (anatomy)."""
        if frames.ndim != 4 or frames.shape[1] != 1:
            raise ValueError(f"frames must be [N,1,H,W], got {tuple(frames.shape)}")
        hidden = functional.pixel_unshuffle(frames, int(self.config["patch_size"]))
        hidden = torch.cat([hidden, coordinates(hidden)], dim=1)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            hidden = block(functional.avg_pool2d(hidden, 2) if level else hidden)
            skips.append(hidden)
        features = torch.cat([skips[0].mean((2, 3)), skips[-1].mean((2, 3))], dim=1)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            hidden = block(torch.cat([functional.interpolate(hidden, scale_factor=2), skip], dim=1))
        return functional.pixel_shuffle(self.head(hidden), self.unfold), features


def _block(before: int, width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
    )


def coordinates(like: Tensor) -> Tensor:
    """Row and column of every position in [-1,1]: [N,2,h,w]."""
    rows, columns = (torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype) for size in like.shape[-2:])
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(like.shape[0], -1, -1, -1)
