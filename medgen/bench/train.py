"""`medgen bench train`: a training step on cached latents and tokens, against a plain loop that encodes films and reports each step.

Both loops train the same denoiser of the same task on the same films in batches of the same size. Weights are new: time does not
depend on what a network knows.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel, PreTrainedModel

from medgen.bench.machine import machine, matmul_ceiling, seconds
from medgen.data.images import ImagePreprocessing
from medgen.data.order import move
from medgen.data.records import CXRRecord, write_manifest
from medgen.models.autoencoder import AutoencoderConfig, build_autoencoder
from medgen.models.conditioners import TextEncoderConfig
from medgen.models.denoiser import DenoiserConfig
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CXRData
from medgen.tasks.text_encoder import train_tokenizer
from medgen.tasks.text_to_cxr import FrozenAutoencoder, TextToCXR, TextToCXRRecipe
from medgen.training.loop import Trainer

Precision = Literal["no", "bf16", "fp16"]
REPORT = "There is a {} left pleural effusion. The heart is enlarged. No pneumothorax. Lines and tubes are unchanged. {}"


@dataclass(frozen=True)
class Shape:
    """The networks of a recipe: an autoencoder and a text encoder that are frozen, a denoiser that is trained."""

    size: int
    batch_size: int
    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    text_encoder: Callable[[int], PreTrainedModel]


def _small_bert(vocabulary: int) -> PreTrainedModel:
    config = BertConfig(vocab_size=vocabulary, hidden_size=192, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512)
    return BertModel(config, add_pooling_layer=False)


def _clip_large(vocabulary: int) -> PreTrainedModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=96, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(config)


SHAPES = {
    # configs/text_to_cxr/digital_chest.yaml
    "digital": Shape(
        128, 64,
        AutoencoderConfig(patch_size=4, block_out_channels=(64, 128), norm_num_groups=8, mid_block_attention=False),
        DenoiserConfig(width=256, depth=8, heads=4), _small_bert,
    ),
    # the autoencoder and text encoder of Stable Diffusion 1.5 at its own 512 px (Rombach 2022), before a transformer of 12 blocks
    "stable_diffusion": Shape(
        512, 4,
        AutoencoderConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512),
        DenoiserConfig(width=384, depth=12, heads=6), _clip_large,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TrainTimes:
    """What was measured: the machine, the shape, seconds per step both ways, and the share of the machine's matrix products."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    figures: dict[str, float]

    def __str__(self) -> str:
        s, f = self.settings, self.figures
        title = f"{s['shape']}: batch {s['batch_size']} at {s['size']}², precision {s['precision']}, on {self.machine['name']}"
        table = Table(title=title)
        for heading in ("training step", "s per step", "samples/s"):
            table.add_column(heading, justify="left" if heading == "training step" else "right")
        for name, key in (
            ("plain loop, encodes each step", "plain_seconds"),
            ("medgen, cached latents and tokens", "cached_seconds"),
        ):
            table.add_row(name, f"{f[key]:.3f}", f"{s['batch_size'] / f[key]:.1f}")
        console = Console(width=110)
        with console.capture() as captured:
            console.print(table)
            console.print(
                f"{f['ratio']:.1f} times as fast (target: 3); a cached batch is read in {f['data_share']:.1%} of a step"
            )
            console.print(
                f"{f['step_flop'] / 1e9:.0f} GFLOP per step = {f['flop_per_second'] / 1e12:.3f} TFLOP/s: "
                f"{f['share_of_bf16']:.0%} of this machine's bf16 matrix products ({f['bf16_ceiling'] / 1e12:.2f} TFLOP/s), "
                f"{f['share_of_fp32']:.0%} of its fp32 ones ({f['fp32_ceiling'] / 1e12:.2f})"
            )
        return captured.get()


