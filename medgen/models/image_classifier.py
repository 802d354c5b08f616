"""torchvision's networks for films of one channel, at any size and optional narrower width: what augmentation is measured with.

The judge of generated images is another network (`medgen.models.classifier`): this one is the user's own, that is to gain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import DenseNet, ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from medgen.data.records import FINDINGS

Network = Literal["resnet18", "resnet50", "densenet121"]
_GREY_MEAN, _GREY_STD = 0.449, 0.226  # of ImageNet's pixels in [0,1], averaged over colours
_RESNETS: dict[str, tuple[Any, list[int]]] = {"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}


class WeightsError(ValueError):
    """A file of pretrained weights that cannot be used; the message says which and why."""


class NarrowResNet(ResNet):
    """torchvision's ResNet with `width` (64: as published) channels in its first stage, and one input channel."""

    def __init__(self, block: Any, layers: list[int], width: int, classes: int) -> None:
        self.width = width
        super().__init__(block, layers)
        self.conv1 = nn.Conv2d(1, width, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(8 * width * block.expansion, classes)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == 64:  # the first stage: what flows in comes from the narrower stem
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, blocks, stride, dilate)


class ImageClassifier(ModelMixin, ConfigMixin):
    """Images [B,1,H,W] in [-1,1] → logits [B,len(outputs)] of the findings in `outputs`.

    `width` is the channels of the first stage (64: the published shape, the only one that published weights fit).
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self, network: Network = "resnet18", width: int = 64, image_size: int = 224, outputs: Sequence[str] = FINDINGS
    ) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        if network in _RESNETS:
            self.backbone: nn.Module = NarrowResNet(*_RESNETS[network], width, len(outputs))
        elif network == "densenet121":
            dense = DenseNet(width // 2, (6, 12, 24, 16), width, num_classes=len(outputs))
            dense.features.conv0 = stem = nn.Conv2d(1, width, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(stem.weight)
            self.backbone = dense
        else:
            raise ValueError(f"no network {network!r}; there are {', '.join((*_RESNETS, 'densenet121'))}")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The finding that each logit is about."""
        return tuple(cast("Sequence[str]", self.config["outputs"]))

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images must be [B,1,H,W], got {tuple(images.shape)}")
        return cast(Tensor, self.backbone(((images + 1) / 2 - _GREY_MEAN) / _GREY_STD))

    def load_published(self, path: str | Path) -> None:
        """Take over torchvision's ImageNet weights from a local file; the last layer stays as it is.

        The first convolution's weights are summed over colours: a grey film shown in three channels would give the same.
        Raises `WeightsError` naming the file and what does not fit.
        """
        weights = {_modern(name): value for name, value in _read_weights(Path(path)).items()}
        own = self.backbone.state_dict()
        first, last = ("conv1.weight", "fc") if "conv1.weight" in own else ("features.conv0.weight", "classifier")
        if first in weights:
            weights[first] = weights[first].sum(1, keepdim=True)
        kept = {name: value for name, value in own.items() if name.split(".")[0] == last}
        weights = {name: value for name, value in weights.items() if name.split(".")[0] != last} | kept
        # torch of old did not count batches
        weights |= {name: own[name] for name in own.keys() - weights.keys() if name.endswith("num_batches_tracked")}
        wrong = sorted(set(weights) ^ set(own)) or sorted(k for k in own if own[k].shape != weights[k].shape)
        if wrong:
            shape = f"{self.config['network']} of width {self.config['width']}"
            raise WeightsError(
                f"{path} does not fit {shape}: {', '.join(wrong[:3])} differ (of {len(wrong)}); published weights need width 64"
            )
        self.backbone.load_state_dict(weights)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"no weights at {path}; fetch torchvision's file once and name it here, or leave it out to start anew")
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        found: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(f"{path} cannot be read as plain tensors ({error})") from None
    return found


def _modern(name: str) -> str:
    """torchvision's DenseNet files still carry names of 2017 ("norm.1" for "norm1")."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d\.)", r"\1\2", name)
