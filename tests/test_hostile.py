"""Hostile inputs, end to end through the command line: each is one clear error or a named quarantine, and nothing is left half written."""

from __future__ import annotations

import json
import pickle
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from medgen.cli import main
from medgen.data.dataset import CXRDataset
from medgen.data.dicom import write_dx
from medgen.data.images import ImageError, ImagePreprocessing
from medgen.data.records import CXRRecord, read_manifest, write_manifest
from medgen.data.report_text import PromptConfig

SIZE = 32
TEXT = "Small left pleural effusion."
Said = pytest.CaptureFixture[str]


def film(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE), dtype=np.uint8)).save(path)
    return path


def record(name: str, image: str, findings: str = "", impression: str = TEXT) -> CXRRecord:
    return CXRRecord(name, f"patient-{name}", f"study-{name}", image, "PA", findings, impression, "train")


def manifest(root: Path, *records: CXRRecord) -> Path:
    return write_manifest(records, root / "manifest.parquet", name="hostile", source="test")


def jsonl(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def refused(said: Said, command: str, *words: object) -> str:
    """What `medgen` says on refusing (exit code 2, no traceback)."""
    said.readouterr()
    code = main([*command.split(), *map(str, words)])
    text = said.readouterr().err
    assert code == 2 and "error: " in text and "Traceback" not in text, (code, text)
    return text[text.index("error: ") :]


def build(source: str, root: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("--source", source, "--root", root, "--out", out, *more)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.endswith((".tmp", ".parquet")))


@pytest.mark.parametrize("part", [0.0, 0.1, 0.6, 0.99])
def test_a_truncated_dicom_is_quarantined_by_name(tmp_path: Path, capsys: Said, part: float) -> None:
    root = tmp_path / "films"
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 65535, (SIZE, SIZE), dtype=np.uint16)
        write_dx(
            root / f"f{i}.dcm",
            pixels,
            patient_id=f"p{i}",
            study_id=f"s{i}",
            record_id=f"r{i}",
            model="test",
            seed=i,
            description=TEXT,
        )
    content = (root / "f1.dcm").read_bytes()
    (root / "f1.dcm").write_bytes(content[: int(part * len(content))])
    text = refused(capsys, "data build", *build("dicom_folder", root, tmp_path / "out" / "manifest.parquet"))
    assert "f1.dcm" in text and "no manifest was written" in text and left_behind(tmp_path) == []
    assert (
        main(
            [
                "data",
                "build",
                *map(str, build("dicom_folder", root, tmp_path / "out" / "manifest.parquet", "--max-quarantined", 0.5)),
            ]
        )
        == 0
    )
    assert len(read_manifest(tmp_path / "out" / "manifest.parquet")) == 2
    (held,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert "f1.dcm" in json.loads(held)["reason"]


def test_wrong_columns_are_named(tmp_path: Path, capsys: Said) -> None:
    film(tmp_path / "a.png")
    path = manifest(tmp_path, record("a", "a.png"))
    table = pq.read_table(path)
    renamed = table.rename_columns(["vue" if name == "view" else name for name in table.column_names])
    pq.write_table(renamed.replace_schema_metadata(table.schema.metadata), path)
    text = refused(capsys, "data check", "--manifest", path)
    assert "manifest.parquet" in text and "missing columns ['view']" in text and "unknown columns ['vue']" in text
    pq.write_table(pa.table({"x": [1]}), path)
    assert "missing columns" in refused(capsys, "train classifier", "--config", "configs/classifier/digital_chest.yaml",
                                        f"data.manifest={path}", f"train.out={tmp_path / 'run'}", "train.cpu=true")  # fmt: skip
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_missing_file_is_named(tmp_path: Path, capsys: Said) -> None:
    film(tmp_path / "a.png")
    path = manifest(tmp_path, record("a", "a.png"), record("b", "b.png"))
    text = refused(capsys, "data check", "--manifest", path)
    assert "1 of 2 images are unusable" in text and "b: no image at" in text
    with pytest.raises(ImageError, match=r"record 'b'.*b\.png"):
        CXRDataset(read_manifest(path), ImagePreprocessing(size=SIZE))[1]
    assert "no manifest at" in refused(capsys, "data check", "--manifest", tmp_path / "none.parquet")


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hostname", "a/../../secret.png", "..\\secret.png", "C:/secret.png"])
def test_a_path_outside_the_root_is_refused(tmp_path: Path, capsys: Said, image: str) -> None:
    film(tmp_path / "secret.png")
    header = {"medgen_manifest": 1, "name": "hostile", "source": "test"}
    path = jsonl(tmp_path / "inside" / "manifest.jsonl", header, asdict(record("a", image)))
    text = refused(capsys, "data check", "--manifest", path)
    assert "row 1" in text and "'image'" in text and "below the manifest's folder" in text
    root = tmp_path / "folder"
    jsonl(root / "metadata.jsonl", {"file_name": image, "text": TEXT})
    text = refused(capsys, "data build", *build("imagefolder", root, root / "manifest.parquet"))
    assert repr(image)[1:-1] in text and "no manifest was written" in text and left_behind(root) == []


class _Bomb:
    """Pickled, it makes a file when it is opened by anything that unpickles."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.mark,)  # type: ignore[return-value]


def test_a_pickled_checkpoint_is_never_opened(tmp_path: Path, capsys: Said) -> None:
    mark, folder = tmp_path / "exploded", tmp_path / "pipeline"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(
        '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}'
    )
    (folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        (folder / "unet" / name).write_bytes(pickle.dumps(_Bomb(mark)))
    text = refused(capsys, "sample text-to-cxr", "--pipeline", folder, "--prompt", TEXT, "--out", tmp_path / "out")
    assert "unet/diffusion_pytorch_model.bin is pickled, which is never opened" in text
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_nan_image_is_named(tmp_path: Path, capsys: Said) -> None:
    film(tmp_path / "a.png")
    values = np.random.default_rng(0).random((SIZE, SIZE), dtype=np.float32)
    values[3, 4] = np.nan
    Image.fromarray(values).save(tmp_path / "b.tiff")
    path = manifest(tmp_path, record("a", "a.png"), record("b", "b.tiff"))
    text = refused(capsys, "data check", "--manifest", path)
    assert "1 of 2 images are unusable" in text and "b.tiff" in text and "finite" in text


def test_an_empty_prompt_is_refused(tmp_path: Path, capsys: Said) -> None:
    out = tmp_path / "out"
    text = refused(capsys, "sample text-to-cxr", "--pipeline", "any", "--prompt", " ", "--out", out)
    assert "'prompt'" in text and "empty" in text
    cases = jsonl(
        tmp_path / "cases.jsonl", {"case_id": "a", "prompt": TEXT, "seed": 0}, {"case_id": "b", "prompt": "", "seed": 0}
    )
    text = refused(capsys, "sample text-to-cxr", "--pipeline", "any", "--cases", cases, "--out", out)
    assert "cases.jsonl, line 2" in text and "'prompt'" in text and not out.exists()


def test_a_record_without_words_is_quarantined(tmp_path: Path, capsys: Said) -> None:
    for i in range(2):
        film(tmp_path / f"{i}.png", i)
    jsonl(tmp_path / "metadata.jsonl", {"file_name": "0.png", "text": TEXT}, {"file_name": "1.png", "text": "___"})
    text = refused(capsys, "data build", *build("imagefolder", tmp_path, tmp_path / "manifest.parquet"))
    assert "no words about the image" in text and not (tmp_path / "manifest.parquet").exists()


def test_a_report_of_ten_thousand_words_is_cut_at_a_sentence_in_no_time(tmp_path: Path) -> None:
    film(tmp_path / "a.png")
    findings = " ".join(["The heart is mildly enlarged and the left costophrenic angle is blunted."] * 850)
    assert len(findings.split()) > 10_000
    path = manifest(tmp_path, record("a", "a.png", findings))
    start = time.perf_counter()
    films = CXRDataset(
        read_manifest(path),
        ImagePreprocessing(size=SIZE),
        prompts=PromptConfig(max_tokens=64),
        count_tokens=lambda text: len(text.split()),
    )
    prompt = films[0]["prompt"]
    assert 0 < len(prompt.split()) <= 64 and prompt.endswith(".") and time.perf_counter() - start < 5
