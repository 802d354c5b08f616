"""Named feature encoders behind one interface, and their features on disk, keyed by encoder and image content.

Distances between distributions mean something only together with the encoder's name: it is part of every result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from medgen.evaluation.images import EvaluationError, ImageSet, batches
from medgen.models.classifier import FindingClassifier

Features = NDArray[np.float32]
PRETRAINED = Path(__file__).resolve().parent.parent / "pretrained"
JUDGE = PRETRAINED / "digital_chest_judge"
RAD_DINO = "microsoft/rad-dino"  # hub id; its revision is part of the fingerprint through the weights
CHUNK = 256


@dataclass(frozen=True)
class FeatureEncoder:
    """Images [b,1,size,size] float32 in [-1,1] → features [b,dim]. `fingerprint` changes with weights and preprocessing."""

    name: str
    fingerprint: str
    size: int
    dim: int
    encode: Callable[[Tensor], Tensor]


def load_encoder(name: str, device: torch.device | str | None = None) -> FeatureEncoder:
    """An encoder by name, `name:PATH` or folder.

    - `digital-chest`: the shipped judge's penultimate features; or the folder of another `FindingClassifier`;
    - `rad-dino` (hub id of the weights: downloads) or `rad-dino:FOLDER`, or any folder of a transformers vision model: CLS token;
    - `xrv:FILE`: torchxrayvision's densenet121 (1024 features, 224 pixels), weights as .safetensors or a weights-only .pt;
    - `inception:FILE`: Inception-2048 of the original FID, weights file of torch-fidelity;
    - `pixels`: 32x32 grey values, no network.
    Raises `EvaluationError` for an unknown name or weights that cannot be used.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind, _, path = name.partition(":")
    if kind == "pixels":
        return pixel_encoder()
    if kind == "digital-chest":
        return _classifier_encoder(name, Path(path) if path else JUDGE, place)
    if kind == "rad-dino":
        return _transformer_encoder(name, path or RAD_DINO, place)
    if kind in ("xrv", "inception"):
        if not Path(path).is_file():
            raise EvaluationError(
                f"encoder {name!r}: give a local weights file, as {kind}:FILE (nothing is at {path or '(no path)'})"
            )
        return (_xrv_encoder if kind == "xrv" else _inception_encoder)(Path(path), place)
    folder = Path(name)
    if (folder / "config.json").is_file():
        class_name = json.loads((folder / "config.json").read_text()).get("_class_name")
        if class_name == FindingClassifier.__name__:
            return _classifier_encoder(folder.name, folder, place)
        return _transformer_encoder(folder.name, name, place)
    raise EvaluationError(
        f"no encoder {name!r}: use digital-chest, rad-dino[:FOLDER], xrv:FILE, inception:FILE, pixels, or a folder with config.json"
    )


