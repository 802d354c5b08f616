"""The output folder: files whole or absent, metadata repaired after a kill, merged the same whatever the shards."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from medgen.sampling.output import OutputError, OutputFolder

NAMES = [f"a_{i:03d}.png" for i in range(4)]


def nothing(lines: list[dict]) -> Mapping[str, bytes]:
    return {}


def line(name: str) -> dict:
    return {"file_name": name, "prompt": "épanchement"}


def claimed(path: Path, part: str = "0-of-1") -> OutputFolder:
    folder = OutputFolder(path, part)
    folder.claim({"steps": 2}, '{"case_id": "a"}\n')
    return folder


def test_a_line_cut_by_a_kill_is_dropped_and_its_image_asked_for_again(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    for name in NAMES[:2]:
        folder.write({name: b"pixels"}, line(name))
    part = tmp_path / ".metadata-0-of-1.jsonl"
    part.write_bytes(part.read_bytes()[:-5])  # in the middle of the last line
    again = claimed(tmp_path)
    assert list(again.finished()) == NAMES[:1]
    again.write({NAMES[1]: b"pixels"}, line(NAMES[1]))
    digest = hashlib.sha256(b"pixels").hexdigest()
    assert list(again.finished()) == NAMES[:2] and again.finished()[NAMES[1]] == {**line(NAMES[1]), "sha256": {NAMES[1]: digest}}


def test_shards_of_any_number_merge_in_the_order_asked(tmp_path: Path) -> None:
    for part, name in (("0-of-1", NAMES[2]), ("1-of-3", NAMES[0]), ("0-of-3", NAMES[3]), ("2-of-3", NAMES[1])):
        folder = claimed(tmp_path, part)
        assert not folder.merge(NAMES, nothing)
        folder.write({name: b"pixels"}, line(name))
    (tmp_path / ".a_000.png.123.tmp").write_bytes(b"left by a kill")
    assert folder.merge(NAMES, lambda lines: {"sheet.png": str(len(lines)).encode()})
    assert [json.loads(row)["file_name"] for row in (tmp_path / "metadata.jsonl").read_text().splitlines()] == NAMES
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*NAMES, "cases.jsonl", "metadata.jsonl", "sampling.json", "sheet.png"]
    )


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = claimed(tmp_path)
    folder.write({NAMES[0]: b"pixels"}, line(NAMES[0]))
    part = tmp_path / ".metadata-0-of-1.jsonl"
    part.write_bytes(b"\x00\x00\n" + part.read_bytes())
    with pytest.raises(OutputError, match=r"metadata-0-of-1\.jsonl, line 1 is damaged"):
        claimed(tmp_path).finished()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match="no sampler of medgen wrote"):
        claimed(tmp_path)
    with pytest.raises(OutputError, match="cannot make the folder"):
        claimed(tmp_path / "metadata.jsonl" / "below")


def test_a_full_disk_leaves_only_whole_files_and_says_so(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the same `OSError` at the same places."""
    script = f"""
import resource
from pathlib import Path
from medgen.sampling.output import OutputError, OutputFolder
folder = OutputFolder(Path({str(tmp_path)!r}))
folder.claim({{"steps": 2}}, '{{"case_id": "a"}}\\n')
folder.write({{"a_000.png": b"p" * 900}}, {{"file_name": "a_000.png"}})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    folder.write({{"a_001.png": b"p" * 2000}}, {{"file_name": "a_001.png"}})
except OutputError as error:
    print(error)
try:
    folder.write({{"a_002.png": b"p" * 900}}, {{"file_name": "a_002.png", "prompt": "p" * 2000}})
except OutputError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(told) == 2 and "a_001.png" in told[0] and "the same command continues" in told[1]
    assert not (tmp_path / "a_001.png").exists() and not list(tmp_path.glob(".*.tmp"))
    assert list(claimed(tmp_path).finished()) == ["a_000.png"]
    assert (tmp_path / ".metadata-0-of-1.jsonl").read_bytes().endswith(b"\n")
