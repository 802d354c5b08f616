"""What cannot be evaluated is refused with its reason: empty, unfinished, mixed, damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from toy_films import KINDS, film, write_generated

from medgen.data.images import ImageError
from medgen.evaluation.images import EvaluationError, ImageSet, batches, load_square, read_generated

ENTRIES = [{"case_id": f"c{i}", "prompt": "Normal."} for i in range(3)]
FILMS = [film(*KINDS[0], seed) for seed in range(3)]


def test_images_come_in_the_order_of_their_cases_with_their_lines(tmp_path):
    generated = read_generated(write_generated(tmp_path / "g", ENTRIES[::-1], FILMS))
    assert generated.groups == ("c0", "c1", "c2")
    assert generated.metadata[0]["seed"] == 2
    assert generated.native == 32
    shapes = [tuple(batch.shape) for batch in batches(generated, 16, batch_size=2)]
    assert shapes == [(2, 1, 16, 16), (1, 1, 16, 16)]


def test_shards_in_folders_are_one_set(tmp_path):
    for shard in range(3):
        write_generated(tmp_path / "all" / f"shard-{shard}", ENTRIES[shard : shard + 1], FILMS[shard : shard + 1])
    assert read_generated(tmp_path / "all").groups == ("c0", "c1", "c2")


def _no_metadata(folder):
    (folder / "metadata.jsonl").unlink()


def _unfinished(folder):
    (folder / "metadata.jsonl").rename(folder / ".metadata-0-of-1.jsonl")


def _no_lines(folder):
    (folder / "metadata.jsonl").write_text("")


def _broken_line(folder):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png"\n')


def _no_prompt(folder):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "c0_000.png", "case_id": "c0"}))


def _lost_image(folder):
    (folder / "c1_000.png").unlink()


def _outside(folder):
    Image.fromarray(FILMS[0]).save(folder.parent / "x.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "../x.png", "case_id": "c0", "prompt": "x"}))


def _other_size(folder):
    Image.new("L", (16, 16)).save(folder / "c2_000.png")


def _listed_twice(folder):
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text + text.splitlines()[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_metadata, "holds 3 files but no metadata.jsonl"),
        (_unfinished, "not finished"),
        (_no_lines, "lists nothing"),
        (_broken_line, "line 1 is not JSON"),
        (_no_prompt, "line 1 lacks prompt"),
        (_lost_image, "lists c1_000.png, which is not there"),
        (_outside, "lies outside"),
        (_other_size, r"c2_000.png is 16x16 pixels, the others are 32x32"),
        (_listed_twice, "listed twice"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, spoil, message):
    folder = write_generated(tmp_path / "g", ENTRIES, FILMS)
    spoil(folder)
    with pytest.raises(EvaluationError, match=message):
        read_generated(folder)


def test_a_missing_folder_says_what_it_should_be(tmp_path):
    with pytest.raises(EvaluationError, match="no folder"):
        read_generated(tmp_path / "nothing")


def test_images_with_nan_are_refused_by_name(tmp_path):
    values = np.full((32, 32), 0.5, np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values, "F").save(tmp_path / "bad.tif")
    with pytest.raises((EvaluationError, ImageError), match="bad.tif holds NaN"):
        load_square(tmp_path / "bad.tif", 32)


def test_real_images_take_the_same_way_as_generated_ones(tmp_path):
    """A large film is brought to the generated size first, so that sharpness alone cannot tell the two apart."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (256, 256), dtype=np.uint8)).save(tmp_path / "large.png")
    direct, by_way = (load_square(tmp_path / "large.png", 64, native) for native in (None, 32))
    assert direct.shape == by_way.shape == (1, 64, 64)
    assert by_way.std() < 0.6 * direct.std()
    small = load_square(tmp_path / "large.png", 32)
    expected = torch.nn.functional.interpolate(small[None], (64, 64), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(by_way, expected)


def test_taking_images_keeps_what_belongs_to_them(tmp_path):
    images = ImageSet("x", (tmp_path / "a", tmp_path / "b"), ("p", "q"), ({"n": 1}, {"n": 2}), 32)
    assert images.take([1]) == ImageSet("x", (tmp_path / "b",), ("q",), ({"n": 2},), 32)
