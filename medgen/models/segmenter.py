"""The video segmenter: left-ventricular cavity, myocardium and left atrium in every frame of an echocardiogram.

It judges generated echo videos: volumes, ejection fraction and timing come from its masks, and its features are the encoder
'digital-echo-judge'. It sees one frame at a time, so that a smooth volume curve is the video's own doing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional

STRUCTURES = ("background", "lv_cavity", "myocardium", "left_atrium")
"""The mask values 0 to 3, in annotations and logits alike."""
CAVITY, MYOCARDIUM, ATRIUM = 1, 2, 3


class VideoSegmenter(ModelMixin, ConfigMixin):
    """Frames [N,1,H,W] in [-1,1] → logits [N,4,H,W] of `STRUCTURES`; H and W are multiples of `patch_size * 2 ** (levels - 1)`.

    A U-Net (Ronneberger et al. 2015) on folded pixels: `patch_size`² pixels become channels before the first convolution and are
    unfolded after the last one, so no convolution runs at full resolution. Coordinates tell base from apex. No batch statistics:
    a frame's masks depend on that frame alone. `patients` says who it learned from.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        image_size: int = 112,
        patch_size: int = 4,
        channels: Sequence[int] = (32, 48, 64),
        norm_groups: int = 8,
        patients: str = "",
    ) -> None:
        super().__init__()
        if any(width % norm_groups for width in channels):
            raise ValueError(f"every entry of channels {tuple(channels)} must be a multiple of norm_groups={norm_groups}")
        side = patch_size * 2 ** (len(channels) - 1)
        if image_size % side:
            raise ValueError(f"image_size {image_size} must be a multiple of {side} (patch_size and {len(channels)} levels)")
        widths = list(channels)
        self.down = nn.ModuleList(
            _block(before, width, norm_groups) for before, width in zip([patch_size**2 + 2, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            _block(low + high, high, norm_groups) for low, high in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], len(STRUCTURES) * patch_size**2, 3, padding=1)

    @property
    def feature_dim(self) -> int:
        widths = cast("Sequence[int]", self.config["channels"])
        return widths[0] + widths[-1]

    def forward(self, frames: Tensor) -> Tensor:
        return self.with_features(frames)[0]

    def with_features(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N,4,H,W], and features [N,feature_dim]: spatial means of the finest level (texture) and of the coarsest (anatomy)."""
        if frames.ndim != 4 or frames.shape[1] != 1:
            raise ValueError(f"frames must be [N,1,H,W], got {tuple(frames.shape)}")
        patch = int(self.config["patch_size"])
        hidden = functional.pixel_unshuffle(frames, patch)
        hidden = torch.cat([hidden, _coordinates(hidden)], dim=1)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            hidden = block(functional.avg_pool2d(hidden, 2) if level else hidden)
            skips.append(hidden)
        features = torch.cat([skips[0].mean((2, 3)), skips[-1].mean((2, 3))], dim=1)
        for block, skip in zip(self.up, skips[-2::-1], strict=True):
            hidden = block(torch.cat([functional.interpolate(hidden, scale_factor=2), skip], dim=1))
        return functional.pixel_shuffle(self.head(hidden), patch), features


def _block(before: int, width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.GroupNorm(groups, width),
        nn.SiLU(),
    )


def _coordinates(like: Tensor) -> Tensor:
    """Row and column of every position in [-1,1]: [N,2,h,w]."""
    rows, columns = (torch.linspace(-1, 1, size, device=like.device, dtype=like.dtype) for size in like.shape[-2:])
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).expand(like.shape[0], -1, -1, -1)
