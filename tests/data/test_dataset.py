"""Records become items: same values with and without the cache, the second epoch from disk, errors that name the record."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.data.dataset import Augmentation, CXRDataset
from medgen.data.dicom import write_dx
from medgen.data.images import ImageError, ImagePreprocessing
from medgen.data.records import CXRRecord, FindingLabel, Manifest, read_manifest, write_manifest
from medgen.data.report_text import PromptConfig, ReportError

SMALL = ImagePreprocessing(size=32)


def manifest(folder: Path, n: int = 3, suffix: str = ".png", side: int = 48, **changes: Any) -> Manifest:
    """A manifest of `n` films with a bright right half of the picture (the patient's left)."""
    (folder / "images").mkdir(parents=True)
    records = []
    for i in range(n):
        film = np.zeros((side, side), np.uint16)
        film[:, side // 2 :] = 30000 + 1000 * i
        name = f"images/r{i}{suffix}"
        if suffix == ".dcm":
            write_dx(folder / name, film, patient_id=f"p{i}", study_id=f"s{i}", record_id=f"r{i}", model="test", seed=i)
        else:
            Image.fromarray(film).save(folder / name)
        values: dict[str, Any] = {"findings": "No pneumothorax.", "impression": "Small left pleural effusion."} | changes
        labels = (FindingLabel("pleural_effusion", "present", "left", "small"), FindingLabel("pneumothorax", "absent"))
        records.append(CXRRecord(f"r{i}", f"p{i}", f"s{i}", name, "PA", split="train", labels=labels, **values))
    return read_manifest(write_manifest(records, folder / "manifest.parquet", name="tiny", source="test"))


def test_an_item(tmp_path: Path) -> None:
    item = CXRDataset(manifest(tmp_path), SMALL)[1]
    assert item["id"] == "r1" and item["prompt"] == "Small left pleural effusion. No pneumothorax."
    assert item["image"].shape == (1, 32, 32) and item["image"].dtype == torch.float32
    assert item["image"][0, 5, 5] == -1 and item["image"][0, 5, 28] == pytest.approx(31000 / 65535 * 2 - 1)
    assert item["labels"] == {"pleural_effusion": "present", "pneumothorax": "absent"}
    assert item["sides"] == {"pleural_effusion": "left"}


def test_the_cache_changes_no_value_and_notices_a_changed_file(tmp_path: Path) -> None:
    films = manifest(tmp_path)
    plain, cached = CXRDataset(films, SMALL), CXRDataset(films, SMALL, cache=tmp_path / "cache")
    for _ in range(2):
        assert all(torch.equal(plain[i]["image"], cached[i]["image"]) for i in range(3))
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 3 and not list((tmp_path / "cache").rglob("*.tmp"))
    assert CXRDataset(films, ImagePreprocessing(size=16), cache=tmp_path / "cache")[0]["image"].shape == (1, 16, 16)
    Image.fromarray(np.full((48, 48), 65535, np.uint16)).save(films.image_path(films.records[0]))
    assert (cached[0]["image"] == 1).all()


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path) -> None:
    films = manifest(tmp_path)
    data = CXRDataset(films, SMALL, cache=tmp_path / "cache")
    expected = data[0]["image"]
    entry = data.prepare.entry(films.image_path(films.records[0]))
    entry.write_bytes(entry.read_bytes()[:100])
    assert torch.equal(data[0]["image"], expected)


def test_the_second_epoch_on_dicom_is_five_times_faster(tmp_path: Path) -> None:
    films = manifest(tmp_path, n=6, suffix=".dcm", side=1024)
    plain = CXRDataset(films, ImagePreprocessing(size=256))
    cached = CXRDataset(films, ImagePreprocessing(size=256), cache=tmp_path / "cache")
    _epoch_seconds(cached)
    assert min(_epoch_seconds(plain) for _ in range(3)) > 5 * min(_epoch_seconds(cached) for _ in range(3))


def _epoch_seconds(data: CXRDataset) -> float:
    start = time.perf_counter()
    for i in range(len(data)):
        data[i]
    return time.perf_counter() - start


def test_augmentation_follows_epoch_and_record_only_and_never_flips(tmp_path: Path) -> None:
    films = manifest(tmp_path)
    first, second = (CXRDataset(films, SMALL, augmentation=Augmentation(), seed=7) for _ in range(2))
    second.set_epoch(4)
    later = [second[i]["image"] for i in (2, 1, 0)]
    first.set_epoch(4)
    assert all(torch.equal(first[i]["image"], image) for i, image in zip((2, 1, 0), later, strict=True))
    first.set_epoch(5)
    assert not torch.equal(first[0]["image"], later[2])
    strong = CXRDataset(films, SMALL, augmentation=Augmentation(rotate_degrees=15, shift=0.1, zoom=0.2, gamma=0.3))
    for epoch in range(20):
        strong.set_epoch(epoch)
        image = strong[0]["image"][0]
        assert image[:, -8:].mean() > image[:, :8].mean(), "the patient's left stays at the picture's right"
        assert image.min() >= -1 and image.max() <= 1


def test_it_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    data = CXRDataset(manifest(tmp_path), SMALL, cache=tmp_path / "cache", augmentation=Augmentation())
    assert torch.equal(pickle.loads(pickle.dumps(data))[1]["image"], data[1]["image"])


def test_errors_name_record_and_file(tmp_path: Path) -> None:
    films = manifest(tmp_path)
    films.image_path(films.records[1]).unlink()
    films.image_path(films.records[2]).write_bytes(b"\x89PNG\r\n\x1a\n")
    for folder in (None, tmp_path / "cache"):
        data = CXRDataset(films, SMALL, cache=folder)
        with pytest.raises(ImageError, match=r"record 'r1' of tiny: no image at .*r1\.png"):
            data[1]
        with pytest.raises(ImageError, match=r"record 'r2' of tiny: .*r2\.png cannot be decoded"):
            data[2]
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 0


def test_a_report_without_words_is_an_error_unless_prompts_are_off(tmp_path: Path) -> None:
    films = manifest(tmp_path, n=1, findings="___", impression="No interval change.")
    with pytest.raises(ReportError, match="record 'r0' of tiny"):
        CXRDataset(films, SMALL)[0]
    assert CXRDataset(films, SMALL, prompts=None)[0]["prompt"] == ""


def test_prompts_obey_the_encoders_own_count(tmp_path: Path) -> None:
    films = manifest(tmp_path, n=1, findings="No pneumothorax. " * 2000)
    data = CXRDataset(films, SMALL, prompts=PromptConfig(max_tokens=4), count_tokens=lambda text: len(text.split()))
    assert data[0]["prompt"] == "Small left pleural effusion."
