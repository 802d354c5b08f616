"""The finding classifier: a small residual network that says which findings a film shows, and on which side.

It judges generated images against their prompts, and its penultimate features are the encoder 'digital-chest'.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D
from torch import Tensor, nn

from medgen.data.records import FINDINGS, FindingLabel
from medgen.models.folded_unet import coordinates

SIDED_FINDINGS = ("pleural_effusion", "pneumothorax", "consolidation", "nodule", "atelectasis")
OUTPUTS = (*FINDINGS, *(f"{name}_{side}" for name in SIDED_FINDINGS for side in ("left", "right")))


def finding_targets(labels: Iterable[FindingLabel]) -> tuple[Tensor, Tensor]:
    """Targets and mask, each [len(OUTPUTS)] float32, from the labels of one report.

    A finding that is not mentioned counts as absent (the CheXpert convention). Mask 0 (no loss, no score): uncertain findings,
    and the sides of a finding that is present on an unstated side. Present wins where a report says both of one finding.
    """
    values = dict.fromkeys(OUTPUTS, 0.0)
    known = dict.fromkeys(OUTPUTS, 1.0)
    for label in sorted(labels, key=lambda label: (label.state == "present", label.side is not None)):
        if label.state == "absent":
            continue
        sides = (label.side,) if label.side in ("left", "right") else ("left", "right")
        certain: dict[str, bool] = {label.name: label.state == "present"}
        certain |= {f"{label.name}_{side}": label.state == "present" and label.side is not None for side in sides}
        for output in certain.keys() & values.keys():
            values[output] = known[output] = float(certain[output])
    return torch.tensor(list(values.values())), torch.tensor(list(known.values()))


class FindingClassifier(ModelMixin, ConfigMixin):
    """Images [B,1,H,W] in [-1,1] → logits [B,len(outputs)].

    Two coordinate channels tell left from right; mean and maximum of the last feature map are taken over the left and the right
    half of the image apart, so the features [B,4*feature_channels] keep the side and a small nodule is not averaged away. The
    first channels of that map say where each finding is (`with_places`). No batch statistics: a score depends on its image alone.

    `thresholds` (probabilities, one per output) are chosen on the validation split at export; `patients` says who it learned from.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        image_size: int = 128,
        channels: Sequence[int] = (32, 64, 64),
        stem_stride: int = 4,
        layers_per_block: int = 1,
        feature_channels: int = 32,
        norm_groups: int = 8,
        outputs: Sequence[str] = OUTPUTS,
        thresholds: Sequence[float] | None = None,
        patients: str = "",
    ) -> None:
        super().__init__()
        if any(width % norm_groups for width in channels):
            raise ValueError(f"every entry of channels {tuple(channels)} must be a multiple of norm_groups={norm_groups}")
        if feature_channels < len(FINDINGS):
            raise ValueError(f"feature_channels must be at least {len(FINDINGS)} (one per finding), got {feature_channels}")
        if thresholds is not None and len(thresholds) != len(outputs):
            raise ValueError(f"{len(thresholds)} thresholds for {len(outputs)} outputs")
        self.stem = nn.Conv2d(3, channels[0], 2 * stem_stride - 1, stride=stem_stride, padding=stem_stride - 1)
        self.blocks = nn.ModuleList(
            DownEncoderBlock2D(
                channels[max(index - 1, 0)],
                width,
                num_layers=layers_per_block,
                resnet_groups=norm_groups,
                add_downsample=index + 2 < len(channels),
            )
            for index, width in enumerate(channels)
        )
        self.norm = nn.GroupNorm(norm_groups, channels[-1])
        self.neck = nn.Conv2d(channels[-1], feature_channels, 1)
        self.head = nn.Linear(4 * feature_channels, len(outputs))

    @property
    def outputs(self) -> tuple[str, ...]:
        """What each logit says: a finding, or a finding and its side (patient's left and right)."""
        return tuple(cast("Sequence[str]", self.config["outputs"]))

    @property
    def thresholds(self) -> Tensor:
        """Probability above which each output counts as shown, [len(outputs)]."""
        values = self.config["thresholds"]
        return torch.full((len(self.outputs),), 0.5) if values is None else torch.tensor(values, dtype=torch.float32)

    @property
    def feature_dim(self) -> int:
        return self.head.in_features

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [B,feature_dim] of images [B,1,H,W] in [-1,1]."""
        return self._pool(self._map(images))

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.features(images)))

    def with_places(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B,len(outputs)], and logits [B,len(FINDINGS),h,w] of where each finding is, on a grid of a few pixels a cell."""
        hidden = self._map(images)
        return self.head(self._pool(hidden)), hidden[:, : len(FINDINGS)]

    def _map(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images must be [B,1,H,W], got {tuple(images.shape)}")
        hidden = self.stem(torch.cat([images, coordinates(images)], dim=1))
        for block in self.blocks:
            hidden = block(hidden)
        return cast(Tensor, self.neck(nn.functional.silu(self.norm(hidden))))

    @staticmethod
    def _pool(hidden: Tensor) -> Tensor:
        pools = (nn.functional.adaptive_avg_pool2d, nn.functional.adaptive_max_pool2d)
        return torch.cat([pool(hidden, (1, 2)).flatten(1) for pool in pools], dim=1)
