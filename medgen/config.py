"""Configuration: frozen typed schemas, strict YAML in, resolved YAML out.

Every component declares its own small `Config` beside its code; a recipe composes them. Any field can be overridden on the
command line as `section.field=value`. A wrong key or value is an error that names the key, its file and the nearest valid key.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which key, where, and what would be right."""


class Config(BaseModel):
    """Base of every configuration section: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


T = TypeVar("T", bound=Config)


def load_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read `path` (YAML, optional), apply `section.field=value` overrides (values are YAML), and validate against `schema`."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if path is not None:
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text()) or {}
        except FileNotFoundError:
            raise ConfigError(f"no configuration file at {path}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a mapping of sections, not {type(values).__name__}")
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign:
            raise ConfigError(f"override {override!r} must look like section.field=value")
        try:
            _assign(values, key.split("."), yaml.safe_load(text) if text else None)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
        origin[key] = "the command line"
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, schema, str(path or "defaults"), origin)) from None


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration (every field, defaults included) so that it can be read again by `load_config`."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = values.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {'.'.join(keys)}: {key!r} is a value, not a section")
        values = child
    values[keys[-1]] = value


def _explain(error: ValidationError, schema: type[Config], path: str, origin: dict[str, str]) -> str:
    lines = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        key = ".".join(parts)
        where = origin.get(key, path)
        if problem["type"] == "extra_forbidden":
            valid = field_names(schema)
            near = difflib.get_close_matches(key, valid, 1) or [name for name in valid if name.split(".")[-1] == parts[-1]][:1]
            near = near or difflib.get_close_matches(parts[-1], [name.split(".")[-1] for name in valid], 1)
            lines.append(f"unknown key {key!r} in {where}" + (f"; did you mean {near[0]!r}?" if near else ""))
        else:
            lines.append(f"{key or 'configuration'} in {where}: {problem['msg'].lower()} (got {problem['input']!r})")
    return "\n".join(lines)


def field_names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that `schema` accepts."""
    names = []
    for name, field in schema.model_fields.items():
        names.append(prefix + name)
        for option in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(option, type) and issubclass(option, BaseModel):
                names += field_names(option, f"{prefix}{name}.")
    return names
