"""Nothing but the pixels tells the arms apart: a classifier on all the rest guesses, and no word of the key is anywhere in the pack."""

import itertools
import json
import os
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from studies import film, write_clip_samples, write_clips, write_films, write_protocol, write_samples

from medgen.study.build import build
from medgen.study.media import mp4_bytes, png_bytes
from medgen.study.responses import read_key, read_pack

CASES = 400  # 200 real, 200 synthetic
SEEDS = range(1, 1 + int(os.environ.get("STUDY_PACKS", "3")))
SECTIONS = f"[{{name: origin, task: real_or_synthetic, cases: {CASES}, arms: [maker, clinic]}}]"
WORDS = 24


def file_features(path):
    """All of a file but its pixels: size, time, name, and every chunk's name, place, length and header bytes."""
    content = path.read_bytes()
    found = [len(content), path.stat().st_mtime_ns, path.stat().st_mode, *(path.stem.encode() + bytes(16))[:16]]
    place, chunks = 8, []
    while place < len(content):
        length, name = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        chunks += [length, zlib.crc32(name), zlib.crc32(content[place + 8 : place + 8 + length]) if name != b"IDAT" else 0]
        place += 12 + length
    return found + (chunks + [0] * WORDS)[:WORDS]


def item_features(pack, item):
    """What the page says of an item, its places in the readers' orders, and its file."""
    shown = pack.items[item]
    places = [order.index(item) for order in pack.orders.values()]
    name = pack.folder / shown["media"][0]["file"]
    listed = (pack.folder / "SHA256SUMS").read_text().splitlines()
    line = next(i for i, text in enumerate(listed) if name.name in text)
    said = [len(json.dumps(shown)), list(pack.items).index(item), line, *item.encode()]
    return [*file_features(name), *said, *places]


def auc_interval(folds, z):
    """Mean AUC of several packs and its interval, `z` standard errors to either side (Hanley and McNeil 1982)."""
    aucs, variance = np.array([auc for auc, _ in folds]), 0.0
    for auc, (positive, negative) in folds:
        q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
        spread = auc * (1 - auc) + (positive - 1) * (q1 - auc**2) + (negative - 1) * (q2 - auc**2)
        variance += spread / (positive * negative) / len(folds) ** 2
    half = z * variance**0.5
    return aucs.mean(), aucs.mean() - half, aucs.mean() + half


