"""Imaged visits as items, in 2D and 3D: what an autoencoder's cache and a sampler read is the same, with and without a cache."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional

from medgen.data.dicom import write_dx
from medgen.data.images import ImageError, ImagePreprocessing
from medgen.data.latent_cache import LatentCache, cache_key
from medgen.data.records import Manifest, read_manifest, write_manifest
from medgen.data.visit_images import VisitImages, VisitPreprocessing, load_visit
from medgen.data.visit_records import Visit, VisitSeries
from medgen.data.volumes import VolumePreprocessing

CUBE = VisitPreprocessing(dim=3, size=16)
FILM = VisitPreprocessing(size=32)


def manifest(folder: Path, dim: int) -> Manifest[VisitSeries]:
    """Two patients of three visits each, the middle one without an image."""
    rng = np.random.default_rng(dim)
    records = []
    for patient in ("p1", "p2"):
        visits = []
        for index, time in enumerate((0.0, 30.0, 45.5)):
            name = f"{patient}_{index}" + (".png" if dim == 2 else ".nii.gz")
            if dim == 2:
                Image.fromarray(rng.integers(0, 255, (40, 36), dtype=np.uint8)).save(folder / name)
            else:
                values = rng.integers(-1000, 500, (18, 16, 20)).astype(np.int16)
                nibabel.save(nibabel.Nifti1Image(values, np.diag([-5.0, 5, 5, 1])), folder / name)
            visits.append(Visit(f"v{index}", time, None if index == 1 else name))
        records.append(VisitSeries(patient, patient, patient, tuple(visits), "cxr", 2 if dim == 2 else 3, "days", "train"))
    write_manifest(records, folder / "manifest.parquet", name="visits", source="a test")
    return read_manifest(folder / "manifest.parquet", record=VisitSeries)


@pytest.mark.parametrize(("dim", "preprocessing"), [(2, FILM), (3, CUBE)])
def test_items_with_and_without_a_cache(tmp_path: Path, dim: int, preprocessing: VisitPreprocessing) -> None:
    read = manifest(tmp_path, dim)
    plain, cached = VisitImages(read, preprocessing), VisitImages(read, preprocessing, tmp_path / "cache")
    assert plain.ids == ["p1/v0", "p1/v2", "p2/v0", "p2/v2"] and len(plain) == 4
    assert plain.rows == {"p1": [0, 1], "p2": [2, 3]} and plain.visits[3][1].time == 45.5
    for index in range(4):
        first, second, third = plain[index], cached[index], cached[index]
        assert first["id"] == plain.ids[index] and first["image"].shape == (1, *preprocessing.shape)
        assert first["image"].dtype == torch.float32 and -1 <= first["image"].min() < first["image"].max() <= 1
        assert torch.equal(first["image"], second["image"]) and torch.equal(second["image"], third["image"])
        path = read.path(str(plain.visits[index][1].image))
        assert torch.equal(first["image"], load_visit(path, preprocessing))
    assert len(list((tmp_path / "cache").glob("*/*.npy"))) == 4
    again = pickle.loads(pickle.dumps(cached))
    assert again.fingerprint == plain.fingerprint and torch.equal(again[2]["image"], plain[2]["image"])


def test_the_fingerprint_follows_what_an_item_depends_on(tmp_path: Path) -> None:
    read = manifest(tmp_path, 3)
    marks = {VisitImages(read, p).fingerprint for p in (CUBE, VisitPreprocessing(dim=3, size=24),
             VisitPreprocessing(dim=3, size=16, volume=VolumePreprocessing(window=(-900, 100))))}  # fmt: skip
    fewer = Manifest(read.records[:1], read.root, read.name, read.source, read.schema_version, read.sha256)
    assert len(marks | {VisitImages(fewer, CUBE).fingerprint}) == 4


def test_a_changed_file_is_prepared_again(tmp_path: Path) -> None:
    images = VisitImages(manifest(tmp_path, 3), CUBE, tmp_path / "cache")
    before = images[0]["image"]
    values = np.random.default_rng(9).integers(-1000, 500, (30, 16, 20)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([5.0, 5, 5, 1])), tmp_path / "p1_0.nii.gz")
    assert not torch.equal(images[0]["image"], before)
    entry = next((tmp_path / "cache").glob("*/*.npy"))
    for entry in (tmp_path / "cache").glob("*/*.npy"):  # a full disk cut it off
        entry.write_bytes(entry.read_bytes()[:200])
    assert torch.equal(images[0]["image"], load_visit(tmp_path / "p1_0.nii.gz", CUBE))


@pytest.mark.parametrize(("dim", "preprocessing"), [(2, FILM), (3, CUBE)])
def test_an_autoencoders_cache_takes_pictures_and_volumes(tmp_path: Path, dim: int, preprocessing: VisitPreprocessing) -> None:
    images = VisitImages(manifest(tmp_path, dim), preprocessing)
    pool = functional.avg_pool2d if dim == 2 else functional.avg_pool3d

    def encode(batch: Tensor) -> tuple[Tensor, Tensor]:
        assert batch.shape[1:] == (1, *preprocessing.shape)
        return pool(batch, 4), pool(batch.abs(), 4)

    key = cache_key("autoencoder", images.fingerprint)
    cache = LatentCache.build(tmp_path / "latents", images, encode, key, ids=images.ids, batch_size=3)
    assert len(cache) == 4 and cache[3]["id"] == "p2/v2"
    assert cache[3]["mean"].shape == (1, *(side // 4 for side in preprocessing.shape))
    torch.testing.assert_close(cache[3]["mean"], pool(images[3]["image"][None], 4)[0], atol=1e-3, rtol=0)


def test_dicom_and_sixteen_bit_films(tmp_path: Path) -> None:
    grey = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    write_dx(tmp_path / "a.dcm", (grey * 65535).astype(np.uint16), patient_id="p", study_id="s", record_id="r", model="m", seed=0)
    Image.fromarray((grey * 65535).astype(np.uint16)).save(tmp_path / "a.png")
    dicom, png = (load_visit(tmp_path / name, FILM) for name in ("a.dcm", "a.png"))
    assert dicom.shape == png.shape == (1, 32, 32) and (dicom - png).abs().max() < 0.02


def test_settings_are_plain_json_and_read_back() -> None:
    for settings in (
        CUBE,
        VisitPreprocessing(dim=3, size=(32, 128, 128), volume=VolumePreprocessing(intensity="minmax", max_anisotropy=12)),
        VisitPreprocessing(size=64, image=ImagePreprocessing(size=64, intensity="percentile", pad=False)),
    ):
        dumped = json.loads(json.dumps(settings.model_dump(mode="json")))
        assert VisitPreprocessing.model_validate(dumped) == settings
    assert VisitPreprocessing(size=64).image.size == 64 and VisitPreprocessing.model_validate({"size": 64}).shape == (64, 64)
    assert VisitPreprocessing.model_validate({"size": 64, "image": {"pad": False}}).image == ImagePreprocessing(
        size=64, pad=False
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": 64, "image": {"size": 128}}, "size is 64 but image.size 128"),
        ({"size": (64, 64, 64)}, "pictures are square"),
        ({"size": 4}, "8 to 4096"),
        ({"image": {"range": (0, 1)}}, "range must be"),
    ],
)
def test_settings_that_disagree(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VisitPreprocessing.model_validate(values)


def test_errors_name_visit_and_file(tmp_path: Path) -> None:
    read = manifest(tmp_path, 3)
    with pytest.raises(ImageError, match="series 'p1' has dim 3, the preprocessing 2; set preprocessing.dim=3"):
        VisitImages(read, FILM)
    with pytest.raises(ImageError, match="is a volume, but the preprocessing is for pictures"):
        load_visit(tmp_path / "p1_0.nii.gz", FILM)
    (tmp_path / "p1_2.nii.gz").unlink()
    (tmp_path / "p2_0.nii.gz").write_bytes(b"no volume")
    images = VisitImages(read, CUBE, tmp_path / "cache")
    with pytest.raises(ImageError, match="visit 'p1/v2' of visits: no image at .*p1_2.nii.gz"):
        images[1]
    with pytest.raises(ImageError, match="visit 'p2/v0' of visits: .*p2_0.nii.gz cannot be decoded"):
        images[2]
