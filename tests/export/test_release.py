"""What may be released and what is refused; a folder that tells what is missing, changed, swapped, or not generated at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from samples import bytes_of, film, line, notes, write, write_films, write_visits

from medgen.export.hf import export
from medgen.export.source import ExportError, read_generated
from medgen.sampling.pictures import png_bytes


@pytest.fixture
def films(tmp_path: Path) -> Path:
    return write_films(tmp_path / "films")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metadata.jsonl").read_text().splitlines()]


def rewritten(folder: Path, **values: Any) -> None:
    """The first line with other values; None takes a field away."""
    first, *rest = lines_of(folder)
    first = {key: value for key, value in {**first, **values}.items() if value is not None}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (first, *rest)))


def swapped(folder: Path) -> None:
    """A patient's film in place of a sample, in a folder of an older medgen, which kept no hashes."""
    rewritten(folder, sha256={})
    Image.fromarray(np.zeros((24, 24), np.uint8)).save(folder / "p10000032-0_000.png")


def exchanged(folder: Path) -> None:
    """Two samples whose files have changed places, hashes and all."""
    shutil.copy(folder / "p10000032-1_000.png", folder / "p10000032-0_000.png")
    rewritten(folder, sha256={"p10000032-0_000.png": hashlib.sha256((folder / "p10000032-1_000.png").read_bytes()).hexdigest()})


def coloured(folder: Path) -> None:
    first, *_ = lines_of(folder)
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    for key, value in notes(first).items():
        text.add_itxt(key, value)
    Image.new("RGB", (8, 8)).save(folder / first["file_name"], pnginfo=text)
    rewritten(folder, sha256={})


def cut(folder: Path) -> None:
    path = folder / "p10000032-0_000.png"
    path.write_bytes(path.read_bytes()[:200])
    rewritten(folder, sha256={})


