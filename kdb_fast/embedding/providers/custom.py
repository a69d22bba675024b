"""Providers that are the caller's own: what is accepted as one, and how it is called."""

from __future__ import annotations

import operator
from typing import Any, cast

from ...errors import UsageError
from .base import OTHER_BATCH, UNKNOWN_WINDOW, EmbeddingProvider


def as_provider(obj: object) -> EmbeddingProvider:
    """``obj`` itself, if it can be used as a provider: any object with the methods and properties of one.

    Raises:
        UsageError: It is a class, or something is missing; the message names what.
    """
    if isinstance(obj, EmbeddingProvider):
        return obj
    name = obj.__name__ if isinstance(obj, type) else type(obj).__name__
    if isinstance(obj, type):
        raise UsageError(f"{name} is a class; expected an embedding provider, such as an instance of it.")
    missing = [f"{method}()" for method in ("embed", "embed_batch") if not callable(getattr(obj, method, None))]
    try:
        if operator.index(getattr(obj, "dimensions", None)) < 1:  # type: ignore[arg-type]
            raise TypeError
    except TypeError:
        missing.append("dimensions (a positive whole number)")
    model_name = getattr(obj, "model_name", None)
    if not isinstance(model_name, str) or not model_name:
        missing.append("model_name (a string)")
    if missing:
        raise UsageError(
            f"{name} is no embedding provider; missing: {', '.join(missing)}.",
            remedy="Derive it from kdb_fast.EmbeddingProvider.",
        )
    return cast(EmbeddingProvider, obj)


def adapted(obj: object) -> EmbeddingProvider:
    """A provider that answers for itself: ``obj``, or an adapter of an object that only has the methods of one.

    Raises:
        UsageError: As :func:`as_provider`.
    """
    return obj if isinstance(obj, EmbeddingProvider) else OwnProvider(as_provider(obj))


class OwnProvider(EmbeddingProvider):
    """An object that has the methods and properties of a provider, and derives from nothing of ours."""

    def __init__(self, own: Any) -> None:
        self._own = own

    @property
    def named_class(self) -> type:
        return type(self._own)

    @property
    def dimensions(self) -> int:
        return int(self._own.dimensions)

    @property
    def model_name(self) -> str:
        name: str = self._own.model_name
        return name

    @property
    def max_tokens(self) -> int:  # type: ignore[override]  # the object's
        return int(getattr(self._own, "max_tokens", UNKNOWN_WINDOW))

    @property
    def max_batch(self) -> int:  # type: ignore[override]  # the object's
        most: int = getattr(self._own, "max_batch", OTHER_BATCH)
        return most

    def embed(self, text: str) -> list[float]:
        vector: list[float] = self._own.embed(text)
        return vector

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self._own.embed_batch(texts)
        return vectors
