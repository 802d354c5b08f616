"""Fréchet distances of clips: near the floor for more of the same, far for still or noisy ones; other backbones from local files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.video import mc3_18

from medgen.data.video import write_video
from medgen.evaluation.echo.measure import Reading
from medgen.evaluation.echo.phase import Beats
from medgen.evaluation.echo.video_fidelity import PROJECTED, frame_distance, load_backbone, video_distance
from medgen.evaluation.echo.videos import Clip
from medgen.evaluation.images import EvaluationError

EMPTY = np.empty(0)
JUDGE = load_backbone("digital-echo-judge")


def clip(name: str, features: np.ndarray, path: Path = Path("none")) -> Clip:
    times, nothing = np.arange(len(features)) / 20, np.zeros(len(features))
    beats = Beats(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)
    reading = Reading(times, nothing, beats, 50.0, 1.0, 0.5, 60.0, 60.0, features.astype(np.float32), nothing, nothing)
    return Clip(name, path, name, EMPTY, EMPTY, 50.0, reading)


def clips(count: int, seed: int, speed: float = 1.0, dim: int = 6) -> list[Clip]:
    """Patients with features of their own that wander from frame to frame at `speed`."""
    rng = np.random.default_rng(seed)
    walks = (rng.normal(0, 1, dim) + np.cumsum(rng.normal(0, 0.1 * speed, (12, dim)), 0) for _ in range(count))
    return [clip(f"{seed}-{i}", walk) for i, walk in enumerate(walks)]


def test_more_of_the_same_is_at_the_floor_and_still_hearts_are_far():
    real = clips(80, 1)
    same = video_distance(real, clips(40, 2), JUDGE, replicates=10).metrics["frechet"].ratio
    still = video_distance(real, clips(40, 2, speed=0.2), JUDGE, replicates=10).metrics["frechet"].ratio
    assert 0.6 < same.value < 1.6
    assert still.value > 5
    frames = frame_distance(real, clips(40, 2, speed=0.2), replicates=10).metrics["frechet"].ratio
    assert frames.value < 2  # every single frame of a still heart looks right: only the video distance tells


def test_many_features_are_projected_and_still_see_what_no_real_clip_has():
    real = clips(160, 3, dim=40)
    odd = [clip(c.name, c.reading.features + 6 * (np.arange(40) == 7)) for c in clips(80, 4, dim=40)]
    result = video_distance(real, odd, JUDGE, replicates=5)
    assert result.dim == PROJECTED
    assert result.metrics["frechet"].ratio.value > 2


def test_a_published_network_reads_the_files(tmp_path):
    torch.manual_seed(0)
    network = mc3_18(weights=None)
    save_file({f"module.{key}": value for key, value in network.state_dict().items()}, tmp_path / "mc3.safetensors")
    backbone = load_backbone(f"mc3:{tmp_path / 'mc3.safetensors'}")
    made = []
    for i in range(2):
        path = write_video(tmp_path / f"{i}.avi", np.random.default_rng(i).integers(0, 255, (6, 40, 40), np.uint8), 20.0)
        made.append(clip(str(i), np.zeros((6, 2)), path))
    vectors = backbone.encode(made, 4)
    assert vectors.shape == (2, 512)
    assert not np.allclose(vectors[0], vectors[1])


def test_unknown_backbones_and_wrong_weights_are_named(tmp_path):
    with pytest.raises(EvaluationError, match="no video backbone 'i3d'"):
        load_backbone("i3d")
    with pytest.raises(EvaluationError, match="give a local weights file, as r3d:FILE"):
        load_backbone("r3d:nowhere.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(EvaluationError, match="does not hold the weights of torchvision's r3d_18"):
        load_backbone(f"r3d:{tmp_path / 'other.safetensors'}")
