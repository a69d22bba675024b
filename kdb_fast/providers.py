"""What turns text into vectors: FastEmbed in this process, OpenAI's API, or an object of the user's own.

The interface is KameleonDB's, so a provider of either package works with both.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import operator
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from .encoder import Encoder, EncoderSpec, Matrix, Tally
from .errors import ModelError, UsageError
from .models import directory_name, resolve
from .openai_api import EmbeddingsAPI
from .openai_inputs import MAX_INPUT_TOKENS, MAX_INPUTS, unfit, unfit_for_api
from .openai_requests import PROBE
from .origins import BY_NAME
from .provider_base import (
    EmbeddingProvider,
    EmbeddingResult,
    embed_batches,
    listed,
    raise_unfit,
    unfit_rows,
)
from .provider_errors import MissingPackageError, OptionError, ProviderError, ProviderInputError, ProviderKeyError
from .settings import DEFAULT_BATCH_SIZE, MAX_BATCH_SIZES

if TYPE_CHECKING:
    import httpx

__all__ = [
    "EmbeddingProvider",
    "EmbeddingResult",
    "FastEmbedProvider",
    "MissingPackageError",
    "OpenAIProvider",
    "OptionError",
    "ProviderEncoder",
    "ProviderError",
    "ProviderInputError",
    "ProviderKeyError",
    "as_provider",
    "get_provider",
    "provider_fingerprint",
]

FASTEMBED_MODEL = "BAAI/bge-small-en-v1.5"
OPENAI_MODEL = "text-embedding-3-small"
OPENAI_DIMENSIONS = 384
"""KameleonDB's defaults; OpenAI's model is asked for as many dimensions as FastEmbed's has."""

OPENAI_SHORTENS = "text-embedding-3-"
"""So begin the names of OpenAI's models that give vectors of the length they are asked for."""

OPENAI_URL = "https://api.openai.com/v1"

UNKNOWN_WINDOW = 1_000_000
"""Tokens that a user's own provider is taken to read: more than any record holds, so none of its text is cut."""