def bench_train(
    shape: Literal["digital", "stable_diffusion"] = "digital",
    batch_size: int | None = None,
    steps: int = 8,
    precision: Precision | None = None,
    films: int = 128,
    out: Path | None = None,
) -> TrainTimes:
    """Time training steps both ways, in turns, so that other work on the machine slows both; medians count.

    Args:
        shape: which networks: the shipped recipe's, or those around Stable Diffusion 1.5 at 512 px.
        batch_size: samples per step; the shape's own if not given.
        steps: steps timed of each kind.
        precision: mixed precision; bf16 on a GPU and none on a CPU if not given.
        films: PNG files written for both (noise).
        out: also write the figures to this JSON file.
    """
    networks = SHAPES[shape]
    size = batch_size or networks.batch_size
    chosen: Precision = precision or ("bf16" if torch.cuda.is_available() else "no")
    with tempfile.TemporaryDirectory(prefix="medgen-bench-") as name:
        folder = Path(name)
        recipe = _recipe(folder, networks, size, chosen, films)
        cached = TextToCXR(recipe.model_copy(update={"cache": folder / "cache"}))
        trainer = Trainer(cached, recipe.train, recipe)
        device, batches = trainer.device, trainer.batches()
        plain = _plain_loop(TextToCXR(recipe), recipe.train, device)
        trainer.take_step(batches), next(plain)  # warm-up
        times = [
            (seconds(lambda: trainer.take_step(batches), device), seconds(lambda: next(plain), device)) for _ in range(steps)
        ]
        reading = statistics.median(seconds(lambda: next(batches), device) for _ in range(steps))
        flop = _step_flop(cached, trainer, move(next(batches), device))
        trainer.close()
    ours, theirs = (statistics.median(column) for column in zip(*times))
    ceilings = {name: matmul_ceiling(dtype, device) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    figures = {
        "cached_seconds": ours, "plain_seconds": theirs, "ratio": theirs / ours, "data_share": reading / ours,
        "step_flop": float(flop), "flop_per_second": flop / ours,
        **{f"{name}_ceiling": value for name, value in ceilings.items()},
        **{f"share_of_{name}": flop / ours / value for name, value in ceilings.items()},
    }  # fmt: skip
    settings = {"shape": shape, "size": networks.size, "batch_size": size, "steps": steps, "precision": chosen, "films": films}
    result = TrainTimes(machine(device), settings, figures)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": result.machine, "settings": settings, "figures": figures}, indent=2) + "\n")
    return result


def _recipe(folder: Path, shape: Shape, batch_size: int, precision: Precision, films: int) -> TextToCXRRecipe:
    """A recipe over new networks, and films and reports to train on, all below `folder`."""
    sizes = ("small", "moderate", "large", "very large")
    reports = [REPORT.format(sizes[i % 4], "The mediastinum is not widened. " * (i % 3)).strip() for i in range(films)]
    noise = np.random.default_rng(0)
    records = []
    for i, report in enumerate(reports):
        Image.fromarray(noise.integers(0, 256, (shape.size, shape.size), dtype=np.uint8)).save(folder / f"film{i:04d}.png")
        records.append(CXRRecord(f"film{i:04d}", f"p{i}", f"s{i}", f"film{i:04d}.png", "PA", report, "", "train"))
    manifest = write_manifest(records, folder / "manifest.parquet", name="bench", source="noise")
    tokenizer = train_tokenizer(reports, 512, 96)
    tokenizer.save_pretrained(folder / "text")
    shape.text_encoder(len(tokenizer)).save_pretrained(folder / "text")
    build_autoencoder(shape.autoencoder).save_pretrained(folder / "autoencoder")
    train = TrainConfig(
        out=folder / "run", steps=1_000_000, batch_size=batch_size, mixed_precision=precision, tensorboard=False, preflight=False,
        validate_every=0, preview_every=0, schedule="constant",
    )  # fmt: skip
    return TextToCXRRecipe(
        data=CXRData(manifest=manifest, preprocessing=ImagePreprocessing(size=shape.size)),
        autoencoder=FrozenAutoencoder(path=str(folder / "autoencoder")),
        text_encoder=TextEncoderConfig(path=str(folder / "text"), max_tokens=96),
        denoiser=shape.denoiser,
        train=train,
    )


def _plain_loop(task: TextToCXR, config: TrainConfig, device: torch.device) -> Any:
    """The loop of diffusers' text-to-image example: load, encode, noise, predict, step. One step per `next`."""
    model = task.modules()["model"].to(device).train()
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    task.to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    draws = torch.Generator(device=device).manual_seed(0)
    loader = DataLoader(task.dataset("train"), config.batch_size, shuffle=True, drop_last=True, collate_fn=task.collate)
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss, _ = task.loss({"model": model}, move(batch, device), "model", draws)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss)


def _step_flop(task: TextToCXR, trainer: Trainer, batch: dict[str, Any]) -> int:
    """Floating-point operations of a forward and backward pass on cached inputs."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know every fused attention
        loss, _ = task.loss(trainer.modules, batch, "model", torch.Generator(device=trainer.device).manual_seed(0))
        loss.backward()
    return int(counter.get_total_flops())
