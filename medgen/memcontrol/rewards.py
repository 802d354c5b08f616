"""What a fine-tuning is judged by: how much it memorised, and what it lost. Levels, noises and prompts are fixed, captions are heard.

Memorisation is measured at the memorised patients' films, against films of patients who were never seen. Quality is of validation
patients only. The search has one half of the strangers and of the validation patients, the confirmation the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from medgen.config import ConfigError
from medgen.data.dataset import CXRDataset
from medgen.data.records import CXRRecord, Manifest, read_manifest
from medgen.evaluation.alignment import auroc
from medgen.evaluation.features import FeatureEncoder, load_encoder
from medgen.evaluation.fidelity import frechet_distance
from medgen.evaluation.privacy.predictor import NoisePredictor
from medgen.evaluation.privacy.text_noise import norms_at_films
from medgen.evaluation.statistics import Gaussian
from medgen.memcontrol.config import MemControlConfig
from medgen.memcontrol.task import Start
from medgen.models.denoiser import SequenceTransformer
from medgen.seeds import generator, stable_seed

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """What `Scorer.score` measured. `memorisation` and `quality` are the objectives; lower is better for both.

    `text_noise` and `loss_gap` are the two measures of memorisation (`MemorisationConfig`); without patients never seen there is no
    gap. `frechet` is None where a search does not go by it. `gain_seen` and `gain_unseen` hold ln(loss before / loss now) of each
    film; `membership` is the AUC with which it tells the memorised patients' films from those of patients never seen: .5 is chance.
    """

    memorisation: float
    quality: float
    frechet: float | None
    validation_loss: float
    text_noise: float
    loss_gap: float | None
    membership: float
    gain_seen: list[float] = field(repr=False)
    gain_unseen: list[float] = field(repr=False)


@dataclass(frozen=True)
class Films:
    """Some films as the scores need them: latents [N,C,h,w], captions, and whose they are."""

    latents: Tensor
    prompts: list[str]
    patients: list[str]
    features: Floats | None = None

    def take(self, rows: Sequence[int]) -> Films:
        """Those at `rows`."""
        features = None if self.features is None else self.features[list(rows)]
        return Films(self.latents[list(rows)], [self.prompts[i] for i in rows], [self.patients[i] for i in rows], features)


def split_patients(config: MemControlConfig, repeat: int = 0) -> tuple[Manifest, list[int], list[int]]:
    """The training split, and in it the rows of the memorised patients' films and of the others that a trial trains on.

    Who is memorised depends on the ids, the seed and the repeat only. Raises `ConfigError` where there are too few patients.
    """
    manifest = read_manifest(config.data.manifest, "train")
    names = sorted(
        {r.patient_id for r in manifest.records}, key=lambda name: (stable_seed("memorised", config.seed, repeat, name), name)
    )
    wanted = config.inner.memorised_patients
    if len(names) < wanted:
        raise ConfigError(f"inner.memorised_patients: {wanted}, but {config.data.manifest} has {len(names)} training patients")
    memorised = set(names[:wanted])
    others = set(names[wanted : wanted + round(config.inner.other_fraction * (len(names) - wanted))])
    rows = range(len(manifest.records))
    return (
        manifest,
        [i for i in rows if manifest.records[i].patient_id in memorised],
        [i for i in rows if manifest.records[i].patient_id in others],
    )


class Scorer:
    """Scores fine-tunings of one start by one configuration: everything that does not depend on their weights is computed once."""

    def __init__(self, config: MemControlConfig, start: Start) -> None:
        self.config, self.start = config, start
        self.encoder: FeatureEncoder = load_encoder(config.quality.encoder, start.predictor.device)
        manifest = read_manifest(config.data.manifest, "train")
        self.validation = self._halves(self._validation(manifest))
        self.unseen = self._halves(self._unseen(manifest))
        self._seen: dict[int, Films] = {}
        self._references: dict[int, Floats] = {}

    def score(self, predictor: NoisePredictor, repeat: int = 0) -> Scores:
        """Scores of a network, of the search (0) or of a repeat of the confirmation: there the other half, other noises."""
        memory, half = self.config.memorisation, min(repeat, 1)
        seed = stable_seed("memcontrol", self.config.seed, repeat)
        seen, validation = self.seen(repeat), self.validation[half]
        with torch.no_grad():
            norms = norms_at_films(predictor, seen.prompts, seen.latents, memory.levels, memory.draws, seed).mean(1)
            gains = np.log(self._reference(repeat, seed) / self._watched(predictor, repeat, seed))
            loss = float(self._losses(predictor, validation, seed).mean())
            frechet = self._frechet(predictor, validation, seed) if self.config.quality.measure == "frechet" else None
        members = np.arange(len(gains)) < len(seen.prompts)
        gap = None if members.all() else float(gains[members].mean() - gains[~members].mean())
        noise = self._text_noise(norms, seen.patients)
        return Scores(
            memorisation=gap if memory.measure == "loss_gap" and gap is not None else noise,
            quality=loss if frechet is None else frechet,
            frechet=frechet,
            validation_loss=loss,
            text_noise=noise,
            loss_gap=gap,
            membership=auroc(gains, members),
            gain_seen=gains[members].tolist(),
            gain_unseen=gains[~members].tolist(),
        )

    @property
    def counts(self) -> dict[str, list[int]]:
        """How many films of validation patients, and of patients never seen: of the search, and of the confirmation."""
        halves = {"validation": self.validation, "unseen": self.unseen}
        return {name: [len(films.prompts) for films in both] for name, both in halves.items()}

    def seen(self, repeat: int) -> Films:
        """The films of those whom this repeat memorises."""
        if repeat not in self._seen:
            manifest, memorised, _ = split_patients(self.config, repeat)
            self._seen[repeat] = self._films(manifest, [manifest.records[i] for i in memorised])
        return self._seen[repeat]

    def _halves(self, films: Films) -> tuple[Films, Films]:
        """The search's and the confirmation's: whole patients, by a hash."""
        names = sorted(set(films.patients), key=lambda name: (stable_seed("half", self.config.seed, name), name))
        first = set(names[::2])
        rows = [[i for i, name in enumerate(films.patients) if (name in first) == wanted] for wanted in (True, False)]
        return films.take(rows[0]), films.take(rows[1])

    def _watched(self, predictor: NoisePredictor, repeat: int, seed: int) -> Floats:
        """Losses of the seen, then of the unseen films."""
        watched = (self.seen(repeat), self.unseen[min(repeat, 1)])
        return np.concatenate([self._losses(predictor, films, seed) for films in watched])

    def _reference(self, repeat: int, seed: int) -> Floats:
        """The same before any fine-tuning."""
        if repeat not in self._references:
            self._references[repeat] = self._watched(self.start.predictor, repeat, seed)
        return self._references[repeat]

    def _text_noise(self, norms: Floats, patients: Sequence[str]) -> float:
        if not self.config.memorisation.largest:
            return float(norms.mean())
        by_patient: dict[str, float] = {}
        for name, norm in zip(patients, norms.tolist()):
            by_patient[name] = max(norm, by_patient.get(name, 0.0))
        return float(np.mean(list(by_patient.values())))

    def _losses(self, predictor: NoisePredictor, films: Films, seed: int) -> Floats:
        """Denoising loss of each film [N] under its own caption, averaged over the fixed levels and noises."""
        memory, size = self.config.memorisation, self.config.quality.batch_size
        found = np.zeros(len(films.prompts), dtype=np.float32)
        for start in range(0, len(found), size):
            rows = slice(start, start + size)
            captions, clean = predictor.captions(films.prompts[rows]), films.latents[rows].to(predictor.device)
            for draw in range(memory.draws):
                noise = torch.randn(predictor.latent_shape, generator=generator("denoising loss", seed, draw))
                noise = noise.to(predictor.device)[None]
                for level in memory.levels:
                    predicted = predictor.predict(predictor.noised(clean, noise, level), level, captions)
                    error = (predicted - predictor.target(clean, noise, level)).square().flatten(1).mean(1)
                    found[rows] += error.cpu().numpy() / (memory.draws * len(memory.levels))
        return found

    def _frechet(self, predictor: NoisePredictor, films: Films, seed: int) -> float:
        """Of as many generated films as there are validation films of this half, one for each of their prompts."""
        assert films.features is not None
        quality, pipeline, features = self.config.quality, predictor.pipeline, []
        wanted = {"num_inference_steps": quality.steps, "guidance_scale": quality.guidance}
        settings: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
        if not isinstance(predictor.denoiser, SequenceTransformer):
            settings |= dict.fromkeys(("height", "width"), predictor.preprocessing.size)
        pipeline.set_progress_bar_config(disable=True)
        for start in range(0, len(films.prompts), quality.batch_size):
            prompts = films.prompts[start : start + quality.batch_size]
            draws = [generator("memcontrol film", seed, start + i) for i in range(len(prompts))]
            images: Tensor = pipeline(prompts, generator=draws, output_type="pt", **settings).images
            features.append(self._features(2 * images.float().mean(1, keepdim=True) - 1))
        return frechet_distance(Gaussian.of(films.features), Gaussian.of(np.concatenate(features)))

    def _features(self, images: Tensor) -> Floats:
        size = self.encoder.size
        if images.shape[-1] != size:
            images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        found: Floats = self.encoder.encode(images.clamp(-1, 1)).float().cpu().numpy()
        return found

    @torch.no_grad()
    def _films(self, manifest: Manifest, records: Sequence[CXRRecord], features: bool = False) -> Films:
        predictor = self.start.predictor
        prompts = self.config.data.prompts.model_copy(update={"max_tokens": predictor.limit, "random_words": 0})
        data = CXRDataset(
            replace(manifest, records=tuple(records)),
            predictor.preprocessing,
            prompts=prompts,
            count_tokens=predictor.count_tokens,
            cache=self.config.data.cache,
        )
        latents, found = [], []
        for start in range(0, len(data), 16):
            images = torch.stack([data[i]["image"] for i in range(start, min(start + 16, len(data)))])
            latents.append(predictor.latents(images).cpu())
            if features:
                found.append(self._features(images.to(predictor.device)))
        patients = [record.patient_id for record in records]
        texts = [data.prompt(i) for i in range(len(data))]
        return Films(torch.cat(latents), texts, patients, np.concatenate(found) if features else None)

    def _unseen(self, training: Manifest) -> Films:
        """Films of patients whom no training sees: the training manifest's test split, if any."""
        everyone = read_manifest(self.config.data.manifest)
        records = [record for record in everyone.records if record.split == "test"]
        if not records and self.config.memorisation.measure == "loss_gap":
            raise ConfigError(
                f"memorisation.measure: a loss_gap needs patients never seen, and {self.config.data.manifest} has no record in "
                "split test; use text_noise"
            )
        if not records:
            films = self._films(training, training.records[:1])
            return replace(films, latents=films.latents[:0], prompts=[], patients=[])
        return self._films(everyone, records)

    def _validation(self, training: Manifest) -> Films:
        """The validation films: whole patients, in the order of a hash, until there are enough. Refused: anyone who is trained on."""
        path, most = self.config.validation, self.config.quality.films
        everyone = read_manifest(path)
        records = [record for record in everyone.records if record.split == "val"]
        if not records:
            raise ConfigError(
                f"quality.manifest: {path} has no record in split val, and quality is never measured on test films; name a "
                "manifest that has one"
            )
        trained = {record.patient_id for record in training.records}
        if shared := sorted({record.patient_id for record in records} & trained):
            raise ConfigError(f"quality.manifest: {len(shared)} of its val patients are trained on (first: {shared[0]!r})")
        records.sort(key=lambda r: (stable_seed("validation", self.config.seed, r.patient_id), r.record_id))
        records = records[:most]
        if len(records) < 40 or len({record.patient_id for record in records}) < 4:
            raise ConfigError(f"quality.films: {path} has {len(records)} val films; a Fréchet distance needs at least 40")
        return self._films(everyone, records, features=True)
