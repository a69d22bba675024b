"""A provider whose model reads a prefix before each text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...origins import prefixed
from ...records import cut_content
from ..encoder import EncoderSpec, Matrix, Tally
from .base import EmbeddingProvider
from .custom import adapted


class PrefixedProvider(EmbeddingProvider):
    """A provider to which every text is given with ``prefix`` in front, and whose fingerprint says so."""

    def __init__(self, provider: object, prefix: str) -> None:
        self._inner, self._prefix = adapted(provider), prefix
        self.concurrent_calls, self.limits_of = self._inner.concurrent_calls, self._inner.limits_of

    @property
    def dimensions(self) -> int:
        return int(self._inner.dimensions)

    @property
    def model_name(self) -> str:
        return self._inner.model_name

    @property
    def max_tokens(self) -> int:  # type: ignore[override]  # the provider's
        return self._inner.max_tokens

    @property
    def max_batch(self) -> int:  # type: ignore[override]  # the provider's
        return self._inner.max_batch

    @property
    def read_chars(self) -> int:
        return self._inner.read_chars

    @property
    def named_class(self) -> type:
        return self._inner.named_class

    def embed(self, text: str) -> list[float]:
        return self._inner.embed(self._prefix + text)

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        return self._inner.embed_batch([self._prefix + text for text in texts])

    def embed_into(self, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
        # Cut again, so that a text that was cut before it came here is still known as one.
        return self._inner.embed_into([cut_content(self._prefix + text) for text in texts], out)

    def fingerprint(self) -> str:
        return prefixed(self._inner.fingerprint(), self._prefix)

    def worker_spec(self) -> EncoderSpec | None:
        spec = self._inner.worker_spec()
        return spec and replace(spec, prefix=self._prefix)

    def self_test(self) -> None:
        self._inner.self_test()

    def close(self) -> None:
        self._inner.close()
