"""Image files become tensors with the same geometry and grey values, or a clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.data.dicom import write_dx
from medgen.data.images import ImageError, ImagePreprocessing, load_image, preprocess

RAMP = np.linspace(0, 1, 40 * 60).reshape(40, 60)


def test_every_format_gives_the_same_values(tmp_path: Path) -> None:
    eight, sixteen = (RAMP * 255).round().astype(np.uint8), (RAMP * 65535).round().astype(np.uint16)
    Image.fromarray(eight).save(tmp_path / "8.png")
    Image.fromarray(eight).convert("RGB").save(tmp_path / "rgb.png")
    Image.fromarray(eight).save(tmp_path / "8.jpg", quality=95)
    Image.fromarray(sixteen).save(tmp_path / "16.png")
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "float.tif")
    for name in ("dx.dcm", "dx_without_suffix"):
        write_dx(tmp_path / name, sixteen, patient_id="p", study_id="s", record_id="r", model="m", seed=0)
    expected = torch.from_numpy(RAMP * 2 - 1).float()[None]
    for path in sorted(tmp_path.iterdir()):
        image = load_image(path)
        assert image.shape == (1, 40, 60) and image.dtype == torch.float32
        assert (image - expected).abs().max() < (0.03 if path.suffix == ".jpg" else 0.005), path.name


def test_a_square_is_padded_with_black_and_keeps_its_sides(tmp_path: Path) -> None:
    picture = np.zeros((40, 80), np.uint8)
    picture[:, :40] = 255  # bright at the image's left
    Image.fromarray(picture).save(tmp_path / "wide.png")
    image = load_image(tmp_path / "wide.png", size=32)
    assert image.shape == (1, 32, 32)
    assert (image[0, :7] == -1).all() and (image[0, -7:] == -1).all(), "black above and below"
    assert image[0, 16, 4] > 0.999 and image[0, 16, 28] == -1
    assert load_image(tmp_path / "wide.png", size=32, channels=3).shape == (3, 32, 32)


def test_cropping_instead_of_padding(tmp_path: Path) -> None:
    picture = np.zeros((40, 80), np.uint8)
    picture[:, 20:60] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    assert (preprocess(tmp_path / "wide.png", ImagePreprocessing(size=16, pad=False)) == 1).all()


def test_large_jpeg_is_decoded_at_a_fraction_with_the_same_result(tmp_path: Path) -> None:
    y, x = np.mgrid[:1024, :1024] / 1024
    Image.fromarray((255 * (0.5 + 0.5 * np.sin(9 * x) * np.cos(7 * y))).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.jpg", 64) - load_image(tmp_path / "a.png", 64)).abs().max() < 0.03


def test_a_rotated_photograph_stands_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to show
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").shape == (1, 60, 40)


def test_intensity_choices(tmp_path: Path) -> None:
    twelve_bits = (RAMP * 4095).astype(np.uint16)
    twelve_bits[0, 0] = 60000  # one hot pixel
    Image.fromarray(twelve_bits).save(tmp_path / "12.png")
    tops = {}
    for intensity in ("stored", "minmax", "percentile"):
        image = preprocess(tmp_path / "12.png", ImagePreprocessing(size=64, intensity=intensity, range=(0, 1)))
        assert 0 <= image.min() and image.max() <= 1
        tops[intensity] = float(image[0, 50, 40])
    assert tops["percentile"] > 0.9 > 0.1 > tops["minmax"] >= tops["stored"]


def test_unusable_images_say_why(tmp_path: Path) -> None:
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("<html>404</html>")
    (tmp_path / "empty.jpg").touch()
    values = RAMP.astype(np.float32).copy()
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "nan.tif")
    Image.fromarray(RAMP.astype(np.float32) * 1000).save(tmp_path / "hu.tif")
    (tmp_path / "cut.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\x00")
    for name, said in {
        "cut.png": "cannot be decoded",
        "text.png": "cannot be decoded",
        "empty.jpg": "cannot be decoded",
        "nan.tif": "NaN",
        "hu.tif": "outside",
        "cut.dcm": "cut.dcm",
        "absent.png": "no image at",
    }.items():
        with pytest.raises(ImageError, match=said) as error:
            load_image(tmp_path / name, 32)
        assert name in str(error.value)
