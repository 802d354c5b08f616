"""Training the video tokenizer: windows of echo clips in, the same windows out, through a codebook.

Losses are L1 + L2 + commitment. The export is the tokenizer's folder; `echo_tokens` learns its codes.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medgen.config import Config, ConfigError
from medgen.data.clips import VideoPreprocessing
from medgen.data.echo_dataset import EchoDataset
from medgen.models.video_tokenizer import VideoTokenizer, VideoTokenizerConfig, build_video_tokenizer
from medgen.tasks.autoencoder import reconstruction_quality
from medgen.tasks.base import TrainConfig
from medgen.tasks.echo_data import split_of


class EchoWindows(Config):
    """Windows of echo clips, without what they are conditioned on."""

    manifest: Path = Field(..., description="a manifest of echo clips with splits train and, if any, val")
    preprocessing: VideoPreprocessing = VideoPreprocessing()
    cache: Path | None = Field(None, description="folder for resized frames; default: every clip is decoded anew")

    def dataset(self, split: Literal["train", "val"]) -> EchoDataset | list[Any]:
        """{"id", "video" [T,1,H,W] in [-1,1], ...} per clip of `split`; an empty list where there is no "val"."""
        manifest = split_of(self.manifest, split)
        return [] if manifest is None else EchoDataset(manifest, self.preprocessing, cache=self.cache)


class TokenizerLoss(Config):
    """Weights of the tokenizer's losses."""

    l1: float = Field(0.5, ge=0)
    l2: float = Field(1.0, ge=0)
    commitment: float = Field(0.02, ge=0, description="keeps the encoder near the codes: 1 - cosine")


class VideoTokenizerRecipe(Config):
    """configs/video_tokenizer/*.yaml"""

    data: EchoWindows
    tokenizer: VideoTokenizerConfig = VideoTokenizerConfig()
    loss: TokenizerLoss = TokenizerLoss()
    start_clips: int = Field(
        64, ge=0, description="training clips whose principal components a new tokenizer starts from; 0: noise"
    )
    train: TrainConfig


class VideoTokenizerTask:
    """Windows in, windows out. One module, "model"."""

    name = "video-tokenizer"

    def __init__(self, recipe: VideoTokenizerRecipe) -> None:
        self.recipe = recipe

    def modules(self) -> dict[str, nn.Module]:
        """The tokenizer."""
        model = build_video_tokenizer(self.recipe.tokenizer)
        size, patch = self.recipe.data.preprocessing.size, int(model.config.patch_size)
        if size % patch:
            raise ConfigError(f"data.preprocessing.size: {size} is not a multiple of the tokenizer's patch, {patch}")
        if self.recipe.start_clips and self.recipe.tokenizer.init_from is None:
            model.start_from(self._some_clips(self.recipe.start_clips))
        return {"model": model}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """Windows of the manifest's clips."""
        return self.recipe.data.dataset(split)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{"videos" [B,T,1,H,W], "frames" [B], "ids"}; of unequal windows the shorter are filled up with their last frame."""
        frames = [len(item["video"]) for item in items]
        longest = max(frames)
        videos = [torch.cat([v, v[-1:].expand(longest - len(v), -1, -1, -1)]) for v in (item["video"] for item in items)]
        return {"videos": torch.stack(videos), "frames": torch.tensor(frames), "ids": [item["id"] for item in items]}

    def loss(
        self,
        modules: dict[str, nn.Module],
        batch: dict[str, Any],
        which: str,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Reconstruction of the frames that are there, and commitment."""
        model, videos = modules[which], batch["videos"]
        out = model(videos)
        there = torch.arange(videos.shape[1], device=videos.device) < batch["frames"][:, None]
        real, made = videos[there], out.video.float()[there]
        terms = {"l1": functional.l1_loss(made, real), "l2": functional.mse_loss(made, real), "commitment": out.commitment}
        total = sum((getattr(self.recipe.loss, name) * value for name, value in terms.items()), videos.new_zeros(()))
        logged: dict[str, float | Tensor] = {name: value.detach() for name, value in terms.items()}
        logged["perplexity"] = out.perplexity
        if not model.training:
            logged |= reconstruction_quality(made, real)
        return total, logged

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """Four held-out clips, eight frames of each, and below each row what comes back."""
        model = modules["model"]
        assert isinstance(model, VideoTokenizer)
        rows = []
        for clip in self._preview_clips:
            clip = clip.to(next(model.parameters()).device)
            made = model.decode(model.encode(clip[None]), len(clip))[0].clamp(-1, 1)
            shown = torch.linspace(0, len(clip) - 1, 8).round().long()
            rows += [clip[shown].cpu(), made[shown].cpu()]
        return {"reconstruction": torch.cat(rows)} if rows else {}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """The tokenizer's folder."""
        model = modules["model"]
        assert isinstance(model, VideoTokenizer)
        model.save_pretrained(folder, safe_serialization=True)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing is frozen."""

    def _some_clips(self, count: int) -> Tensor:
        """[B,T,1,H,W] of `count` training clips, evenly chosen."""
        data = self.dataset("train")
        count = min(count, len(data))
        videos: Tensor = self.collate([data[i * len(data) // count] for i in range(count)])["videos"]
        return videos

    @cached_property
    def _preview_clips(self) -> list[Tensor]:
        data = self.dataset("val")
        count = min(4, len(data))
        return [data[i * len(data) // count]["video"] for i in range(count)]
