"""The text of a row, as one SQL expression over its columns: the same where it is read, compared and searched.

Several parts are joined by a blank line; a part that is NULL or empty is left out, and of a row without any the text is
NULL or empty.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence

from ..errors import SchemaError, UsageError
from ..records import storable_key
from .find_relation import no_column
from .relation import Column, Relation
from .target import Dialect, Target, identifier
from .template import split_template

BLANK_LINE = "\n\n"

MOST_ARGUMENTS = 100
"""That a function of PostgreSQL takes (its FUNC_MAX_ARGS)."""

_WORD = re.compile(r"[^\W\d][\w$]*")


def text_columns(
    relation: Relation, leave_out: Collection[str] = (), *, provider: str = "fastembed"
) -> tuple[str, ...]:
    """Names of the columns whose text is embedded where none are named: all that hold text, but for those that the
    database computes from others.

    Args:
        relation: What is read.
        leave_out: Columns of the key, and of vectors that are kept as text.
        provider: One that is paid for each text is not sent what nobody has named.

    Raises:
        SchemaError: None of its columns holds text.
        UsageError: Several do, and each text is paid for.
    """
    left_out = {name.lower() for name in leave_out}
    names = [c.name for c in relation.columns if c.is_text and c.name.lower() not in left_out]
    named = [name for name in names if not _column(relation, name).generated]
    names = named or names
    if not names:
        raise SchemaError(
            f"{relation.shown} has no column of text beside its key.",
            remedy="Name what is to be embedded, a column or an SQL expression: --text \"payload->>'data'\"",
        )
    if len(names) > 1 and provider != "fastembed":
        raise UsageError(
            f"{relation.shown} has several columns of text ({', '.join(map(storable_key, names))}), and the provider "
            f"{provider} is paid for each text.",
            remedy=f"Name those that are to be embedded: --text {storable_key(names[0])}",
        )
    return tuple(names)


def text_expression(relation: Relation, text: Sequence[str], template: str, dialect: Dialect) -> str:
    """SQL expression of a row's text over bare names of the columns.

    Args:
        relation: What is read.
        text: Columns as they are named or, where no column has the name, SQL expressions; () for all columns of text
            that are no part of the first key.
        template: ``{title}\\n\\n{body}``: text with columns in braces; '' for the parts of ``text`` with a blank line
            between. A brace is written twice; ``\\n``, ``\\t`` and ``\\\\`` are what they are in SQL's ``E''``.

    Raises:
        SchemaError: There is no such column, or it holds no text.
        UsageError: The template cannot be read, or both were given.
    """
    if template:
        if text:
            raise UsageError("--text and --template were both given; expected one of them.")
        return _filled(relation, template, dialect)
    names = text or text_columns(relation, [key.name for key in relation.keys[0]] if relation.keys else ())
    parts = text_parts(relation, names, dialect)
    if len(parts) == 1:
        return parts[0]
    kept = [f"nullif({part}, '')" for part in parts]
    if dialect == "postgresql":
        listed = ", ".join(kept)
        if len(kept) >= MOST_ARGUMENTS:
            listed = f"VARIADIC ARRAY[{listed}]::text[]"
        return f"pg_catalog.concat_ws({_literal(BLANK_LINE)}, {listed})"
    # No function: they end a text at a NUL, which makes it a bad one.
    joined = [f"coalesce({kept[0]}, '')"]
    for number, part in enumerate(kept[1:], 1):
        before = kept[0] if number == 1 else f"coalesce({', '.join(kept[:number])})"
        after = f"coalesce({_literal(BLANK_LINE)} || {part}, '')"
        joined.append(f"CASE WHEN {before} IS NULL THEN coalesce({part}, '') ELSE {after} END")
    return " || ".join(joined)


def text_parts(relation: Relation, text: Sequence[str], dialect: Dialect) -> list[str]:
    """The SQL expression of each part of a text; see :func:`text_expression`."""
    parts = []
    for part in text:
        column = relation.column(part) or (relation.column(part.lower()) if _WORD.fullmatch(part) else None)
        if column is not None:
            parts.append(_text_of(relation, column, dialect))
        elif _WORD.fullmatch(part):
            raise no_column(relation, part)
        elif not part.strip() or "\0" in part:
            raise UsageError(
                f"--text is {storable_key(part)!r}; expected a column of {relation.shown} or an SQL expression."
            )
        else:
            # On lines of its own: it may end in a comment.
            parts.append(f"({part}\n)::text" if dialect == "postgresql" else f"({part}\n)")
    return parts


def is_expression(relation: Relation, part: str) -> bool:
    """Whether a part of a text is no column but an SQL expression."""
    return relation.column(part) is None and not _WORD.fullmatch(part)


def _filled(relation: Relation, template: str, dialect: Dialect) -> str:
    """The template with its columns, where any of them holds text; else NULL."""
    literal, *rest = split_template(template)
    pieces, columns = [_literal(literal)] if literal else [], []
    for name, literal in zip(rest[::2], rest[1::2], strict=True):
        column = relation.column(name) or relation.column(name.strip().lower())
        if column is None:
            raise no_column(relation, name)
        columns.append(_text_of(relation, column, dialect))
        pieces.append(f"coalesce({columns[-1]}, '')")
        if literal:
            pieces.append(_literal(literal))
    first = f"coalesce({', '.join(f'''nullif({column}, '')''' for column in columns)}{', NULL' * (len(columns) == 1)})"
    return f"CASE WHEN {first} IS NOT NULL THEN {' || '.join(pieces)} END"


def _text_of(relation: Relation, column: Column, dialect: Dialect) -> str:
    """A column as text.

    Raises:
        SchemaError: It holds something else.
    """
    name = identifier(column.name, dialect)
    # A column of SQLite that is declared as nothing, or of a query, may hold anything.
    unknown = dialect == "sqlite" and not column.type
    if not column.is_text and not unknown:
        shown = Target(column.name).shown()
        example = f"CAST({shown} AS text)"
        if "json" in column.type.lower():
            example = f"{shown} ->> 'name'"
        raise SchemaError(
            f"{relation.shown}.{storable_key(column.name)} is of type {column.type}; expected text.",
            remedy=f"To embed it all the same, make text of it: --text {shlex.quote(example)}",
        )
    if dialect == "sqlite":
        return name
    if column.is_array:
        return f"pg_catalog.array_to_string({name}, {_literal(chr(10))})"
    return f"{name}::text"


def _column(relation: Relation, name: str) -> Column:
    column = relation.column(name)
    assert column is not None
    return column


def _literal(text: str) -> str:
    """A text as a constant; ``standard_conforming_strings`` is on."""
    if "\0" in text:
        raise UsageError("The template holds a NUL character, which no text of a database can.")
    return "'" + text.replace("'", "''") + "'"
