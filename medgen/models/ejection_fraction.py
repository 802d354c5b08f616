"""torchvision's R(2+1)D (Tran et al. 2018), reading the ejection fraction off an echo clip as EchoNet-Dynamic does (Ouyang et al. 2020)."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, VideoResNet


class _Stem(nn.Sequential):
    """torchvision's R2Plus1dStem for one channel, `width` (64: as published) channels wide."""

    def __init__(self, width: int) -> None:
        middle = max(45 * width // 64, 1)
        super().__init__(
            nn.Conv3d(1, middle, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            nn.Conv3d(middle, width, (3, 1, 1), padding=(1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )


class _R2Plus1D(VideoResNet):
    """r2plus1d_18 with `width` (64: as published) channels in its first stage, one input channel and one output."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(BasicBlock, [Conv2Plus1D] * 4, [2, 2, 2, 2], partial(_Stem, width), num_classes=1)
        self.fc = nn.Linear(8 * width, 1)
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def _make_layer(self, block: Any, conv_builder: Any, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        if planes == 64:  # the first stage: what flows in comes from the narrower stem
            self.inplanes = self.width
        return super()._make_layer(block, conv_builder, planes * self.width // 64, blocks, stride)


class EjectionFractionRegressor(ModelMixin, ConfigMixin):
    """Clips [B,T,1,S,S] in [-1,1] at `fps` → ejection fraction [B] in percent.

    The network gives how far a clip lies from `mean`, in units of `std` (percent; those of the training clips). `frames`, `size` and
    `fps` say what it was trained on; another rate would be another heart rate.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, width: int = 64, frames: int = 32, size: int = 112, fps: float = 25.0, mean: float = 55.0, std: float = 12.0
    ) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        self.backbone = _R2Plus1D(width)

    def forward(self, clips: Tensor) -> Tensor:
        if clips.ndim != 5 or clips.shape[2] != 1:
            raise ValueError(f"clips must be [B,T,1,H,W], got {tuple(clips.shape)}")
        deviation = self.backbone(clips.transpose(1, 2)).float()[:, 0]
        return cast(Tensor, self.config["mean"] + self.config["std"] * deviation)
