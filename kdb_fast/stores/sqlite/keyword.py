"""SQLite: keyword search of a table of any kind: an FTS5 table over texts that stand beside what is known of each row.

The text is a column ``content`` of a table of ours, and the FTS5 table keeps only its words. Its rows are told by
numbers of their own, since a rowid may change with VACUUM. Triggers of our table keep both in step, whatever writes it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from ...db.sqlite import quoted
from ...db.sqlite_errors import translated
from ...db.sqlite_session import transaction
from ...errors import SchemaError
from ...records import storable_key
from ...tables.keyword import NUMBER, full_text_of
from ...tables.known_rows import text_hash_of

CREATE = (
    "CREATE VIRTUAL TABLE {full_text} USING fts5(content, content={content_table}, content_rowid={number}, "
    "tokenize={tokenizer})"
)
TRIGGERS = {
    "insert": "AFTER INSERT ON {table} BEGIN "
    "UPDATE {table} SET {number} = (SELECT coalesce(max({number}), 0) + 1 FROM {table}) WHERE {same_new}; "
    "INSERT INTO {full_text} (rowid, content) SELECT {number}, content FROM {table} WHERE {same_new}; END",
    "update": "AFTER UPDATE OF content ON {table} WHEN old.content IS NOT new.content BEGIN "
    "INSERT INTO {full_text} ({full_text}, rowid, content) VALUES ('delete', old.{number}, old.content); "
    "INSERT INTO {full_text} (rowid, content) VALUES (new.{number}, new.content); END",
    "delete": "AFTER DELETE ON {table} BEGIN "
    "INSERT INTO {full_text} ({full_text}, rowid, content) VALUES ('delete', old.{number}, old.content); END",
}
NUMBER_ROW = "UPDATE {table} SET {number} = ? WHERE {same}"


def find_tokenizer(connection: sqlite3.Connection, language: str) -> str:
    """The tokenizer of FTS5 for a language: ``english`` finds a word in all its forms, ``simple`` and '' as it is
    written; anything else is FTS5's own name of one, such as ``trigram``.

    Raises:
        SchemaError: There is none of this name.
    """
    tokenizer = {"english": "porter unicode61", "simple": "unicode61", "": "unicode61"}.get(language.lower(), language)
    try:
        connection.execute(f"CREATE VIRTUAL TABLE temp.kdb_fast_try USING fts5(content, tokenize={_text(tokenizer)})")
        connection.execute("DROP TABLE temp.kdb_fast_try")
    except sqlite3.OperationalError as error:
        raise SchemaError(
            f"FTS5 has no tokenizer {storable_key(tokenizer)!r}: {error}.",
            remedy="Give --language english, --language simple, or a tokenizer of FTS5 such as trigram.",
        ) from None
    return tokenizer


def prepare_keyword(connection: sqlite3.Connection, table: str, key: Sequence[str], tokenizer: str) -> None:
    """Make the FTS5 table with its triggers, or take it away for '', within a transaction.

    Args:
        table: A table of ours, by its name.
        key: Names of the columns of its primary key.
        tokenizer: As :func:`find_tokenizer` gives it.
    """
    full_text = full_text_of(table)
    row = connection.execute("SELECT sql FROM sqlite_master WHERE name = ?", (full_text,)).fetchone()
    parts = {
        "table": quoted(table),
        "content_table": _text(table),
        "full_text": quoted(full_text),
        "number": NUMBER,
        "tokenizer": _text(tokenizer),
        "key": ", ".join(map(quoted, key)),
        "same_new": " AND ".join(f"{quoted(name)} = new.{quoted(name)}" for name in key),
        "same": " AND ".join(f"{quoted(name)} = ?" for name in key),
    }
    create = CREATE.format(**parts)
    if row is not None and row[0] == create:
        return
    for event in TRIGGERS:
        connection.execute(f"DROP TRIGGER IF EXISTS {quoted(f'{full_text}_{event}')}")
    if row is not None:
        connection.execute(f"DROP TABLE {quoted(full_text)}")
    if not tokenizer:
        return
    columns = {name for _, name, *_ in connection.execute(f"PRAGMA table_xinfo({quoted(table)})")}
    for name, kind in (("content", "TEXT"), (NUMBER, "INTEGER")):
        if name not in columns:
            connection.execute(f"ALTER TABLE {quoted(table)} ADD COLUMN {name} {kind}")
    if NUMBER not in columns:
        rows = connection.execute(f"SELECT {parts['key']} FROM {quoted(table)}").fetchall()  # noqa: S608 - names
        connection.executemany(NUMBER_ROW.format(**parts), ((n, *row) for n, row in enumerate(rows, 1)))
        connection.execute(f"CREATE UNIQUE INDEX {quoted(f'{full_text}_number')} ON {quoted(table)} ({NUMBER})")
    connection.execute(create)
    for event, body in TRIGGERS.items():
        connection.execute(f"CREATE TRIGGER {quoted(f'{full_text}_{event}')} " + body.format(**parts))
    connection.execute(f"INSERT INTO {quoted(full_text)} ({quoted(full_text)}) VALUES ('rebuild')")  # noqa: S608 - names


def fill_in(connection: sqlite3.Connection, select: str, fill: str, beat: Callable[[str], None]) -> None:
    """Fill in the texts of rows that were embedded before there was keyword search.

    Args:
        select: Gives text as bytes, hash that was noted, and key of some of those rows, until there are none.
        fill: Sets the text of the row with a key.
    """
    beat("keyword search")
    with translated("filling in the texts of keyword search"):
        while rows := connection.execute(select).fetchall():
            texts = [
                # One that is gone, or has another text by now, is found again when it is embedded again.
                (text.decode("utf-8", "replace") if text is not None and text_hash_of(text) == noted else "", *key)
                for text, noted, *key in rows
            ]
            with transaction(connection):
                connection.executemany(fill, texts)
            beat("keyword search")


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
