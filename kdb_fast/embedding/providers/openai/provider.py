"""OpenAI's embeddings API, or a server that speaks it, as a provider."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING

import numpy as np

from ....errors import OptionError, ProviderInputError
from ...encoder import Matrix, Tally
from ..base import MatrixProvider, digest, listed
from ..texts import raise_unfit
from .client import EmbeddingsAPI
from .inputs import MAX_INPUT_TOKENS, MAX_INPUTS, why_refused

if TYPE_CHECKING:
    import httpx

OPENAI_MODEL = "text-embedding-3-small"
OPENAI_DIMENSIONS = 384
"""KameleonDB's defaults; OpenAI's model is asked for as many dimensions as FastEmbed's has."""

OPENAI_SHORTENS = "text-embedding-3-"
"""So begin the names of OpenAI's models that give vectors of the length they are asked for."""

OPENAI_URL = "https://api.openai.com/v1"

API_CALLS = 8
"""Slots that are sent to the API at the same time: its answers take tenths of a second, our part nothing."""


class OpenAIProvider(MatrixProvider):
    """OpenAI's embeddings API, or a server that speaks it. Close it, or use it in a ``with`` statement.

    Args:
        model: Name of the model.
        dimensions: Length of a vector; the API shortens the model's own. None takes what the model gives. Left out, it
            is 384 for OpenAI's models (``text-embedding-3-…``), as in KameleonDB, and for any other what it gives. What
            it gives is found out by a probe, when it is first needed.
        api_key: Key; without it ``OPENAI_API_KEY``. A server other than OpenAI's may need none.
        base_url: Address of the API, with or without its ``/v1``; without it ``OPENAI_BASE_URL``, then OpenAI's.
        timeout: Seconds without a byte after which an attempt has failed.
        max_retries: Attempts after the first.
        concurrency: Requests in flight.
        organization: Which of the key's organisations to bill.
        max_inputs: Most texts of a request, 1 to 2,048.
        max_input_tokens: Window of the model in tokens. Longer texts are cut, and counted as truncated.
        transport, sleep, clock: For tests; see :class:`~kdb_fast.embedding.providers.openai.client.EmbeddingsAPI`.

    Raises:
        MissingPackageError: httpx is not installed.
        OptionError: An argument makes no sense, or there is no key.
    """

    concurrent_calls = API_CALLS

    def __init__(
        self,
        model: str = OPENAI_MODEL,
        dimensions: int | EllipsisType | None = ...,
        api_key: str | None = None,
        base_url: str | None = None,
        timeout: float = 60.0,
        max_retries: int = 6,
        concurrency: int = 4,
        organization: str | None = None,
        *,
        max_inputs: int = MAX_INPUTS,
        max_input_tokens: int = MAX_INPUT_TOKENS,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        if isinstance(dimensions, EllipsisType):
            shortens = isinstance(model, str) and model.startswith(OPENAI_SHORTENS)
            dimensions = OPENAI_DIMENSIONS if shortens else None
        self._api = EmbeddingsAPI(
            model=model,
            dimensions=dimensions,
            api_key=(api_key or os.environ.get("OPENAI_API_KEY") or "").strip() or None,
            base_url=base_url,
            timeout=timeout,
            max_retries=max_retries,
            concurrency=concurrency,
            organization=organization,
            max_inputs=max_inputs,
            max_input_tokens=max_input_tokens,
            transport=transport,
            sleep=sleep,
            clock=clock,
        )
        if not self._api.has_key and not self.is_elsewhere:
            self._api.close()
            raise OptionError(
                "There is no OpenAI API key.",
                remedy="Set OPENAI_API_KEY, or give api_key; for another server set OPENAI_BASE_URL, or give base_url.",
            )

    @property
    def dimensions(self) -> int:
        return self._api.dimensions

    @property
    def model_name(self) -> str:
        return self._api.model

    @property
    def base_url(self) -> str:
        """Address of the API, without a final slash."""
        return self._api.base_url

    def fingerprint(self) -> str:
        return openai_fingerprint(self.model_name, self.dimensions, self.base_url, self.max_tokens)

    @property
    def max_tokens(self) -> int:  # type: ignore[override]  # an option of the constructor: it cannot be set
        """Window of the model in tokens."""
        return self._api.max_input_tokens

    def embed_matrix(self, texts: Sequence[str]) -> Matrix:
        """The vectors as float32, len(texts) × dimensions. Raises as :meth:`embed`.

        A text that the API refuses for certain (an empty one) is found before anything is sent.
        """
        raise_unfit(listed(texts), why_refused)
        out = np.empty((len(texts), self.dimensions), np.float32)
        _, refused = self._api.embed_into(texts, out)
        if refused:
            raise ProviderInputError.of(refused)
        return out

    def embed_into(self, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
        return self._api.embed_into(texts, out)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the API is another server than OpenAI's."""
        return self.base_url != OPENAI_URL

    def settle(self) -> None:
        """Take vectors of the length that the server gives for a probe. Raises KdbFastError."""
        self._api.settle()

    @property
    def accepted(self) -> bool:
        """Whether the server has given vectors before, to this provider."""
        return self._api.accepted

    def probe(self) -> None:
        """Embed one sentence, to see that key, model and dimensions are right. Raises KdbFastError."""
        self._api.probe()

    def self_test(self) -> None:
        if not self.accepted:
            self.probe()

    def close(self) -> None:
        self._api.close()

    def __repr__(self) -> str:
        length = self._api.known_dimensions
        return f"OpenAIProvider({self.model_name!r}, dimensions={length}, base_url={self.base_url!r})"


def openai_fingerprint(model: str, dimensions: int, base_url: str, max_tokens: int = MAX_INPUT_TOKENS) -> str:
    """The fingerprint of an :class:`OpenAIProvider` with these options.

    The address counts, since two servers may have different models under one name; how it is written does not.
    """
    # By the API's name, so that moving the class within the package makes no index stale.
    ingredients = {"class": "openai", "model": model, "dimensions": int(dimensions)}
    address = base_url.strip().rstrip("/").removesuffix("/embeddings").rstrip("/")
    if not re.search(r"/v\d", address):
        address += "/v1"
    return digest({**ingredients, "base_url": address, "max_tokens": max_tokens})
