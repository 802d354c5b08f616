"""Text conditioners over transformers encoders of three families; padding, length and refusals."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from medgen.config import ConfigError
from medgen.models.conditioners import PromptTooLong, TextConditioner, TextEncoderConfig, TokenBert, fit_prompt
from medgen.tasks.text_encoder import train_tokenizer

SENTENCES = ["Small left pleural effusion.", "No pneumothorax.", "Heart size is normal."]


def encoder_of(family: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    size, marks = len(tokenizer), {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.sep_token_id}
    if family == "bert":
        return TokenBert(BertConfig(vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                    max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id))  # fmt: skip
    if family == "clip":
        return CLIPTextModel(CLIPTextConfig(vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                            num_attention_heads=2, max_position_embeddings=32, **marks))  # fmt: skip
    return T5EncoderModel(T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **marks))


@pytest.mark.parametrize("family", ["bert", "clip", "t5"])
def test_any_encoder_gives_tokens_that_padding_does_not_change(family: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SENTENCES, 320, 32)
    encoder_of(family, tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    conditioner = TextConditioner.from_config(TextEncoderConfig(path=str(tmp_path), max_tokens=32))
    alone, mask = conditioner.encode(SENTENCES[1:2])
    together, masks = conditioner.encode([SENTENCES[1], " ".join(SENTENCES[:2])])
    assert mask.all() and conditioner.width == 16
    assert masks.sum(1).tolist() == [conditioner.count_tokens(SENTENCES[1]), conditioner.count_tokens(" ".join(SENTENCES[:2]))]
    torch.testing.assert_close(together[:1, : mask.shape[1]], alone, atol=1e-5, rtol=0)


def test_a_trained_encoder_keeps_its_gradients(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(SENTENCES, 300, 32)
    encoder_of("bert", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    conditioner = TextConditioner.from_config(TextEncoderConfig(path=str(tmp_path), max_tokens=32, trained=True))
    assert conditioner.encode(SENTENCES[:1])[0].requires_grad


def test_a_prompt_is_cut_at_a_sentence_and_says_so() -> None:
    tokenizer = train_tokenizer(SENTENCES * 3, 400, 32)
    limit = len(tokenizer(" ".join(SENTENCES[:2])).input_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_prompt(" ".join(SENTENCES[:2]), tokenizer, limit) == " ".join(SENTENCES[:2])
    with pytest.warns(PromptTooLong, match="No pneumothorax"):
        assert fit_prompt(" ".join(SENTENCES), tokenizer, limit) == " ".join(SENTENCES[:2])
    with pytest.warns(PromptTooLong, match="first sentence is cut"):
        ids, mask = TextConditioner(tokenizer, encoder_of("bert", tokenizer), limit).tokenize(["word " * 10_000])
    assert ids.shape == (1, limit) and mask.all() and ids[0, -1] == tokenizer.sep_token_id


def test_threads_may_share_a_conditioner() -> None:
    tokenizer = train_tokenizer(SENTENCES, 320, 32)
    conditioner = TextConditioner(tokenizer, encoder_of("bert", tokenizer), 16)
    prompts = [[SENTENCES[i % 3]] * (1 + i % 4) for i in range(60)]
    expected = [conditioner.tokenize(some) for some in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(conditioner.tokenize, prompts))
    assert all(torch.equal(a, b) for pair, other in zip(expected, found) for a, b in zip(pair, other))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load a text encoder"):
        TextConditioner.from_config(TextEncoderConfig(path=str(tmp_path)))
    tokenizer = train_tokenizer(SENTENCES, 300, 32)
    with pytest.raises(ConfigError, match="reads at most 32"):
        TextConditioner(tokenizer, encoder_of("bert", tokenizer), 33)
