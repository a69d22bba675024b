"""Searching an index, and writing to it from a program: the library.

Its names are imported when they are first used, so that a command imports only what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import SearchEngine
    from .results import IndexStatus, SearchResult
    from .session_batch import SessionBatch

__all__ = ["IndexStatus", "SearchEngine", "SearchResult", "SessionBatch"]

_MODULES = {
    "SearchEngine": "engine",
    "IndexStatus": "results",
    "SearchResult": "results",
    "SessionBatch": "session_batch",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
