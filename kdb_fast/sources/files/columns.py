"""The columns of a file that are asked for: which are key, and whether they are there."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UsageError
from ...records import storable_key
from ...tables.key import KeyColumn
from ...tables.names import nearest
from ...tables.target import Dialect
from .rows import Rows

DEFAULT_KEY = "id"

TYPES = {
    "text": {"postgresql": "text", "sqlite": "TEXT"},
    "bigint": {"postgresql": "bigint", "sqlite": "INTEGER"},
}
"""Types of a column of a key, in which it is kept in each database."""

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


def check_columns(rows: Rows, key: Sequence[str], text: Sequence[str]) -> None:
    """Refuse a file that has not these columns, before anything is read.

    Raises:
        UsageError: A column is not there, is there twice, or holds something else.
    """
    if rows.columns is None:
        return
    for name in (*key, *text):
        if name not in rows.columns:
            near = nearest(name, rows.columns)
            names = near or rows.columns
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            option = "--key" if name in key else "--text"
            raise UsageError(
                f"The input has no column {_shown(name)} ({option}); "
                f"{'nearest' if near else 'it has'}: {', '.join(map(_shown, names[:NAMES_SHOWN]))}{more}."
            )
        if rows.columns.count(name) > 1:
            raise UsageError(f"The input has several columns {_shown(name)}; expected one.")
    for name in key:
        kind = rows.type_of(name)
        if kind not in ("text", "integer") and "uuid" not in kind:
            raise UsageError(f"The column {_shown(name)} (--key) is of type {kind}; expected text, integers or UUIDs.")
    for name in text:
        if (kind := rows.type_of(name)) != "text":
            raise UsageError(f"The column {_shown(name)} (--text) is of type {kind}; expected text.")


def _shown(name: str) -> str:
    return repr(storable_key(name, 60))
