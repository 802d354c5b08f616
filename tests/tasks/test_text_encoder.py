"""The small text encoder: its tokenizer knows every word, its targets are what reports say, and it learns sides and negation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from medgen.config import load_config
from medgen.data.records import FINDINGS, FindingLabel
from medgen.models.conditioners import TextConditioner, TextEncoderConfig
from medgen.tasks.base import Task
from medgen.tasks.text_encoder import (
    SIDES,
    STATES,
    TextEncoderRecipe,
    TextEncoderTask,
    finding_targets,
    size_class,
    train_tokenizer,
)
from medgen.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
EFFUSION = FINDINGS.index("pleural_effusion")
PNEUMOTHORAX = FINDINGS.index("pneumothorax")


@pytest.fixture
def parsed(recipe: dict[str, Any]) -> TextEncoderRecipe:
    encoder = {"vocabulary": 300, "width": 32, "depth": 1, "heads": 2, "hidden": 32, "max_tokens": 64}
    return TextEncoderRecipe.model_validate({"data": recipe["data"], "encoder": encoder, "train": recipe["train"]})


def test_a_run_exports_a_conditioner(parsed: TextEncoderRecipe) -> None:
    task = TextEncoderTask(parsed)
    assert isinstance(task, Task)
    result = train(task, parsed.train, parsed)
    assert "val/state_accuracy" in result.metrics
    folder = result.folder / "export"
    conditioner = TextConditioner.from_config(TextEncoderConfig(path=str(folder), max_tokens=64))
    tokens, mask = conditioner.encode(["Large left pleural effusion.", "No pneumothorax."])
    assert tokens.shape == (*mask.shape, 32) and conditioner.width == 32
    assert not any(parameter.requires_grad for parameter in conditioner.encoder.parameters())


def test_it_learns_what_the_reports_say(parsed: TextEncoderRecipe) -> None:
    torch.manual_seed(0)
    task = TextEncoderTask(parsed)
    data, modules = task.dataset("train"), task.modules()
    model = modules["model"]
    batch = task.collate([data[i] for i in range(16)])
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(40):
        loss, _ = task.loss(modules, batch, "model", torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    asked = task.tokenizer(["Large right pleural effusion. No pneumothorax.", "Large left pleural effusion."], padding=True,
                           return_tensors="pt")  # fmt: skip
    logits, _ = model.eval()(asked.input_ids, asked.attention_mask.bool())
    sides = logits[:, EFFUSION, len(STATES) : len(STATES) + len(SIDES)].argmax(-1)
    assert [SIDES[i] for i in sides] == ["right", "left"]
    states = logits[:, :, : len(STATES)].argmax(-1)
    assert [STATES[i] for i in (states[0, EFFUSION], states[0, PNEUMOTHORAX])] == ["present", "absent"]


def test_targets_of_labels() -> None:
    labels = (
        FindingLabel("pleural_effusion", "present", "left", "small"),
        FindingLabel("nodule", "present", "right", "30 mm"),
        FindingLabel("edema", "uncertain"),
        FindingLabel("pneumothorax", "absent", "left"),
    )
    targets = finding_targets(labels)
    by_name = {name: tuple(int(targets[key][i]) for key in ("state", "side", "size")) for i, name in enumerate(FINDINGS)}
    assert by_name["pleural_effusion"] == (1, 0, 0)
    assert by_name["nodule"] == (1, 1, 2)
    assert by_name["edema"] == (2, -100, -100)
    assert by_name["pneumothorax"] == by_name["cardiomegaly"] == (0, -100, -100)


@pytest.mark.parametrize(
    ("word", "grade"),
    [("small", 0), ("mild", 0), ("moderate", 1), ("large", 2), ("Severe", 2), ("8 mm", 0), ("1.2 cm", 1), ("25 mm", 2),
     ("stable", None), (None, None)],
)  # fmt: skip
def test_sizes_in_words_and_millimetres(word: str | None, grade: int | None) -> None:
    assert size_class(word) == grade


def test_the_tokenizer_knows_every_word_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["Large left pleural effusion."] * 5, 300, 16)
    text = "A 12 mm nodule, naïve to treatment."
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.lower()
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer("LEFT").input_ids == tokenizer("left").input_ids
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == ids and loaded.model_max_length == 16


def test_the_recipe_is_valid() -> None:
    assert load_config(TextEncoderRecipe, ROOT / "configs" / "text_encoder" / "digital_chest.yaml").encoder.width == 192