class FastEmbedProvider(EmbeddingProvider):
    """A FastEmbed model in this process. The model is fetched and loaded on first use.

    Args:
        model_name: FastEmbed's name of the model.
        cache_dir: Directory that holds models as kdb-fast keeps them (``kdb-fast models path``), instead of its
            own. Nothing is fetched into it.
        model: Another name for ``model_name``, KameleonDB's.
        model_path: Directory of this one model.
        batch_size: Most texts of one run of the model, 1 to 1,000.
        threads: CPU threads; one is fastest where several processes embed.

    Raises:
        MissingPackageError: FastEmbed is not installed.
        OptionError: An option is not known or makes no sense.
    """

    def __init__(
        self,
        model_name: str = FASTEMBED_MODEL,
        cache_dir: str | Path | None = None,
        *,
        model: str | None = None,
        model_path: str | Path | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        threads: int = 1,
        **options: object,
    ) -> None:
        if options:
            raise OptionError(
                f"The fastembed provider has no option {', '.join(sorted(options))}.",
                remedy="It takes model_name, cache_dir, model_path, batch_size and threads.",
            )
        if importlib.util.find_spec("fastembed") is None:
            raise MissingPackageError(
                "The fastembed provider needs the package fastembed.", remedy="Run: pip install kdb-fast"
            )
        most = MAX_BATCH_SIZES["fastembed"]
        if not 1 <= batch_size <= most:
            raise OptionError(f"batch_size is {batch_size}; expected 1 to {most:,}.")
        if threads < 1:
            raise OptionError(f"threads is {threads}; expected at least 1.")
        self._model_name = model or model_name
        self._path = Path(model_path) if model_path else None
        if self._path is None and cache_dir is not None:
            self._path = Path(cache_dir) / directory_name(self._model_name)
        self._batch_size, self._threads = batch_size, threads
        self._lock = threading.Lock()
        self._spec: EncoderSpec | None = None
        self._encoder: Encoder | None = None

    @property
    def spec(self) -> EncoderSpec:
        """What a worker process needs to build the same encoder. Resolves the model. Raises ModelError."""
        with self._lock:
            if self._spec is None:
                self._spec = EncoderSpec(resolve(self._model_name, self._path), self._batch_size, threads=self._threads)
            return self._spec

    @property
    def encoder(self) -> Encoder:
        """The encoder in this process. Loads the model. Raises ModelError."""
        spec = self.spec
        with self._lock:
            if self._encoder is None:
                self._encoder = Encoder(spec)
            return self._encoder

    @property
    def dimensions(self) -> int:
        return self.spec.model.dimensions

    @property
    def model_name(self) -> str:
        return self._model_name

    def embed(self, text: str) -> list[float]:
        return self.embed_batch([text])[0]

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self.embed_matrix(texts).tolist()
        return vectors

    def embed_matrix(self, texts: Sequence[str]) -> Matrix:
        """The vectors as float32, len(texts) × dimensions. Raises ProviderInputError and ModelError."""
        raise_unfit(listed(texts), unfit)
        return self.encoder.embed(texts)

    def embed_into(self, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
        refused = unfit_rows(texts, unfit)
        rows = [row for row in range(len(texts)) if row not in refused]
        out[list(refused)] = 0
        if not rows:
            return Tally(0, 0, 0), refused
        if not refused:
            return self.encoder.encode(texts, out), refused
        part = np.empty((len(rows), self.dimensions), np.float32)
        tally = self.encoder.encode([texts[row] for row in rows], part)
        out[rows] = part
        return tally, refused

    def __repr__(self) -> str:
        return f"FastEmbedProvider({self._model_name!r})"


class OpenAIProvider(EmbeddingProvider):
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
        transport, sleep, clock: For tests; see :class:`~kdb_fast.openai_api.EmbeddingsAPI`.

    Raises:
        MissingPackageError: httpx is not installed.
        OptionError: An argument makes no sense, or there is no key.
    """

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

    @property
    def max_tokens(self) -> int:
        """Window of the model in tokens."""
        return self._api.max_input_tokens

    def embed(self, text: str) -> list[float]:
        return self.embed_batch([text])[0]

    def embed_batch(self, texts: list[str]) -> list[list[float]]:
        vectors: list[list[float]] = self.embed_matrix(texts).tolist()
        return vectors

    def embed_matrix(self, texts: Sequence[str]) -> Matrix:
        """The vectors as float32, len(texts) × dimensions. Raises as :meth:`embed`.

        A text that the API refuses for certain (an empty one) is found before anything is sent.
        """
        raise_unfit(listed(texts), unfit_for_api)
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

    def close(self) -> None:
        self._api.close()

    def __repr__(self) -> str:
        length = self._api.known_dimensions
        return f"OpenAIProvider({self.model_name!r}, dimensions={length}, base_url={self.base_url!r})"


# --- finding, checking and naming a provider ---


def get_provider(name_or_instance: object, **options: Any) -> EmbeddingProvider:
    """The provider of that name, built with ``options``; an instance is checked and given back.

    Raises:
        ValueError: The name is unknown (an :class:`OptionError`).
        ImportError: A package is missing (a :class:`MissingPackageError`); the message says how to install it.
        UsageError: The object is no provider, or options were given for one that is built already.
    """
    if name_or_instance == "fastembed":
        return FastEmbedProvider(**options)
    if name_or_instance == "openai":
        return OpenAIProvider(**options)
    if isinstance(name_or_instance, str):
        raise OptionError(
            f"There is no embedding provider {name_or_instance!r}; expected fastembed, openai or a provider object."
        )
    if options:
        raise UsageError(f"The provider is built already; {', '.join(sorted(options))} would have no effect.")
    return as_provider(name_or_instance)


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
            remedy="Derive it from kdb_fast.providers.EmbeddingProvider.",
        )
    return cast(EmbeddingProvider, obj)


def provider_fingerprint(provider: EmbeddingProvider) -> str:
    """16 hex digits that differ as soon as anything differs that has a part in the vectors, as far as is known.

    For FastEmbed it is the model's own (see :meth:`~kdb_fast.models.Model.fingerprint`). The key has no part in it.
    Of a provider of the caller's own nothing is known but names and length; BY_NAME before the digits says so.
    """
    if isinstance(provider, FastEmbedProvider):
        return provider.spec.model.fingerprint()
    if isinstance(provider, OpenAIProvider):
        return openai_fingerprint(provider.model_name, provider.dimensions, provider.base_url, provider.max_tokens)
    return BY_NAME + _digest(
        {
            "class": f"{type(provider).__module__}.{type(provider).__qualname__}",
            "model": provider.model_name,
            "dimensions": int(provider.dimensions),
        }
    )


def openai_fingerprint(model: str, dimensions: int, base_url: str, max_tokens: int = MAX_INPUT_TOKENS) -> str:
    """:func:`provider_fingerprint` of an :class:`OpenAIProvider` with these options.

    The address counts, since two servers may have different models under one name; how it is written does not.
    """
    # By the API's name, so that moving the class within the package makes no index stale.
    ingredients = {"class": "openai", "model": model, "dimensions": int(dimensions)}
    address = base_url.strip().rstrip("/").removesuffix("/embeddings").rstrip("/")
    if not re.search(r"/v\d", address):
        address += "/v1"
    return _digest({**ingredients, "base_url": address, "max_tokens": max_tokens})


def _digest(ingredients: dict[str, object]) -> str:
    canonical = json.dumps(ingredients, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


# --- the engines' side ---


class ProviderEncoder:
    """A provider as the engines use an :class:`~kdb_fast.encoder.Encoder`.

    Attributes:
        dimensions: Length of a vector.
        max_tokens: Tokens of a text beyond which the provider reads nothing.
    """

    def __init__(self, provider: EmbeddingProvider) -> None:
        self.provider = as_provider(provider)
        self.dimensions = int(self.provider.dimensions)
        if isinstance(provider, FastEmbedProvider):
            self.max_tokens = provider.spec.model.max_tokens
        else:
            self.max_tokens = int(getattr(provider, "max_tokens", UNKNOWN_WINDOW))

    def encode(self, texts: Sequence[str], out: Matrix) -> Tally:
        """Embed ``texts`` into ``out`` (float32, len(texts) × dimensions), row for row.

        Raises:
            ProviderInputError: Texts were refused; all other rows of ``out`` hold their vectors.
            KdbFastError: The provider cannot be used; ``out`` may be filled in part.
        """
        tally, refused = self.encode_each(texts, out)
        if refused:
            raise ProviderInputError.of(refused)
        return tally

    def encode_each(self, texts: Sequence[str], out: Matrix) -> tuple[Tally, dict[int, str]]:
        """:meth:`encode`, but refused rows are returned with the reason instead of raised; they are zero in ``out``.

        Nothing is embedded twice on their account, which counts where every text is paid for.
        """
        if out.shape != (len(texts), self.dimensions) or out.dtype != np.float32:
            raise UsageError(
                f"The matrix is {out.dtype} of {out.shape}; expected float32 of {(len(texts), self.dimensions)}."
            )
        if isinstance(self.provider, EmbeddingProvider):
            return self.provider.embed_into(texts, out)
        return embed_batches(self.provider, texts, out)

    def self_test(self) -> None:
        """Embed a probe. Raises KdbFastError if that fails, or gives no direction of the promised length."""
        if isinstance(self.provider, FastEmbedProvider):
            self.provider.encoder.self_test()
        elif isinstance(self.provider, OpenAIProvider):
            if not self.provider.accepted:
                self.provider.probe()
        else:
            out = np.empty((1, self.dimensions), np.float32)
            self.encode([PROBE], out)
            if not out.any():
                raise ModelError(f"{self.provider.model_name} gives a vector of zeros; expected a direction.")
