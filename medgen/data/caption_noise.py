"""Random words in training captions, another draw each epoch: a film is then no answer to one exact caption (Somepalli et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from medgen.seeds import stable_seed

VARIANTS = 8
"""Draws of each caption, used in turn by the epochs: few enough to keep their tokens in a cache."""
TOKENS_PER_WORD = 3
"""Room left for each random word in the text encoder's limit."""
# They say nothing about a film: no finding, side, size or place. A random finding would be a wrong label.
_WORDS = (
    "study", "image", "film", "view", "exam", "chest", "report", "patient", "seen", "noted", "read", "today", "please", "clinical",
    "history", "routine", "frontal", "final", "radiology", "reviewed", "as", "the", "with", "this", "is", "of", "and", "for", "also",
    "above", "below", "question", "number", "page", "date", "order", "time", "department", "referral", "copy",
)  # fmt: skip


def with_random_words(caption: str, words: int, *key: object) -> str:
    """`caption` with `words` words or numbers at random places between its own; the same for the same `key`."""
    draw = np.random.default_rng(stable_seed("random words", *key))
    said = caption.split()
    for _ in range(words):
        word = _WORDS[draw.integers(len(_WORDS))] if draw.random() < 0.8 else str(draw.integers(100))
        said.insert(int(draw.integers(len(said) + 1)), word)
    return " ".join(said)


def caption_variants(captions: Sequence[str], ids: Sequence[str], words: int) -> list[str]:
    """Every caption that `NoisyCaptions` can give for these, for a cache of tokens."""
    return [with_random_words(text, words, name, k) for text, name in zip(captions, ids, strict=True) for k in range(VARIANTS)]


class NoisyCaptions(Dataset[dict[str, Any]]):
    """`films` (items with "id" and "prompt") with random words in the prompts: a function of (record, epoch) alone."""

    def __init__(self, films: Any, words: int) -> None:
        self.films, self.words, self.epoch = films, words, 0
        if hasattr(films, "fingerprint"):
            self.fingerprint = f"{films.fingerprint}+{words} random words"

    def set_epoch(self, epoch: int) -> None:
        """Which draw the next items get."""
        self.epoch = epoch
        if hasattr(self.films, "set_epoch"):
            self.films.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.films)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.films[index]
        return {**item, "prompt": with_random_words(item["prompt"], self.words, item["id"], self.epoch % VARIANTS)}