def guessed(features, synthetic, seed):
    """Cross-validated AUC of the better of a linear model and a forest, by name."""
    models = {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        "forest": RandomForestClassifier(60, min_samples_leaf=4, random_state=seed),
    }
    values = np.array(features, dtype=float)
    return {
        name: roc_auc_score(synthetic, cross_val_predict(model, values, synthetic, cv=5, method="predict_proba")[:, 1])
        for name, model in models.items()
    }


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    return {"generated": write_samples(root / "generated", CASES // 2), "reference": write_films(root / "clinic", CASES // 2)}


@pytest.fixture(scope="module")
def packs(films, tmp_path_factory):
    root = tmp_path_factory.mktemp("packs")
    return [build(write_protocol(root / f"{s}.yaml", SECTIONS, s, readers=3), root / f"pack{s}", **films) for s in SEEDS]


def test_a_classifier_on_everything_but_pixels_guesses(packs):
    found = {"linear": [], "forest": []}
    for seed, built in zip(SEEDS, packs, strict=True):
        pack = read_pack(built.pack)
        key = read_key(built.key, pack)
        synthetic = np.array([key[item]["source"] == "synthetic" for item in pack.items])
        counts = int(synthetic.sum()), int((~synthetic).sum())
        assert counts == (CASES // 2, CASES // 2)
        for name, auc in guessed([item_features(pack, item) for item in pack.items], synthetic, seed).items():
            found[name].append((auc, counts))
    for name, folds in found.items():
        auc, low, high = auc_interval(folds, 1.96)
        print(f"{name}: AUC {auc:.3f} [{low:.3f}, {high:.3f}] over {len(folds)} packs of {CASES} items")
        # Wide enough that no draw of names fails (other library versions write other bytes): permuted labels spread by 0.036 a pack.
        assert auc_interval(folds, 4)[1] <= 0.5
        assert high <= 0.60


def test_the_same_classifier_tells_the_files_that_the_pack_was_made_from(films):
    """So it would see a pack that merely copied its images."""
    real, made = sorted(films["reference"].parent.glob("images/*.png")), sorted(films["generated"].glob("case-*.png"))
    size_alone = [[path.stat().st_size] for path in (*real, *made)]
    synthetic = np.repeat([False, True], [len(real), len(made)])
    assert min(guessed(size_alone, synthetic, 0).values()) > 0.99


def test_no_word_of_the_key_is_in_the_pack(packs):
    for built in packs:
        key = json.loads(built.key.read_text())
        secrets = {key["salt"], str(built.pack.parent)}
        for entry in key["items"].values():
            secrets |= {entry["arm"], entry["case_id"], *entry["record_ids"], *entry["files_sha256"]}
            secrets |= {str(entry["seed"])} if entry["seed"] is not None else set()
        content = b"".join(path.name.encode() + path.read_bytes() for path in built.pack.rglob("*") if path.is_file())
        told = sorted(secret for secret in secrets if secret.encode() in content)
        assert len(secrets) > 2 * CASES and told == []
        assert b"test_model" not in content and b"Synthetic image" not in content


def test_every_file_has_the_same_time_and_every_picture_the_same_size(packs):
    for built in packs:
        paths = list(built.pack.rglob("*"))
        assert {path.stat().st_mtime_ns for path in (*paths, built.pack)} == {946_684_800 * 10**9}
        pictures = [path for path in paths if path.suffix == ".png"]
        assert len(pictures) == CASES
        assert len({(path.stat().st_size, len(path.name)) for path in pictures}) == 1
        assert {tuple(Image.open(path).info) for path in pictures[:20]} == {()}, "no note in the file"


def test_arms_stand_anywhere_in_the_orders(packs):
    """The mean place of synthetic items, in standard errors of what chance gives."""
    deviations = []
    for built in packs:
        pack = read_pack(built.pack)
        key = read_key(built.key, pack)
        for order in pack.orders.values():
            places = np.flatnonzero([key[item]["source"] == "synthetic" for item in order])
            error = (CASES**2 / 12 / len(places) * (CASES - len(places)) / (CASES - 1)) ** 0.5
            deviations.append((places.mean() - (CASES - 1) / 2) / error)
    assert max(map(abs, deviations)) < 3.5 and abs(np.mean(deviations)) < 3 / len(deviations) ** 0.5


def test_smooth_and_noisy_pictures_make_files_of_one_size():
    smooth, noisy = (np.rint(film(1, blurred) * 255).astype(np.uint8) for blurred in (True, False))
    assert len(png_bytes(smooth)) == len(png_bytes(noisy))
    assert len(zlib.compress(smooth)) < 0.9 * len(zlib.compress(noisy)), "compressed they would differ"


def test_clips_differ_in_nothing_but_their_pictures(tmp_path):
    clinic = write_clips(tmp_path / "clinic", 4)
    generated = write_clip_samples(tmp_path / "generated", clinic)
    text = write_protocol(tmp_path / "study.yaml", "[{name: clips, task: real_or_synthetic, cases: 8}]").read_text()
    arms = "arms: [{name: maker, source: synthetic, kind: echo}, {name: clinic, source: real, kind: echo}]"
    (tmp_path / "study.yaml").write_text(text[: text.index("arms:")] + arms + "\n" + text[text.index("sections:") :])
    built = build(tmp_path / "study.yaml", tmp_path / "pack", generated, clinic)
    files = [path.read_bytes() for path in built.pack.glob("media/*.mp4")]
    begins = [content.index(b"mdat") for content in files]
    assert len(files) == 8 and len({len(content) for content in files}) == 1
    assert len({content[:begin] for content, begin in zip(files, begins, strict=True)}) == 1, (
        "all headers and tables, byte by byte"
    )
    assert len(set(files)) == 8


@pytest.mark.parametrize("extra", range(0, 600, 37))
def test_a_frame_is_filled_up_to_any_size(extra):
    """Also to the one length in 256 that a single filling message cannot have."""
    smooth = np.full((2, 16, 16, 3), 90, np.uint8)
    noisy = np.random.default_rng(extra).integers(0, 256, (2, 16, 16 + 2 * (extra // 37), 3)).astype(np.uint8)
    clips = [noisy, np.full_like(noisy, 90), np.repeat(smooth[:, :, :1], noisy.shape[2], axis=2)]
    assert len({len(content) for content in itertools.chain(mp4_bytes(clips, 25.0))}) == 1
