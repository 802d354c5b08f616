"""Configuration: strict YAML in, precise errors, overrides, and a resolved file that reads back the same."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, field_validator

from medgen.config import Config, ConfigError, load_config, save_config


class EMA(Config):
    decay: float = Field(0.999, ge=0, le=1)


class Train(Config):
    steps: int = Field(100, gt=0)
    learning_rate: float = 1e-4
    mixed_precision: Literal["no", "bf16"] = "bf16"
    ema: EMA | None = EMA()
    out: Path = Path("runs/x")

    @field_validator("out")
    @classmethod
    def _relative(cls, out: Path) -> Path:
        if out.is_absolute():
            raise ValueError("Expected a folder below the Current one")
        return out


class Data(Config):
    manifest: str
    widths: tuple[int, ...] = (32, 64)


class Recipe(Config):
    data: Data
    train: Train = Train()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("data:\n  manifest: a.parquet\ntrain:\n  steps: 7\n  ema: null\n")
    return path


def test_a_file_and_overrides_make_a_frozen_configuration(recipe: Path) -> None:
    config = load_config(Recipe, recipe, ["train.learning_rate=3e-5", "data.widths=[8, 16]", "train.out=runs/a=b"])
    assert (config.train.steps, config.train.learning_rate, config.data.widths) == (7, 3e-5, (8, 16))
    assert config.train.ema is None and config.train.out == Path("runs/a=b")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "value"),
    [("train.mixed_precision=no", "no"), ("train.mixed_precision='no'", "no"), ("train.mixed_precision=bf16", "bf16")],
)
def test_no_is_a_word_not_false(recipe: Path, override: str, value: str) -> None:
    assert load_config(Recipe, recipe, [override]).train.mixed_precision == value


def test_a_section_switched_off_in_the_file_can_be_switched_on(recipe: Path) -> None:
    assert load_config(Recipe, recipe, ["train.ema.decay=0.9"]).train.ema == EMA(decay=0.9)
    assert load_config(Recipe, recipe, ["train.ema={}"]).train.ema == EMA()


def test_the_resolved_configuration_reads_back_the_same(recipe: Path, tmp_path: Path) -> None:
    config = load_config(Recipe, recipe, ["train.mixed_precision=no", "data.manifest='1e-4'"])
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(Recipe, tmp_path / "resolved.yaml") == config
    assert config.data.manifest == "1e-4", "text that looks like a number stays text"


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("data: {manifest: a}\ntrian: {steps: 1}", [], ["unknown key 'trian' in", "recipe.yaml; did you mean 'train'?"]),
        ("data: {manifest: a}\nsteps: 1", [], ["unknown key 'steps'", "did you mean 'train.steps'?"]),
        ("data: {manifest: a}", ["train.step=3"], ["unknown key 'train.step' in the command line; did you mean 'train.steps'?"]),
        ("data: {manifest: a}", ["train.ema.dcay=1"], ["did you mean 'train.ema.decay'?"]),
        ("data: {manifest: a}", ["train.steps=many"], ["train.steps in the command line", "valid integer", "got 'many'"]),
        ("data: {manifest: a}\ntrain: {steps: 0}", [], ["train.steps in", "recipe.yaml", "greater than 0 (got 0)"]),
        ("data: {manifest: a}", ["train.mixed_precision=fp8"], ["expected 'no' or 'bf16' (got 'fp8')"]),
        ("data: {manifest: a}", ["train.out=/tmp/x"], ["Expected a folder below the Current one"]),
        ("data: {manifest: a}", ["train={steps: 1, setps: 2}"], ["unknown key 'train.setps' in the command line"]),
        ("train: {steps: 1}", [], ["data is missing in", "recipe.yaml"]),
        ("data: {manifest: a}", ["train.steps"], ["must look like section.field=value"]),
        ("data: {manifest: a}", [".steps=1"], ["must look like section.field=value"]),
        ("data: {manifest: a}\ntrain: {steps: 1}", ["train.steps.more=1"], ["'steps' is a value, not a section"]),
        ("data: {manifest: a}", ["data.widths=[1"], ["data.widths=[1", "not valid YAML"]),
        ("data: {manifest: a}\ndata: {manifest: b}", [], ["key 'data' is given twice", "line 1"]),
        ("data: [", [], ["recipe.yaml is not valid YAML"]),
        ("- a\n- b", [], ["must hold a mapping of sections, not list"]),
        ("data: {manifest: !!python/object/apply:os.getcwd []}", [], ["not valid YAML", "python/object"]),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_remedy(
    tmp_path: Path, text: str, overrides: list[str], said: list[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(Recipe, path, overrides)
    for words in said:
        assert words in str(error.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Recipe, None, ["train.steps=-1", "train.ema.decay=2", "dta.manifest=x"])
    assert len(str(error.value).splitlines()) == 4  # these three, and the missing data section


def test_a_missing_or_unreadable_file_is_named(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*recipes.yaml; did you mean .*recipe.yaml"):
        load_config(Recipe, tmp_path / "recipes.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Recipe, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Recipe, tmp_path / "binary.yaml")
