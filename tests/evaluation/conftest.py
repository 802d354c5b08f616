"""The judge of the toy world is a real, tiny classifier trained on its films in seconds; nothing is faked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

from toy_films import KINDS, SIZE, film, labels, write_reference

from medgen.models.classifier import FindingClassifier, finding_targets


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a classifier that learned the toy world."""
    torch.manual_seed(0)
    kinds = [KINDS[i % len(KINDS)] for i in range(180)]
    images = torch.stack([torch.from_numpy(film(*kind, 10_000 + i)) for i, kind in enumerate(kinds)])[:, None] / 127.5 - 1
    targets = torch.stack([finding_targets(labels(*kind))[0] for kind in kinds])
    model = FindingClassifier(
        image_size=SIZE, channels=(16, 32), stem_stride=2, feature_channels=8, norm_groups=4, patients="toy"
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        rows = torch.arange(step * 30, step * 30 + 30) % len(images)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images[rows]), targets[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    folder = tmp_path_factory.mktemp("judge")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("reference") / "test", 120, "test", 50_000)
