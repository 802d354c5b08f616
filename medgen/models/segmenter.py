"""The video segmenter: left-ventricular cavity, myocardium and left atrium in every frame of an echocardiogram.

It judges generated echo videos: volumes, ejection fraction and timing come from its masks, and its features are the encoder
'digital-echo-judge'. It sees one frame at a time, so that a smooth volume curve is the video's own doing.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config
from torch import Tensor

from medgen.models.folded_unet import FoldedUNet

STRUCTURES = ("background", "lv_cavity", "myocardium", "left_atrium")
"""The mask values 0 to 3, in annotations and logits alike."""
CAVITY, MYOCARDIUM, ATRIUM = 1, 2, 3


class VideoSegmenter(FoldedUNet):
    """Frames [N,1,H,W] in [-1,1] → logits [N,4,H,W] of `STRUCTURES`; H and W are multiples of `patch_size * 2 ** (levels - 1)`.

    A `FoldedUNet` unfolded to every pixel: a frame's masks depend on that frame alone. `patients` says who it learned from.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 112,
        patch_size: int = 4,
        channels: Sequence[int] = (32, 48, 64),
        norm_groups: int = 8,
        patients: str = "",
    ) -> None:
        super().__init__(image_size, patch_size, channels, norm_groups, outputs=len(STRUCTURES), unfold=patch_size)

    def forward(self, frames: Tensor) -> Tensor:
        return self.with_features(frames)[0]
