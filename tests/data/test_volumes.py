"""Volumes meet a model in one orientation, size and intensity, and what cannot be placed or read is refused with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from medgen.data.volumes import (
    VolumeError,
    VolumePreprocessing,
    is_volume,
    load_volume,
    middle_coronal,
    read_header,
    read_volume,
    write_volume,
)

RAS = np.diag([2.0, 2.0, 2.5, 1.0])
RAS[:3, 3] = (-16.0, -20.0, 30.0)


def body(shape: tuple[int, int, int] = (16, 20, 24)) -> NDArray[np.int16]:
    """Air with a block of tissue whose centre lies to the patient's right, front and head, in RAS order."""
    hu = np.full(shape, -1000, dtype=np.int16)
    hu[10:14, 9:19, 16:22] = 50
    return hu


def save(path: Path, values: NDArray[Any], affine: NDArray[np.float64] = RAS, codes: int = 1) -> Path:
    image = nibabel.Nifti1Image(values, affine)
    image.set_sform(affine, code=codes)
    image.set_qform(affine, code=codes)
    nibabel.save(image, path)
    return path


def turned(values: NDArray[Any], axes: str) -> nibabel.Nifti1Image:
    """The same body as another scanner stores it."""
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes))
    return nibabel.Nifti1Image(values, RAS).as_reoriented(turn)


def middle_mm(values: torch.Tensor, affine: NDArray[np.float64], level: float = 0.0) -> NDArray[np.float64]:
    """Where the tissue's centre lies in RAS mm."""
    z, y, x = (values[0] > level).nonzero(as_tuple=True)
    return np.asarray(affine @ np.array([x.float().mean(), y.float().mean(), z.float().mean(), 1.0]))[:3]


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SAR", "LAI"])
def test_every_storage_order_gives_the_same_tensor(tmp_path: Path, axes: str) -> None:
    nibabel.save(turned(body(), axes), tmp_path / "a.nii.gz")
    assert read_header(tmp_path / "a.nii.gz").axes == axes
    volume = load_volume(tmp_path / "a.nii.gz", (24, 20, 16), VolumePreprocessing(window=(-1000, 50)))
    expected = torch.from_numpy(body().transpose(2, 1, 0).astype(np.float32))[None] > 0
    assert volume.values.shape == (1, 24, 20, 16) and volume.values.dtype == torch.float32
    assert torch.equal(volume.values, expected * 2.0 - 1.0)
    np.testing.assert_allclose(volume.affine, RAS, atol=1e-5)
    # D counts to the head, H to the front, W to the right; hung as a film, the right side is on the left
    assert expected[0, 19].any() and not expected[0, 4].any()
    picture = middle_coronal(volume.values[0])
    assert picture.shape == (24, 16) and picture[:12, :8].max() == 1 and picture[:, 8:].max() == -1 and picture[12:].max() == -1


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, (12, 10, 8)),
        ({}, 32),
        ({"fit": "crop", "spacing_mm": 4.0}, (20, 12, 10)),
        ({"fit": "crop", "spacing_mm": (5.0, 2.0, 2.0)}, (10, 24, 14)),
        ({"fit": "crop"}, (24, 18, 16)),
    ],
)
def test_a_resampled_body_stays_where_it_was(tmp_path: Path, settings: dict[str, Any], size: Any) -> None:
    path = save(tmp_path / "a.nii", body())
    volume = load_volume(path, size, VolumePreprocessing(window=(-1000, 50), **settings))
    assert tuple(volume.values.shape[1:]) == ((size,) * 3 if isinstance(size, int) else size)
    assert volume.values.min() >= -1 and volume.values.max() <= 1
    np.testing.assert_allclose(middle_mm(volume.values, volume.affine), middle_mm(*load_volume(
        path, (24, 20, 16), VolumePreprocessing(window=(-1000, 50)))), atol=1.6)  # fmt: skip
    if "spacing_mm" in settings:
        want = np.broadcast_to(settings["spacing_mm"], 3)[::-1]
        np.testing.assert_allclose(np.linalg.norm(volume.affine[:3, :3], axis=0), want, rtol=0.06)


