"""Two lines for a training of one's own, in PyTorch or MONAI: `dataset = mix(real_dataset, synthetic="DIR", ratio=0.5, seed=0)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from medgen.data.images import load_image
from medgen.data.records import FINDINGS, CXRRecord, Manifest, read_manifest
from medgen.seeds import stable_seed

IMAGE_KEYS, LABEL_KEYS = ("image", "img", "pixel_values", "x"), ("label", "labels", "target", "targets", "y")
Item = Callable[[CXRRecord, Path], Any]


class MixError(ValueError):
    """Data sets that cannot be mixed; the message says why and what to give."""


class Mixed(Dataset[Any]):
    """Every real item, then the synthetic ones; shuffle in the loader. `is_synthetic(i)` tells which an index is."""

    def __init__(self, real: Dataset[Any], records: Sequence[tuple[CXRRecord, Path]], item: Item) -> None:
        self.real, self.records, self.item = real, records, item
        self._real_items = len(cast(Sized, real))

    def __len__(self) -> int:
        return self._real_items + len(self.records)

    def is_synthetic(self, index: int) -> bool:
        """Whether item `index` shows no patient."""
        return index % len(self) >= self._real_items

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.item(*self.records[index - self._real_items]) if self.is_synthetic(index) else self.real[index]


def mix(
    real: Dataset[Any],
    synthetic: str | Path,
    ratio: float = 0.5,
    seed: int = 0,
    labels: str | Sequence[str] = FINDINGS,
    item: Item | None = None,
) -> Mixed:
    """`real` with `ratio` synthetic items for each of its own, made to look like its items.

    A MONAI data set of dicts with file names gets dicts with the synthetic films' file names, sent through its own transform. Other
    dicts and tuples get image and label in the place, shape and type of the first real item's (a torchvision data set's `transform`
    sees a grey PIL image). A smaller ratio's films are among a larger one's. Films that are uncertain in one of `labels` are left out.

    Args:
        real: a map-style data set of dicts (keys image/img and label/labels/target) or of (image, label).
        synthetic: folder that `medgen augment generate` wrote, or a manifest file.
        ratio: synthetic items for every real one: 0.5 is one for two.
        seed: of the choice of synthetic films.
        labels: findings in the order of the label's vector; one name alone for a label that is one number.
        item: what to make of a synthetic record and its image's path, where the above does not fit.

    Raises `MixError`, or `ManifestError` for a folder without a manifest of films.
    """
    if isinstance(real, IterableDataset) or not hasattr(real, "__len__"):
        raise MixError("mix needs a data set with a length; of a stream, mix the sources in the stream itself")
    if ratio < 0:
        raise MixError(f"ratio must be 0 or more, not {ratio:g}")
    names = [labels] if isinstance(labels, str) else list(labels)
    if unknown := [name for name in names if name not in FINDINGS]:
        raise MixError(f"no finding {', '.join(map(repr, unknown))}; labels are among {', '.join(FINDINGS)}")
    path = Path(synthetic)
    chosen = _choose(read_manifest(path / "manifest.parquet" if path.is_dir() else path), names, round(ratio * len(real)), seed)
    return Mixed(real, chosen, item or _like(real, names, isinstance(labels, str)))


def _choose(manifest: Manifest[CXRRecord], names: Sequence[str], count: int, seed: int) -> list[tuple[CXRRecord, Path]]:
    unsure = {r.record_id for r in manifest.records for x in r.labels if x.state == "uncertain" and x.name in names}
    sure = [record for record in manifest.records if record.record_id not in unsure]
    if count > len(sure):
        raise MixError(
            f"{count} synthetic films wanted, {len(sure)} there ({len(unsure)} uncertain ones left out): generate more, or lower the ratio"
        )
    order = np.random.default_rng(stable_seed("mix", seed)).permutation(len(sure))[:count]
    return [(sure[i], manifest.image_path(sure[i])) for i in order]


def _like(real: Dataset[Any], names: Sequence[str], single: bool) -> Item:
    """How to make items like those of `real`."""
    transform = getattr(real, "transform", None)
    raw = getattr(real, "data", None)
    if isinstance(raw, Sequence) and len(raw) and isinstance(raw[0], Mapping) and callable(transform):
        return _monai_item(dict(raw[0]), transform, names, single)
    example = real[0]
    if isinstance(example, Mapping):
        image, label = _keys(example)
        make = _pair(example[image], example[label], transform, names, single)
        return lambda record, path: dict(zip((image, label), make(record, path), strict=True))
    if isinstance(example, tuple | list) and len(example) == 2:
        return _pair(example[0], example[1], transform, names, single)
    raise MixError(f"items are {type(example).__name__}: mix knows dicts and (image, label); say how with item=")


def _monai_item(example: Mapping[str, Any], transform: Callable[[Any], Any], names: Sequence[str], single: bool) -> Item:
    """A raw dict like MONAI's before its transforms: a file's name for the image, the label in the real one's type."""
    image, label = _keys(example)
    if not isinstance(example[image], str | Path):
        raise MixError(f"{image!r} of the real data is {type(example[image]).__name__}, not a file's name; say how with item=")
    kind = type(example[image])
    target = _label(example[label], names, single)
    return lambda record, path: transform({image: kind(path), label: target(record)})