def outside(folder: Path) -> None:
    shutil.move(folder / "p10000032-0_000.png", folder.parent / "p.png")
    os.symlink(folder.parent / "p.png", folder / "p10000032-0_000.png")


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no metadata": (lambda f: (f / "metadata.jsonl").unlink(), "not a folder that `medgen sample` wrote"),
    "still sampling": (lambda f: (f / "metadata.jsonl").rename(f / ".metadata-0-of-2.jsonl"), "has not finished"),
    "a data set": (lambda f: (f / "metadata.jsonl").rename(f / "manifest.parquet"), "lists records of a data set"),
    "no folder": (shutil.rmtree, "there is no folder"),
    "empty": (lambda f: (f / "metadata.jsonl").write_text(""), "nothing to release"),
    "damaged": (lambda f: (f / "metadata.jsonl").write_text("{\n"), "line 1 is damaged"),
    "not JSON objects": (lambda f: (f / "metadata.jsonl").write_text("[1]\n"), "line 1 is damaged"),
    "real": (lambda f: rewritten(f, synthetic=False), 'line 1: it does not say "synthetic": true'),
    "perhaps real": (lambda f: rewritten(f, synthetic="true"), 'does not say "synthetic": true'),
    "no model": (lambda f: rewritten(f, model=None), "'model' is missing"),
    "no seed": (lambda f: rewritten(f, noise_seed="7"), "'noise_seed' is missing or no int"),
    "no hash": (lambda f: rewritten(f, model_sha256="../x"), "is no SHA-256"),
    "frames of nothing": (lambda f: rewritten(f, frames=[]), "list of frames is damaged"),
    "a time without end": (lambda f: rewritten(f, frames=[{"file_name": "a.png", "time": float("inf")}]), "no finite number"),
    "twice": (lambda f: rewritten(f, **lines_of(f)[1]), "is there twice"),
    "lost": (lambda f: (f / "p10000032-0_000.png").unlink(), "p10000032-0_000.png is missing"),
    "changed": (lambda f: (f / "p10000032-0_000.png").write_bytes(png_bytes(film(7), 8, notes(lines_of(f)[0]))), "has changed since"),
    "swapped": (swapped, "does not say that it is synthetic"),
    "exchanged": (exchanged, "says another case_id"),
    "cut off": (cut, "cannot be read"),
    "coloured": (coloured, "mode RGB"),
    "upwards": (lambda f: rewritten(f, file_name="../films/p10000032-0_000.png"), "leads out of the folder"),
    "absolute": (lambda f: rewritten(f, file_name="/etc/hostname"), "leads out of the folder"),
    "by a link": (outside, "leads out of the folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_an_untouched_sample_is_refused_by_name(name: str, films: Path, tmp_path: Path) -> None:
    spoil, said = HOSTILE[name]
    spoil(films)
    with pytest.raises(ExportError, match=said):
        export(films, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "SHA256SUMS").exists()


def test_a_manifest_of_patients_is_no_release(tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1")
    with pytest.raises(ExportError, match="a release holds only what `medgen sample` generated"):
        export(tmp_path / "manifest.parquet", tmp_path / "out", progress=False)


def test_an_older_folder_without_hashes_is_known_by_the_marks_in_its_files(films: Path, tmp_path: Path) -> None:
    text = [{key: value for key, value in one.items() if key != "sha256"} for one in lines_of(films)]
    (films / "metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in text))
    export(films, tmp_path / "out", progress=False)
    assert len(list((tmp_path / "out/data").glob("*.png"))) == 2


def test_the_same_command_again_writes_nothing_and_mends_what_was_lost_or_changed(films: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(films, out, progress=False)
    whole, times = bytes_of(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    export(films, out, progress=False)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.png")} == times
    first, second = sorted(times)
    first.unlink()
    second.write_bytes(b"edited")
    export(films, out, progress=False)
    assert bytes_of(out) == whole


def test_sums_are_those_of_every_file(films: Path, tmp_path: Path) -> None:
    export(films, tmp_path / "out", progress=False)
    there = bytes_of(tmp_path / "out")
    sums = dict(reversed(row.split("  ")) for row in there.pop("SHA256SUMS").decode().splitlines())
    assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in there.items()}
    about = json.loads(there["release.json"])
    assert about["synthetic"] is True and about["generators"][0]["model_sha256"] == "ab" * 32


def test_another_request_into_the_same_folder_is_refused(films: Path, tmp_path: Path) -> None:
    export(films, tmp_path / "out", progress=False)
    with pytest.raises(ExportError, match="another request"):
        export(films, tmp_path / "out", license="mit", progress=False)
    rewritten(films, prompt="Something else.")
    with pytest.raises(ExportError, match="samples that have changed"):
        export(films, tmp_path / "out", progress=False)


def test_folders_that_are_no_place_for_a_release(films: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="is not empty"):
        export(films, tmp_path / "full", progress=False)
    for inside in (films, films / "release"):
        with pytest.raises(ExportError, match="lies in the folder of the samples"):
            export(films, inside, progress=False)
    export(films, tmp_path / "out", progress=False)
    (tmp_path / "out" / "data" / "patient.png").write_bytes(b"a patient's")
    with pytest.raises(ExportError, match=r"holds data/patient\.png, which no export wrote"):
        export(films, tmp_path / "out", progress=False)
    (tmp_path / "out.sources.jsonl").write_text("nonsense\n")
    with pytest.raises(ExportError, match="is damaged"):
        export(films, tmp_path / "out", progress=False)


def test_known_visits_strips_and_movies_are_no_part_of_what_is_read(tmp_path: Path) -> None:
    made = read_generated(write_visits(tmp_path / "visits"))
    assert [len(one.pictures) for one in made] == [4, 4] and made[0].identity != made[1].identity
    assert all(name.endswith(("_00.png", "_01.png", "_02.png", "_cf.png")) for one in made for name in one.files)


def test_names_of_samples_never_meet_in_a_release(tmp_path: Path) -> None:
    """The same case and seed under two prompts: other patients, other files."""
    samples = []
    for i, prompt in enumerate(("one", "two")):
        entry = {**line("case", prompt=prompt), "file_name": f"case-{i}.png"}
        samples.append((entry, {entry["file_name"]: png_bytes(film(0), 8, notes(entry))}))
    assert len({one.identity for one in read_generated(write(tmp_path / "s", samples))}) == 2
