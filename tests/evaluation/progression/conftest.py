"""Real digital follow-ups, a judge that learned them in seconds, cases made from them, and generators whose quality is known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from generators import copier, generate, prophet

from medgen.data.images import load_image
from medgen.data.records import read_manifest
from medgen.data.visit_records import VisitSeries
from medgen.digital.progression import write_dataset
from medgen.evaluation.progression.cases import write_progression_cases
from medgen.models.film_meter import FilmMeter

SEED, PATIENTS = 1384, 8  # six of these eight are held out, with simulated futures


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 8 follow-ups, 64 pixels square."""
    return write_dataset(tmp_path_factory.mktemp("follow-ups"), PATIENTS, seed=SEED, size=64, futures=32, processes=1)


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """Folder of a film meter that learned these very films: enough to tell them apart."""
    manifest = read_manifest(reference, record=VisitSeries)
    visits = [visit for record in manifest.records for visit in record.imaged]
    films = torch.stack([load_image(manifest.root / str(visit.image)) for visit in visits])
    maps = [np.load(manifest.root / visit.extra["thickness"])["mm"] for visit in visits]
    wanted = torch.from_numpy(np.stack(maps)).float()
    torch.manual_seed(0)
    model = FilmMeter(image_size=64, channels=(16, 24, 32), patients="the test's own")
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(120):
        rows = torch.arange(step * 10, step * 10 + 10) % len(films)
        loss = ((model(films[rows]) - wanted[rows]).abs() / 20).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    out = tmp_path_factory.mktemp("cases")
    return write_progression_cases(reference, out, trajectories=4, controls=6, pairs=2, rollouts=1, split=None)


@pytest.fixture(scope="session")
def true_follow_ups(tmp_path_factory: pytest.TempPathFactory, reference: Path, cases: Path) -> Path:
    """What a prophet makes of the cases."""
    return generate(cases, reference, tmp_path_factory.mktemp("prophet") / "out", prophet)


@pytest.fixture(scope="session")
def copies(tmp_path_factory: pytest.TempPathFactory, reference: Path, cases: Path) -> Path:
    """What somebody makes of them who copies the last film."""
    return generate(cases, reference, tmp_path_factory.mktemp("copier") / "out", copier)
