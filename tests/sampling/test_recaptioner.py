"""Stage prompts: they start at the report, move only the asked finding, arrive at the target, and say nothing of time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from medgen.sampling.recaptioner import StageError, instruction, model_recaptioner, recaption

SMALL, LARGE = "Small left pleural effusion.", "large left pleural effusion"
LINES = "1. Small to moderate left pleural effusion.\n2. Moderate left pleural effusion.\n3. Large left pleural effusion.\n"


@pytest.mark.parametrize(
    ("report", "target", "rounds", "prompts"),
    [
        (SMALL, LARGE, 4, ["Moderate left pleural effusion."] * 2 + ["Large left pleural effusion."] * 2),
        ("Large right pleural effusion.", "no pleural effusion", 3,
         ["Small right pleural effusion.", "No pleural effusion.", "No pleural effusion."]),
        ("", "large right pneumothorax", 3, ["Small right pneumothorax.", "Moderate right pneumothorax.", "Large right pneumothorax."]),
        ("", "no pulmonary edema", 3, ["Mild pulmonary edema.", "No pulmonary edema.", "No pulmonary edema."]),
        # The report's own words stay where they can, and what else it says stays behind them.
        ("Small left-sided pleural effusion with blunting of the costophrenic angle. No pneumothorax.", LARGE, 1,
         ["Large left-sided pleural effusion with blunting of the costophrenic angle. No pneumothorax."]),
        ("The heart is enlarged, mildly.", "severe cardiomegaly", 2,
         ["The heart is enlarged, moderately.", "The heart is enlarged, severely."]),
        ("Small left effusion with adjacent atelectasis.", LARGE, 1, ["Large left pleural effusion. Left atelectasis."]),
        # One side of two.
        ("Bilateral pleural effusions, small on the right and large on the left.", "large right pleural effusion", 1,
         ["Large right pleural effusion. Large left pleural effusion."]),
        ("Moderate right pleural effusion.", "small left pleural effusion", 1,
         ["Small left pleural effusion. Moderate right pleural effusion."]),
        ("A 12 mm nodule in the left upper lobe.", "45 mm left lung nodule", 2,
         ["A 25 mm nodule in the left upper lobe.", "A 45 mm nodule in the left upper lobe."]),
    ],
)  # fmt: skip
def test_rules_write_the_stages(report: str, target: str, rounds: int, prompts: list[str]) -> None:
    stages = recaption(report, target, rounds)
    assert list(stages.prompts) == prompts
    assert stages.written_by == "rules" and len(stages.degrees) == rounds + 1
    moves = [b - a for a, b in pairwise(stages.degrees)]
    assert min(move * stages.direction for move in moves) >= 0 and moves[0] != 0


def test_what_cannot_be_staged_is_said() -> None:
    with pytest.raises(StageError, match="expected one finding"):
        recaption("", "sicker", 3)
    with pytest.raises(StageError, match="expected one finding"):
        recaption("", "large left pleural effusion and severe cardiomegaly", 3)
    with pytest.raises(StageError, match="already says so"):
        recaption("No pleural effusion.", "no pleural effusion", 3)
    with pytest.raises(StageError, match="rounds"):
        recaption("", LARGE, 0)
    assert recaption("", "large pneumothorax", 2).side is None


def language_model(folder: Path, answer: str | None) -> Path:
    """A GPT-2 of a few thousand weights that has learned one answer by heart; or nothing."""
    torch.manual_seed(0)
    asked = instruction(SMALL, LARGE, 3)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator([asked, LINES], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    width = 64 if answer else 16
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=width, n_layer=1, n_head=2, bos_token_id=0,
                                       eos_token_id=0, pad_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))  # fmt: skip
    if answer:
        prompt = tokenizer(asked, return_tensors="pt").input_ids
        ids = torch.cat([prompt, tokenizer(answer + "<end>", return_tensors="pt").input_ids], 1)
        labels = ids.clone()
        labels[:, : prompt.shape[1]] = -100
        optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
        for _ in range(60):
            loss = model(ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_language_model_writes_the_stages(tmp_path: Path) -> None:
    stages = model_recaptioner(language_model(tmp_path / "learned", LINES))(SMALL, LARGE, 3)
    assert stages.written_by == "learned"
    assert stages.prompts[0] == "Small to moderate left pleural effusion." and stages.degrees == (1.0, 1.5, 2.0, 3.0)
    assert stages.source == SMALL


def test_a_model_that_does_not_follow_gives_way_to_the_rules(tmp_path: Path) -> None:
    ruled = recaption(SMALL, LARGE, 3)
    babbled = model_recaptioner(language_model(tmp_path / "babbles", None), max_new_tokens=20)(SMALL, LARGE, 3)
    assert babbled.prompts == ruled.prompts and babbled.written_by.startswith("rules (babbles wrote")
    backwards = "1. Large left pleural effusion.\n2. Small left pleural effusion.\n3. Large left pleural effusion.\n"
    turned = model_recaptioner(language_model(tmp_path / "turns", backwards))(SMALL, LARGE, 3)
    assert turned.prompts == ruled.prompts and "do not lead to the target" in turned.written_by
    with pytest.raises(StageError, match="no language model"):
        model_recaptioner(tmp_path / "nothing")
