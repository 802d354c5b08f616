"""Records as training items: decoded and resized once, then read from a disk cache; prompts from reports; a MONAI data set.

There are no horizontal flips anywhere, not even as an option: a flipped chest with its heart on the right is another patient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import Dataset
from monai.transforms import MapTransform, RandAdjustContrastd, RandAffined, Transform
from pydantic import Field
from torch import Tensor

from medgen.config import Config
from medgen.data import disk_cache
from medgen.data.images import ImageError, ImagePreprocessing, from_grid, to_grid
from medgen.data.records import CXRRecord, Manifest
from medgen.data.report_text import PromptConfig, ReportError, report_to_prompt
from medgen.seeds import stable_seed

_CACHE_VERSION = 1  # raise it when `to_grid` gives other values for the same file and preprocessing


class Augmentation(Config):
    """Small changes of pose and exposure, each drawn uniformly up to its limit; never a flip."""

    rotate_degrees: float = Field(3.0, ge=0, le=30, description="largest rotation")
    shift: float = Field(0.02, ge=0, le=0.3, description="largest shift, as a part of the image's side")
    zoom: float = Field(0.03, ge=0, le=0.5, description="largest change of scale")
    gamma: float = Field(0.1, ge=0, lt=1, description="largest change of the contrast's exponent")


class PreparedImages:
    """Preprocessed images on disk, one `.npy` of uint16 `[size, size]` per file and preprocessing; safe to share by processes.

    An entry is keyed by the file's path, length and modification time and by the preprocessing, so a changed file is decoded
    again. `folder=None` decodes every time. Values are the same with and without the cache.
    """

    def __init__(self, preprocessing: ImagePreprocessing, folder: str | Path | None = None) -> None:
        self.preprocessing = preprocessing
        self.folder = None if folder is None else Path(folder)

    def __call__(self, path: Path) -> Tensor:
        """`[1, size, size]` float32 in `preprocessing.range`. Raises `ImageError` naming the file."""
        low, high = self.preprocessing.range
        if self.folder is None:
            return from_grid(to_grid(path, self.preprocessing), low, high)
        entry = self.entry(path)
        try:
            grid = np.load(entry, allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):  # absent, or cut off by a full disk
            grid = to_grid(path, self.preprocessing)
            disk_cache.write_atomically(entry, partial(np.save, arr=grid, allow_pickle=False))
        return from_grid(grid, low, high)

    def entry(self, path: Path) -> Path:
        """Where the prepared image of `path` lies (or would lie)."""
        if self.folder is None:
            raise ImageError("this data set has no cache folder")
        try:
            state = disk_cache.file_state(path)
        except OSError:
            raise ImageError(f"no image at {path}") from None
        return disk_cache.entry(self.folder, ".npy", _CACHE_VERSION, state, self.preprocessing.model_dump_json(exclude={"range"}))


class LoadFilmd(MapTransform):
    """MONAI transform: the path under each key becomes the preprocessed image."""

    def __init__(self, keys: str, prepare: PreparedImages) -> None:
        super().__init__(keys)
        self.prepare = prepare

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Replace `Path` by `[1, size, size]` float32."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.prepare(item[key])
        return item


class Augmentd(Transform):
    """MONAI's random affine and contrast, seeded by (epoch, record): the same whatever the worker, rank or order."""

    def __init__(self, augmentation: Augmentation, seed: int) -> None:
        a, self.seed, self.epoch = augmentation, seed, 0
        turn = np.deg2rad(a.rotate_degrees)
        self._turn, self._shift, self._zoom = (-turn, turn), a.shift, (-a.zoom, a.zoom)
        self._contrast = RandAdjustContrastd("image", prob=1.0, gamma=(1 - a.gamma, 1 + a.gamma)) if a.gamma else None

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Augment `data["image"]` `[1, H, W]`."""
        draw = stable_seed("augment", self.seed, self.epoch, data["id"]) % 2**32
        shift = self._shift * data["image"].shape[-1]
        affine = RandAffined(
            "image",
            prob=1.0,
            rotate_range=self._turn,
            translate_range=(shift, shift),
            scale_range=self._zoom,
            padding_mode="border",
        )
        item: dict[str, Any] = affine.set_random_state(draw)(dict(data))
        if self._contrast is not None:
            item = self._contrast.set_random_state(draw)(item)
        return {**item, "image": item["image"].as_tensor()}


class CXRDataset(Dataset):
    """Map-style data set of a manifest: `[i]` gives one item.

    ```
    {"id": record_id, "image": [1, size, size] float32 in preprocessing.range, "prompt": str,
     "labels": {finding: "present" | "absent" | "uncertain"}, "sides": {finding: "left" | "right" | "bilateral"}}
    ```
    `cache` is a folder for prepared images (see `PreparedImages`; the first epoch fills it), None decodes every time.
    `count_tokens` is the text encoder's own count, for an exact cut of the prompt. Image errors name the record and the file;
    a record without words (label-only data sets that were built so) has the prompt "" only if `prompts` is None.
    With `augmentation`, call `set_epoch` before every epoch; an item depends on (seed, epoch, record) only. Picklable as long as
    `count_tokens` is.
    """

    def __init__(
        self,
        manifest: Manifest,
        preprocessing: ImagePreprocessing,
        *,
        prompts: PromptConfig | None = PromptConfig(),  # noqa: B008  (frozen)
        count_tokens: Callable[[str], int] | None = None,
        cache: str | Path | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.manifest, self.preprocessing = manifest, preprocessing
        self.prompts, self.count_tokens = prompts, count_tokens
        self.prepare = PreparedImages(preprocessing, cache)
        self._augment = Augmentd(augmentation, seed) if augmentation is not None else None
        transforms: list[Any] = [LoadFilmd("image", self.prepare)]
        super().__init__(manifest.records, transforms + ([self._augment] if self._augment is not None else []))

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's augmentations the next items get."""
        if self._augment is not None:
            self._augment.epoch = epoch

    def prompt(self, index: int) -> str:
        """The prompt of record `index`, without opening its image. Raises `ReportError` naming the record if it has no words."""
        record: CXRRecord = self.manifest.records[index]
        if self.prompts is None:
            return ""
        try:
            prompts = self.prompts.for_record(record.record_id)
            return report_to_prompt(record.findings, record.impression, record.view, prompts, self.count_tokens)
        except ReportError as error:
            raise ReportError(f"record {record.record_id!r} of {self.manifest.name}: {error}") from None

    def _transform(self, index: int) -> dict[str, Any]:
        record: CXRRecord = self.manifest.records[index]
        item = {
            "id": record.record_id,
            "image": self.manifest.image_path(record),
            "prompt": self.prompt(index),
            "labels": {label.name: label.state for label in record.labels},
            "sides": {label.name: label.side for label in record.labels if label.side is not None},
        }
        try:
            return dict(self.transform(item))
        except (ImageError, RuntimeError) as error:  # MONAI wraps a transform's error in RuntimeError
            cause = error.__cause__ if isinstance(error.__cause__, ImageError) else error
            raise ImageError(f"record {record.record_id!r} of {self.manifest.name}: {cause}") from error
