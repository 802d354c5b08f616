"""Conditioners turn what a trajectory is conditioned on into tokens. `TextConditioner`: any transformers tokenizer and encoder.

Tokens are [B,N,D] with a mask [B,N] (True: a token, False: padding).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)

from medgen.config import Config, ConfigError
from medgen.data.report_text import split_sentences
from medgen.models.folders import component


class TokenBert(BertModel):
    """BERT for its tokens only: without the pooler, which nothing here uses and which a pipeline would load as random numbers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)


_TEXT_HALF: dict[str, type[PreTrainedModel]] = {
    "bert": TokenBert,
    "clip": CLIPTextModel,
    "clip_text_model": CLIPTextModel,
    "t5": T5EncoderModel,
}


class TextEncoderConfig(Config):
    """Which text encoder conditions the denoiser."""

    path: str = Field(..., description="folder or hub id of a transformers text encoder with its tokenizer (CLIP, T5, BERT kin)")
    tokenizer: str | None = Field(None, description="where the tokenizer is, if not beside the encoder")
    max_tokens: int = Field(77, ge=4, description="tokens of one prompt, marks included")
    trained: bool = Field(False, description="train the encoder with the denoiser (its tokens are then not cached)")


class PromptTooLong(UserWarning):
    """A prompt had more tokens than the text encoder reads; the message says what was left out."""


class TextConditioner:
    """A tokenizer and an encoder. `encode(prompts)` gives tokens [B,N,D] and their mask [B,N]; N is the longest prompt's."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel, max_tokens: int) -> None:
        limit = getattr(encoder.config, "max_position_embeddings", None)
        if limit is not None and max_tokens > limit:
            raise ConfigError(f"text_encoder.max_tokens: {max_tokens}, but {type(encoder).__name__} reads at most {limit}")
        self.tokenizer, self.encoder, self.max_tokens = tokenizer, encoder, max_tokens

    @classmethod
    def from_config(cls, config: TextEncoderConfig) -> TextConditioner:
        """The conditioner at `config.path`: safetensors only, evaluation mode, float32; frozen unless `config.trained`."""
        path = component(config.path, "text_encoder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.tokenizer or component(config.path, "tokenizer"))
            kind = AutoConfig.from_pretrained(path).model_type
            loader: Any = _TEXT_HALF.get(kind, AutoModel)
            options = {} if kind in _TEXT_HALF or kind not in _WITHOUT_POOLER else {"add_pooling_layer": False}
            encoder = loader.from_pretrained(path, use_safetensors=True, dtype=torch.float32, **options)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"text_encoder.path: cannot load a text encoder and tokenizer from {config.path!r}: {error}"
            ) from error
        return cls(tokenizer, encoder.requires_grad_(config.trained).eval(), config.max_tokens)

    @property
    def width(self) -> int:
        """D."""
        config = self.encoder.config
        return int(getattr(config, "hidden_size", None) or config.d_model)

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, marks included."""
        return len(self.tokenizer(text, truncation=False, verbose=False).input_ids)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B,N]; too long a prompt is cut at a sentence (`fit_prompt`), with a warning."""
        fitted = [fit_prompt(prompt, self.tokenizer, self.max_tokens) for prompt in prompts]
        # Cut and padded here: a fast tokenizer keeps these settings as state, which threads that share it would change for each other.
        rows = [
            torch.tensor(_cut(ids, self.max_tokens)) for ids in self.tokenizer(fitted, truncation=False, verbose=False).input_ids
        ]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        return ids, torch.arange(ids.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token embeddings [B,N,D] of ids and mask [B,N], on the encoder's device; with gradients if the encoder is trained."""
        return embed_tokens(self.encoder, ids, mask)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B,N,D] and mask [B,N] of `prompts`."""
        ids, mask = (t.to(self.encoder.device) for t in self.tokenize(prompts))
        return self.embed(ids, mask), mask


def _cut(ids: list[int], limit: int) -> list[int]:
    """The first tokens of a prompt that is one endless sentence, and its closing mark."""
    return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]


_WITHOUT_POOLER = ("roberta", "xlm-roberta", "camembert", "mpnet")


def embed_tokens(encoder: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states [B,N,D]. Padding does not change the tokens that are there."""
    hidden: Tensor = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return hidden


def fit_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    """`prompt`, or as many of its first sentences as `max_tokens` allow (of a first sentence that is too long, its start).

    Warns with `PromptTooLong`, naming how much was left out: nothing is dropped silently.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, truncation=False, verbose=False).input_ids)

    head = prompt[: 40 * max_tokens]  # more letters than any prompt that fits; a whole book is not worth counting
    if head == prompt and count(prompt) <= max_tokens:
        return prompt
    kept = ""
    for sentence in split_sentences(head):
        longer = f"{kept} {sentence}".strip()
        if count(longer) > max_tokens:
            break
        kept = longer
    used = f"only its start up to {kept[-40:]!r} is used" if kept else "its first sentence is cut"
    warnings.warn(
        f"the prompt has more than the {max_tokens} tokens that this text encoder reads; {used}",
        PromptTooLong,
        stacklevel=3,
    )
    return kept or head
