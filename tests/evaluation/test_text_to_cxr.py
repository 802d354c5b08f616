"""The whole evaluation on a toy world: files, figures that tell a good generator from a bad one, a page without links."""

from __future__ import annotations

import base64
import io
import json
import re

import pytest
from PIL import Image
from toy_films import KINDS, film, report, write_generated, write_reference

from medgen.evaluation.images import EvaluationError
from medgen.evaluation.text_to_cxr import evaluate


def entries() -> list[dict]:
    singles = [{"case_id": f"s{i:02d}", "prompt": report(*KINDS[i % 6]), "kind": list(KINDS[i % 6])} for i in range(42)]
    repeats = [{"case_id": f"s{i:02d}", "trajectory": 1, "prompt": report(*KINDS[i]), "kind": list(KINDS[i])} for i in range(6)]
    pairs = []
    for i in range(6):
        for variant, kind in (("left", ("left", False)), ("right", ("right", False))):
            pairs.append({"case_id": f"l{i}-{variant}", "pair_id": f"l{i}", "variant": variant, "kind": list(kind)})
        for variant, kind in (("present", ("left", True)), ("absent", ("left", False))):
            pairs.append({"case_id": f"n{i}-{variant}", "pair_id": f"n{i}", "variant": variant, "kind": list(kind)})
    return [*singles, *repeats, *({**pair, "seed": int(pair["pair_id"][1:]), "prompt": report(*pair["kind"])} for pair in pairs)]


def films(all_entries: list[dict]) -> list:
    return [film(*entry["kind"], 90_000 + i) for i, entry in enumerate(all_entries)]


@pytest.fixture(scope="module")
def result(tmp_path_factory, judge, reference):
    root = tmp_path_factory.mktemp("evaluation")
    train = write_reference(root / "train", 60, "train", 70_000)
    asked = entries()
    images = films(asked)
    images[5] = film(*KINDS[5], 70_005)  # the training film train-5, copied
    generated = write_generated(root / "generated", asked, images)
    page = evaluate(generated, reference, root / "out", str(judge), judge, train, replicates=10)
    return page, json.loads((root / "out" / "metrics.json").read_text())


def test_a_good_generator_scores_well_on_everything(result):
    _, metrics = result
    assert metrics["findings"]["macro"]["value"] > 0.97
    assert metrics["laterality"]["accuracy"]["value"] == 1.0
    assert metrics["negation"]["accuracy"]["value"] == 1.0
    frechet = metrics["fidelity"]["metrics"]["frechet"]
    assert frechet["ratio"]["value"] < 5  # other mixture of findings than the reference, same films
    assert metrics["fidelity"]["n"] == 42  # one image of every single case: neither pairs nor repeats shift the population
    assert 0 < metrics["diversity"]["generated"]["value"] < 1
    distances = {entry["name"]: entry for entry in metrics["by_finding"]}
    assert distances["cardiomegaly"]["frechet"]["ratio"]["value"] < 10
    assert distances["edema"]["frechet"] is None
    assert metrics["subgroups"] is None  # the toy's patients have neither sex nor age
    unmeasured = next(output for output in metrics["findings"]["outputs"] if output["name"] == "edema")
    assert unmeasured["auroc"] is None


def test_the_planted_copy_is_shown_as_the_nearest_pair(result):
    _, metrics = result
    worst = next(space for space in metrics["memorisation"] if space["space"] == "pixels")["worst"][0]
    assert worst["train"] == 5
    assert worst["distance"] < 1e-3


def test_the_page_stands_alone_and_shows_floor_prompts_and_pictures(result):
    page, _ = result
    html = page.read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", html)
    assert html.count("data:image/png;base64,") > 40
    assert report("left", False) in html
    assert "real (floor)" in html
    assert "<svg" in html
    assert "nan" not in re.sub(r"base64,[^\"]*", "", html).lower().replace("finance", "")


def test_the_page_can_do_without_images_of_patients(tmp_path, judge, reference, result):
    asked = entries()
    generated = write_generated(tmp_path / "generated", asked, films(asked))
    train = write_reference(tmp_path / "train", 60, "train", 70_000)
    page = evaluate(generated, reference, tmp_path / "out", str(judge), judge, train, replicates=5, no_real_images=True)
    html, full = page.read_text(), result[0].read_text()
    assert "holds no image of a real patient" in html and "holds no image of a real patient" not in full
    assert "Nearest pairs" not in html and "Nearest pairs" in full
    shown = set(re.findall(r"base64,([^\"]+)", html))
    made = {base64.b64encode(path.read_bytes()).decode() for path in generated.glob("*.png")}
    pixels = {_pixels(base64.b64decode(data)) for data in shown}
    assert pixels <= {_pixels(base64.b64decode(data)) for data in made}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["memorisation"]  # measured all the same


def _pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        return image.tobytes()


def test_a_generator_that_ignores_its_prompts_is_exposed(tmp_path, judge, reference):
    asked = entries()
    images = films(asked)
    folder = write_generated(tmp_path / "generated", asked, [images[(i * 7 + 3) % len(images)] for i in range(len(images))])
    evaluate(folder, reference, tmp_path / "out", str(judge), judge, replicates=5)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["findings"]["macro"]["value"] < 0.8
    assert metrics["laterality"]["accuracy"]["value"] < 0.9
    assert metrics["memorisation"] == []


def test_too_few_images_and_leaking_references_are_refused(tmp_path, judge, reference):
    asked = entries()
    few = write_generated(tmp_path / "few", asked[:5], films(asked)[:5])
    with pytest.raises(EvaluationError, match="holds 5 images; at least 20"):
        evaluate(few, reference, tmp_path / "out", str(judge), judge)
    enough = write_generated(tmp_path / "enough", asked, films(asked))
    leak = write_reference(tmp_path / "leak", 12, "train", 0)
    rows = leak.parent / "manifest.jsonl"
    from medgen.data.records import read_manifest, write_manifest

    records = [r.__class__(**{**vars(r), "patient_id": f"test-p{i}"}) for i, r in enumerate(read_manifest(leak).records)]
    write_manifest(records, rows, name="leak", source="test")
    with pytest.raises(EvaluationError, match="not held out"):
        evaluate(enough, reference, tmp_path / "out", str(judge), judge, rows, replicates=5)
