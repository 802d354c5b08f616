"""What a fine-tuning is judged by: how much it memorised, and what it lost. Levels, noises and prompts are fixed, captions are heard.

Memorisation is the text-noise norm at the memorised patients' films; the denoising losses of those and of patients who were never
seen check it from another side (membership). Quality is of validation patients only; no test film is ever opened for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

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

Purpose = Literal["search", "confirmation"]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """What `Scorer.score` measured. `memorisation` and `quality` are the objectives; lower is better for both.

    `norms`, `loss_seen`, `loss_unseen` and `loss_validation` hold one value for each film (`Scorer.patients` says whose), so that
    intervals can be over patients. `frechet` is None where a search does not go by it. `membership` is the AUC with which the gain in
    denoising loss since the start tells the memorised patients' films from those of patients never seen: .5 is chance.
    """

    memorisation: float
    quality: float
    frechet: float | None
    validation_loss: float
    membership: float
    norms: list[float] = field(repr=False)
    loss_seen: list[float] = field(repr=False)
    loss_unseen: list[float] = field(repr=False)
    loss_validation: list[float] = field(repr=False)


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


def split_patients(config: MemControlConfig) -> tuple[Manifest, list[int], list[int]]:
    """The training split, and in it the rows of the memorised patients' films and of the others that a trial trains on.

    Who is memorised depends on the ids and the seed only. Raises `ConfigError` where there are too few patients.
    """
    manifest = read_manifest(config.data.manifest, "train")
    names = sorted({r.patient_id for r in manifest.records}, key=lambda name: (stable_seed("memorised", config.seed, name), name))
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
        manifest, memorised, _ = split_patients(config)
        self.encoder: FeatureEncoder = load_encoder(config.quality.encoder, start.predictor.device)
        self.seen = self._films(manifest, [manifest.records[i] for i in memorised])
        self.unseen = self._unseen(manifest, len(self.seen.prompts))
        validation = self._validation(manifest)
        self.halves: dict[Purpose, Films] = {}
        names = sorted(set(validation.patients), key=lambda name: (stable_seed("half", config.seed, name), name))
        purposes: tuple[Purpose, Purpose] = ("search", "confirmation")
        for purpose, chosen in zip(purposes, (set(names[::2]), set(names[1::2]))):
            self.halves[purpose] = validation.take([i for i, name in enumerate(validation.patients) if name in chosen])
        self._references: dict[Purpose, Floats] = {}

    def score(self, predictor: NoisePredictor, purpose: Purpose = "search") -> Scores:
        """Scores of a network. "confirmation" takes other noises and the other half of the validation patients."""
        memory, films = self.config.memorisation, self.halves[purpose]
        seed = stable_seed("memcontrol", purpose, self.config.seed)
        with torch.no_grad():
            norms = norms_at_films(predictor, self.seen.prompts, self.seen.latents, memory.levels, memory.draws, seed).mean(1)
            seen, unseen, validation = (self._losses(predictor, group, seed) for group in (self.seen, self.unseen, films))
            wanted = purpose == "confirmation" or self.config.quality.measure == "frechet"
            frechet = self._frechet(predictor, films, seed) if wanted else None
        gain = self._reference(purpose, seed) - np.concatenate([seen, unseen])  # how much better than before the fine-tuning
        membership = auroc(gain, np.arange(len(gain)) < len(seen))
        loss = float(validation.mean())
        return Scores(
            memorisation=self._memorisation(norms),
            quality=frechet if frechet is not None and self.config.quality.measure == "frechet" else loss,
            frechet=frechet,
            validation_loss=loss,
            membership=membership,
            norms=norms.tolist(),
            loss_seen=seen.tolist(),
            loss_unseen=unseen.tolist(),
            loss_validation=validation.tolist(),
        )

    @property
    def patients(self) -> dict[str, list[str]]:
        """Whose each film of the scores is: of the norms ("seen"), and of the validation losses by purpose."""
        return {
            "seen": self.seen.patients,
            "unseen": self.unseen.patients,
            **{str(purpose): films.patients for purpose, films in self.halves.items()},
        }

    def _reference(self, purpose: Purpose, seed: int) -> Floats:
        """Losses of the seen, then the unseen films before any fine-tuning."""
        if purpose not in self._references:
            found = [self._losses(self.start.predictor, films, seed) for films in (self.seen, self.unseen)]
            self._references[purpose] = np.concatenate(found)
        return self._references[purpose]

    def _memorisation(self, norms: Floats) -> float:
        if not self.config.memorisation.largest:
            return float(norms.mean())
        by_patient: dict[str, float] = {}
        for name, norm in zip(self.seen.patients, norms.tolist()):
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

    def _unseen(self, manifest: Manifest, most: int) -> Films:
        """Films of patients whom no training sees: the training manifest's test split (as many films as are memorised), if any."""
        everyone = read_manifest(self.config.data.manifest)
        records = [record for record in everyone.records if record.split == "test"][:most]
        if not records:
            return replace(self.seen, latents=self.seen.latents[:0], prompts=[], patients=[])
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
