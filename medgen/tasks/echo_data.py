"""The `data` sections of echo recipes: frames of clips as images, and clips with what they are conditioned on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset

from medgen.config import Config
from medgen.data.clip_cache import Arrays, ClipCache
from medgen.data.clips import VideoPreprocessing
from medgen.data.ecg import LEADS, ECGPreparation, frame_phase, read_ecg
from medgen.data.ecg_window import MARGIN_SECONDS, ecg_window
from medgen.data.echo_dataset import EchoDataset, shifted
from medgen.data.echo_records import ECHO_VIEWS, EchoRecord
from medgen.data.images import to_square
from medgen.data.latent_cache import cache_key, module_hash
from medgen.data.records import Manifest, read_manifest
from medgen.data.video import load_video
from medgen.models.ecg_encoders import ECGEncoderError, PublishedECGEncoder, encode_span
from medgen.seeds import generator, stable_seed

_CACHE_VERSION = 1  # raise it when the same clip gives other arrays


class FramePreprocessing(Config):
    """How a frame becomes an image."""

    size: int = Field(112, ge=8, description="height and width in pixels")


class EchoFrames(Config):
    """Frames of echo clips as images: what an autoencoder learns from."""

    manifest: Path = Field(..., description="a manifest of echo clips with splits train and, if any, val")
    preprocessing: FramePreprocessing = FramePreprocessing()
    frames_per_clip: int = Field(
        ..., ge=1, description="images drawn of a clip each time it comes (a batch is so many times larger)"
    )

    def dataset(self, split: Literal["train", "val"]) -> FramesOfClips | list[Any]:
        """{"id", "image" [K,1,H,W] in [-1,1]} per clip of `split`; an empty list where there is no "val"."""
        manifest = split_of(self.manifest, split)
        return [] if manifest is None else FramesOfClips(manifest, self.preprocessing, self.frames_per_clip)


class FramesOfClips(Dataset[dict[str, Any]]):
    """`frames` different frames of each clip, others in every epoch; an item depends on (epoch, clip) only."""

    def __init__(self, manifest: Manifest[EchoRecord], preprocessing: FramePreprocessing, frames: int) -> None:
        self.manifest, self.preprocessing, self.frames, self.epoch = manifest, preprocessing, frames, 0
        self.fingerprint = cache_key(manifest.sha256, preprocessing.model_dump_json(), frames, len(manifest))

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's frames the next items are."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.manifest.records[index]
        video = load_video(self.manifest.path(record.video), record.fps).frames
        draws = generator("frames", self.epoch, record.record_id)
        chosen = torch.randperm(len(video), generator=draws)[: self.frames]
        if len(chosen) < self.frames:  # a clip of fewer frames gives some of them twice
            chosen = torch.randint(len(video), (self.frames,), generator=draws)
        return {"id": record.record_id, "image": _images(video[chosen.numpy()], self.preprocessing.size)}


class EchoData(Config):
    """Clips with their ECG: what a generator of echo video learns from."""

    manifest: Path = Field(..., description="a manifest of echo clips with splits train and, if any, val")
    preprocessing: VideoPreprocessing = VideoPreprocessing()
    ecg: ECGPreparation = ECGPreparation()

    def dataset(self, split: Literal["train", "val"]) -> EchoDataset | None:
        """The clips of `split`, read from their files; None where there is no "val"."""
        manifest = split_of(self.manifest, split)
        return None if manifest is None else EchoDataset(manifest, self.preprocessing, self.ecg)


class CachedClips(Dataset[dict[str, Any]]):
    """Windows of clips from the cache; no video is opened. `[i]` gives, for T frames and S samples of ECG,

    ```
    {"id", "mean" and "std" [T,C,h,w] float16, "present" [T] bool (a shorter clip is padded at its end), "times" [T] s,
     "phase" [T,4], "ecg" [12,S] mV, "lead_mask" [12], "sample_mask" [S], "ecg_start" s, "ejection_fraction", "view", "fps"}
    ```
    as `EchoConditions` has them, and "encoded" [M,E] with "encoded_times" [M] where a published encoder listened. A clip longer
    than the window gives another part in every epoch. With `shown`, an item has the window's first frame and `shown` - 1 others,
    drawn anew in every epoch, at their real times.
    """

    def __init__(self, cache: ClipCache, manifest: Manifest[EchoRecord], data: EchoData, seed: int) -> None:
        self.cache, self.manifest, self.data, self.seed, self.epoch = cache, manifest, data, seed, 0
        self.fingerprint = cache.fingerprint
        self.shown: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's windows the next items are."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record, arrays = self.manifest.records[index], self.cache[index]
        wanted, fps = self.data.preprocessing.frames, self.data.preprocessing.fps
        there = len(arrays["mean"])
        count = min(wanted, there)
        first = stable_seed("window", self.seed, self.epoch, record.record_id) % (there - count + 1)
        part, missing = slice(first, first + count), wanted - count
        start = float(arrays["times"][first])
        grid = np.arange(wanted) / fps  # padded frames and the length of the ECG do not depend on the camera's rhythm
        times = np.where(np.arange(wanted) < count, np.pad(arrays["times"][part] - start, (0, missing)), grid)
        item: dict[str, Any] = {
            "id": record.record_id,
            "mean": _padded(arrays["mean"][part], missing),
            "std": _padded(arrays["std"][part], missing),
            "present": torch.arange(wanted) < count,
            "times": torch.from_numpy(times.astype(np.float32)),
            "phase": _padded(arrays["phase"][part], missing, np.nan),
            **_ecg_part(arrays, start, round((grid[-1] + 2 * MARGIN_SECONDS) * self.data.ecg.rate), self.data.ecg.rate),
            "ejection_fraction": torch.tensor(np.nan if record.ejection_fraction is None else record.ejection_fraction),
            "view": torch.tensor(ECHO_VIEWS.index(record.view) if record.view in ECHO_VIEWS else -1),
            "fps": torch.tensor(fps),
            **_encoded_part(arrays, start, float(grid[-1])),
        }
        if self.shown is not None and self.shown < wanted:
            drawn = torch.randperm(wanted - 1, generator=generator("shown frames", self.seed, self.epoch, record.record_id))
            kept = torch.cat([torch.zeros(1, dtype=torch.long), 1 + drawn[: self.shown - 1].sort().values])
            item |= {name: item[name][kept] for name in ("mean", "std", "present", "times", "phase")}
        return item


def cached_clips(
    clips: EchoDataset,
    data: EchoData,
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    autoencoder: str,
    root: Path,
    device: torch.device | str,
    seed: int,
    ecg_encoder: PublishedECGEncoder | None = None,
) -> CachedClips:
    """`clips` with the latents that `encode` gives of all their frames, below `root`; `autoencoder` is its hash.

    With `ecg_encoder`, also its tokens of each clip's ECG; one too short for it is an error that names the record.
    """
    manifest = clips.manifest
    ids = [record.record_id for record in manifest.records]
    settings = (data.preprocessing.model_dump_json(exclude={"frames"}), data.ecg.model_dump_json())

    def load(index: int) -> tuple[Tensor, Arrays]:
        clip, prepared = clips.clip(index), clips.prepared_ecg(index)
        phase = np.full((len(clip.times), 4), np.nan, np.float32)
        kept: Arrays = {"times": clip.times - clip.times[0], "phase": phase}
        if ecg_encoder is not None:
            kept |= {"encoded": np.zeros((0, ecg_encoder.width), np.float16), "encoded_times": np.zeros(0, np.float32)}
        if prepared is not None:
            prepared = shifted(prepared, -float(clip.times[0]))
            window = ecg_window(prepared, 0.0, float(kept["times"][-1]))
            kept |= {"ecg": window.signal.astype(np.float16), "lead_mask": window.lead_mask, "sample_mask": window.sample_mask}
            kept["phase"] = frame_phase(prepared.r_peaks, prepared.t_ends, kept["times"]).astype(np.float32)
            if ecg_encoder is not None:
                kept |= _encoded(ecg_encoder, manifest, index, float(clip.times[0]), float(kept["times"][-1]))
        return clip.video(), kept

    listener = () if ecg_encoder is None else (module_hash(ecg_encoder),)
    key = cache_key("clips", _CACHE_VERSION, autoencoder, manifest.sha256, *settings, *listener)
    return CachedClips(ClipCache.build(root, ids, load, encode, key, device=device), manifest, data, seed)


def split_of(path: Path, split: Literal["train", "val"]) -> Manifest[EchoRecord] | None:
    """The clips of one split; None if the manifest has none in "val" (a training split must exist)."""
    if split == "val" and all(record.split != "val" for record in read_manifest(path, record=EchoRecord).records):
        return None
    return read_manifest(path, split, record=EchoRecord)


def _images(frames: np.ndarray[Any, np.dtype[np.uint8]], size: int) -> Tensor:
    """[K,1,size,size] in [-1,1], with the geometry of `VideoPreprocessing`."""
    return to_square(torch.from_numpy(frames) / 255, size, pad=True)[:, None] * 2 - 1


def _ecg_part(arrays: Arrays, start: float, count: int, rate: float) -> dict[str, Tensor]:
    """`count` samples from MARGIN_SECONDS before second `start` of the clip on; what the cache does not hold is masked."""
    signal, samples = np.zeros((len(LEADS), count), np.float32), np.zeros(count, bool)
    leads, first = np.zeros(len(LEADS), bool), round(start * rate)
    if "ecg" in arrays:
        leads = arrays["lead_mask"]
        part = arrays["ecg"][:, first : first + count]
        signal[:, : part.shape[1]], samples[: part.shape[1]] = part, arrays["sample_mask"][first : first + count]
    return {
        "ecg": torch.from_numpy(signal),
        "lead_mask": torch.from_numpy(leads),
        "sample_mask": torch.from_numpy(samples),
        "ecg_start": torch.tensor(first / rate - start - MARGIN_SECONDS),  # to a part of a sample
    }


def _encoded(encoder: PublishedECGEncoder, manifest: Manifest[EchoRecord], index: int, first: float, seconds: float) -> Arrays:
    """What `encoder` makes of the ECG of a beat-synchronous record around its clip, which begins at its video's second `first`."""
    record = manifest.records[index]
    begin = record.ecg_offset + first
    try:
        ecg = read_ecg(manifest.path(str(record.ecg)))
        found = encode_span(encoder, ecg, begin - MARGIN_SECONDS, begin + seconds + MARGIN_SECONDS)
    except ValueError as error:
        raise ECGEncoderError(f"record {record.record_id!r} of {manifest.name}: {error}") from error
    return {"encoded": found.tokens.half().numpy(), "encoded_times": (found.times - begin).numpy()}


def _encoded_part(arrays: Arrays, start: float, seconds: float) -> dict[str, Tensor]:
    """The tokens around a window of `seconds` that begins at second `start` of the clip."""
    if "encoded" not in arrays:
        return {}
    times = arrays["encoded_times"] - start
    near = (times >= -MARGIN_SECONDS) & (times <= seconds + MARGIN_SECONDS)
    return {
        "encoded": torch.from_numpy(arrays["encoded"][near].astype(np.float32)),
        "encoded_times": torch.from_numpy(times[near].astype(np.float32)),
    }


def _padded(values: np.ndarray[Any, Any], missing: int, value: float = 0.0) -> Tensor:
    """[T + missing, ...]"""
    padding = [(0, missing)] + [(0, 0)] * (values.ndim - 1)
    return torch.from_numpy(np.pad(values, padding, constant_values=value) if missing else np.ascontiguousarray(values))
