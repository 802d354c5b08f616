"""The first task, end to end on a tiny world: train, export, load, sample; caches change nothing but time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medgen.config import ConfigError, save_config
from medgen.diffusion.frames import FrameBatch
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.pipelines.text_to_cxr import TextToCXRPipeline
from medgen.tasks.base import Task
from medgen.tasks.text_to_cxr import TextToCXR, TextToCXRRecipe, write_training_shards
from medgen.training.loop import train


def a_batch(task: TextToCXR) -> dict[str, Any]:
    data = task.dataset("train")
    return task.collate([data[i] for i in range(4)])


def frames_of(task: TextToCXR) -> FrameBatch:
    return task.frames(task.modules(), a_batch(task), torch.Generator().manual_seed(0))


def test_a_run_ends_in_a_pipeline_that_samples(recipe: dict[str, Any]) -> None:
    parsed = TextToCXRRecipe.model_validate(recipe | {"cache": recipe["train"]["out"].parent / "cache"})
    task = TextToCXR(parsed)
    assert isinstance(task, Task)
    result = train(task, parsed.train, parsed)
    assert result.metrics["val/loss"] > 0
    assert list((result.folder / "previews").glob("*.png"))

    pipeline = TextToCXRPipeline.from_pretrained(result.folder / "export")
    image = pipeline("Large left pleural effusion.").images[0]
    assert image.size == (32, 32) and image.mode == "L"
    assert "synthetic" in (result.folder / "export" / "README.md").read_text()
    assert str(parsed.data.manifest) not in (result.folder / "export" / "README.md").read_text()


def test_the_cache_gives_what_encoding_gives(recipe: dict[str, Any], tmp_path: Path) -> None:
    direct = frames_of(TextToCXR(TextToCXRRecipe.model_validate(recipe)))
    cached = frames_of(TextToCXR(TextToCXRRecipe.model_validate(recipe | {"cache": tmp_path / "cache"})))
    torch.testing.assert_close(cached.latents, direct.latents, atol=5e-3, rtol=0)  # kept in half precision
    assert cached.context is not None and direct.context is not None
    assert torch.equal(cached.context_mask, direct.context_mask)
    kept = direct.context_mask[..., None]
    torch.testing.assert_close(cached.context * kept, direct.context * kept, atol=5e-3, rtol=0)


@pytest.fixture
def sharded(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The recipe, and its films in shards of five."""
    values = TextToCXRRecipe.model_validate(recipe | {"cache": tmp_path / "cache"})
    save_config(values, tmp_path / "recipe.yaml")
    write_training_shards(tmp_path / "recipe.yaml", tmp_path / "shards", samples_per_shard=5)
    return recipe | {"shards": {"path": str(tmp_path / "shards"), "mix": 2}}


def test_shards_give_what_the_cache_gives_and_need_no_films(
    recipe: dict[str, Any], sharded: dict[str, Any], tmp_path: Path
) -> None:
    cached = a_batch(TextToCXR(TextToCXRRecipe.model_validate(recipe | {"cache": tmp_path / "cache"})))
    elsewhere = sharded | {"data": recipe["data"] | {"manifest": tmp_path / "not" / "here.parquet"}}
    streamed = a_batch(TextToCXR(TextToCXRRecipe.model_validate(elsewhere)))
    assert streamed["ids"] == cached["ids"]
    assert all(torch.equal(streamed[name], cached[name]) for name in ("mean", "std", "tokens", "mask"))


def test_a_run_on_shards_resumes_to_the_same_weights(sharded: dict[str, Any], tmp_path: Path) -> None:
    def weights(name: str, *stops: int | None) -> dict[str, torch.Tensor]:
        settings = sharded["train"] | {"out": tmp_path / name, "steps": 7, "checkpoint_every": 100}
        for stop in stops:  # 16 films in batches of 4: step 3 is inside the first epoch, step 6 inside the second
            parsed = TextToCXRRecipe.model_validate(sharded | {"train": settings | {"stop_at": stop}})
            folder = train(TextToCXR(parsed), parsed.train, parsed).folder
        return load_file(folder / "checkpoints" / "step-00000007" / "model" / "model.safetensors")

    whole, resumed = weights("whole", None), weights("resumed", 3, 6, None)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_shards_of_another_autoencoder_are_refused(sharded: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = AutoencoderConfig(
        patch_size=2, block_out_channels=(8, 8), norm_num_groups=4, mid_block_attention=False, sample_size=32
    )
    build_autoencoder(shape).save_pretrained(tmp_path / "other")
    task = TextToCXR(TextToCXRRecipe.model_validate(sharded | {"autoencoder": {"path": str(tmp_path / "other")}}))
    with pytest.raises(ConfigError, match=r"shards.path: .* was written with another autoencoder than"):
        task.dataset("train")


def test_captions_are_dropped_whole(recipe: dict[str, Any]) -> None:
    task = TextToCXR(TextToCXRRecipe.model_validate(recipe | {"caption_dropout": 0.5}))
    modules, batch = task.modules(), a_batch(task)
    dropped = torch.cat([~task.frames(modules, batch, torch.Generator().manual_seed(i)).context_mask.any(1) for i in range(50)])
    assert 0.35 < dropped.float().mean() < 0.65


def test_a_trained_text_encoder_gets_gradients_and_is_exported(recipe: dict[str, Any], tmp_path: Path) -> None:
    text_encoder = recipe["text_encoder"] | {"trained": True}
    task = TextToCXR(TextToCXRRecipe.model_validate(recipe | {"text_encoder": text_encoder, "caption_dropout": 0.0}))
    modules = task.modules()
    model = modules["model"]
    with torch.no_grad():  # away from the zero initialisation, where nothing reaches the text
        for parameter in model.denoiser.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    loss, _ = task.loss(modules, a_batch(task), "model", torch.Generator().manual_seed(0))
    loss.backward()
    assert model.text_encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0

    with torch.no_grad():
        model.text_encoder.embeddings.word_embeddings.weight.fill_(0.25)
    task.export(modules, tmp_path)
    loaded = TextToCXRPipeline.from_pretrained(tmp_path)
    assert (loaded.text_encoder.embeddings.word_embeddings.weight == 0.25).all()
    assert loaded.text_encoder.dtype == torch.float32


def test_fine_tuning_starts_from_an_exported_pipeline(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = TextToCXR(TextToCXRRecipe.model_validate(recipe | {"export_dtype": "float32"}))
    modules = first.modules()
    first.export(modules, tmp_path)
    again = recipe | {name: {"path": str(tmp_path)} for name in ("autoencoder",)}
    again |= {"text_encoder": {"path": str(tmp_path), "max_tokens": 64}, "denoiser": {"init_from": str(tmp_path)}}
    weights = TextToCXR(TextToCXRRecipe.model_validate(again)).modules()["model"].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in modules["model"].state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"preprocessing": {"size": 36}}}, "multiple of 8"),
        ({"text_encoder": {"max_tokens": 99}}, "reads at most 64"),
        ({"text_encoder": {"path": "nowhere/at/all"}}, "cannot load a text encoder"),
        ({"denoiser": {"heads": 3}}, "denoiser: width 16 / heads 3"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(recipe: dict[str, Any], change: dict[str, Any], message: str) -> None:
    values = {key: {**value, **change.get(key, {})} if isinstance(value, dict) else value for key, value in recipe.items()}
    with pytest.raises(ConfigError, match=message):
        TextToCXR(TextToCXRRecipe.model_validate(values)).modules()
