"""Radiographs in DICOM: shown as they are meant to be, refused when they cannot be, written as synthetic."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, RLELossless

from medgen.data.dicom import DicomError, read_dicom, read_header, write_dx

ORIGIN: dict[str, Any] = {
    "patient_id": "p1", "study_id": "s1", "record_id": "case-1", "model": "digital-chest", "model_hash": "ab" * 32, "seed": 3
}  # fmt: skip
RAMP = np.linspace(0, 4095, 48 * 64).round().astype(np.uint16).reshape(48, 64)


def film(path: Path, pixels: NDArray[Any] = RAMP, **attributes: Any) -> Path:
    """A DX file as a vendor writes it: 12 bits in 16, no window unless `attributes` say so."""
    write_dx(path, pixels.astype(np.uint16), **ORIGIN)
    dataset = pydicom.dcmread(path)
    for name in ("WindowCenter", "WindowWidth", "WindowCenterWidthExplanation"):
        delattr(dataset, name)
    dataset.BitsStored, dataset.HighBit = 12, 11
    dataset.PixelData = pixels.astype("<i2" if attributes.get("PixelRepresentation") else "<u2").tobytes()
    for name, value in attributes.items():
        if name == "PixelPaddingValue":
            dataset.add_new(name, "SS", value)
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)
    return path


def lut(first: int, table: list[int], bits: int = 16) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(table), first, bits]
    item.LUTData = np.array(table, "<u2").tobytes()
    return item


def lossless_jpeg(image: NDArray[np.uint16], precision: int = 16) -> bytes:
    """A lossless stream (ITU-T T.81 process 14, predictor 1): installed codecs decode it, none writes it."""
    height, width = image.shape
    values = image.astype(np.int64)
    predicted = np.empty_like(values)
    predicted[0, 0] = 1 << (precision - 1)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    bits = "".join(_code(int(d)) for d in (values - predicted).ravel())
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    table = bytes([0]) + bytes([0] * 4 + [17] + [0] * 11) + bytes(range(17))  # seventeen codes of five bits: categories 0-16
    return (
        b"\xff\xd8"
        + _segment(0xC3, struct.pack(">BHHB", precision, height, width, 1) + bytes([1, 0x11, 0]))
        + _segment(0xC4, table)
        + _segment(0xDA, bytes([1, 1, 0, 1, 0, 0]))
        + scan
        + b"\xff\xd9"
    )


def _code(difference: int) -> str:
    difference = (difference + 32768) % 65536 - 32768  # modulo 2^16 (T.81 H.1.2.1)
    category = abs(difference).bit_length()
    if category == 0 or difference == -32768:
        return f"{category:05b}"
    magnitude = difference if difference > 0 else difference + (1 << category) - 1
    return f"{category:05b}{magnitude:0{category}b}"


def _segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def test_without_a_window_the_range_is_the_image(tmp_path: Path) -> None:
    shown, _ = read_dicom(film(tmp_path / "a.dcm"))
    assert shown.dtype == np.float32 and shown.shape == (48, 64)
    np.testing.assert_allclose(shown, RAMP / 4095, atol=1e-6)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    shown, _ = read_dicom(film(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(shown, 1 - RAMP / 4095, atol=1e-6)


def test_rescale_then_window(tmp_path: Path) -> None:
    path = film(tmp_path / "a.dcm", RescaleSlope=2, RescaleIntercept=-100, WindowCenter=[1900, 7], WindowWidth=[2001, 9])
    shown, _ = read_dicom(path)
    np.testing.assert_allclose(shown, np.clip((RAMP * 2.0 - 100 - 1899.5) / 2000 + 0.5, 0, 1), atol=1e-6)


def test_sigmoid_window(tmp_path: Path) -> None:
    shown, _ = read_dicom(film(tmp_path / "a.dcm", WindowCenter=2000, WindowWidth=1000, VOILUTFunction="SIGMOID"))
    np.testing.assert_allclose(shown, 1 / (1 + np.exp(-4 * (RAMP - 2000.0) / 1000)), atol=1e-6)


@pytest.mark.parametrize("window", [{"WindowCenter": 100, "WindowWidth": 0}, {"WindowCenter": "", "WindowWidth": ""}])
def test_an_unusable_window_is_ignored(tmp_path: Path, window: dict[str, Any]) -> None:
    np.testing.assert_allclose(read_dicom(film(tmp_path / "a.dcm", **window))[0], RAMP / 4095, atol=1e-6)


def test_voi_lut_sequence_is_preferred_and_its_own_top_is_white(tmp_path: Path) -> None:
    table = [int(4095 * (i / 4095) ** 0.5) for i in range(4096)]  # twelve-bit entries that claim sixteen, as vendors write
    shown, _ = read_dicom(film(tmp_path / "a.dcm", VOILUTSequence=[lut(0, table)], WindowCenter=1, WindowWidth=2))
    np.testing.assert_allclose(shown, np.array(table)[RAMP] / 4095, atol=1e-6)


def test_voi_lut_clamps_outside_its_range(tmp_path: Path) -> None:
    shown, _ = read_dicom(film(tmp_path / "a.dcm", VOILUTSequence=[lut(1000, list(range(0, 40000, 40)))]))
    np.testing.assert_allclose(shown, np.clip(RAMP.astype(float) - 1000, 0, 999) / 999, atol=1e-6)


def test_modality_lut(tmp_path: Path) -> None:
    modality = lut(0, [4095 - i for i in range(4096)])
    modality.ModalityLUTType = "US"
    dataset = pydicom.dcmread(film(tmp_path / "a.dcm", ModalityLUTSequence=[modality]))
    del dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType
    dataset.save_as(tmp_path / "a.dcm")
    np.testing.assert_allclose(read_dicom(tmp_path / "a.dcm")[0], 1 - RAMP / 4095, atol=1e-6)


def test_signed_pixels_and_padding(tmp_path: Path) -> None:
    pixels = RAMP.astype(np.int16) // 2 - 1000
    pixels[:4] = -2000
    path = film(
        tmp_path / "a.dcm", pixels, PixelRepresentation=1, PixelPaddingValue=-2000, PhotometricInterpretation="MONOCHROME1"
    )
    shown, _ = read_dicom(path)
    assert (shown[:4] == 0).all(), "padding is black in MONOCHROME1 too"
    body = pixels[4:].astype(float)
    np.testing.assert_allclose(shown[4:], 1 - (body - body.min()) / (body.max() - body.min()), atol=1e-6)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_lossless_compression_changes_nothing(tmp_path: Path, syntax: str) -> None:
    dataset = pydicom.dcmread(film(tmp_path / "a.dcm"))
    if syntax == JPEGLosslessSV1:
        dataset.PixelData = encapsulate([lossless_jpeg(RAMP)])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    else:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(tmp_path / "b.dcm")
    np.testing.assert_array_equal(read_dicom(tmp_path / "b.dcm")[0], read_dicom(tmp_path / "a.dcm")[0])


@pytest.mark.parametrize(
    ("compressed", "plain"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
    ],
)
def test_real_files_in_other_transfer_syntaxes(compressed: str, plain: str) -> None:
    first, second = (read_dicom(str(get_testdata_file(name, download=False)))[0] for name in (compressed, plain))
    np.testing.assert_array_equal(first, second)


def test_unusable_files_say_why(tmp_path: Path) -> None:
    good = film(tmp_path / "good.dcm")
    content = good.read_bytes()
    (tmp_path / "cut.dcm").write_bytes(content[: len(content) - RAMP.nbytes // 2])
    (tmp_path / "text.dcm").write_text("not an image")
    film(tmp_path / "frames.dcm", np.concatenate([RAMP, RAMP]), Rows=48, NumberOfFrames=2)
    film(tmp_path / "nan.dcm", RescaleSlope=float("nan"))
    film(tmp_path / "huge.dcm", Rows=65535, Columns=65535)
    dataset = pydicom.dcmread(good)
    dataset.PhotometricInterpretation = "RGB"
    dataset.save_as(tmp_path / "colour.dcm")
    del dataset.PixelData
    dataset.save_as(tmp_path / "empty.dcm")
    dataset = pydicom.dcmread(good)
    dataset.PixelData = encapsulate([b"not a video frame "])
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.102"  # MPEG-4
    dataset.save_as(tmp_path / "video.dcm")
    for name, said in {
        "cut": "cannot be decoded",
        "text": "not a readable DICOM",
        "frames": "has 2 frames",
        "nan": "not finite",
        "huge": "is refused",
        "colour": "is RGB; expected MONOCHROME",
        "empty": "has no pixel data",
        "video": "MPEG-4",
        "absent": "no file at",
    }.items():
        with pytest.raises(DicomError, match=said) as error:
            read_dicom(tmp_path / f"{name}.dcm")
        assert f"{name}.dcm" in str(error.value)


def test_written_dx_says_that_it_is_synthetic_and_reads_back(tmp_path: Path) -> None:
    image = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    path = write_dx(tmp_path / "a.dcm", image, **ORIGIN, view="AP", age=61.5, sex="F", description="Effusion.")
    header = read_header(path)
    assert header.SyntheticData == "YES" and header.ImageType[0] == "DERIVED" and header.PatientID == "SYN-p1"
    assert "seed 3" in header.DerivationDescription and "ab" * 32 in header.DerivationDescription
    assert header.PresentationLUTShape == "IDENTITY" and header.BurnedInAnnotation == "NO" and header.ViewPosition == "AP"
    assert list(header.PatientOrientation) == ["L", "F"] and header.PatientAge == "061Y"
    assert header.ContributingEquipmentSequence[0].Manufacturer == "medgen"
    np.testing.assert_allclose(read_dicom(path)[0], image / 65535, atol=1e-4)


def test_written_bytes_follow_from_the_origin(tmp_path: Path) -> None:
    other = {**ORIGIN, "seed": 4}
    files = [write_dx(tmp_path / f"{i}.dcm", RAMP, **origin) for i, origin in enumerate((ORIGIN, ORIGIN, other))]
    first, again, third = (path.read_bytes() for path in files)
    assert first == again != third
    uids = [read_header(path).SOPInstanceUID for path in files]
    assert uids[0] != uids[2] and all(uid.is_valid and uid.startswith("2.25.") for uid in uids)


def test_only_uint16_is_written(tmp_path: Path) -> None:
    with pytest.raises(DicomError, match="uint16"):
        write_dx(tmp_path / "a.dcm", RAMP.astype(np.float32), **ORIGIN)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize("view", ["PA", "AP"])
def test_dciodvfy_accepts_written_dx(tmp_path: Path, view: Any) -> None:
    path = write_dx(tmp_path / "a.dcm", RAMP, **ORIGIN, view=view, age=61.5, sex="F")
    said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True)
    # Its dictionary is older than Synthetic Data (0008,001C), which the standard gained in 2023.
    errors = [
        line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error") and "(0x0008,0x001c)" not in line
    ]
    assert "DXImageForPresentation" in said.stdout + said.stderr and not errors
