"""Tokens of a data set, counted with the model's own tokenizer: rates in records alone cannot be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BATCH_TEXTS = 10_000
"""Texts that are counted at a time: the tokens of a million at once take 3 GB."""


@dataclass(frozen=True)
class TokenStats:
    """Tokens with the special ones; ``read`` are what the model reads of them (cut at its window)."""

    records: int
    distinct: int
    mean: float
    median: float
    longest: int
    beyond_window: int
    window: int
    read: int

    def describe(self) -> str:
        duplicates = 1 - self.distinct / max(1, self.records)
        return (
            f"{self.records:,} records, {self.mean:.1f} tokens a record (median {self.median:.0f}, longest "
            f"{self.longest:,}; {self.beyond_window:,} beyond the model's {self.window}), {duplicates:.0%} duplicates"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def lengths(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], int]:
    """(tokens of each text, uncut; tokens that the model reads at most)."""
    from tokenizers import Tokenizer

    from kdb_fast.embedding.models.lookup import resolve
    from kdb_fast.settings import DEFAULT_MODEL

    model = resolve(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_file(str(model.path / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    parts = (texts[first : first + BATCH_TEXTS] for first in range(0, len(texts), BATCH_TEXTS))
    counts = (len(encoding) for part in parts for encoding in tokenizer.encode_batch_fast(list(part)))
    return np.fromiter(counts, dtype=np.int64, count=len(texts)), model.max_tokens


def stats(texts: Sequence[str]) -> TokenStats:
    """Counts of a data set."""
    counts, window = lengths(texts)
    return TokenStats(
        len(texts), len(set(texts)), float(counts.mean()), float(np.median(counts)), int(counts.max()),
        int((counts > window).sum()), window, int(np.minimum(counts, window).sum()),
    )  # fmt: skip
