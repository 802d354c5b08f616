"""What each recipe needs: parameters, memory and arithmetic of a training step, found on PyTorch's meta device, without data.

Parameters and operations are counted, activations are what autograd would keep; only the time rests on an assumed efficiency.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medgen.config import load_config
from medgen.models.folders import component
from medgen.training.run import TASKS, task_of

EFFICIENCY = 0.4  # share of the measured matrix-product ceiling that a training step usually reaches
_BACKWARD = 3  # a forward and a backward pass cost three forward passes


@dataclass(frozen=True)
class Estimate:
    """Needs of one recipe on one process. Bytes and operations; `problem` says why there is no estimate."""

    task: str
    recipe: str
    parameters: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    step_flop: int = 0
    batch_size: int = 0
    precision: str = ""
    problem: str | None = None

    def judged(self, device: dict[str, Any]) -> dict[str, Any]:
        """The estimate with what `device` (of `doctor.examine_device`) makes of it: memory needed, seconds per step, and a verdict."""
        if self.problem:
            return asdict(self)
        need_gb = (self.state_bytes + self.activation_bytes) / 1e9
        speed = device["tflops"].get("bfloat16" if self.precision == "bf16" else "float32") or device["tflops"].get("float32")
        seconds = self.step_flop / (speed * 1e12 * EFFICIENCY) if speed else None
        fits = need_gb <= device["free_gb"]
        return {**asdict(self), "device": device["device"], "need_gb": round(need_gb, 2), "step_seconds": seconds, "fits": fits}


def estimate_recipes(configs: Path) -> list[Estimate]:
    """One estimate for every recipe `configs/<task>/<name>.yaml` of a task that can be trained."""
    found = [(_task(path), path) for path in sorted(configs.glob("*/*.yaml"))]
    return [estimate(task, path) for task, path in found if task in TASKS]


def _task(path: Path) -> str:
    """The second generator of echo clips has its recipes beside those of the first."""
    return "echo-tokens" if path.stem.endswith("_tokens") else path.parent.name.replace("_", "-")


def estimate(task: str, path: Path) -> Estimate:
    """Build the recipe's trained model on the meta device and push one example through it."""
    name = path.stem
    if task not in _EXAMPLES:
        return Estimate(task, name, problem="no estimate for this task")
    try:
        module_name, schema, _ = task_of(task, path)
        recipe: Any = load_config(getattr(importlib.import_module(module_name), schema), path)
        if "published" in type(recipe).model_fields:
            return Estimate(
                task, name, problem=f"fine-tunes {recipe.published.path}, which would have to be fetched to be measured"
            )
        # transformers looks at the values of a mask: its small encoder is built for real
        with torch.device("cpu" if task == "text-encoder" else "meta"), contextlib.redirect_stdout(io.StringIO()):
            model, forward = _EXAMPLES[task](recipe)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
            activations, flop = _measure(model, forward)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        return Estimate(task, name, problem="; ".join(str(error).strip().splitlines()[:3]))
    train = recipe.train
    half = train.mixed_precision != "no"
    # fp32 weights, gradients, two moments, and the average
    state = trained * (16 + (4 if train.ema else 0)) + frozen * (2 if half else 4)
    kept = activations * train.batch_size // (2 if half else 1)
    if train.gradient_checkpointing:
        kept //= 4  # roughly: one block's activations and the borders of all
    flop = flop * _BACKWARD * train.batch_size * train.accumulate
    return Estimate(task, name, trained, state, kept, flop, train.batch_size, train.mixed_precision)


