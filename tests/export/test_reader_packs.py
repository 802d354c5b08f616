"""A release says loudly that it is synthetic, so none of it may reach blinded readers: packs hold re-encoded pictures and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import samples
from samples import bytes_of
from studies import ORIGIN, write_films, write_protocol

from medgen.export import dicom, hf
from medgen.study.build import build

MARKS = (b"DICM", b"SYNTHETIC", b"Synthetic", b"ynthesiz", b"tEXt", b"iTXt", b"p10000032", b"2.25.")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples as `medgen sample text-to-cxr --dicom` leaves them: DICOM files beside the pictures."""
    folder = samples.write_films(tmp_path_factory.mktemp("study") / "generated", count=12)
    dicom.export(folder, folder.with_name("release"), progress=False)
    for i, path in enumerate(sorted(folder.with_name("release").rglob("*.dcm"))):
        shutil.copy(path, folder / f"p10000032-{i}_000.dcm")
    return folder


def test_no_marked_file_and_no_mark_gets_into_a_pack(generated: Path, tmp_path: Path) -> None:
    built = build(
        write_protocol(tmp_path / "study.yaml", ORIGIN), tmp_path / "pack", generated, write_films(tmp_path / "clinic", 24)
    )
    media = {name: content for name, content in bytes_of(built.pack).items() if name.startswith("media/")}
    assert media and {Path(name).suffix for name in bytes_of(built.pack)} <= {".png", ".json", ".html", ""}
    assert not [name for name, content in media.items() for mark in MARKS if mark in content]


def test_a_release_folder_cannot_be_taken_for_material_of_a_study(generated: Path, tmp_path: Path) -> None:
    reference = write_films(tmp_path / "clinic", 24)
    hf.export(generated, tmp_path / "hub", progress=False)
    for release in (generated.with_name("release"), tmp_path / "hub"):
        with pytest.raises(ValueError):
            build(write_protocol(tmp_path / "study.yaml", ORIGIN), tmp_path / f"{release.name}-pack", release, reference)
        assert not (tmp_path / f"{release.name}-pack").exists()
