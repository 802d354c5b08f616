"""Copies of a film are found however they were scaled, compressed or brightened; other patients' films stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from medgen.cli import main
from medgen.data.duplicates import deduplicate
from medgen.data.records import CXRRecord, read_manifest, write_manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Four films, and four changed copies of the first two."""
    films = [_film(i) for i in range(4)]
    grey = [Image.fromarray(film) for film in films]
    films += [np.asarray(grey[0].resize((90, 90)).resize((128, 128))), (films[1] * 0.8 + 30).astype(np.uint8)]
    grey[0].save(tmp_path / "lossy.jpg", quality=40)
    films += [np.asarray(Image.open(tmp_path / "lossy.jpg")), films[1]]
    records = []
    for i, film in enumerate(films):
        Image.fromarray(film).save(tmp_path / f"r{i}.png")
        records.append(CXRRecord(f"r{i}", f"p{i}", f"s{i}", f"r{i}.png", "PA", "Clear lungs.", "", "train"))
    return write_manifest(records, tmp_path / "manifest.parquet", name="copies", source="test")


def _film(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2)))


def test_copies_go_and_the_first_of_each_stays(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "deduplicate", "--manifest", str(manifest)]) == 0
    said = capsys.readouterr().out
    assert "4 films, 4 duplicates removed" in said
    assert all(pair in said for pair in ("r4 is r0", "r5 is r1", "r6 is r0", "r7 is r1"))
    kept = read_manifest(manifest.with_name("manifest.unique.parquet")).records
    assert [record.record_id for record in kept] == ["r0", "r1", "r2", "r3"]


def test_the_manifest_is_written_where_its_films_are(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write it beside"):
        deduplicate(manifest, tmp_path / "elsewhere" / "m.parquet")
