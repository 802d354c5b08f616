"""The re-identification network: a film → a point on a sphere, near to other films of the same patient (Packhäuser et al. 2022).

Packhäuser, Gündel, Münster, Syben, Christlein & Maier, "Deep learning-based patient re-identification is able to exploit the biometric
nature of medical chest X-ray data", Scientific Reports 12, 14851. Theirs compares |a-b| by a layer; here the distance itself is trained
(a contrastive loss), because a nearest neighbour among thousands of films must be found in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import BasicBlock, resnet50

Backbone = Literal["small", "resnet50"]
PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
DIGITAL_CHEST = "digital_chest_reid"


class SiameseNetwork(ModelMixin, ConfigMixin):
    """Films [B,1,H,W] in [-1,1] → unit vectors [B,dim]; the Euclidean distance of two of them says how little they are alike.

    Every film is first freed of its brightness and contrast. `backbone` "small" is for 128-pixel films on a CPU, with `channels`;
    "resnet50" (torchvision, one input channel) is for real films of 256 pixels and more. `threshold`: the distance below which two
    films count as one patient's, chosen on the validation split at export; `patients` says who it learned from.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        backbone: Backbone = "small",
        channels: Sequence[int] = (24, 48, 96, 128),
        dim: int = 128,
        threshold: float | None = None,
        patients: str = "",
    ) -> None:
        super().__init__()
        self.trunk = _small(channels, dim) if backbone == "small" else _resnet50(dim)

    @property
    def feature_dim(self) -> int:
        return int(self.config["dim"])

    def forward(self, films: Tensor) -> Tensor:
        if films.ndim != 4 or films.shape[1] != 1:
            raise ValueError(f"films must be [B,1,H,W], got {tuple(films.shape)}")
        centred = films - films.mean((2, 3), keepdim=True)
        standard = centred / centred.square().mean((2, 3), keepdim=True).sqrt().clamp(min=1e-3)
        return functional.normalize(self.trunk(standard), dim=1)

    def both_ways(self, films: Tensor) -> Tensor:
        """Vectors [2,B,dim] of the films and of their mirror images, which a copy may be."""
        return cast(Tensor, self(torch.cat([films, films.flip(-1)])).unflatten(0, (2, len(films))))


def _small(channels: Sequence[int], dim: int) -> nn.Sequential:
    """Residual stages at 1/4, 1/8, ... of the film's side; the last map is kept in quarters, so that place counts."""
    stages: list[nn.Module] = [
        nn.Conv2d(1, channels[0], 7, stride=4, padding=3, bias=False),
        nn.BatchNorm2d(channels[0]),
        nn.ReLU(inplace=True),
    ]
    for index, width in enumerate(channels):
        before = channels[max(index - 1, 0)]
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=2, bias=False), nn.BatchNorm2d(width)) if index else None
        stages.append(BasicBlock(before, width, stride=2 if index else 1, downsample=shortcut))
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], dim))


def _resnet50(dim: int) -> nn.Module:
    trunk = resnet50(weights=None, num_classes=dim)
    trunk.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return trunk


def load_siamese(source: str | Path = DIGITAL_CHEST, device: torch.device | str | None = None) -> SiameseNetwork:
    """The network in a folder, or a shipped one by name, in float32 and evaluation mode. Raises `FileNotFoundError` if it is not there."""
    folder = Path(source) if (Path(source) / "config.json").is_file() else PRETRAINED / str(source)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no re-identification network at {source} (neither a folder with config.json nor a shipped model); train one: "
            "medgen train re-identification --config configs/re_identification/digital_chest.yaml"
        )
    model = SiameseNetwork.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    assert isinstance(model, SiameseNetwork)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
