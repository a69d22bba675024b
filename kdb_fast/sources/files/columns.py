"""The columns of a file that are asked for: which are key and how a key is read, and whether they are there."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from ...errors import UsageError
from ...records import storable_key
from ...tables.key import KeyColumn
from ...tables.names import nearest
from ...tables.target import Dialect
from ..json_records import kind as json_kind
from .rows import Rows

DEFAULT_KEY = "id"

TYPES = {
    "text": {"postgresql": "text", "sqlite": "TEXT"},
    "bigint": {"postgresql": "bigint", "sqlite": "INTEGER"},
    "float": {"postgresql": "double precision", "sqlite": "REAL"},
    "uuid": {"postgresql": "uuid", "sqlite": "TEXT"},
    "date": {"postgresql": "date", "sqlite": "TEXT"},
}
"""Types of a column of a key, in which it is kept in each database; SQLite has none of the last two."""

NAMES_SHOWN = 20


def key_columns(names: Sequence[str], dialect: Dialect) -> tuple[KeyColumn, ...]:
    """Columns of a file as the key of a new table of vectors: of text, or as ``id:bigint`` says.

    Args:
        names: As the user gives them; () is the column ``id``.

    Raises:
        UsageError: A column is named twice.
    """
    found = []
    for name in names or (DEFAULT_KEY,):
        before, _, kind = name.rpartition(":")
        column, kind = (before, kind) if before and kind in TYPES else (name, "text")
        found.append(KeyColumn(column, TYPES[kind][dialect], noun=column, typed=dialect == "sqlite"))
    if len({column.name for column in found}) < len(found):
        raise UsageError(f"--key names a column twice: {', '.join(map(storable_key, names))}.")
    return tuple(found)


_WHOLE = re.compile(r"[+-]?[0-9]{1,19}")
_BIGINT = 1 << 63


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text) or not -_BIGINT <= int(text) < _BIGINT:
        raise ValueError
    return int(text)


def _float(text: str) -> float:
    value = float(text) + 0.0  # one zero
    if not math.isfinite(value) or not text.isascii() or "_" in text:
        raise ValueError
    return value


_Read = Callable[[str], str | int | float]

_READ: dict[str, tuple[_Read, str, str]] = {
    "bigint": (_whole, "whole number of 64 bits", "integer"),
    "integer": (_whole, "whole number of 64 bits", "integer"),
    "double precision": (_float, "finite number", "float|double|halffloat|integer"),
    "real": (_float, "finite number", "float|double|halffloat|integer"),
    "uuid": (lambda text: str(UUID(text)), "UUID", ""),
    "date": (lambda text: datetime.date.fromisoformat(text).isoformat(), "date (expected 2026-01-31)", "date.*"),
}
"""By the type of the column: how a value is read in its one form, what it is, and which types of a format hold such."""

_ANY = "text|integer|.*uuid.*"
"""Types of a format of which any key is made."""


def key_part(value: Any, column: KeyColumn) -> str | int | float | tuple[str, str]:
    """A value of a file as a part of a key, as it travels; or reason and detail where there is none."""
    shown = _shown(column.name)
    if value is None or value == "":
        return "missing_key", f"the key column {shown} is empty{_about_types(column.name)}"
    read, what, _ = _READ.get(column.type.lower(), (str, "", ""))
    if type(value) is float and read is not _float:
        return "bad_key", f"the key column {shown} is a number with decimals, expected text or a whole number"
    if type(value) not in (str, int, float, UUID, datetime.date):
        return "bad_key", f"the key column {shown} is {json_kind(value)}, expected text or a number"
    try:
        part = read(str(value))
    except ValueError:
        return "bad_key", f"the key column {shown} holds no {what}"
    return part if column.typed else str(part)


def check_columns(rows: Rows, key: Sequence[KeyColumn], text: Sequence[str]) -> None:
    """Refuse a file that has not these columns, before anything is read.

    Raises:
        UsageError: A column is not there, is there twice, or holds something else.
    """
    if rows.columns is None:
        return
    names = [column.name for column in key]
    for name in (*names, *text):
        if name not in rows.columns:
            near = nearest(name, rows.columns)
            there = near or rows.columns
            more = f" and {len(there) - NAMES_SHOWN} more" if len(there) > NAMES_SHOWN else ""
            option = "--key" if name in names else "--text"
            raise UsageError(
                f"The input has no column {_shown(name)} ({option}); "
                f"{'nearest' if near else 'it has'}: {', '.join(map(_shown, there[:NAMES_SHOWN]))}{more}"
                f"{_about_types(name) if name in names else ''}."
            )
        if rows.columns.count(name) > 1:
            raise UsageError(f"The input has several columns {_shown(name)}; expected one.")
    for column in key:
        kind = rows.type_of(column.name)
        own = _READ.get(column.type.lower(), (str, "", ""))[2]
        if not re.fullmatch(f"{_ANY}|{own}", kind):
            raise UsageError(
                f"The column {_shown(column.name)} (--key) is of type {kind}; expected text, integers or UUIDs"
                f"{_suited(column.name, kind)}."
            )
    for name in text:
        if (kind := rows.type_of(name)) != "text":
            raise UsageError(f"The column {_shown(name)} (--text) is of type {kind}; expected text.")


def _about_types(name: str) -> str:
    """What to say of a name that may end with a type that is none."""
    return f" (the types are {', '.join(TYPES)})" if ":" in name else ""


def _suited(name: str, kind: str) -> str:
    """The option that takes a column of this type of a format."""
    found = (
        known for known, types in TYPES.items() if re.fullmatch(_READ.get(types["postgresql"], ("", "", ""))[2], kind)
    )
    return "".join(f", or --key {name}:{known}" for known in found)


def _shown(name: str) -> str:
    return repr(storable_key(name, 60))