def _measure(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes that autograd keeps (each storage once, weights apart) and operations, of one forward pass in fp32."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that its address is not used twice
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()


Example = tuple[nn.Module, Callable[[], Tensor]]


def _autoencoder(recipe: Any) -> Example:
    from medgen.models.autoencoder import build_autoencoder

    preprocessing = recipe.data.preprocessing
    shape = getattr(preprocessing, "shape", (preprocessing.size,) * 2)  # of visits: pictures or volumes
    model: Any = build_autoencoder(recipe.autoencoder, 3 if len(shape) == 3 else 2)
    frames = getattr(recipe.data, "frames_per_clip", 1)  # an example is a film, a volume, or some frames of a clip
    return model, lambda: model(torch.zeros(frames, 1, *shape), sample=False)[0]


def _classifier(recipe: Any) -> Example:
    from medgen.models.classifier import FindingClassifier

    size = recipe.data.preprocessing.size
    model = FindingClassifier(image_size=size, **recipe.model.model_dump(exclude={"init_from"}))
    return model, lambda: model(torch.zeros(1, 1, size, size))


def _image_classifier(recipe: Any) -> Example:
    from medgen.models.image_classifier import ImageClassifier

    shape, size = recipe.model, recipe.data.preprocessing.size
    model = ImageClassifier(shape.network, shape.width, size, recipe.data.findings)
    return model, lambda: model(torch.zeros(1, 1, size, size))


def _ejection_fraction(recipe: Any) -> Example:
    from medgen.models.ejection_fraction import EjectionFractionRegressor

    clip = recipe.data.preprocessing
    model = EjectionFractionRegressor(recipe.model.width, clip.frames, clip.size, clip.fps)
    return model, lambda: model(torch.zeros(1, clip.frames, 1, clip.size, clip.size))


def _re_identification(recipe: Any) -> Example:
    from medgen.models.siamese import SiameseNetwork

    size = recipe.data.preprocessing.size
    model = SiameseNetwork(image_size=size, **recipe.model.model_dump())
    return model, lambda: model(torch.zeros(1, 1, size, size))


def _text_encoder(recipe: Any) -> Example:
    from medgen.tasks.text_encoder import ReportEncoder

    shape = recipe.encoder
    model, ids = ReportEncoder(shape, shape.vocabulary, 0), torch.zeros(1, shape.max_tokens, dtype=torch.long)
    return model, lambda: model(ids, torch.ones(ids.shape, dtype=torch.bool))[1]


def _text_to_cxr(recipe: Any) -> Example:
    from medgen.models.denoiser import SequenceTransformer

    vae = _settings(recipe.autoencoder.path, "vae", {"latent_channels": 4, "block_out_channels": [0] * 4})
    words = _settings(recipe.text_encoder.path, "text_encoder", {"hidden_size": 768})
    side = recipe.data.preprocessing.size // (vae.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1))
    channels, width, tokens = vae["latent_channels"], words.get("hidden_size") or words["d_model"], recipe.text_encoder.max_tokens
    shape = recipe.denoiser.model_dump(exclude={"init_from"})
    if recipe.denoiser.init_from is not None:
        shape |= {k: v for k, v in _settings(recipe.denoiser.init_from, "denoiser", {}).items() if k in shape}
    model = SequenceTransformer(channels, width, **shape)
    latents, level = torch.zeros(1, 1, channels, side, side), torch.zeros(1, 1)
    context, mask = torch.zeros(1, tokens, width), torch.ones(1, tokens, dtype=torch.bool)
    return model, lambda: model(latents, level, level, context=context, context_mask=mask)


def _film_meter(recipe: Any) -> Example:
    from medgen.models.film_meter import FilmMeter

    size = recipe.data.size
    model = FilmMeter(image_size=size, **recipe.model.model_dump())
    return model, lambda: model(torch.zeros(1, 1, size, size))


def _progression(recipe: Any) -> Example:
    from medgen.models.denoiser import build_denoiser
    from medgen.models.echo_conditioner import ConditionedDenoiser
    from medgen.models.progression_conditioner import ProgressionConditions, build_progression_conditioner

    shape, frames = recipe.data.preprocessing.shape, recipe.shown_visits
    usual = {"latent_channels": 8 if len(shape) == 3 else 4, "patch_size": 4, "block_out_channels": [0, 0]}
    vae, spoken = _settings(recipe.autoencoder.path, "vae", usual), 0
    if recipe.reports is not None:
        words = _settings(recipe.reports.path, "text_encoder", {"hidden_size": 768})
        spoken = words.get("hidden_size") or words["d_model"]
    factor, channels = vae.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1), vae["latent_channels"]
    conditioner = build_progression_conditioner(recipe.conditioner, spoken, recipe.denoiser.init_from)
    denoiser = build_denoiser(recipe.denoiser, channels, conditioner.width, len(shape), conditioner.feature_dim)
    times, events = torch.zeros(1, frames), torch.zeros(1, max(1, len(recipe.conditioner.events)))
    conditions = ProgressionConditions(
        times=times,
        known=torch.ones(1, frames, dtype=torch.bool),
        event_kind=events.long(),
        event_times=events,
        event_values=events,
        events_known=torch.ones(1, dtype=torch.bool),
        numbers=torch.zeros(1, len(recipe.conditioner.numbers)),
        words=torch.zeros(1, len(recipe.conditioner.words), dtype=torch.long),
        sentences=torch.zeros(1, 4 * frames, spoken) if spoken else None,  # some sentences a visit
        sentence_times=torch.zeros(1, 4 * frames) if spoken else None,
    )
    latents = torch.zeros(1, frames, channels, *(side // factor for side in shape))

    def forward() -> Tensor:
        context, context_times, context_mask, features = conditioner(conditions)
        out: Tensor = denoiser(latents, times, times, None, context, context_times, context_mask, features)
        return out

    return ConditionedDenoiser(denoiser, conditioner), forward


def _segmenter(recipe: Any) -> Example:
    from medgen.models.segmenter import VideoSegmenter

    size, frames = recipe.data.size, recipe.data.frames_per_clip
    model = VideoSegmenter(image_size=size, **recipe.model.model_dump())
    return model, lambda: model(torch.zeros(frames, 1, size, size))


def _video_tokenizer(recipe: Any) -> Example:
    from medgen.models.video_tokenizer import build_video_tokenizer

    model, shape = build_video_tokenizer(recipe.tokenizer), recipe.data.preprocessing
    return model, lambda: model(torch.zeros(1, shape.frames, 1, shape.size, shape.size)).video


def _ecg_to_echo(recipe: Any) -> Example:
    from medgen.models.denoiser import build_denoiser
    from medgen.models.echo_conditioner import ConditionedDenoiser, build_conditioner

    vae = _settings(recipe.autoencoder.path, "vae", {"latent_channels": 12, "patch_size": 8, "block_out_channels": [0]})
    shape, channels = recipe.data.preprocessing, vae["latent_channels"]
    side = shape.size // (vae.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1))
    conditioner = build_conditioner(recipe.conditioner, recipe.data.ecg.rate, recipe.denoiser.init_from)
    denoiser = build_denoiser(recipe.denoiser, channels, conditioner.width, feature_dim=conditioner.feature_dim)
    latents = torch.zeros(1, shape.frames, channels, side, side)
    return ConditionedDenoiser(denoiser, conditioner), lambda: _conditioned(recipe, conditioner, denoiser, latents)


def _echo_tokens(recipe: Any) -> Example:
    from medgen.models.echo_conditioner import ConditionedDenoiser, build_conditioner
    from medgen.models.token_transformer import build_token_transformer
    from medgen.models.video_tokenizer import VideoTokenizerConfig

    tokenizer = _settings(recipe.tokenizer.path, "tokenizer", VideoTokenizerConfig().model_dump())
    shape, span, books = recipe.data.preprocessing, tokenizer["frames_per_token"], tokenizer["codes_per_place"]
    side, count = shape.size // tokenizer["patch_size"], 1 + -(-(shape.frames - 1) // span)
    conditioner = build_conditioner(recipe.conditioner, recipe.data.ecg.rate, recipe.denoiser.init_from)
    sizes = {"codebook_size": tokenizer["codebook_size"], "codes_per_place": books}
    sizes |= {"context_dim": conditioner.width, "feature_dim": conditioner.feature_dim}
    denoiser = build_token_transformer(recipe.denoiser, recipe.token_dim, **sizes)
    codes = torch.zeros(1, count, side, side, books, dtype=torch.long)
    return ConditionedDenoiser(denoiser, conditioner), lambda: _conditioned(recipe, conditioner, denoiser, codes)


def _conditioned(recipe: Any, conditioner: Any, denoiser: nn.Module, clip: Tensor) -> Tensor:
    """One clip with its 12-lead ECG, phase and scalars through conditioner and denoiser; `clip`: latents or codes."""
    from medgen.data.ecg_window import MARGIN_SECONDS
    from medgen.models.echo_conditioner import LEADS, EchoConditions

    seconds = (recipe.data.preprocessing.frames - 1) / recipe.data.preprocessing.fps + 2 * MARGIN_SECONDS
    samples, times = round(seconds * recipe.data.ecg.rate), torch.zeros(clip.shape[:2])
    conditions = EchoConditions(
        times=times,
        ecg=torch.zeros(1, LEADS, samples),
        lead_mask=torch.ones(1, LEADS, dtype=torch.bool),
        sample_mask=torch.ones(1, samples, dtype=torch.bool),
        ecg_start=torch.zeros(1),
        phase=torch.zeros(*times.shape, 4),
        ejection_fraction=torch.ones(1),
        view=torch.zeros(1, dtype=torch.long),
        fps=torch.ones(1),
    )
    context, context_times, context_mask, features, feature_mask = conditioner(conditions)
    named = {"context": context, "context_times": context_times, "context_mask": context_mask}
    out: Tensor = denoiser(clip, times, times, **named, features=features, feature_mask=feature_mask)
    return out


def _ecg_translation(recipe: Any) -> Example:
    from medgen.models.denoiser import build_denoiser
    from medgen.models.signal_autoencoder import SignalAutoencoder

    data = recipe.data
    width = SignalAutoencoder(list(data.signals), data.frame_samples, data.latent_channels).feature_width
    model = build_denoiser(recipe.denoiser, data.latent_channels, 1, spatial_dims=1, feature_dim=width)
    frames, level = torch.zeros(1, data.window_frames, data.latent_channels, 1), torch.zeros(1, data.window_frames)
    return model, lambda: model(frames, level, level, features=torch.zeros(1, data.window_frames, width))


def _settings(path: str, name: str, default: dict[str, Any]) -> dict[str, Any]:
    """The saved configuration of a component where its folder is here already, what recipes usually have otherwise."""
    file = Path(component(path, name)) / "config.json"
    return json.loads(file.read_text()) if file.is_file() else default


_EXAMPLES: dict[str, Callable[[Any], Example]] = {
    "autoencoder": _autoencoder,
    "classifier": _classifier,
    "ecg-to-echo": _ecg_to_echo,
    "ecg-translation": _ecg_translation,
    "echo-tokens": _echo_tokens,
    "ejection-fraction": _ejection_fraction,
    "film-meter": _film_meter,
    "image-classifier": _image_classifier,
    "progression": _progression,
    "re-identification": _re_identification,
    "segmenter": _segmenter,
    "text-encoder": _text_encoder,
    "text-to-cxr": _text_to_cxr,
    "video-tokenizer": _video_tokenizer,
}
