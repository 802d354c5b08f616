"""A small text encoder made for one data set: its own tokenizer, then a little BERT that learns what the reports state.

It predicts each finding's state, side and size from the prompt, and masked words; its token embeddings then carry finding, side,
size and negation, and condition the denoiser, frozen. Labels are the manifest's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import BertConfig, PreTrainedTokenizerFast

from medgen.config import Config
from medgen.data.dataset import CXRDataset
from medgen.data.records import FINDINGS, FindingLabel
from medgen.models.conditioners import TokenBert
from medgen.tasks.base import TrainConfig
from medgen.tasks.cxr_data import CXRData

STATES = ("absent", "present", "uncertain")  # unmentioned counts as absent: a short prompt leaves normal findings out
SIDES = ("left", "right", "bilateral")
SIZES = ("small", "moderate", "large")
_SIZE_WORDS = {
    "small": ("small", "mild", "tiny", "trace", "minimal", "slight", "subtle"),
    "moderate": ("moderate", "medium"),
    "large": ("large", "severe", "massive", "marked", "extensive"),
}
_IGNORED = -100


class ReportEncoderConfig(Config):
    """The shape of the encoder."""

    vocabulary: int = Field(1024, ge=300, description="byte-level BPE tokens; 256 of them are bytes, so no word is unknown")
    width: int = Field(192, ge=8)
    depth: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    hidden: int = Field(512, ge=8)
    max_tokens: int = Field(96, ge=8)
    masked_share: float = Field(0.15, gt=0, lt=1)
    dropout: float = Field(0.0, ge=0, lt=1)


class TextEncoderRecipe(Config):
    """configs/text_encoder/*.yaml"""

    data: CXRData
    encoder: ReportEncoderConfig = ReportEncoderConfig()
    train: TrainConfig


class ReportEncoder(nn.Module):
    """BERT with one attention-pooled query per finding on its tokens, and a head for masked words."""

    def __init__(self, config: ReportEncoderConfig, vocabulary: int, pad_token_id: int) -> None:
        super().__init__()
        self.encoder = TokenBert(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                intermediate_size=config.hidden,
                max_position_embeddings=config.max_tokens,
                type_vocab_size=1,
                pad_token_id=pad_token_id,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
            )
        )
        self.queries = nn.Parameter(torch.randn(1, len(FINDINGS), config.width) * 0.02)
        self.pool = nn.MultiheadAttention(config.width, config.heads, batch_first=True)
        self.heads = nn.Linear(config.width, len(STATES) + len(SIDES) + len(SIZES))
        self.words = nn.Linear(config.width, vocabulary)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids and mask [B,N] → logits [B,findings,states + sides + sizes] and of words [B,N,vocabulary]."""
        tokens = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        pooled, _ = self.pool(self.queries.expand(len(ids), -1, -1), tokens, tokens, key_padding_mask=~mask, need_weights=False)
        return self.heads(pooled), self.words(tokens)


class TextEncoderTask:
    """Prompts in, findings and masked words out. One module, "model"."""

    name = "text-encoder"

    def __init__(self, recipe: TextEncoderRecipe) -> None:
        self.recipe = recipe
        prompts = _Prompts(recipe.data, "train")
        self.tokenizer = train_tokenizer(prompts.texts(), recipe.encoder.vocabulary, recipe.encoder.max_tokens)

    def modules(self) -> dict[str, nn.Module]:
        """The encoder with its heads."""
        return {"model": ReportEncoder(self.recipe.encoder, len(self.tokenizer), int(self.tokenizer.pad_token_id))}

    def dataset(self, split: Literal["train", "val"]) -> Any:
        """Prompts and targets of the manifest; no image is opened."""
        return _Prompts(self.recipe.data, split)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """{"tokens" [B,N], "mask" [B,N], "state", "side", "size" [B,findings], "ids"}"""
        tokens = self.tokenizer([item["prompt"] for item in items], padding=True, truncation=True, return_tensors="pt")
        targets = {key: torch.stack([item[key] for item in items]) for key in ("state", "side", "size")}
        mask = tokens.attention_mask.bool()
        return {"tokens": tokens.input_ids, "mask": mask, **targets, "ids": [item["id"] for item in items]}

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Any], which: str, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Cross-entropy of states, sides and sizes on the whole prompt, and of the words masked in a second pass."""
        model, tokens, mask = modules[which], batch["tokens"], batch["mask"]
        logits, _ = model(tokens, mask)
        parts = dict(zip(("state", "side", "size"), logits.split((len(STATES), len(SIDES), len(SIZES)), dim=-1)))
        terms = {name: _cross_entropy(part, batch[name]) for name, part in parts.items()}
        hidden, wanted = self._mask_words(tokens, mask, generator)
        terms["words"] = _cross_entropy(model(hidden, mask)[1], wanted)
        logged: dict[str, float | Tensor] = {name: value.detach() for name, value in terms.items()}
        if not model.training:
            logged |= {f"{name}_accuracy": _accuracy(part, batch[name]) for name, part in parts.items()}
        return torch.stack(list(terms.values())).sum(), logged

    def preview(self, modules: dict[str, nn.Module], seed: int) -> dict[str, Tensor]:
        """Nothing to look at."""
        return {}

    def export(self, modules: dict[str, nn.Module], folder: Path) -> None:
        """A transformers folder: the encoder without its heads, and the tokenizer."""
        model = modules["model"]
        assert isinstance(model, ReportEncoder)
        model.encoder.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Nothing is frozen here."""

    def _mask_words(self, tokens: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens with a share replaced by the mask token, and the words to predict there (ignored elsewhere)."""
        marks = torch.tensor(self.tokenizer.all_special_ids, device=tokens.device)
        draw = torch.rand(tokens.shape, generator=generator, device=tokens.device)
        chosen = (draw < self.recipe.encoder.masked_share) & mask & ~torch.isin(tokens, marks)
        return tokens.masked_fill(chosen, int(self.tokenizer.mask_token_id)), tokens.masked_fill(~chosen, _IGNORED)


class _Prompts(Dataset[dict[str, Any]]):
    """Prompts with targets, by record."""

    def __init__(self, data: CXRData, split: Literal["train", "val"]) -> None:
        self.films = data.dataset(split)

    def __len__(self) -> int:
        return len(self.films)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert isinstance(self.films, CXRDataset)
        record = self.films.manifest.records[index]
        return {"id": record.record_id, "prompt": self.films.prompt(index), **finding_targets(record.labels)}

    def texts(self) -> Iterable[str]:
        """All prompts."""
        return (self[index]["prompt"] for index in range(len(self)))


def finding_targets(labels: Iterable[FindingLabel]) -> dict[str, Tensor]:
    """Class numbers [findings] of state, side and size; -100 where the label does not say."""
    state = torch.zeros(len(FINDINGS), dtype=torch.long)
    side, size = torch.full_like(state, _IGNORED), torch.full_like(state, _IGNORED)
    for label in labels:
        k = FINDINGS.index(label.name)
        state[k] = STATES.index(label.state)
        if label.state == "absent":
            continue
        if label.side is not None:
            side[k] = SIDES.index(label.side)
        if (grade := size_class(label.size)) is not None:
            size[k] = grade
    return {"state": state, "side": side, "size": size}


def size_class(word: str | None) -> int | None:
    """0 small, 1 moderate, 2 large for a report's size word or millimetres (10 and 25 mm are the borders); None if it says neither."""
    if word is None:
        return None
    if number := re.search(r"(\d+(?:\.\d+)?)\s*(mm|cm)", word):
        millimetres = float(number[1]) * (10 if number[2] == "cm" else 1)
        return sum(millimetres >= border for border in (10, 25))
    return next((SIZES.index(size) for size, words in _SIZE_WORDS.items() if any(w in word.lower() for w in words)), None)


def train_tokenizer(texts: Iterable[str], vocabulary: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer with BERT's marks."""
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(marks.values()), initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_tokens, **marks)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that say something; 0 where none does."""
    total = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_IGNORED, reduction="sum")
    return total / (targets != _IGNORED).sum().clamp(min=1)


def _accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    counted = targets != _IGNORED
    return ((logits.argmax(-1) == targets) & counted).sum() / counted.sum().clamp(min=1)
