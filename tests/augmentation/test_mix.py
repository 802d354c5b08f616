"""Two lines for a user's own training: real items and synthetic ones that look like them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import Dataset as MonaiDataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, ScaleIntensityRanged
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from medgen.augmentation.mix import MixError, mix
from medgen.data.records import FINDINGS, CXRRecord, FindingLabel, write_manifest


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 films of one grey each; every third has a nodule, the last one may have one."""
    folder = tmp_path_factory.mktemp("synthetic")
    records = []
    for i in range(12):
        Image.fromarray(np.full((16, 16), 10 * i, np.uint8)).save(folder / f"plan-{i}.png")
        labels = (FindingLabel("nodule", "uncertain" if i == 11 else "present" if i % 3 == 0 else "absent"),)
        records.append(CXRRecord(f"plan-{i}", f"synthetic-{i}", f"s-{i}", f"plan-{i}.png", "PA", "", "", "train", labels))
    write_manifest(records, folder / "manifest.parquet", name="synthetic", source="test")
    return folder


def tensors(count: int) -> TensorDataset:
    return TensorDataset(torch.rand(count, 1, 16, 16), torch.zeros(count, len(FINDINGS)))


def test_tuples_in_a_loader(synthetic: Path) -> None:
    dataset = mix(tensors(10), synthetic=synthetic, ratio=0.5, seed=0)
    images, labels = next(iter(DataLoader(dataset, batch_size=15, shuffle=True)))
    assert images.shape == (15, 1, 16, 16) and labels.shape == (15, len(FINDINGS)) and labels.dtype == torch.float32
    assert [dataset.is_synthetic(i) for i in (0, 9, 10, 14, -1)] == [False, False, True, True, True]


def test_labels_follow_the_films_and_doubt_is_left_out(synthetic: Path) -> None:
    dataset = mix(tensors(11), synthetic, ratio=1.0)
    for image, label in (dataset[i] for i in range(11, 22)):
        number = round(float(image.mean()) * 25.5)
        assert label[FINDINGS.index("nodule")] == (number % 3 == 0) and number != 11
        assert label.sum() == label[FINDINGS.index("nodule")]
    with pytest.raises(MixError, match="12 synthetic films wanted, 11 there"):
        mix(tensors(12), synthetic, ratio=1.0)
    assert len(mix(TensorDataset(torch.rand(12, 1, 16, 16), torch.zeros(12)), synthetic, 1.0, labels="edema")) == 24


def test_a_monai_data_set_of_dicts_keeps_its_transforms(synthetic: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16), 200, np.uint8)).save(tmp_path / "real.png")
    steps = [LoadImaged("image"), EnsureChannelFirstd("image"), ScaleIntensityRanged("image", 0, 255, -1, 1)]
    real = MonaiDataset([{"image": str(tmp_path / "real.png"), "label": 1}] * 6, Compose(steps))
    dataset = mix(real, synthetic=synthetic, ratio=0.5, labels="nodule")
    items = [dataset[i] for i in range(9)]
    assert {item["image"].shape for item in items} == {(1, 16, 16)} and {type(item["label"]) for item in items} == {int}
    for item in items[6:]:
        assert item["label"] == (round((float(item["image"].mean()) + 1) * 12.75) % 3 == 0)


def test_the_choice_is_seeded_and_a_smaller_ratio_is_part_of_a_larger(synthetic: Path) -> None:
    def names(ratio: float, seed: int) -> list[str]:
        return [record.record_id for record, _ in mix(tensors(10), synthetic, ratio, seed).records]

    assert names(0.3, 1) == names(0.9, 1)[:3] and names(0.9, 1) != names(0.9, 2)
    assert len(mix(tensors(10), synthetic / "manifest.parquet", 0.0)) == 10


class Named(Dataset):
    """A data set with items of its own."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {"film": "real", "text": "normal"}


class Stream(IterableDataset):
    def __iter__(self):
        yield 1


def test_other_items_are_refused_or_made_by_the_user(synthetic: Path) -> None:
    with pytest.raises(MixError, match="no image among 'film', 'text'"):
        mix(Named(), synthetic)
    own = mix(Named(), synthetic, 0.5, item=lambda record, path: {"film": path.name, "text": record.impression})
    assert own[4]["film"].startswith("plan-") and own[0]["film"] == "real"
    with pytest.raises(MixError, match="with a length"):
        mix(Stream(), synthetic)
    with pytest.raises(MixError, match="label is 3 numbers; labels names 8 findings"):
        mix(TensorDataset(torch.rand(4, 1, 16, 16), torch.zeros(4, 3)), synthetic)
    with pytest.raises(MixError, match="no finding 'fracture'"):
        mix(tensors(4), synthetic, labels="fracture")