def _keys(example: Mapping[str, Any]) -> tuple[str, str]:
    found = [next((key for key in keys if key in example), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
    if found[0] is None or found[1] is None:
        raise MixError(
            f"no image among {', '.join(map(repr, example))} or no label: expected one of {', '.join(IMAGE_KEYS)} and one of "
            f"{', '.join(LABEL_KEYS)}; say how with item="
        )
    return found[0], found[1]


def _pair(
    image: Any, label: Any, transform: Callable[[Any], Any] | None, names: Sequence[str], single: bool
) -> Callable[[CXRRecord, Path], tuple[Any, Any]]:
    target = _label(label, names, single)
    if callable(transform):
        return lambda record, path: (transform(_grey(path)), target(record))
    if not isinstance(image, torch.Tensor) or image.ndim != 3 or not image.is_floating_point():
        raise MixError("the first real image is no tensor [C,H,W] of floats; say how with item=")
    channels, height, width = image.shape
    low, kind = (0.0 if image.min() >= 0 else -1.0), image.dtype
    if height != width or image.max() > 1 or image.min() < -1:
        raise MixError(f"real images are {height} x {width} from {image.min():g} to {image.max():g}: say how with item=")

    def make(record: CXRRecord, path: Path) -> tuple[torch.Tensor, Any]:
        film = load_image(path, height, channels)
        return (film if low < 0 else (film + 1) / 2).to(kind), target(record)

    return make


def _grey(path: Path) -> Image.Image:
    return Image.fromarray(np.asarray((load_image(path)[0] + 1) * 127.5).round().astype(np.uint8))


def _label(example: Any, names: Sequence[str], single: bool) -> Callable[[CXRRecord], Any]:
    """Targets 0 or 1 in the type of `example`: a number, or a list, array or tensor of as many."""
    size = int(np.prod(np.shape(example))) if np.ndim(example) else None
    if single != (size is None) or (size is not None and size != len(names)):
        have = "one number" if size is None else f"{size} numbers"
        raise MixError(
            f"the real label is {have}; labels names {'one finding' if single else f'{len(names)} findings'}: {', '.join(names)}"
        )

    def target(record: CXRRecord) -> Any:
        present = {x.name for x in record.labels if x.state == "present"}
        values = [float(name in present) for name in names]
        if isinstance(example, int | float):
            return type(example)(values[0])
        if isinstance(example, torch.Tensor):
            return torch.tensor(values, dtype=example.dtype).reshape(example.shape)
        if isinstance(example, np.ndarray):
            return np.array(values, dtype=example.dtype).reshape(example.shape)
        return type(example)(type(example[0])(value) for value in values)

    return target
