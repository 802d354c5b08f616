"""The `data` section of progression recipes: a patient's visits as cached latents, with dates, treatments, covariates and reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from medgen.config import Config, ConfigError
from medgen.data.latent_cache import LatentCache, cache_key
from medgen.data.records import Manifest, read_manifest
from medgen.data.visit_images import VisitImages, VisitPreprocessing
from medgen.data.visit_records import VisitSeries
from medgen.models.progression_conditioner import ProgressionConditioner
from medgen.seeds import generator

ReportEncoder = Callable[[str], Tensor]
"""A report → one token for each of its sentences [R,E]."""


class VisitData(Config):
    """Series to learn from."""

    manifest: Path = Field(..., description="a manifest of visit series with splits train and, if any, val")
    preprocessing: VisitPreprocessing
    cache: Path | None = Field(None, description="folder for preprocessed images; default: none are kept")

    def images(self, split: Literal["train", "val"], least: int = 2) -> VisitImages | None:
        """Every image of the series of `split` that have `least` or more; None where there is no "val"."""
        manifest = self._series(split, least)
        return None if manifest is None else VisitImages(manifest, self.preprocessing, self.cache)

    def _series(self, split: Literal["train", "val"], least: int) -> Manifest[VisitSeries] | None:
        if split == "val" and all(r.split != "val" for r in read_manifest(self.manifest, record=VisitSeries).records):
            return None
        manifest = read_manifest(self.manifest, split, record=VisitSeries)
        kept = tuple(series for series in manifest.records if len(series.imaged) >= least)
        if not kept:
            if split == "val":
                return None
            raise ConfigError(f"data.manifest: no series of {self.manifest} in split {split!r} has {least} visits with images")
        if units := sorted({series.time_unit for series in kept} - {kept[0].time_unit}):
            raise ConfigError(f"data.manifest: {self.manifest} mixes time units {kept[0].time_unit} and {', '.join(units)}")
        return Manifest(kept, manifest.root, manifest.name, manifest.source, manifest.schema_version, manifest.sha256)


class CachedVisits(Dataset[dict[str, Any]]):
    """Series from the cache; no image is opened. `[i]` gives, for V visits with an image, N treatments and R sentences,

    ```
    {"id", "latents" [V,C,*S], "times" [V], "event_kind" [N] long, "event_times" [N], "event_values" [N], "events_known" [],
     "numbers" [K], "words" [L] long, "sentences" [R,E], "sentence_times" [R], "sentence_visit" [R] long (index among the V)}
    ```
    as `ProgressionConditions` has them. With `shown`, an item has that many of its visits at most, drawn anew in every epoch, in
    the order of their dates: more patients for the same work, and gaps of every length. The latents are the posterior's mean: its
    spread is noise that no course explains.
    """

    def __init__(
        self,
        series: Sequence[VisitSeries],
        latents: LatentCache,
        conditioner: ProgressionConditioner,
        encode_report: ReportEncoder | None,
        shown: int | None = None,
    ) -> None:
        self.series, self.latents, self.shown, self.epoch = list(series), latents, shown, 0
        self.fingerprint = cache_key(latents.fingerprint, shown, *conditioner.config.items())
        self._rows: list[list[int]] = []
        row = 0
        for one in self.series:
            self._rows.append(list(range(row, row + len(one.imaged))))
            row += len(one.imaged)
        if row != len(latents):
            raise ValueError(f"{len(latents)} cached images, but the series have {row}: the cache is of another manifest")
        kinds = {name: i for i, name in enumerate(conditioner.config.events)}
        self._conditions = [_conditions(one, conditioner, kinds, encode_report) for one in self.series]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's visits the next items show."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.series)

    def __getitem__(self, index: int) -> dict[str, Any]:
        series, conditions = self.series[index], dict(self._conditions[index])
        count = len(series.imaged)
        chosen = list(range(count))
        if self.shown is not None and count > self.shown:
            draws = generator("visits", self.epoch, series.record_id)
            chosen = sorted(torch.randperm(count, generator=draws)[: self.shown].tolist())
        item: dict[str, Any] = {
            "id": series.record_id,
            "latents": torch.stack([self.latents[self._rows[index][i]]["mean"] for i in chosen]),
            "times": torch.tensor([series.imaged[i].time for i in chosen], dtype=torch.float32),
        }
        if "sentence_visit" in conditions:
            place = {visit: i for i, visit in enumerate(chosen)}
            kept = torch.tensor([int(v) in place for v in conditions["sentence_visit"]], dtype=torch.bool)
            for name in ("sentences", "sentence_times", "sentence_visit"):
                conditions[name] = conditions[name][kept]
            conditions["sentence_visit"] = torch.tensor([place[int(v)] for v in conditions["sentence_visit"]], dtype=torch.long)
        return item | conditions


def _conditions(
    series: VisitSeries, conditioner: ProgressionConditioner, kinds: dict[str, int], encode_report: ReportEncoder | None
) -> dict[str, Tensor]:
    numbers, words = conditioner.covariates(series.covariates)
    events = [event for event in series.events if event.name in kinds]
    item = {
        "event_kind": torch.tensor([kinds[event.name] for event in events], dtype=torch.long),
        "event_times": torch.tensor([event.time for event in events], dtype=torch.float32),
        "event_values": torch.tensor([torch.nan if e.value is None else e.value for e in events], dtype=torch.float32),
        "events_known": torch.tensor(bool(kinds)),
        "numbers": torch.tensor(numbers, dtype=torch.float32),
        "words": torch.tensor(words, dtype=torch.long),
    }
    if encode_report is None:
        return item
    spoken = [(i, visit.time, encode_report(visit.report)) for i, visit in enumerate(series.imaged)]
    lengths = [len(tokens) for _, _, tokens in spoken]
    item["sentences"] = torch.cat([tokens for _, _, tokens in spoken])
    item["sentence_times"] = torch.tensor([t for (_, t, _), n in zip(spoken, lengths) for _ in range(n)], dtype=torch.float32)
    item["sentence_visit"] = torch.tensor([i for (i, _, _), n in zip(spoken, lengths) for _ in range(n)], dtype=torch.long)
    return item


_PADDING = {"times": None, "event_kind": -1, "event_values": torch.nan, "sentence_times": torch.nan, "sentence_visit": -1}


def collate_visits(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch, shorter series padded: "present" [B,T] says where a visit is; times go on at the last date."""
    batch: dict[str, Any] = {"ids": [item["id"] for item in items]}
    for name in (name for name in items[0] if name != "id"):
        values = [item[name] for item in items]
        if name in ("events_known", "numbers", "words"):
            batch[name] = torch.stack(values)
        else:
            batch[name] = pad_sequence(values, batch_first=True, padding_value=float(_PADDING.get(name) or 0))
    counts = torch.tensor([len(item["times"]) for item in items])
    batch["present"] = torch.arange(int(counts.max()))[None] < counts[:, None]
    last = batch["times"].gather(1, counts[:, None] - 1)
    batch["times"] = torch.where(batch["present"], batch["times"], last)
    return batch
