"""The privacy gate: a sampled film that is a training film, or nearly one, is not written.

Evidence comes twice: a re-identification network proposes the training films that look most like the sampled one or its mirror image,
and the pixels of each are laid over it. `medgen audit gate` builds a gate folder and tests it with planted copies; a gate that failed
there says "not validated" wherever it goes. It finds copies; that it passes a film is no proof that the film shows nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from medgen.models.siamese import SiameseNetwork, load_siamese
from medgen.sampling.aligned import SIDE, STORED, aligned_correlation, reduced
from medgen.sampling.cases import Case
from medgen.sampling.gates import GATE_FILE, GateError, Verdict

INDEX, NETWORK = "index.safetensors", "model"
CANDIDATES = 4  # training films whose pixels are looked at, of the film and of its mirror image each
BATCH = 32


@dataclass(frozen=True)
class Index:
    """Training films: `vectors` [N,dim] float32 (unit length) and `films` [N,STORED,STORED] uint8 (they show patients), with record ids."""

    vectors: Tensor
    films: Tensor
    records: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def of(cls, films: Iterable[Tensor], records: Sequence[str], network: SiameseNetwork) -> Index:
        """Of `films`, batches [B,1,H,W] in [-1,1]."""
        pairs = [(embed(network, batch).cpu(), _as_bytes(reduced(to_network(network, batch), STORED))) for batch in films]
        return cls(torch.cat([vectors for vectors, _ in pairs]), torch.cat([pixels for _, pixels in pairs]), tuple(records))


@dataclass(frozen=True)
class Nearest:
    """The training film most like each of B films: its `score` [B] (1: the same), its row `index` [B], the network's `cosine` [B]."""

    score: Tensor
    index: Tensor
    cosine: Tensor


class PrivacyGate:
    """Rejects films whose likeness to some training film is above `threshold`: the pixel correlation after alignment, 1 for a copy.

    The network only proposes: what it takes for one patient may be two, and a zoomed copy lies farther off than a neighbour.
    """

    name = "privacy"

    def __init__(
        self,
        network: SiameseNetwork,
        index: Index,
        threshold: float,
        validated: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.index, self.threshold, self.validated = network, index, threshold, validated
        self._facts = dict(facts or {})
        self._vectors = index.vectors.to(network.device)

    def describe(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "films": len(self.index), "candidates": CANDIDATES, **self._facts}

    def check(self, images: Tensor, cases: Sequence[Case[Any]]) -> list[Verdict]:
        found = self.nearest(images)
        rows = zip(found.score.tolist(), found.index.tolist(), found.cosine.tolist(), strict=True)
        return [
            Verdict(
                score <= self.threshold,
                score,
                f"likeness {score:.4f} to training film {row} of the gate's index (network {cosine:.3f})",
            )
            for score, row, cosine in rows
        ]

    @torch.inference_mode()
    def nearest(self, images: Tensor) -> Nearest:
        """The training film most like each of `images` [B,1,H,W] in [-1,1]."""
        films = to_network(self.network, images)
        each = min(CANDIDATES, len(self.index))
        ways = self.network.both_ways(films).flatten(0, 1)
        cosine, rows = (ways @ self._vectors.T).topk(each, 1)
        candidates = self.index.films[rows.cpu()].to(films.device).float()
        likeness = aligned_correlation(reduced(torch.cat([films, films.flip(-1)]), SIDE), candidates)
        likeness, rows, cosine = (torch.cat(values.cpu().chunk(2), 1) for values in (likeness, rows, cosine))
        score, best = likeness.max(1)
        return Nearest(score, *(values.gather(1, best[:, None])[:, 0] for values in (rows, cosine)))

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write the gate into `folder`; `facts` go into its gate.json."""
        folder.mkdir(parents=True, exist_ok=True)
        self.network.save_pretrained(folder / NETWORK)
        tensors = {"vectors": self.index.vectors.contiguous(), "films": self.index.films.contiguous()}
        save_file(tensors, folder / INDEX, metadata={"records": json.dumps(self.index.records)})
        state = {
            "gate": self.name,
            "validated": self.validated,
            "threshold": self.threshold,
            "films": len(self.index),
            **{f"{name}_sha256": _sha256(path) for name, path in _parts(folder).items()},
            **facts,
        }
        (folder / GATE_FILE).write_text(json.dumps(state, indent=1))

    @classmethod
    def load(cls, folder: Path | None, device: torch.device | str | None = None) -> PrivacyGate:
        """From a gate folder. Raises `GateError` if it is incomplete or not what was validated."""
        if folder is None:
            raise GateError("the privacy gate needs its folder (it knows the training films); `medgen audit gate` makes one")
        try:
            state = json.loads((folder / GATE_FILE).read_text())
            hashes = {f"{name}_sha256": _sha256(path) for name, path in _parts(folder).items()}
            changed = [name for name, digest in hashes.items() if state[name] != digest]
            if changed:
                raise GateError(
                    f"{folder} is not as it was validated ({', '.join(changed)} differs); build it again: medgen audit gate"
                )
            with safe_open(folder / INDEX, "pt") as file:
                records = tuple(json.loads(file.metadata()["records"]))
                index = Index(file.get_tensor("vectors").float(), file.get_tensor("films"), records)
            return cls(
                load_siamese(folder / NETWORK, device), index, float(state["threshold"]), state["validated"] is True, hashes
            )
        except (OSError, KeyError, TypeError, SafetensorError, json.JSONDecodeError) as error:
            raise GateError(f"{folder} is not a whole privacy gate: {type(error).__name__}: {error}") from None


@torch.inference_mode()
def embed(network: SiameseNetwork, films: Tensor) -> Tensor:
    """Unit vectors [B,dim] of `films` [B,1,H,W] in [-1,1]."""
    return network(to_network(network, films))


def to_network(network: SiameseNetwork, films: Tensor) -> Tensor:
    """`films` [B,1,H,W] at the network's size, on its device, in float32."""
    side = int(network.config["image_size"])
    films = films.to(network.device, torch.float32)
    if tuple(films.shape[-2:]) == (side, side):
        return films
    resized: Tensor = functional.interpolate(films, (side, side), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)


def _as_bytes(films: Tensor) -> Tensor:
    """Films in [-1,1] as uint8."""
    return ((films.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def _parts(folder: Path) -> dict[str, Path]:
    return {"index": folder / INDEX, "network": folder / NETWORK / "diffusion_pytorch_model.safetensors"}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
