"""The interface of an embedding provider, KameleonDB's, and what is checked of a provider's answers."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from ...errors import KdbFastError, ModelError, ProviderError, ProviderInputError, UsageError
from ...origins import BY_NAME, Maker
from ..encoder import PROBE, EncoderSpec, Matrix, Tally
from .texts import PACKED_BYTES_PER_TOKEN, typical_tokens, unfit_rows, why_unfit

OTHER_BATCH = 64
"""Most texts of one call to a user's own provider. Below the limits of the hosted APIs; Cohere's, 96, is the least."""

UNKNOWN_WINDOW = 1_000_000
"""Tokens that a user's own provider is taken to read: more than any record holds, so none of its text is cut."""


@dataclass(frozen=True)
class EmbeddingResult:
    """A text with its vector, and what made it.

    Attributes:
        text: The text as it was given.
        embedding: Its vector.
        model: Name of the model.
        dimensions: Length of the vector.
    """

    text: str
    embedding: list[float]
    model: str
    dimensions: int


class EmbeddingProvider(ABC):
    """Turns text into vectors of ``dimensions`` numbers. A provider may be used from several threads.

    The first four members are KameleonDB's interface, and all that a provider must have. The others say what kdb-fast
    needs to know of it; as they stand here they are right for one of which nothing else is known.

    Attributes:
        max_tokens: Tokens of a text beyond which the provider reads nothing.
        max_batch: Most texts of one call of :meth:`embed_batch`.
        concurrent_calls: Calls of :meth:`embed_into` that a run makes at the same time. One, since an object of the
            user's own may not expect more.
        limits_of: ``fastembed`` or ``openai``: whose limits of the options hold for a run with this provider.
    """

    max_tokens: int = UNKNOWN_WINDOW
    max_batch: int = OTHER_BATCH
    concurrent_calls: int = 1
    limits_of: str = "openai"

    @abstractmethod
    def embed(self, text: str) -> list[float]:
        """The vector of a text.

        Raises:
            ProviderInputError: It cannot be embedded.
            KdbFastError: The model or the API cannot be used.
        """

    @abstractmethod
    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        """The vectors of texts, in their order. Raises as :meth:`embed`; then none is returned."""

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """Length of a vector."""

    @property
    @abstractmethod
    def model_name(self) -> str:
        """Name of the model, as it is stored beside a vector."""

    def embed_with_metadata(self, text: str) -> EmbeddingResult:
        """:meth:`embed` with what made the vector. Raises as :meth:`embed`."""
        return EmbeddingResult(text, self.embed(text), self.model_name, self.dimensions)

    def embed_into(self, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
        """Embed every text that can be into its row of ``out`` (float32, len(texts) × dimensions).

        Returns:
            What was computed; and the rows that were refused, with the reason. Those rows of ``out`` are zero.

        Raises:
            KdbFastError: The model or the API cannot be used; ``out`` may be filled in part.
        """
        return embed_batches(self, texts, out)

    def fingerprint(self) -> str:
        """What is kept beside a vector to tell its model: it differs as soon as anything differs that has a part in it.

        As far as is known; a key has no part in it. Where nothing is known but names and length, it says so (BY_NAME).
        Raises as :attr:`dimensions`.
        """
        own = self.named_class
        ingredients = {
            "class": f"{own.__module__}.{own.__qualname__}",
            "model": self.model_name,
            "dimensions": int(self.dimensions),
        }
        return BY_NAME + digest(ingredients)

    def maker(self) -> Maker:
        """Fingerprint, name and length: they tell which rows it has made. Raises as :attr:`dimensions`."""
        return Maker(self.fingerprint(), self.model_name, int(self.dimensions))

    @property
    def read_chars(self) -> int:
        """Characters of a text that count for the size of what is sent at once: what is behind them is not read."""
        return int(self.max_tokens) * PACKED_BYTES_PER_TOKEN

    def worker_spec(self) -> EncoderSpec | None:
        """How worker processes build the same encoder; None for a provider that is called from this process only."""
        return None

    def self_test(self) -> None:
        """Embed a probe. Raises KdbFastError if that fails, or gives no direction of the promised length."""
        out = np.empty((1, int(self.dimensions)), np.float32)
        _, refused = self.embed_into([PROBE], out)
        if refused:
            raise ProviderInputError.of(refused)
        if not out.any():
            raise ModelError(f"{self.model_name} gives a vector of zeros; expected a direction.")

    @property
    def named_class(self) -> type:
        """The class by which messages and the fingerprint name the provider."""
        return type(self)

    def close(self) -> None:
        """Give back what the provider holds; it cannot be used again."""
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class MatrixProvider(EmbeddingProvider):
    """A provider of kdb-fast's own: it gives matrices, of which the lists of the interface are made."""

    @abstractmethod
    def embed_matrix(self, texts: Sequence[str]) -> Matrix:
        """The vectors as float32, len(texts) × dimensions. Raises as :meth:`embed`."""

    def embed(self, text: str) -> list[float]:
        return self.embed_batch([text])[0]

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self.embed_matrix(texts).tolist()
        return vectors


def own_batch_limit(provider: EmbeddingProvider) -> int:
    """Most texts to give a user's own provider at once: its ``max_batch``, or OTHER_BATCH where that is no number."""
    own: object = provider.max_batch
    return own if isinstance(own, int) and own > 0 else OTHER_BATCH


def embed_batches(provider: EmbeddingProvider, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
    """Fill ``out`` with calls of ``embed_batch``, and check what they give."""
    refused = unfit_rows(texts, why_unfit)
    out[list(refused)] = 0
    rows = [row for row in range(len(texts)) if row not in refused]
    limit = own_batch_limit(provider)
    waiting = [rows[start : start + limit] for start in range(0, len(rows), limit)][::-1]
    while waiting:
        batch = waiting.pop()
        try:
            vectors = provider.embed_batch([texts[row] for row in batch])
        except ProviderInputError as error:
            bad = {batch[i]: reason for i, reason in error.refused.items() if 0 <= i < len(batch)}
            if not bad:
                raise
            refused.update(bad)
            out[list(bad)] = 0
            if rest := [row for row in batch if row not in bad]:
                waiting.append(rest)
            continue
        except (KdbFastError, MemoryError):
            raise
        except Exception as error:
            # Its text is left out: it may quote a record. It is kept as the cause.
            raise ProviderError(
                f"The embedding provider {provider.named_class.__name__} failed with {type(error).__name__}."
            ) from error
        matrix = checked_matrix(provider, vectors, len(batch))
        out[batch] = matrix
        for i in np.flatnonzero(~np.isfinite(matrix).all(axis=1)).tolist():
            refused[batch[i]] = "the provider gives a vector that is not finite"
            out[batch[i]] = 0
    tokens = typical_tokens([texts[row] for row in rows if row not in refused])
    return Tally(tokens, tokens, 0), dict(sorted(refused.items()))


def checked_matrix(provider: EmbeddingProvider, vectors: object, count: int) -> Matrix:
    name, expected = provider.named_class.__name__, (count, int(provider.dimensions))
    try:
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused for that
            matrix = np.asarray(vectors, np.float64).astype(np.float32)
    except (ValueError, TypeError):
        raise ProviderError(
            f"{name}.embed_batch gave no matrix of numbers; expected {expected[0]} lists of {expected[1]}."
        ) from None
    if matrix.shape != expected:
        raise ProviderError(f"{name}.embed_batch gave vectors of shape {matrix.shape}; expected {expected}.")
    return matrix


def listed(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise UsageError("embed_batch got one string; expected a list of strings.")
    return texts


def digest(ingredients: dict[str, object]) -> str:
    """16 hex digits of what has a part in a provider's vectors."""
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
