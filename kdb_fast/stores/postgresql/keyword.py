"""PostgreSQL: keyword search of a table of any kind: a column ``tsv`` beside what is known of each row, and its index.

Which text search configuration has made the column is its comment, so that another one makes it anew, also in a table
that was restored. Flushes write it, of the text as it was compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import SchemaError
from ...records import number_of, storable_key
from ...tables.column_target import text_bytes
from ...tables.names import ends_with, nearest

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg

    from ...tables.column_target import ColumnTarget
    from ...tables.table_target import TableTarget
    from .session import PgSession

    Cursor = psycopg.Cursor[tuple[Any, ...]]

MAX_CHARS = 250_000
"""Characters of a text that keyword search reads: ``to_tsvector`` refuses more than 1,048,575 bytes of words and their
places, which takes a text of at least twice as many."""

FOUND = """
SELECT col_description(a.attrelid, a.attnum), EXISTS (
  SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
  WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND i.indnatts = 1 AND m.amname = 'gin')
FROM pg_attribute a WHERE a.attrelid = to_regclass(%s) AND a.attname = 'tsv' AND NOT a.attisdropped
"""

CONFIGURATION = """
SELECT format('%%I.%%I', n.nspname, c.cfgname) FROM pg_ts_config c JOIN pg_namespace n ON n.oid = c.cfgnamespace
WHERE c.oid = {}::regconfig
"""
DEFAULT = "current_setting('default_text_search_config')"
CONFIGURATIONS = "SELECT DISTINCT cfgname::text FROM pg_ts_config ORDER BY 1"

FILL = """
UPDATE {place} v SET tsv = f.tsv FROM (
  SELECT {keys}, coalesce({tsv}, '') AS tsv FROM {place} v WHERE v.tsv IS NULL LIMIT %(rows)s
) f WHERE {same_row}
"""
OF_SOURCE = "(SELECT {tsv} FROM {source} t WHERE {same_record} AND sha256({bytes}) = v.{hash})"
"""A record that is gone, or has another text by now, is found again when it is embedded again."""

WORDLESS = "SELECT count(*) FROM {table} WHERE tsv IS NULL"

FILL_ROWS = 10_000
"""Rows of one transaction."""


def find_configuration(cursor: Cursor, language: str) -> str:
    """The text search configuration of this name, with its schema; '' means the database's own.

    Raises:
        SchemaError: There is none.
    """
    import psycopg

    try:
        with cursor.connection.transaction():
            value = "%s" if language else DEFAULT
            cursor.execute(CONFIGURATION.format(value).encode(), (language,) if language else ())
            row = cursor.fetchone()
    except psycopg.Error:
        row = None
    if row is None:
        there = [name for (name,) in cursor.execute(CONFIGURATIONS).fetchall()]
        raise SchemaError(
            f"The database has no text search configuration {storable_key(language)}"
            f"{ends_with(nearest(language, there))}",
            remedy=f"Name one of these: {', '.join(map(storable_key, there))}.",
        )
    return str(row[0])


def tsvector_of(text: str, configuration: str) -> str:
    """SQL of the words of a text.

    Args:
        text: SQL of the text.
        configuration: As :func:`find_configuration` gives it.
    """
    name = configuration.replace("'", "''")
    return f"pg_catalog.to_tsvector('{name}'::pg_catalog.regconfig, pg_catalog.left({text}, {MAX_CHARS}))"


def prepare_keyword(cursor: Cursor, table: str, regclass: str, configuration: str) -> None:
    """Make the column of a table of ours for this configuration, or take it away for ''; within a transaction.

    Args:
        table: As SQL.
        regclass: The same, as ``to_regclass()`` reads it.
        configuration: As :func:`find_configuration` gives it.
    """
    row = cursor.execute(FOUND.encode(), (regclass,)).fetchone()
    if row is not None and row[0] == configuration:
        return
    if row is not None:
        cursor.execute(f"ALTER TABLE {table} DROP COLUMN tsv".encode())
    if configuration:
        cursor.execute(f"ALTER TABLE {table} ADD COLUMN tsv tsvector".encode())
        comment = configuration.replace("'", "''")
        cursor.execute(f"COMMENT ON COLUMN {table}.tsv IS '{comment}'".encode())


def finish_column(session: PgSession, target: ColumnTarget, beat: Callable[[str], None]) -> None:
    """Fill in the words of rows that were embedded before there was keyword search, and make the index."""
    words = target.statement(
        OF_SOURCE,
        tsv=tsvector_of(f"({target.text})::text", target.keyword).replace("%", "%%"),
        source=target.quoted,
        same_record=target.same_key("t.{column}", "v.key_{number}"),
        bytes=text_bytes(target.text),
        hash="text_hash",
    )
    fill = target.statement(
        FILL,
        place=target.parts["state"],
        keys=target.each_key("v.key_{number}"),
        tsv=words.decode(),
        same_row=target.same_key("v.key_{number}", "f.key_{number}"),
    )
    _fill(session, fill, beat)
    _index(session, target.parts["state"], target.home.regclass(target.state))


def finish_table(session: PgSession, target: TableTarget, beat: Callable[[str], None]) -> tuple[str, ...]:
    """Fill in the words of rows that were embedded before there was keyword search, and make the index.

    Returns:
        What the user should know.
    """
    words = b""
    if target.content:
        words = tsvector_of("v.content", target.keyword).replace("%", "%%").encode()
    elif target.text:
        words = target.statement(
            OF_SOURCE,
            tsv=tsvector_of(f"({target.text})::text", target.keyword).replace("%", "%%"),
            same_record=target.same_key("t.{column}", "v.{column}"),
            bytes=text_bytes(target.text),
            hash="kdb_fast_hash",
        )
    if words:
        unique = list(map(target.column, target.unique))
        fill = target.statement(
            FILL,
            place=target.quoted,
            keys=", ".join(f"v.{column}" for column in unique),
            tsv=words.decode(),
            same_row=" AND ".join(f"v.{column} = f.{column}" for column in unique),
        )
        _fill(session, fill, beat)

    def count() -> int:
        row = session.connection().execute(target.statement(WORDLESS)).fetchone()
        return int(row[0]) if row else 0

    wordless = session.retrying("counting rows", count)
    _index(session, target.quoted, target.regclass)
    if not wordless:
        return ()
    return (
        f"{number_of(wordless, 'row')} of {target.shown} {'was' if wordless == 1 else 'were'} embedded before there "
        "was keyword search, which does not find what it holds; --force embeds it again.",
    )


def _fill(session: PgSession, statement: bytes, beat: Callable[[str], None]) -> None:
    def fill() -> int:
        with session.transaction() as cursor:
            return cursor.execute(statement, {"rows": FILL_ROWS}).rowcount

    beat("keyword search")
    while session.retrying("filling in what keyword search needs", fill) == FILL_ROWS:
        beat("keyword search")


def _index(session: PgSession, table: str, regclass: str) -> None:
    def index() -> None:
        with session.transaction() as cursor:
            index_keyword(cursor, table, regclass)

    session.retrying("building the index of keyword search", index)


def index_keyword(cursor: Cursor, table: str, regclass: str) -> None:
    """Make the index of the column, where it is missing; after a first load, which it would slow down."""
    row = cursor.execute(FOUND.encode(), (regclass,)).fetchone()
    if row is not None and not row[1]:
        cursor.execute(f"CREATE INDEX ON {table} USING gin (tsv)".encode())
