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

SEVERAL = 8
"""Names that it shows where none is like the one that was given."""

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
            f"{storable_key(text) or repr(text)} is no name of a table.",
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


def as_typed(schema: str | None, name: str) -> str:
    """A table as :func:`split_identifier` reads it, whatever its name; for a statement see :func:`qualified`."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in (schema, name) if part is not None)


def qualified(schema: str | None, name: str, dialect: Dialect) -> str:
    """A table for a statement; with a per cent sign in its name it is not what :func:`split_identifier` reads."""
    table = identifier(name, dialect)
    return table if schema is None else f"{identifier(schema, dialect)}.{table}"


def as_one_expression(condition: str) -> str:
    """An expression that is refused unless the condition is one: ``a) OR (b`` would be two where it stands in brackets,
    and what is joined to it would join the second only. The condition may end in a comment.
    """
    return f"CASE WHEN {condition}\nTHEN 1 END"


def said_of_expression(complaint: str) -> str:
    """What a database says of :func:`as_one_expression`, without our own words in it."""
    return re.sub('(syntax error at or )?near "THEN"(: syntax error)?', "syntax error at its end", complaint)


def one_line(expression: str) -> str:
    """An expression of ours for a message: a part of the user's ends with its line."""
    return expression.replace("\n)", ")").replace("\n", " ")


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Those of the names that are most like this one, the nearest first; compared without case."""
    known: dict[str, list[str]] = {}
    for other in names:
        known.setdefault(other.lower(), []).append(other)
    near = difflib.get_close_matches(name.lower(), known, NEAREST)
    return [other for found in near for other in known[found]]


def or_nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that is not there: the nearest ones, else some that are, or '.'."""
    known = list(names)
    return ends_with(nearest(name, known), known)


def ends_with(found: Sequence[str], others: Sequence[str] = ()) -> str:
    """The end of a sentence: these names, else some of the others, or '.'."""
    if found:
        return f"; nearest: {', '.join(map(storable_key, found))}."
    if not others:
        return "."
    more = ", …" if len(others) > SEVERAL else "."
    return f"; there {'is' if len(others) == 1 else 'are'}: {', '.join(map(storable_key, others[:SEVERAL]))}{more}"
