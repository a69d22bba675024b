"""The columns of a target's key, and which records they cannot hold.

A record's key (:data:`kdb_fast.records.Key`) has one part for each column. In PostgreSQL every part is text, and it is
the column's own type that compares it; in SQLite a part keeps its type.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..records import Key, Record, bad_encoding, is_blank


@dataclass(frozen=True)
class KeyColumn:
    """One column of a key.

    Attributes:
        name: Of the column.
        type: Of the column, as PostgreSQL writes it; a value of ``text`` or ``varchar`` is compared as it travels.
        noun: What messages call its values.
        max_chars: Longest value; None where there is no such limit.
        reasons: Why a record is rejected whose value is empty, and whose value is too long; '' where it may be empty.
        equals: The operator by which the table itself tells two values apart.
        less, greater: The operators by which its unique index orders them.
        collation: On SQLite that of its unique index; in PostgreSQL only where it is not the column's.
        typed: Values keep their own type, as SQLite has them; else they are texts.
    """

    name: str
    type: str
    noun: str
    max_chars: int | None = None
    reasons: tuple[str, str] = ("missing_key", "key_too_long")
    equals: str = "="
    less: str = "<"
    greater: str = ">"
    collation: str = ""
    typed: bool = False

    @property
    def is_text(self) -> bool:
        """Whether a text is a value of the column as it is."""
        return self.type.partition("(")[0] in ("text", "varchar")


Unfit = Callable[[Record], tuple[str, str] | None]
"""Why a record can never be stored, as (reason, detail), or None if it is fit."""


def unfit_for(columns: Sequence[KeyColumn]) -> Unfit:
    """What tells which records can never be stored in a table with these key columns.

    Everything here would otherwise fail later for the whole batch it is in: PostgreSQL refuses NUL
    and invalid UTF-8 for the whole COPY, the tokenizer refuses lone surrogates for the whole list.
    """
    limits = tuple(column.max_chars or sys.maxsize for column in columns)
    count = len(limits)

    def unfit(record: Record) -> tuple[str, str] | None:
        key, content = record.key, record.content  # to unpack it takes 0.2 µs more
        try:
            joined = "".join(key) + content  # type: ignore[arg-type]
        except TypeError:
            return _why_unfit(key, content, columns)
        # Nearly every record is fit, and told so here in a fifth of the time of what tells why one is not.
        if len(key) == count and joined.isascii() and "\x00" not in joined and content and not content.isspace():
            for part, limit in zip(key, limits):  # noqa: B905 - as long, and strict takes 0.1 µs more
                if not 0 < len(part) <= limit:  # type: ignore[arg-type]
                    break
            else:
                return None
        return _why_unfit(key, content, columns)

    return unfit


def _why_unfit(key: Sequence[object], content: object, columns: Sequence[KeyColumn]) -> tuple[str, str] | None:
    if not isinstance(content, str):
        return "wrong_type", f"content is {type(content).__name__}, expected text"
    # The last part tells most about a record.
    parts: list[tuple[KeyColumn, str]] = []
    for part, column in zip(reversed(key), reversed(columns), strict=True):
        if column.typed and isinstance(part, (int, float, bytes)):
            continue
        if not isinstance(part, str):
            return "wrong_type", f"{column.noun} is {type(part).__name__}, expected text"
        parts.append((column, part))
    for column, part in parts:
        empty, too_long = column.reasons
        if (part or not empty) and (column.max_chars is None or len(part) <= column.max_chars):
            continue
        if empty == too_long:
            return empty, f"the {column.noun} has {len(part)} characters, expected 1 to {column.max_chars}"
        if not part:
            return empty, f"the {column.noun} is empty"
        return too_long, f"the {column.noun} has {len(part)} characters, the index holds {column.max_chars}"
    if is_blank(content):
        return "empty_text", "the text is empty or only white space"
    for value in (content, *(part for _, part in parts)):
        if "\x00" in value:
            return "nul_byte", "a NUL character (U+0000) cannot be stored as text"
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                return "lone_surrogate", f"a lone surrogate (U+{ord(value[error.start]):04X}) is not valid text"
    return None


def unheld(
    record: Record, columns: Sequence[KeyColumn], missing: frozenset[str], encoding: str
) -> tuple[str, str] | None:
    """Why the database cannot hold this record, as (reason, detail), or None if it can.

    Args:
        record: A fit one.
        columns: Of its key.
        missing: Characters that the database's encoding has not.
        encoding: Its name, for the detail.
    """
    nouns = [column.noun for column in reversed(columns)]
    for what, value in zip(("text", *nouns), (record.content, *reversed(record.key)), strict=True):
        if isinstance(value, str) and not value.isascii() and not missing.isdisjoint(value):
            return bad_encoding(what, missing.intersection(value), encoding)
    return None


def text_arrays(keys: Sequence[Key], columns: int) -> list[str]:
    """The keys as one ``text[]`` for each column, for ``unnest()``."""
    if not keys:
        return ["{}"] * columns
    return [array_literal(parts) for parts in zip(*keys, strict=True)]


def array_literal(texts: Sequence[str]) -> str:
    """Texts as PostgreSQL writes a ``text[]``: three times as fast as psycopg's own dumper of lists."""
    joined = "\x00".join(texts)
    if '"' in joined or "\\" in joined:
        joined = joined.replace("\\", "\\\\").replace('"', '\\"')
    return '{"' + joined.replace("\x00", '","') + '"}' if texts else "{}"
