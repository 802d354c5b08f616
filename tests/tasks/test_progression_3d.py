"""Progression in 3D, end to end with the recipes that are shipped, made small: from a data set to volumes at dates that nobody saw.

ACDC's own layout with SADM's setting, and the digital patients' CTs: manifest → autoencoder → forecaster → pipeline → frames.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from medgen.config import ConfigError, load_config
from medgen.data.build import build
from medgen.data.records import read_manifest, write_manifest
from medgen.data.visit_images import load_visit
from medgen.data.visit_records import VisitSeries
from medgen.digital.progression import write_dataset
from medgen.models.volume_autoencoder import VolumeAutoencoderKL
from medgen.pipelines.progression import History, ProgressionPipeline
from medgen.tasks.autoencoder import AutoencoderRecipe, AutoencoderTask
from medgen.tasks.progression import Progression, ProgressionRecipe
from medgen.training.loop import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHORT_AXIS = np.diag([1.5625, 1.5625, 10.0, 1.0])
TRAIN = ["train.steps=2", "train.batch_size=2", "train.mixed_precision='no'", "train.cpu=true", "train.tensorboard=false",
         "train.workers=0", "train.validate_every=2", "train.validation_batches=1", "train.preview_every=2",
         "train.gradient_checkpointing=false"]  # fmt: skip


@pytest.fixture(scope="module")
def acdc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of five patients in ACDC's layout, a ball that shrinks from the first frame to the sixth; one is the set's test."""
    root = tmp_path_factory.mktemp("acdc")
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (18, 20, 6)), indexing="ij")
    for p in range(1, 6):
        home = root / "ACDC" / ("testing" if p == 5 else "training") / f"patient{p:03d}"
        home.mkdir(parents=True)
        radius = 0.5 + 0.05 * p + 0.15 * np.cos(np.arange(10) / 10 * 2 * np.pi)
        cine = 400 * (np.sqrt(x**2 + y**2 + z**2)[..., None] < radius) + np.random.default_rng(p).integers(0, 40, (18, 20, 6, 10))
        nibabel.save(nibabel.Nifti1Image(cine.astype(np.int16), SHORT_AXIS), home / f"{home.name}_4d.nii.gz")
        (home / "Info.cfg").write_text(
            f"ED: 1\nES: 6\nGroup: {'DCM' if p % 2 else 'NOR'}\nHeight: 180.0\nNbFrame: 10\nWeight: 80.0\n"
        )
    report = build("acdc", root / "ACDC", root / "manifest.parquet", val_fraction=0.0, frames=12)
    return _with_validation(report.manifest)


@pytest.fixture(scope="module")
def cts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of three digital patients' CTs of 16 voxels a side."""
    return _with_validation(
        write_dataset(tmp_path_factory.mktemp("cts"), n=3, seed=1, dim=3, size=16, visits=(2, 3), futures=2, processes=1)
    )


def _with_validation(path: Path) -> Path:
    """The same series, all but the last two in "train"."""
    read = read_manifest(path, record=VisitSeries)
    splits = ["train"] * (len(read) - 2) + ["val", "test"]
    records = [replace(series, split=split) for series, split in zip(read.records, splits, strict=True)]  # type: ignore[arg-type]
    return write_manifest(records, path, name=read.name, source=read.source)


def autoencoder(recipe: str, manifest: Path, out: Path, size: str) -> Path:
    """`configs/autoencoder/{recipe}.yaml`, trained for two steps on small volumes: its exported folder."""
    shape = ["patch_size=2", "block_out_channels=[8, 8]", "layers_per_block=1", "norm_num_groups=4", f"sample_size={size}"]
    small = [f"data.manifest={manifest}", f"data.preprocessing.size={size}", *(f"autoencoder.{item}" for item in shape)]
    config = load_config(
        AutoencoderRecipe, CONFIGS / "autoencoder" / f"{recipe}.yaml", [*small, *TRAIN, f"train.out={out / 'ae'}"]
    )
    return train(AutoencoderTask(config), config.train, config).folder / "export"


