"""Fréchet video distance with a named backbone, and the same for single frames, beside the real-vs-real floor at equal N.

FVD was defined on I3D features (Unterthiner et al. 2018). Distances in other features are not comparable between backbones, so the
backbone is part of the result; what carries over is the ratio to the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medgen.data.images import to_square
from medgen.data.video import load_video
from medgen.evaluation.echo.videos import Clip
from medgen.evaluation.features import read_weights
from medgen.evaluation.fidelity import Fidelity, compare
from medgen.evaluation.images import EvaluationError
from medgen.seeds import stable_seed

JUDGE_BACKBONE = "digital-echo-judge"
FRAMES_PER_CLIP = 4
PROJECTED = 48
_KINETICS_MEAN, _KINETICS_STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # torchvision's video models


@dataclass(frozen=True)
class VideoBackbone:
    """A named map from clips to vectors [N,D]; all clips are cut to `frames` frames first."""

    name: str
    encode: Callable[[Sequence[Clip], int], NDArray[np.float32]]


def load_backbone(name: str) -> VideoBackbone:
    """A backbone by name.

    - `digital-echo-judge`: per-frame features of the judge, their mean over time and the size of their change from frame to frame;
    - `r2plus1d:FILE`, `r3d:FILE`, `mc3:FILE`: torchvision's 18-layer video networks, penultimate features (512) of 112 x 112 frames;
      weights as .safetensors or a weights-only .pt (Kinetics-400 as published, or EchoNet-Dynamic's EF network).
    Raises `EvaluationError` for an unknown name or weights that cannot be used.
    """
    kind, _, path = name.partition(":")
    if kind == JUDGE_BACKBONE:
        return VideoBackbone(
            JUDGE_BACKBONE, lambda clips, frames: np.stack([describe(c.reading.features[:frames]) for c in clips])
        )
    if kind in ("r2plus1d", "r3d", "mc3"):
        return VideoBackbone(kind, _torchvision(kind, Path(path)))
    raise EvaluationError(f"no video backbone {name!r}: use {JUDGE_BACKBONE}, or r2plus1d:FILE, r3d:FILE, mc3:FILE")


def describe(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """One vector [2F] of a clip from features [T,F] of its frames: their mean, and the root mean square of their change per frame.

    The first half is what the clip shows, the second how it moves (and whether it flickers).
    """
    change = np.sqrt((np.diff(features, axis=0) ** 2).mean(0))
    return np.concatenate([features.mean(0), change]).astype(np.float32)


def video_distance(
    real: Sequence[Clip], fake: Sequence[Clip], backbone: VideoBackbone, seed: int = 0, replicates: int = 100
) -> Fidelity:
    """Fréchet video distance and kin of `fake` against `real`, all cut to the shortest clip. See `fidelity.compare`."""
    frames = min(len(clip.reading.times) for clip in [*real, *fake])
    vectors = _comparable(*(_finite(backbone.encode(clips, frames)) for clips in (real, fake)))
    groups = [[clip.group for clip in clips] for clips in (real, fake)]
    return compare(f"{backbone.name}, {frames} frames", vectors[0], groups[0], vectors[1], groups[1], seed, replicates=replicates)


def frame_distance(real: Sequence[Clip], fake: Sequence[Clip], seed: int = 0, replicates: int = 100) -> Fidelity:
    """The same for single frames, a few evenly spaced ones of every clip, in the judge's features."""
    frames = min(len(clip.reading.times) for clip in [*real, *fake])
    chosen = np.linspace(0, frames - 1, FRAMES_PER_CLIP).round().astype(int)
    vectors = _comparable(*(np.concatenate([clip.reading.features[chosen] for clip in clips]) for clips in (real, fake)))
    groups = [[clip.group for clip in clips for _ in chosen] for clips in (real, fake)]
    return compare(JUDGE_BACKBONE, vectors[0], groups[0], vectors[1], groups[1], seed, replicates=replicates)


def _comparable(real: NDArray[np.float32], fake: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both sets [N,D] in units of the real set's deviations, and in at most `PROJECTED` fixed random directions.

    A covariance of more dimensions than clips has no full rank and its distance is mostly bias. Random directions (unlike the
    principal ones of the real clips) also see what no real clip has.
    """
    scale = np.maximum(real.std(0), 1e-6)
    width = real.shape[1]
    if width > PROJECTED:
        rng = np.random.default_rng(stable_seed("video features", width))
        directions = np.linalg.qr(rng.standard_normal((width, PROJECTED)))[0].astype(np.float32)
        return real / scale @ directions, fake / scale @ directions
    return real / scale, fake / scale


def _finite(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(vectors).all():
        raise EvaluationError("the video backbone gives NaN or infinite features")
    return vectors


def _torchvision(kind: str, path: Path) -> Callable[[Sequence[Clip], int], NDArray[np.float32]]:
    from torchvision.models import video

    if not path.is_file():
        raise EvaluationError(f"backbone {kind}: give a local weights file, as {kind}:FILE (nothing is at {path})")
    model = {"r2plus1d": video.r2plus1d_18, "r3d": video.r3d_18, "mc3": video.mc3_18}[kind](weights=None)
    weights = read_weights(path)
    weights = weights.get("state_dict", weights)  # type: ignore[assignment]
    trunk = {
        key.removeprefix("module."): value for key, value in weights.items() if not key.removeprefix("module.").startswith("fc.")
    }
    model.fc = nn.Identity()
    try:
        model.load_state_dict(trunk)
    except RuntimeError as error:
        raise EvaluationError(f"{path} does not hold the weights of torchvision's {kind}_18: {error}") from error
    model.eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (_KINETICS_MEAN, _KINETICS_STD))

    @torch.inference_mode()
    def encode(clips: Sequence[Clip], frames: int) -> NDArray[np.float32]:
        return np.concatenate([model((_grey(clip.path, frames) - mean) / std).numpy() for clip in clips])

    return encode


def _grey(path: Path, frames: int) -> Tensor:
    """[1,3,T,112,112] in [0,1]."""
    video = to_square(torch.from_numpy(load_video(path).frames[:frames]).float() / 255, 112, pad=True)
    return video[None, None].expand(-1, 3, -1, -1, -1)
