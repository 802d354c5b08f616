"""The `data` section that every chest X-ray recipe shares: which manifest, and how its images become tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch.utils.data import Dataset

from medgen.config import Config
from medgen.data.dataset import CXRDataset
from medgen.data.images import ImagePreprocessing
from medgen.data.latent_cache import LatentCache, cache_key
from medgen.data.records import Manifest, read_manifest
from medgen.data.report_text import PromptConfig


class CXRData(Config):
    """Records to learn from."""

    manifest: Path = Field(..., description="a record manifest (.parquet or .jsonl) with splits train and, if any, val")
    preprocessing: ImagePreprocessing = ImagePreprocessing()
    prompts: PromptConfig = PromptConfig()
    cache: Path | None = Field(None, description="folder for preprocessed images; default: none are kept")

    def dataset(self, split: Literal["train", "val"], *, with_prompts: bool = True, **options: Any) -> CXRDataset | list[Any]:
        """{"id", "image" [1,H,W] in [-1,1], "prompt", ...} per record of `split`; an empty list where there is no "val"."""
        manifest = split_of(self, split)
        if manifest is None:
            return []
        prompts = self.prompts if with_prompts else None
        return CXRDataset(manifest, self.preprocessing, prompts=prompts, cache=self.cache, **options)


def split_of(data: CXRData, split: Literal["train", "val"]) -> Manifest | None:
    """The records of one split; None if the manifest has no record in "val" (a training split must exist)."""
    if split == "val" and all(record.split != "val" for record in read_manifest(data.manifest).records):
        return None
    return read_manifest(data.manifest, split)


class CachedFilms(Dataset[dict[str, Any]]):
    """{"id", "mean" [C,h,w], "std" [C,h,w], "prompt"} per record; no image is opened."""

    def __init__(self, latents: LatentCache, prompts: list[str]) -> None:
        self.latents, self.prompts = latents, prompts
        self.fingerprint = cache_key(latents.fingerprint, *prompts)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.latents[index], "prompt": self.prompts[index]}
