"""The folder of a run belongs to one configuration; continuing it with another is an error that names what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medgen.config import Config, ConfigError, load_config, save_config
from medgen.tasks.base import TrainConfig

# These change what is told or kept, not what is learned.
_FREE = {
    f"train.{name}"
    for name in (
        "out",
        "stop_at",
        "log_every",
        "checkpoint_every",
        "keep",
        "workers",
        "preflight",
        "preview_every",
        "validate_every",
        "validation_batches",
        "max_nonfinite",
        "tensorboard",
        "wandb_project",
    )
}


def open_folder(config: TrainConfig, run_config: Config) -> None:
    """Create `config.out` with its config.yaml, or check that it was made by the same configuration."""
    path = config.out / "config.yaml"
    if not path.exists():
        if (config.out / "checkpoints").exists():
            raise ConfigError(f"{config.out} holds checkpoints but no config.yaml: choose another train.out")
        config.out.mkdir(parents=True, exist_ok=True)
        _write(run_config, path)
        return
    before = _flat(load_config(type(run_config), path).model_dump(mode="json"))
    now = _flat(run_config.model_dump(mode="json"))
    free = _FREE | ({"train.steps"} if config.schedule.startswith("constant") else set())
    differing = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and key not in free)
    if differing:
        lines = [f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now" for key in differing]
        raise ConfigError(
            f"{config.out} was made by another configuration:\n"
            + "\n".join(lines)
            + "\nChoose another train.out, or take these values back to continue it"
        )
    if before != now:
        _write(run_config, path)


def _write(run_config: Config, path: Path) -> None:
    temporary = path.with_name(".config.yaml.tmp")
    save_config(run_config, temporary)
    temporary.replace(path)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat
