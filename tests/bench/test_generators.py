"""Generators side by side: evaluations are counted, not calculated, and the table names every pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from medgen.bench.generators import bench_generators
from medgen.models.echo_conditioner import EchoConditioner
from medgen.models.token_transformer import TokenTransformer
from medgen.models.video_tokenizer import VideoTokenizer
from medgen.pipelines.masked_ecg_to_echo import MaskedECGToEchoPipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = VideoTokenizer(patch_size=8, width=16, depth=1, heads=2, code_dim=4, codebook_size=8)
    conditioner = EchoConditioner(width=16, depth=1, heads=2)
    denoiser = TokenTransformer(codebook_size=8, token_dim=8, context_dim=16, width=16, depth=1, heads=2,
                                feature_dim=conditioner.feature_dim)  # fmt: skip
    pipeline = MaskedECGToEchoPipeline(tokenizer, denoiser, conditioner, num_inference_steps=3, guidance_scale=2.0, overlap=2,
                                       window=5, preprocessing={"size": 16, "frames": 5, "fps": 20.0})  # fmt: skip
    where = tmp_path_factory.mktemp("pipelines") / "masked"
    pipeline.save_pretrained(where)
    return where


def test_evaluations_are_counted(folder: Path, tmp_path: Path) -> None:
    quality = tmp_path / "evaluation"
    quality.mkdir()
    (quality / "metrics.json").write_text(
        json.dumps({"generated": {"ejection_fraction": {"mae": {"value": 2.5}}, "phase": None}})
    )
    result = bench_generators((str(folder),), (1,), frames=5, repeats=1, quality=(quality,), out=tmp_path / "times.json")
    own, one = json.loads((tmp_path / "times.json").read_text())["rows"]
    assert own["evaluations"] == 6 and one["evaluations"] == 2  # guidance doubles them
    assert own["seconds_per_clip"] > 0 and own["kind"] == "MaskedECGToEchoPipeline"
    assert own["quality"] == {"EF MAE": 2.5} and one["quality"] == {}
    assert "EF MAE" in str(result) and "masked" in str(result)


def test_a_folder_without_figures_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.json"):
        bench_generators((str(folder),), repeats=1, quality=(tmp_path,))
    with pytest.raises(ValueError, match="2 evaluations for 1 pipelines"):
        bench_generators((str(folder),), quality=(tmp_path, tmp_path))
