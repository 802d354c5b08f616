"""Real digital clips on disk, a case set made from them, and readings without a network where only a volume curve matters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))

from digital_oracle import generate

from medgen.data.echo_records import EchoRecord
from medgen.data.records import read_manifest
from medgen.digital.echo import write_dataset
from medgen.evaluation.echo.cases import write_echo_cases


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 16 held-out digital clips."""
    return write_dataset(tmp_path_factory.mktemp("reference"), 16, seed=91, processes=1)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    out = tmp_path_factory.mktemp("cases") / "cases.jsonl"
    sizes = {"n": 10, "shifts": 4, "controls": 8, "grid": 1, "irregular": 2, "joined": 0, "one": 2, "repeats": 1}
    return write_echo_cases(reference, out, split=None, **sizes)


@pytest.fixture(scope="session")
def obedient(tmp_path_factory: pytest.TempPathFactory, reference: Path, cases: Path) -> Path:
    """What a perfect generator makes of the cases."""
    manifest = read_manifest(reference, record=EchoRecord)
    return generate(manifest, cases, tmp_path_factory.mktemp("generated") / "obedient")


@pytest.fixture(scope="session")
def deaf(tmp_path_factory: pytest.TempPathFactory, reference: Path, cases: Path) -> Path:
    """Good-looking hearts that beat as they like."""
    folder, manifest = tmp_path_factory.mktemp("deaf"), read_manifest(reference, record=EchoRecord)
    chosen = [line for line in cases.read_text().splitlines() if json.loads(line)["purpose"] in ("population", "shift", "ef")]
    (folder / "cases.jsonl").write_text("\n".join(chosen))
    return generate(manifest, folder / "cases.jsonl", folder / "generated", obedient=False)


@pytest.fixture
def beating():
    """(volume [T] mL, times, R peaks, T ends) of a digital heart, without pictures."""
    from medgen.digital.heart import draw_heart, move
    from medgen.digital.rhythm import draw_rhythm

    def make(index: int = 0, rhythm="sinus", frames: int = 64, fps: float = 20.0, noise: float = 0.01, rate: float | None = None):
        heart = draw_heart(17, index, rhythm)
        times = np.arange(frames) / fps
        driven = draw_rhythm(heart.seed, heart.rhythm, rate or heart.heart_rate, 0.0, float(times[-1]), heart.variability)
        volume = move(heart, driven, times).volume_ml
        volume = volume * (1 + noise * np.random.default_rng(index).standard_normal(frames))
        beats = driven.beats
        return volume, times, np.array([b.r for b in beats]), np.array([b.t_end for b in beats])

    return make
