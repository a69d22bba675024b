"""kdb-fast: re-embed a table of text at the speed of the machine.

The library's names are imported when they are first used, so that ``import kdb_fast`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import telemetry

if TYPE_CHECKING:
    from .embedding.providers.base import EmbeddingProvider, EmbeddingResult
    from .embedding.providers.factory import get_provider
    from .embedding.providers.fastembed import FastEmbedProvider
    from .embedding.providers.openai.provider import OpenAIProvider
    from .errors import (
        ClusterError,
        DatabaseError,
        KdbFastError,
        LockedError,
        MissingPackageError,
        ModelError,
        OptionError,
        ProviderError,
        ProviderInputError,
        ProviderKeyError,
        RecordError,
        RefusedError,
        RejectLimitError,
        ResourceError,
        SchemaError,
        SearchWarning,
        StoppedError,
        UsageError,
    )
    from .indexing.tables import reindex_table
    from .receipt import Receipt
    from .search.engine import SearchEngine
    from .search.results import IndexStatus, SearchResult
    from .search.tables.results import TableResult
    from .search.tables.search import search_table

__version__ = "0.1.0"

telemetry.turn_off()  # here, since it must come before the libraries that report their use

__all__ = [
    "ClusterError",
    "DatabaseError",
    "EmbeddingProvider",
    "EmbeddingResult",
    "FastEmbedProvider",
    "IndexStatus",
    "KdbFastError",
    "LockedError",
    "MissingPackageError",
    "ModelError",
    "OpenAIProvider",
    "OptionError",
    "ProviderError",
    "ProviderInputError",
    "ProviderKeyError",
    "Receipt",
    "RecordError",
    "RefusedError",
    "RejectLimitError",
    "ResourceError",
    "SchemaError",
    "SearchEngine",
    "SearchResult",
    "SearchWarning",
    "StoppedError",
    "TableResult",
    "UsageError",
    "get_provider",
    "reindex_table",
    "search_table",
]

_FROM = {
    "search.engine": ("SearchEngine",),
    "indexing.tables": ("reindex_table",),
    "receipt": ("Receipt",),
    "search.results": ("IndexStatus", "SearchResult"),
    "search.tables.results": ("TableResult",),
    "search.tables.search": ("search_table",),
    "embedding.providers.fastembed": ("FastEmbedProvider",),
    "embedding.providers.openai.provider": ("OpenAIProvider",),
    "embedding.providers.factory": ("get_provider",),
    "embedding.providers.base": ("EmbeddingProvider", "EmbeddingResult"),
}
"""Module of each name; all others are in ``errors``."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = next((module for module, names in _FROM.items() if name in names), "errors")
    value: object = getattr(import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
