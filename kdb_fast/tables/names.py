"""Names as users write them: read as SQL reads them, and the nearest of those that there are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from ..errors import SchemaError
from ..records import storable_key
from .target import Dialect, identifier

NEAREST = 3
"""Names that a message proposes."""

_PARTS = {
    "postgresql": r'"(?:[^"\0]|"")+"|[A-Za-z_\u0080-\U0010ffff][\w$\u0080-\U0010ffff]*',
    "sqlite": r'"(?:[^"\0]|"")+"|`(?:[^`\0]|``)+`|\[[^\]\0]+\]|[A-Za-z_\u0080-\U0010ffff][\w$\u0080-\U0010ffff]*',
}


def split_identifier(text: str, dialect: Dialect) -> tuple[str | None, str]:
    """Schema, or None, and name of a table as SQL writes it: ``articles``, ``"My Docs"."Big Table"``.

    Raises:
        SchemaError: It is no name of a table.
    """
    part = _PARTS[dialect]
    match = re.fullmatch(rf"\s*(?:({part})\s*\.\s*)?({part})\s*", text)
    if match is None:
        raise SchemaError(
            f"{storable_key(text)} is no name of a table.",
            remedy='Write it as SQL does: articles, shop.articles or "My Docs"."Big Table".',
        )
    schema, name = match.groups()
    return (None if schema is None else _unquoted(schema, dialect)), _unquoted(name, dialect)


def _unquoted(part: str, dialect: Dialect) -> str:
    if part[0] in '"`':
        return part[1:-1].replace(part[0] * 2, part[0])
    if part[0] == "[":
        return part[1:-1]
    # PostgreSQL folds the letters of ASCII; SQLite compares names without case.
    return re.sub("[A-Z]+", lambda upper: upper[0].lower(), part) if dialect == "postgresql" else part


def qualified(schema: str | None, name: str, dialect: Dialect) -> str:
    """A table for a statement."""
    table = identifier(name, dialect)
    return table if schema is None else f"{identifier(schema, dialect)}.{table}"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Those of the names that are most like this one, the nearest first; compared without case."""
    known: dict[str, list[str]] = {}
    for other in names:
        known.setdefault(other.lower(), []).append(other)
    near = difflib.get_close_matches(name.lower(), known, NEAREST)
    return [other for found in near for other in known[found]]


def or_nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that is not there: the nearest ones, or '.'."""
    return ends_with(nearest(name, names))


def ends_with(found: Sequence[str]) -> str:
    """The end of a sentence: these names, or '.'."""
    return f"; nearest: {', '.join(map(storable_key, found))}." if found else "."
