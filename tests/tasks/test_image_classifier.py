"""The user's own classifier: films drawn by patient, mixed by share, doubt without loss, published weights from a local file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from medgen.config import ConfigError, load_config
from medgen.data.images import ImagePreprocessing
from medgen.data.records import CXRRecord, FindingLabel, write_manifest
from medgen.models.image_classifier import ImageClassifier, WeightsError
from medgen.tasks.image_classifier import (
    Films,
    FilmSource,
    FindingFilms,
    ImageClassifierRecipe,
    ImageClassifierTask,
    Thinning,
    aurocs,
    drawn,
)
from medgen.training.loop import train

SIZE = 32
CONFIGS = Path(__file__).parents[2] / "configs"


def write_films(root: Path, splits: dict[str, int], per_patient: int = 2, state: str = "present") -> Path:
    """Two films a patient; the even patients have a bright disc, which is a nodule (or doubtful)."""
    (root / "images").mkdir(parents=True)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    records = []
    for split, count in splits.items():
        for patient in range(count):
            for film in range(per_patient):
                name, noise = f"{split}-{patient}-{film}", np.random.default_rng(patient * 2 + film).normal(0, 6, (SIZE, SIZE))
                disc = np.hypot(rows - 8 - patient % 16, columns - 22) < 5
                pixels = np.clip(50 + noise + 150 * (disc if patient % 2 == 0 else 0 * disc), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / f"images/{name}.png")
                label = FindingLabel("nodule", state if patient % 2 == 0 else "absent")  # type: ignore[arg-type]
                person = f"{root.name}-{split}-{patient}"
                records.append(CXRRecord(name, person, person, f"images/{name}.png", "PA", "", "", split, (label,)))  # type: ignore[arg-type]
    return write_manifest(records, root / "manifest.parquet", name=root.name, source="test")


def recipe(root: Path, *sources: dict[str, object], **train_overrides: object) -> ImageClassifierRecipe:
    manifest = root / "films" / "manifest.parquet"
    train_config = {
        "out": root / "run", "steps": 30, "batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 3, "schedule": "cosine",
        "mixed_precision": "no", "cpu": True, "ema": None, "tensorboard": False, "validate_every": 0, "preview_every": 0,
        "preflight": False,
    }  # fmt: skip
    return ImageClassifierRecipe.model_validate({
        "data": {"sources": sources or [{"manifest": manifest}], "validation": manifest, "findings": ["nodule"],
                 "preprocessing": {"size": SIZE}, "in_memory": True},
        "model": {"width": 8}, "train": train_config | train_overrides,
    })  # fmt: skip


def test_it_learns_what_the_labels_say_and_loads_again(tmp_path):
    write_films(tmp_path / "films", {"train": 32, "val": 12})
    settings = recipe(tmp_path)
    task = ImageClassifierTask(settings)
    train(task, settings.train, settings)
    export = tmp_path / "run" / "export"
    assert json.loads((export / "validation.json").read_text())["auroc"]["nodule"] > 0.95
    model = ImageClassifier.from_pretrained(export).eval()
    films = task.dataset("val")
    scores = torch.cat([model(films[i]["image"][None]).detach() for i in range(len(films))])
    assert aurocs(scores, films.targets, films.mask)[0] > 0.95
    further = settings.model_copy(update={"model": settings.model.model_copy(update={"init_from": export})})
    assert torch.equal(
        ImageClassifierTask(further).modules()["model"].state_dict()["backbone.fc.weight"], model.backbone.fc.weight
    )


def test_doubtful_findings_carry_no_loss(tmp_path):
    write_films(tmp_path / "films", {"train": 4}, state="uncertain")
    task = ImageClassifierTask(recipe(tmp_path))
    films = task.dataset("train")
    batch = task.collate([films[i] for i in range(len(films))])
    assert batch["mask"].sum() == 4  # the films without a disc
    batch["targets"][batch["mask"] == 0] = 1.0
    model = task.modules()["model"].eval()
    loss, _ = task.loss({"model": model}, batch, "model", torch.Generator().manual_seed(0))
    batch["targets"][batch["mask"] == 0] = 0.0
    assert task.loss({"model": model}, batch, "model", torch.Generator().manual_seed(0))[0] == loss


def test_a_share_of_the_patients_lies_inside_every_larger_one(tmp_path):
    manifest = write_films(tmp_path / "films", {"train": 40, "val": 2})
    films = Films(ImagePreprocessing(size=SIZE))
    shares = {f: drawn(FilmSource(manifest=manifest, fraction=f), films, seed=3).records for f in (0.05, 0.25, 1.0)}
    people = {f: {record.patient_id for record in records} for f, records in shares.items()}
    assert [len(people[f]) for f in shares] == [2, 10, 40]
    assert people[0.05] < people[0.25] < people[1.0]
    assert len(shares[0.25]) == 20  # both films of each
    assert people[0.25] != {r.patient_id for r in drawn(FilmSource(manifest=manifest, fraction=0.25), films, seed=4).records}
    fewer, more = ({r.record_id for r in drawn(FilmSource(manifest=manifest, films=n), films, 0).records} for n in (7, 20))
    assert len(fewer) == 7
    assert fewer < more
    with pytest.raises(ConfigError, match="81 films are asked for, its training split has 80"):
        drawn(FilmSource(manifest=manifest, films=81), films, 0)


def test_a_finding_is_made_rare_by_leaving_patients_out(tmp_path):
    manifest = write_films(tmp_path / "films", {"train": 40})
    films = Films(ImagePreprocessing(size=SIZE))
    records = drawn(FilmSource(manifest=manifest, rare=Thinning(finding="nodule", prevalence=0.1)), films, 0).records
    shown = [record for record in records if record.labels[0].state == "present"]
    assert (len(shown), len(records)) == (4, 44)  # 4 of 44 is the nearest that whole patients give
    with pytest.raises(ConfigError, match="nodule in 90.00% of the films would be 360 of them; there are 40"):
        drawn(FilmSource(manifest=manifest, rare=Thinning(finding="nodule", prevalence=0.9)), films, 0)


def test_sources_fill_their_shares_of_every_epoch(tmp_path):
    few = write_films(tmp_path / "few", {"train": 2}, per_patient=1)
    many = write_films(tmp_path / "many", {"train": 10}, per_patient=1)
    films = Films(ImagePreprocessing(size=SIZE))
    mixed = FindingFilms([films.manifest(few), films.manifest(many)], ("nodule",), films, shares=(1, 1))
    origins, seen = [], set()
    for epoch in range(2):
        mixed.set_epoch(epoch)
        places = [mixed.place(i) for i in range(len(mixed))]
        origins.append(sum(place < 2 for place in places))
        seen |= set(places)
    assert origins == [6, 6]  # half of 12, though they are but two films
    assert seen == set(range(12))  # what had no place in the first epoch has one in the second
    plain = FindingFilms([films.manifest(few), films.manifest(many)], ("nodule",), films)
    assert [plain.place(i) for i in range(12)] == list(range(12))
    with pytest.raises(ValueError, match="give every source a share, or none"):
        recipe(tmp_path, {"manifest": few, "share": 1}, {"manifest": many})


def test_films_in_memory_are_the_same_up_to_their_grey_values(tmp_path):
    manifest = write_films(tmp_path / "films", {"train": 1})
    films = [Films(ImagePreprocessing(size=24), in_memory=kept) for kept in (False, True)]
    path = films[0].manifest(manifest).root / "images/train-0-0.png"
    assert (films[0].image(path) - films[1].image(path)).abs().max() <= 1 / 255 + 1e-6
    assert torch.equal(films[1].image(path), films[1].image(path))


@pytest.mark.parametrize("network", ["resnet18", "densenet121"])
def test_published_weights_fit_and_see_a_grey_film_as_they_saw_three_colours(tmp_path, network):
    published = getattr(torchvision.models, network)(weights=None).eval()
    torch.save({_aged(name): value for name, value in published.state_dict().items()}, tmp_path / "weights.pth")
    model = ImageClassifier(network, 64, SIZE, ("nodule", "edema")).eval()
    model.load_published(tmp_path / "weights.pth")
    film = torch.rand(2, 1, SIZE, SIZE) * 2 - 1
    features = torch.nn.Identity()
    setattr(published, "fc" if network == "resnet18" else "classifier", features)
    setattr(model.backbone, "fc" if network == "resnet18" else "classifier", features)
    grey = ((film + 1) / 2 - 0.449) / 0.226
    torch.testing.assert_close(model(film), published(grey.expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)


def _aged(name: str) -> str:
    """As torchvision's DenseNet file of 2017 writes "denselayer1.norm1.weight"."""
    parts = name.split(".")
    return ".".join(f"{p[:-1]}.{p[-1]}" if p[:-1] in ("norm", "conv") and "denselayer" in name else p for p in parts)


def test_weights_that_do_not_fit_are_named(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights.pth does not fit resnet18 of width 16.*published weights need width 64"):
        ImageClassifier("resnet18", 16).load_published(tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="no weights at"):
        ImageClassifier("resnet18").load_published(tmp_path / "none.pth")


@pytest.mark.parametrize("path", sorted((CONFIGS / "image_classifier").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_valid(path):
    assert load_config(ImageClassifierRecipe, path).train.ema is None
