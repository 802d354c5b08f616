"""Configuration: frozen typed schemas, strict YAML in, resolved YAML out.

Every component declares its own small `Config` beside its code; a recipe composes them. Any field can be overridden on the
command line as `section.field=value`. A wrong key or value is an error that names the key, its file and the nearest valid key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Sequence
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


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars (`no` is a word, 1e-4 a number, 2020-01-01 text), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {repeated!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what `_Loader` would not read back as text."""


for _style in (_Loader, _Dumper):
    _style.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("int", r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ):
        _style.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def load_config(schema: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read `path` (YAML, optional), apply `section.field=value` overrides (values are YAML), and validate against `schema`.

    Raises `ConfigError`, one line per problem: the key, where it was given, the nearest valid key or what was expected.
    """
    values = {} if path is None else _read_mapping(Path(path))
    origin: dict[str, str] = {}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not all(key.split(".")):
            raise ConfigError(f"override {override!r} must look like section.field=value")
        try:
            _assign(values, key.split("."), yaml.load(text, _Loader))
        except yaml.YAMLError:
            raise ConfigError(
                f"override {override!r}: the value is not valid YAML; put text with special marks in quotes"
            ) from None
        origin[key] = "the command line"
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, schema, str(path or "the defaults"), origin)) from None


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration (every field, defaults included) so that it can be read again by `load_config`."""
    Path(path).write_text(yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True), "utf-8")


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text("utf-8"), _Loader)
    except FileNotFoundError:
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1) if path.parent.is_dir() else []
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no configuration file at {path}{hint}") from None
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, not {type(values).__name__}")
    return values


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if values.get(key) is None:  # not there yet, or switched off with null
            values[key] = {}
        if not isinstance(values[key], dict):
            raise ConfigError(f"override {'.'.join(keys)}: {key!r} is a value, not a section")
        values = values[key]
    values[keys[-1]] = value


def _explain(error: ValidationError, schema: type[Config], path: str, origin: dict[str, str]) -> str:
    lines = []
    for problem in error.errors():
        # pydantic puts the tag of a union's member into the path; ours stand in angle brackets, so that they can be told from keys
        key = ".".join(str(part) for part in problem["loc"] if not re.fullmatch(r"<\w+>", str(part)))
        given = [place for name, place in origin.items() if key == name or key.startswith(f"{name}.")]
        where = given[0] if given else path
        if problem["type"] == "extra_forbidden":
            near = _nearest(key, field_names(schema))
            lines.append(f"unknown key {key!r} in {where}" + (f"; did you mean {near!r}?" if near else ""))
        elif problem["type"] == "missing":
            lines.append(f"{key} is missing in {where}; add it there or as {key}=VALUE")
        else:
            message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
            got = repr(problem["input"])
            lines.append(f"{key or 'configuration'} in {where}: {message} (got {got if len(got) < 100 else got[:97] + '...'})")
    return "\n".join(lines)


def _nearest(key: str, valid: Sequence[str]) -> str | None:
    """The valid dotted key that `key` most likely meant: alike as a whole, or the right name in the wrong section."""
    last = key.split(".")[-1]
    alike = difflib.get_close_matches(key, valid, 1, 0.75) or [name for name in valid if name.split(".")[-1] == last]
    by_name = {name.split(".")[-1]: name for name in valid}
    return next(iter(alike), None) or next((by_name[name] for name in difflib.get_close_matches(last, by_name, 1)), None)


def field_names(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key that `schema` accepts."""
    names = []
    for name, field in schema.model_fields.items():
        names.append(prefix + name)
        for option in _options(field.annotation):
            if isinstance(option, type) and issubclass(option, BaseModel):
                names += field_names(option, f"{prefix}{name}.")
    return names


def _options(annotation: Any) -> list[Any]:
    """A field's type, the members of its union, and the types behind their annotations."""
    members = [annotation, *getattr(annotation, "__args__", ())]
    return members + [getattr(member, "__origin__", None) for member in members]
