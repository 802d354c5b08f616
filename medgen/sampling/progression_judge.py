"""A judge of films in the sampler: biomarkers into the metadata and under the strips, for a person's first look."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from medgen.models.film_meter import FilmMeter, as_row, load_film_meter
from medgen.sampling.pictures import BitDepth, quantise
from medgen.sampling.sampler import SamplingError

Reading = Mapping[str, float | None]


@dataclass(frozen=True)
class Judge:
    """A film meter by name, with one SHA-256 over its weights."""

    name: str
    meter: FilmMeter
    sha256: str

    @classmethod
    def load(cls, name: str, device: torch.device) -> Judge:
        """A shipped meter by name, or one in a folder. Raises `SamplingError`."""
        try:
            meter = load_film_meter(name, device)
        except (OSError, ValueError) as error:
            raise SamplingError(f"judge {name!r}: {error}") from None
        weights = hashlib.sha256()
        for key, value in sorted(meter.state_dict().items()):
            weights.update(key.encode() + value.cpu().numpy().tobytes())
        return cls(Path(name).name, meter, weights.hexdigest())

    def read(self, frames: np.ndarray, bit_depth: BitDepth) -> list[Reading]:
        """Biomarkers (None: not to be seen) of frames [N,H,W] in [0,1] as their files show them, one film at a time."""
        return [self._one(quantise(frame, bit_depth) / np.float32(2**bit_depth - 1)) for frame in frames]

    def _one(self, grey: np.ndarray) -> Reading:
        film = torch.from_numpy(grey.astype(np.float32))[None, None] * 2 - 1
        size = (int(self.meter.config["image_size"]),) * 2
        if film.shape[-2:] != size:
            film = functional.interpolate(film, size, mode="bilinear", antialias=True)
        row = as_row(self.meter.measure(film.to(self.meter.device)), 0)
        return {name: float(f"{value:.6g}") if np.isfinite(value) else None for name, value in row.items()}


def in_words(reading: Reading) -> list[str]:
    """A reading in three short lines."""

    def said(name: str, digits: int = 0) -> str:
        value = reading.get(name)
        return "?" if value is None else f"{value:.{digits}f}"

    return [
        f"effusion {said('pleural_effusion_ml')} mL, consolidation {said('consolidation_ml')} mL",
        f"edema {said('edema_ml')} mL, nodule {said('nodule_mm3')} mm3",
        f"heart/thorax {said('cardiothoracic_ratio', 2)}, air {said('aerated_lung_ml')} mL",
    ]
