"""From a data set's folder to a manifest: quarantine by name, near-duplicates, splits by patient, and checking it again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medgen.data.build import BuildError, build, check
from medgen.data.records import ManifestError, read_manifest


def film(path: Path, number: int, side: int = 64, shift: int = 0) -> None:
    """A smooth picture that differs from every other number's."""
    rng = np.random.default_rng(number)
    waves = sum(
        rng.normal() * np.cos(np.outer(np.arange(side) * a * np.pi / side, np.ones(side)) + np.arange(side) * b * np.pi / side)
        for a in range(8)
        for b in range(8)
    )
    picture = (np.asarray(waves) - np.min(waves)) / np.ptp(waves) * 220 + shift
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.astype(np.uint8)).save(path)


def folder(root: Path, rows: list[dict[str, object]]) -> Path:
    """An ImageFolder with one film per row; a row without `number` gets its own."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, row in enumerate(rows):
        row = {"file_name": f"{i}.png", "text": f"Small left pleural effusion of patient {i}.", "patient_id": f"p{i}"} | row
        film(root / str(row["file_name"]), int(str(row.pop("number", i))), shift=int(str(row.pop("shift", 0))))
        lines.append(json.dumps(row))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def quarantine(out: Path) -> dict[str, str]:
    lines = (out.parent / "quarantine.jsonl").read_text().splitlines()
    return {item["record_id"]: item["reason"] for item in map(json.loads, lines)}


def test_a_clean_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = build("imagefolder", folder(tmp_path / "set", [{}, {}, {}]), tmp_path / "set" / "manifest.parquet")
    assert (report.records, report.duplicates, report.quarantined) == (3, 0, {})
    manifest = read_manifest(tmp_path / "set" / "manifest.parquet")
    record = manifest.records[1]
    assert manifest.image_path(record).is_file() and record.image == "1.png"
    assert [(x.name, x.state, x.side, x.size) for x in record.labels] == [("pleural_effusion", "present", "left", "small")]
    assert "every image opens" in check(tmp_path / "set" / "manifest.parquet")
    assert "pleural effusion, present" in capsys.readouterr().err


def test_images_elsewhere_are_linked(tmp_path: Path) -> None:
    root, out = folder(tmp_path / "set", [{}, {}]), tmp_path / "elsewhere" / "manifest.jsonl"
    for _ in range(2):  # a second build finds its own link
        build("imagefolder", root, out)
    manifest = read_manifest(out)
    assert manifest.records[0].image == "imagefolder/0.png" and manifest.image_path(manifest.records[0]).is_file()
    (out.parent / "imagefolder").unlink()
    (out.parent / "imagefolder").mkdir()
    with pytest.raises(BuildError, match="in the way of a link"):
        build("imagefolder", root, out)


def test_what_cannot_be_used_is_quarantined_by_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", [{}, {}, {}, {"text": "___"}, {"text": "No interval change."}, {}, {}])
    (root / "1.png").unlink()
    (root / "2.png").write_bytes((root / "2.png").read_bytes()[:200])
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(root / "5.png")
    with (root / "metadata.jsonl").open("a") as file:
        file.write(
            "\n" + json.dumps({"file_name": "../secret.png", "text": "Effusion."}) + "\n" + json.dumps({"text": "No file."})
        )
    out = tmp_path / "set" / "manifest.parquet"
    report = build("imagefolder", root, out, max_quarantined=0.9)
    assert report.records == 2 and {r.record_id for r in read_manifest(out).records} == {"0", "6"}
    reasons = quarantine(out)
    said = {
        "1": "no image at",
        "2": "cannot be decoded",
        "3": "no words",
        "4": "no words",
        "5": "shows nothing",
        "secret": "path outside",
    }
    assert all(words in reasons[name] for name, words in said.items())
    assert len(reasons) == 7 and any("has no file_name" in reason for reason in reasons.values())
    assert report.quarantined["no words"] == 2 and report.quarantined["missing image"] == 1


def test_too_much_quarantine_writes_no_manifest_but_the_list(tmp_path: Path) -> None:
    root, out = folder(tmp_path / "set", [{}, {}, {}]), tmp_path / "set" / "manifest.parquet"
    (root / "1.png").unlink()
    with pytest.raises(
        BuildError, match=r"1 of 3 records are unusable \(1 missing image; first: 1: no image at .*max_quarantined=0.01"
    ):
        build("imagefolder", root, out)
    assert not out.exists() and "1" in quarantine(out)


def test_near_duplicates_are_kept_once(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {},
        {
            "number": 0,
            "shift": 20,
            "text": "Small left pleural effusion of patient 0.",
            "patient_id": "p0",
        },  # brighter, same words
        {"number": 0, "text": "Large right pleural effusion.", "patient_id": "p0"},  # same patient, other words: stays
        {"number": 0, "shift": 5, "text": "Other words.", "patient_id": "stranger"},  # one film of two patients: cannot be
        {"text": "Small left pleural effusion of patient 0.", "patient_id": "p0"},  # same words, another film: stays
    ]
    out = tmp_path / "set" / "manifest.parquet"
    report = build("imagefolder", folder(tmp_path / "set", rows), out)
    assert report.duplicates == 2 and {r.record_id for r in read_manifest(out).records} == {"0", "2", "4"}
    assert quarantine(out) == {"1": "near-duplicate of 0", "3": "near-duplicate of 0"}
    assert build("imagefolder", tmp_path / "set", out, duplicates="exact").duplicates == 0
    assert build("imagefolder", tmp_path / "set", out, duplicates="keep").records == 5


def test_split_by_patient_is_stable_and_has_the_asked_size(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"patient_id": f"p{i // 2}", "text": f"Nodule {i}."} for i in range(80)]
    root = folder(tmp_path / "set", rows)
    out = tmp_path / "set" / "a.parquet"
    build("imagefolder", root, out, val_fraction=0.2, test_fraction=0.3, threads=3)
    split = {r.patient_id: r.split for r in read_manifest(out).records}
    counts = [sum(s == name for s in split.values()) for name in ("train", "val", "test")]
    assert sum(counts) == 40 and all(count > 2 for count in counts)
    fewer = folder(tmp_path / "fewer", rows[:20])
    build("imagefolder", fewer, tmp_path / "fewer" / "a.parquet", val_fraction=0.2, test_fraction=0.3)
    assert all(split[r.patient_id] == r.split for r in read_manifest(tmp_path / "fewer" / "a.parquet").records)


def test_wrong_requests(tmp_path: Path) -> None:
    root, out = folder(tmp_path / "set", [{}]), tmp_path / "m.parquet"
    with pytest.raises(BuildError, match="no source 'mimic'"):
        build("mimic", root, out)  # type: ignore[arg-type]
    with pytest.raises(BuildError, match="no folder at"):
        build("imagefolder", tmp_path / "absent", out)
    with pytest.raises(BuildError, match="no patient to train on"):
        build("imagefolder", root, out, val_fraction=0.5, test_fraction=0.5)


def test_check_names_what_is_broken(tmp_path: Path) -> None:
    root, out = folder(tmp_path / "set", [{}, {}]), tmp_path / "set" / "manifest.parquet"
    build("imagefolder", root, out)
    (root / "1.png").unlink()
    with pytest.raises(ManifestError, match=r"1 of 2 images are unusable:\n  1: no image at .*1\.png"):
        check(out)


def test_check_notices_dark_sixteen_bit_films(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", [{}])
    picture = np.asarray(Image.open(root / "0.png")).astype(np.uint16) * 16
    Image.fromarray(picture).save(root / "0.png")
    build("imagefolder", root, root / "manifest.parquet")
    assert "intensity=percentile" in check(root / "manifest.parquet")
