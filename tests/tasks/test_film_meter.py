"""The film meter's task on discs of known depth: from visits with thickness files on disk to a folder that measures them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.config import ConfigError, load_config
from medgen.data.records import write_manifest
from medgen.data.visit_records import Visit, VisitSeries
from medgen.models.film_meter import EXTENTS, load_film_meter, volumes_ml
from medgen.tasks.film_meter import FilmMeterRecipe, FilmMeterTask, calibration, identity_projection, in_the_body
from medgen.training.loop import train

SIZE, FIELD = 32, 320.0


def film(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lungs as a dark field, a bright heart in the middle and fluid that stands at the bottom: uint8 [32,32] and mm uint8 [6,16,16]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:16, :16]
    mm = np.zeros((len(EXTENTS), 16, 16))
    mm[1, :, 1:15] = 100
    mm[0] = 60 * (np.hypot(rows - 8, columns - 8) < rng.uniform(2, 5))
    mm[2] = 100 * (rows >= 16 - rng.integers(0, 8)) * (columns >= 8)
    grey = 60 + 1.2 * mm[0] + 0.9 * mm[2] + rng.normal(0, 3, (16, 16))
    return grey.clip(0, 255).astype(np.uint8).repeat(2, 0).repeat(2, 1), mm.astype(np.uint8)


def write_films(root: Path, per_split: dict[str, int], thickness: bool = True) -> Path:
    """Two visits a patient; 80 % of what the maps sum to is the truth, as if the film magnified."""
    records = []
    for split, count in per_split.items():
        for i in range(count):
            visits = []
            for k in range(2):
                name = f"{split}-{i}-{k}"
                grey, mm = film(10_000 * len(split) + 2 * i + k)
                Image.fromarray(grey).save(root / f"{name}.png")
                np.savez(root / f"{name}.npz", mm=mm)
                ml = 0.8 * volumes_ml(torch.from_numpy(mm)[None].float(), FIELD)[0]
                names = ("pleural_effusion_ml", "consolidation_ml", "nodule_mm3", "edema_ml")
                truth = dict(zip(names, ml[2:].tolist(), strict=True)) | {"aerated_lung_ml": float(ml[1] - ml[2])}
                extra = {"thickness": f"{name}.npz"} if thickness else {}
                visits.append(Visit(name, float(10 * k), f"{name}.png", truth=truth, extra=extra))
            name = f"{split}-{i}"
            records.append(VisitSeries(name, name, name, tuple(visits), "cxr", 2, "days", split))
    return write_manifest(records, root / "manifest.parquet", name="discs", source="test")


def recipe(root: Path) -> FilmMeterRecipe:
    options = {
        "out": root / "run", "steps": 150, "batch_size": 12, "learning_rate": 1e-2, "warmup_steps": 5, "schedule": "cosine", "ema": None,
        "mixed_precision": "no", "cpu": True, "tensorboard": False, "validate_every": 0, "preview_every": 0,
    }  # fmt: skip
    values = {
        "data": {"manifest": root / "manifest.parquet", "size": SIZE, "field_mm": FIELD},
        "model": {"patch_size": 2, "channels": (16, 16), "norm_groups": 4},
        "train": options,
    }
    return FilmMeterRecipe.model_validate(values)


def test_it_learns_to_measure_fluid(tmp_path):
    write_films(tmp_path, {"train": 24, "val": 8})
    task = recipe(tmp_path)
    train(FilmMeterTask(task), task.train, task)
    export = tmp_path / "run" / "export"
    facts = json.loads((export / "validation.json").read_text())
    assert facts["films"] == 16
    assert facts["biomarkers"]["pleural_effusion_ml"]["r"] > 0.97
    assert "cardiothoracic_ratio" not in facts["biomarkers"]  # these visits' truth has none
    assert set(facts["calibration"]) == set(EXTENTS)
    assert "discs" in (export / "README.md").read_text()
    assert json.loads((export / "config.json").read_text())["patients"].startswith("discs (")
    meter = load_film_meter(export, "cpu")
    grey, mm = film(7)
    readings = meter.measure(torch.from_numpy(grey)[None, None].float() / 127.5 - 1)
    true = 0.8 * volumes_ml(torch.from_numpy(mm)[None].float(), FIELD)[0]
    assert readings["pleural_effusion_ml"].item() == pytest.approx(float(true[2]), abs=0.1 * float(true[1]))


def test_maps_are_scaled_to_what_is_in_the_body():
    maps = torch.zeros(6, 16, 16)
    maps[1], maps[2, 10:] = 100.0, 50.0
    seen = volumes_ml(maps[None], FIELD)[0]
    truth = {"pleural_effusion_ml": 0.7 * float(seen[2]), "consolidation_ml": 0.0, "nodule_mm3": 0.0, "edema_ml": 0.0}
    visit = Visit("a", 0.0, truth=truth | {"aerated_lung_ml": 0.8 * float(seen[1]) - truth["pleural_effusion_ml"]})
    scaled = volumes_ml(in_the_body(maps, visit, FIELD)[None], FIELD)[0]
    assert scaled[1:3].tolist() == pytest.approx([0.8 * float(seen[1]), 0.7 * float(seen[2])])
    torch.testing.assert_close(in_the_body(maps, Visit("a", 0.0), FIELD), maps)  # nothing is known: as it is


def test_one_factor_per_extent_is_a_line_through_the_origin():
    seen = torch.tensor([[10.0, 0, 0, 0, 0, 0], [20.0, 0, 0, 0, 0, 5]])
    true = torch.tensor([[8.0, 0, 0, 0, 0, 0], [16.0, 0, 0, 0, 0, 0]])
    assert calibration(seen, true) == [0.8, 1, 1, 1, 1, 1]


def test_persons_are_told_apart_where_their_own_films_agree():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    own = rng.normal(size=(40, 6))[patients] * [1, 1, 0.1, 0.1, 0.1, 0.1]
    films = torch.from_numpy(own + rng.normal(size=(200, 6)) * [5, 0.1, 0.01, 1, 1, 1]).float()
    weight, bias = identity_projection(films, [str(i) for i in patients], dim=2)
    found = films @ weight.T + bias
    assert found.mean(0).abs().max() < 1e-4

    def known_again(features: torch.Tensor) -> float:
        apart = torch.cdist(features, features).fill_diagonal_(torch.inf)
        return float((patients[apart.argmin(1).numpy()] == patients).mean())

    assert known_again(found) > 2 * known_again(films), "what differs most from film to film no longer counts"
    assert identity_projection(films[::5], [str(i) for i in range(40)])[0].shape == (6, 6)  # one film each


def test_films_without_thickness_are_named(tmp_path):
    write_films(tmp_path, {"train": 1}, thickness=False)
    with pytest.raises(ConfigError, match="none of the visits of its 1 series has a thickness file"):
        FilmMeterTask(recipe(tmp_path)).dataset("train")


def test_maps_of_another_size_are_refused(tmp_path):
    write_films(tmp_path, {"train": 1})
    np.savez(tmp_path / "train-0-0.npz", mm=np.zeros((6, 8, 8), np.uint8))
    with pytest.raises(ConfigError, match=r"train-0-0.npz holds mm uint8 \[6, 8, 8\]; expected uint8 \[6, 16, 16\]"):
        FilmMeterTask(recipe(tmp_path)).dataset("train")[0]


def test_the_shipped_recipe_is_valid():
    path = Path(__file__).parents[2] / "configs/film_meter/digital_progression.yaml"
    assert load_config(FilmMeterRecipe, path).train.mixed_precision == "no"