def progression(recipe: str, manifest: Path, vae: Path, out: Path, size: str, *more: str) -> ProgressionRecipe:
    """`configs/progression/{recipe}.yaml` with a small denoiser and two steps."""
    shape = ["conditioner.width=16", "denoiser.width=24", "denoiser.depth=2", "denoiser.heads=2", f"cache={out / 'cache'}"]
    given = [f"data.manifest={manifest}", f"data.preprocessing.size={size}", f"autoencoder.path={vae}", *shape, *TRAIN]
    given += ["sampling.num_inference_steps=2", f"train.out={out / 'forecaster'}", *more]
    return load_config(ProgressionRecipe, CONFIGS / "progression" / f"{recipe}.yaml", given)


def history_of(pipeline: ProgressionPipeline, manifest: Path, visits: int) -> History:
    """The first visits of the test patient, read as the pipeline reads them."""
    read = read_manifest(manifest, "test", record=VisitSeries)
    (series,) = read.records
    images = [load_visit(read.path(str(visit.image)), pipeline.preprocessing) for visit in series.imaged[:visits]]
    times = [visit.time for visit in series.imaged[:visits]]
    return History((torch.stack(images) + 1) / 2, times, series.events, series.covariates)


def test_sadm_on_acdc_from_the_data_set_to_the_end_of_systole(acdc: Path, tmp_path: Path) -> None:
    size = "[8, 16, 16]"
    vae = autoencoder("acdc", acdc, tmp_path, size)
    config = progression("sadm_acdc", acdc, vae, tmp_path, size)
    task = Progression(config)
    data = task.dataset("train")
    assert data[0]["latents"].shape == (12, 8, 2, 4, 4) and data[0]["times"].tolist() == pytest.approx(
        np.linspace(0, 1, 12), abs=1e-5
    )
    result = train(task, config.train, config)
    assert result.metrics["val/loss"] > 0 and list((result.folder / "previews").glob("*samples*.png"))

    pipeline = ProgressionPipeline.from_pretrained(result.folder / "export")
    assert isinstance(pipeline.vae, VolumeAutoencoderKL) and pipeline.config.time_unit == "phase"
    assert pipeline.scheduler.config.num_train_timesteps == 400 and pipeline.scheduler.config.beta_end == 0.02
    assert pipeline.config.guidance_scale == 1.2
    past, wanted = history_of(pipeline, acdc, 3), [0.4, 0.7, 1.0]
    for mode in ("joint", "autoregressive"):
        out = pipeline(past, wanted, num_trajectories=2, mode=mode,
                       generator=[torch.Generator().manual_seed(s) for s in (0, 1)])  # fmt: skip
        assert out.frames.shape == (2, 3, 8, 16, 16) and out.times[0].tolist() == pytest.approx(wanted)
        assert np.isfinite(out.frames).all() and 0 <= out.frames.min() and out.frames.max() <= 1
        assert np.abs(out.frames[0] - out.frames[1]).max() > 1e-4
    assert pipeline.reconstruct(past.images).shape == past.images.shape


def test_digital_cts_from_the_simulator_to_a_forecast(cts: Path, tmp_path: Path) -> None:
    vae = autoencoder("digital_ct", cts, tmp_path, "16")
    config = progression("digital_progression_3d", cts, vae, tmp_path, "16")
    result = train(Progression(config), config.train, config)
    assert result.metrics["val/loss"] > 0 and list((result.folder / "previews").glob("*samples*.png"))
    pipeline = ProgressionPipeline.from_pretrained(result.folder / "export")
    past = history_of(pipeline, cts, 1)
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    out = pipeline(past, [30.0, 200.0], num_trajectories=2, generator=generators)
    assert out.frames.shape == (2, 2, 16, 16, 16) and np.isfinite(out.frames).all()
    again = pipeline(past, [30.0, 200.0], generator=[torch.Generator().manual_seed(1)])
    np.testing.assert_allclose(again.frames[0], out.frames[1], atol=1e-4)  # a trajectory does not know its neighbours


def test_a_width_that_three_axes_cannot_share_is_refused(cts: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    VolumeAutoencoderKL(block_out_channels=(8,), norm_num_groups=4, patch_size=2, sample_size=16).save_pretrained(
        tmp_path / "vae"
    )
    task = Progression(progression("digital_progression_3d", cts, tmp_path / "vae", tmp_path, "16", "denoiser.width=16"))
    with pytest.raises(ConfigError, match=r"denoiser: width 16 / heads 2 must be a whole multiple of 6"):
        task.modules()