def test_padding_is_black(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", body() + np.int16(500))  # nothing in the file is black
    values = load_volume(path, 32, VolumePreprocessing(fit="crop", window=(-1000, 1000))).values
    assert values[0, 0, 0, 0] == -1 and values[0, 16, 16, 16] > -1


def test_intensities(tmp_path: Path) -> None:
    mr = np.random.default_rng(0).gamma(2.0, 100.0, (16, 16, 16)).astype(np.float32)
    mr[0, 0, 0] = 1e5  # a spike
    path = save(tmp_path / "a.nii.gz", mr)
    smooth = load_volume(path, 16, VolumePreprocessing(intensity="percentile")).values
    assert 0.3 < (smooth + 1).mean() < 0.9
    assert (load_volume(path, 16, VolumePreprocessing(intensity="minmax")).values + 1).mean() < 0.01
    ct = VolumePreprocessing(window=(-1000.0, 1000.0))
    values = load_volume(save(tmp_path / "b.nii.gz", body()), (24, 20, 16), ct).values
    np.testing.assert_allclose(np.unique(ct.restored(values)), [-1000.0, 50.0], atol=1e-3)


def test_written_volumes_are_read_back_and_equal_byte_for_byte(tmp_path: Path) -> None:
    ct = VolumePreprocessing()
    volume = load_volume(save(tmp_path / "a.nii.gz", body()), 16, ct)
    first = write_volume(tmp_path / "out" / "x.nii.gz", ct.restored(volume.values), volume.affine)
    second = write_volume(tmp_path / "out" / "y.nii.gz", ct.restored(volume.values), volume.affine)
    assert first.read_bytes() == second.read_bytes() and not list((tmp_path / "out").glob(".*"))
    again = load_volume(first, 16, ct)
    assert (again.values - volume.values).abs().max() < 1e-3
    np.testing.assert_allclose(again.affine, volume.affine, atol=1e-4)
    assert read_volume(first)[0].dtype == np.float32 and nibabel.load(first).get_data_dtype() == np.int16


def test_freesurfer_volumes(tmp_path: Path) -> None:
    nibabel.save(nibabel.MGHImage(body().astype(np.float32), RAS), tmp_path / "brain.mgz")
    assert is_volume(tmp_path / "brain.mgz") and read_header(tmp_path / "brain.mgz").axes == "RAS"
    assert load_volume(tmp_path / "brain.mgz", 16, VolumePreprocessing()).values.shape == (1, 16, 16, 16)


def test_a_file_without_orientation_can_be_read_as_it_is_stored(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", body(), codes=0)
    with pytest.raises(VolumeError, match="a.nii.gz says no orientation .*volume.orientation=null"):
        load_volume(path, 16, VolumePreprocessing())
    volume = load_volume(path, (24, 20, 16), VolumePreprocessing(orientation=None))
    assert torch.equal(volume.values[0] > -0.5, torch.from_numpy(body().transpose(2, 1, 0) > 0))
    np.testing.assert_allclose(np.diag(volume.affine), [2, 2, 2.5, 1])


def bad(name: str, path: Path) -> Path:
    values, affine = body().astype(np.float32), RAS.copy()
    if name == "nan":
        values[0, 0, :3] = np.nan
    if name == "4d":
        return save(path, np.stack([values] * 5, axis=-1))
    if name == "flat":
        values[:] = 3
    if name == "metres":
        affine[:3] /= 1e4
    if name == "thick":
        affine[2, 2] = 10.0
    if name == "sheared":
        affine[0, 1] = 1.0
        image = nibabel.Nifti1Image(values, affine)
        nibabel.save(image, path)
        return path
    if name == "not-hu":
        values = values * 0 + np.linspace(3000, 4000, values.size).reshape(values.shape)
    if name == "cut":
        whole = save(path, values).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        return path
    if name == "text":
        path.write_text("no volume")
        return path
    if name == "slice":
        return save(path, values[:, :, :1])
    return save(path, values, affine)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nan", "holds 3 NaN or infinite voxels of 7680"),
        ("4d", "is 4D, 16 x 20 x 24 x 5: expected one 3D volume; write each frame"),
        ("flat", "shows nothing: every voxel is 3"),
        ("metres", "says a spacing of .* expected 0.02 to 30"),
        ("thick", "is anisotropic: 2 x 2 x 10 mm, 5 to 1, more than volume.max_anisotropy=3"),
        ("sheared", "has no plausible affine: .* lean by a cosine"),
        ("not-hu", "holds values from 3000 to 4000, all outside volume.window -1024 to 600: not in HU"),
        ("cut", "cannot be decoded as a volume"),
        ("text", "cannot be decoded as a volume"),
        ("slice", "has the shape 16 x 20 x 1: expected a volume of at least 2 x 2 x 2"),
    ],
)
def test_unusable_volumes_say_what_is_wrong_and_where(tmp_path: Path, name: str, said: str) -> None:
    path = bad(name, tmp_path / f"{name}.nii.gz")
    with pytest.raises(VolumeError, match=f"{name}.nii.gz {said}"):
        load_volume(path, 16, VolumePreprocessing())
    with pytest.raises(VolumeError, match="no image at"):
        load_volume(tmp_path / "absent.nii.gz", 16, VolumePreprocessing())


def test_thick_slices_are_allowed_where_the_set_has_them(tmp_path: Path) -> None:
    path = bad("thick", tmp_path / "a.nii.gz")
    assert load_volume(path, (32, 16, 16), VolumePreprocessing(max_anisotropy=12)).values.shape == (1, 32, 16, 16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window": (10, -10)}, "window must rise"),
        ({"percentiles": (5, 500)}, "percentiles must rise"),
        ({"spacing_mm": 1.0}, "spacing_mm is what fit=crop resamples to"),
        ({"spacing_mm": 1000.0, "fit": "crop"}, "spacing_mm must lie in"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        VolumePreprocessing(**settings)