def load_judge(path: str | Path | None = None, device: torch.device | str | None = None) -> FindingClassifier:
    """The finding classifier at `path`, or the shipped one, in float32 and evaluation mode."""
    folder = Path(path) if path else JUDGE
    if not (folder / "config.json").is_file():
        advice = "train it: medgen train classifier --config configs/classifier/digital_chest.yaml"
        raise EvaluationError(f"no finding classifier at {folder}; {advice}, and pass its export folder with --classifier")
    model = FindingClassifier.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    assert isinstance(model, FindingClassifier)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def fingerprint(module: nn.Module, *parts: object) -> str:
    """SHA-256 over the weights of `module` and any further facts that change its features."""
    digest = hashlib.sha256(repr(parts).encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def pixel_encoder(side: int = 32) -> FeatureEncoder:
    """Grey values of the image at `side` x `side`: for nearest neighbours that look alike."""
    return FeatureEncoder("pixels", f"pixels-{side}", side, side * side, lambda images: images.flatten(1))


def _classifier_encoder(name: str, folder: Path, device: torch.device) -> FeatureEncoder:
    model = load_judge(folder, device)
    size = int(model.config["image_size"])
    return FeatureEncoder(
        name, fingerprint(model, size), size, model.feature_dim, lambda images: model.features(images.to(device))
    )


def _transformer_encoder(name: str, source: str, device: torch.device) -> FeatureEncoder:
    """The CLS token of a transformers vision model, with its own mean, deviation and size."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(source)
        model = AutoModel.from_pretrained(source, use_safetensors=True).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"encoder {name!r}: {source} is no usable transformers vision model ({error})") from error
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    size = int(crop["height"] if "height" in crop else crop["shortest_edge"])
    mean, std = (torch.tensor(getattr(processor, key), device=device).view(1, -1, 1, 1) for key in ("image_mean", "image_std"))

    def encode(images: Tensor) -> Tensor:
        grey = (images.to(device) + 1) / 2
        return model(pixel_values=(grey.expand(-1, 3, -1, -1) - mean) / std).last_hidden_state[:, 0]

    return FeatureEncoder(
        name, fingerprint(model, size, mean.tolist(), std.tolist()), size, int(model.config.hidden_size), encode
    )


def _xrv_encoder(path: Path, device: torch.device) -> FeatureEncoder:
    """torchxrayvision's DenseNet is torchvision's with one input channel; it expects intensities in [-1024, 1024] at 224 pixels."""
    from torchvision.models import densenet121

    model = densenet121(weights=None)
    model.features.conv0 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    weights = {key: value for key, value in read_weights(path).items() if key.startswith("features.")}
    try:
        model.features.load_state_dict({key.removeprefix("features."): value for key, value in weights.items()})
    except RuntimeError as error:
        raise EvaluationError(f"{path} does not hold the weights of torchxrayvision's densenet121: {error}") from error
    trunk = model.features.to(device).eval()

    def encode(images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(functional.relu(trunk(images.to(device) * 1024)), 1).flatten(1)

    return FeatureEncoder("xrv", fingerprint(trunk, 224), 224, 1024, encode)


def _inception_encoder(path: Path, device: torch.device) -> FeatureEncoder:
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
    except (RuntimeError, OSError, ValueError) as error:
        raise EvaluationError(f"{path} does not hold the Inception weights of torch-fidelity: {error}") from error

    def encode(images: Tensor) -> Tensor:
        grey = ((images.to(device) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return model(grey.expand(-1, 3, -1, -1))

    return FeatureEncoder("inception", fingerprint(model), 299, 2048, encode)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or a weights-only file. Raises `EvaluationError` for anything else: nothing is unpickled."""
    try:
        weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise EvaluationError(f"{path} is not a safetensors or weights-only file: {error}") from error
    except Exception as error:  # pickle.UnpicklingError and kin: what weights_only refuses
        raise EvaluationError(
            f"{path} holds pickled code, which is not loaded; save its state_dict as .safetensors first"
        ) from error
    if not isinstance(weights, dict):
        raise EvaluationError(f"{path} holds a {type(weights).__name__}, not a dict of tensors")
    return weights


@torch.inference_mode()
def extract(images: ImageSet, encoder: FeatureEncoder, cache: Path, batch_size: int = 32) -> Features:
    """Features [N,dim] float32 as a memory map below `cache`; what was encoded before is read, not computed again.

    Chunks of images are the unit of the cache: their key is the encoder's fingerprint and the content of their files, so an
    interrupted run continues and a grown set encodes only what is new. Raises `EvaluationError` for features that are not finite.
    """
    folder = cache / f"{encoder.name.partition(':')[0]}-{encoder.fingerprint[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{_key('set', images)}.npy"
    if not whole.is_file():
        temporary = whole.with_suffix(".tmp")
        rows = open_memmap(temporary, mode="w+", dtype=np.float32, shape=(len(images), encoder.dim))
        for start in range(0, len(images), CHUNK):
            part = images.take(range(start, min(start + CHUNK, len(images))))
            rows[start : start + len(part)] = _chunk(part, encoder, folder, batch_size)
        rows.flush()
        del rows
        temporary.replace(whole)
    return np.load(whole, mmap_mode="r")


def _chunk(part: ImageSet, encoder: FeatureEncoder, folder: Path, batch_size: int) -> Features:
    path = folder / f"{_key('chunk', part)}.npy"
    if path.is_file():
        return np.load(path)
    values = torch.cat([encoder.encode(batch).float().cpu() for batch in batches(part, encoder.size, batch_size)]).numpy()
    if not np.isfinite(values).all():
        first = part.paths[int(np.flatnonzero(~np.isfinite(values).all(1))[0])]
        raise EvaluationError(f"encoder {encoder.name!r} gives NaN or infinite features for {first}")
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, values)
    temporary.replace(path)
    return values


def _key(kind: str, images: ImageSet) -> str:
    content = f"{images.native}|{''.join(images.file_hashes)}"
    return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
