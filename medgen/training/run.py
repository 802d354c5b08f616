"""`run(task, config, overrides)`: the one line that the CLI and train/*.py share."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from medgen.config import Config, ConfigError, load_config
from medgen.training.checkpoint import CheckpointError
from medgen.training.guards import EXIT_STOPPED, NonFiniteError
from medgen.training.loop import TrainResult, train
from medgen.training.memory import MemoryPreflightError

TASKS = {
    "text-to-cxr": ("medgen.tasks.text_to_cxr", "TextToCXRRecipe", "TextToCXR"),
    "autoencoder": ("medgen.tasks.autoencoder", "AutoencoderRecipe", "AutoencoderTask"),
    "video-tokenizer": ("medgen.tasks.video_tokenizer", "VideoTokenizerRecipe", "VideoTokenizerTask"),
    "ecg-to-echo": ("medgen.tasks.ecg_to_echo", "ECGToEchoRecipe", "ECGToEcho"),
    "echo-tokens": ("medgen.tasks.echo_tokens", "EchoTokensRecipe", "EchoTokens"),
    "text-encoder": ("medgen.tasks.text_encoder", "TextEncoderRecipe", "TextEncoderTask"),
    "classifier": ("medgen.tasks.classifier", "ClassifierRecipe", "ClassifierTask"),
    "image-classifier": ("medgen.tasks.image_classifier", "ImageClassifierRecipe", "ImageClassifierTask"),
    "ejection-fraction": ("medgen.tasks.ejection_fraction", "EjectionFractionRecipe", "EjectionFractionTask"),
    "segmenter": ("medgen.tasks.segmenter", "SegmenterRecipe", "SegmenterTask"),
    "progression": ("medgen.tasks.progression", "ProgressionRecipe", "Progression"),
    "film-meter": ("medgen.tasks.film_meter", "FilmMeterRecipe", "FilmMeterTask"),
    "ecg-translation": ("medgen.tasks.ecg_translation", "ECGTranslationRecipe", "ECGTranslation"),
    "re-identification": ("medgen.tasks.re_identification", "ReIdentificationRecipe", "ReIdentificationTask"),
}
"""Task name → module, recipe schema, task class (imported only when asked for)."""
_PUBLISHED = ("medgen.tasks.published", "PublishedRecipe", "PublishedTextToCXR")


def task_of(task_name: str, config_path: str | Path) -> tuple[str, str, str]:
    """The entry of `TASKS`; a text-to-CXR recipe with a section `published` fine-tunes a published checkpoint instead."""
    if task_name not in TASKS:
        raise ConfigError(f"no task {task_name!r}; there are {', '.join(TASKS)}")
    if task_name == "text-to-cxr" and Path(config_path).is_file():
        with contextlib.suppress(yaml.YAMLError):  # `load_config` says what is wrong with it
            values = yaml.safe_load(Path(config_path).read_text())
            if isinstance(values, dict) and "published" in values:
                return _PUBLISHED
    return TASKS[task_name]


def run(task_name: str, config_path: str | Path, overrides: Sequence[str] = ()) -> TrainResult:
    """Train `task_name` by the recipe at `config_path`. Raises `SystemExit(75)` after a stop signal, once everything is saved."""
    module_name, recipe_name, class_name = task_of(task_name, config_path)
    module = importlib.import_module(module_name)
    schema: type[Config] = getattr(module, recipe_name)
    recipe: Any = load_config(schema, config_path, overrides)
    result = train(getattr(module, class_name)(recipe), recipe.train, recipe)
    if result.stopped:
        raise SystemExit(EXIT_STOPPED)
    return result


def main(task_name: str, arguments: Sequence[str]) -> None:
    """`--config FILE [section.field=value ...]`, with errors as messages rather than tracebacks."""
    words = list(arguments)
    if not words or words[0] != "--config" or len(words) < 2 or any(word.startswith("-") for word in words[2:]):
        raise SystemExit(f"usage: {task_name} --config RECIPE.yaml [section.field=value ...]")
    try:
        run(task_name, words[1], words[2:])
    except (ConfigError, CheckpointError, NonFiniteError, MemoryPreflightError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
