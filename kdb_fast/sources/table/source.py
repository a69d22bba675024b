"""Records of a table, view or query, in pages."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from ...db import pg_errors, pg_settings, sqlite_reading
from ...db.pg_connection import is_only_session
from ...db.sqlite import KEYS_PER_QUERY, batches
from ...records import Key, Record, Reject, is_blank, storable_key
from ...tables.key import text_arrays
from ...tables.known_rows import KnownRows, register
from ...tables.selection import Selection
from ...tables.target import ALL, Params
from ..base import PAGE_ROWS, Source
from ..reader import ONLY_READING, Reader
from .select import check_unique

FIRST_PAGE_ROWS = 100
"""Rows of the first page, before the size of a record is known. Each further one has at most twice as many."""

PAGE_BYTES = 8 << 20
"""Characters of the texts of one page, about: long texts make smaller pages."""

EXACT_ROWS = 200_000
"""A table of fewer rows, as the planner has it, is counted: some milliseconds."""

ONE_READING = f"{ONLY_READING}; SET LOCAL idle_in_transaction_session_timeout = 0; SET LOCAL cursor_tuple_fraction = 1"
"""Of the transaction in which a query is read: it waits as long as the model works, and all rows are wanted."""

COPY = "kdb_fast_read"


class NotText(bytes):
    """A text of SQLite that is not UTF-8."""


class TableSource(Source):
    """The rows of a selection.

    Of a table the pages are read by key, each with a query of its own: nothing is held open between them, and a row
    changed meanwhile is read as it is then. A query is read once, in one transaction that only reads; on SQLite, where
    that would keep the run from writing, from a copy in a temporary table.

    Args:
        reader: The database; closed with the source.
        selection: Which rows.
        limit: Stop after this many records.
        elsewhere: The vectors are written to another database, of which this may be a copy that lags behind.
        page_rows: Most rows of a page.
    """

    unique_keys = True

    def __init__(
        self,
        reader: Reader,
        selection: Selection,
        limit: int | None = None,
        *,
        elsewhere: bool = False,
        page_rows: int = PAGE_ROWS,
    ) -> None:
        self._reader, self.selection, self._limit, self._most_rows = reader, selection, limit, page_rows
        self._postgresql = selection.dialect == "postgresql"
        # With a limit not every row is seen; in another database a row may be missing that is there.
        self.live_rows = selection if limit is None and not elsewhere else None
        self.reads_again = selection.paged
        self._elsewhere = elsewhere
        self._known: KnownRows | None = None
        self._emptied: list[Key] = []
        self._unchanged = 0
        self._page_rows = min(FIRST_PAGE_ROWS, page_rows)
        self._ended = self._has_odd = self._read_first = False
        if not self._postgresql and not selection.paged:
            self._copy()

    @property
    def entities(self) -> tuple[str, ...]:
        return (ALL,)

    def estimate(self) -> int | None:
        """Rows, with or without text: counted where they are few, else as the planner has it."""
        total = self._estimate()
        return total if self._limit is None else min(total, self._limit)

    def _estimate(self) -> int:
        source = self.selection.source()
        if self._postgresql:
            plan = self._reader.fetch(f"EXPLAIN (FORMAT JSON) SELECT 1 FROM {source}", {})[0][0]  # noqa: S608
            rows = int((json.loads(plan) if isinstance(plan, str | bytes) else plan)[0]["Plan"]["Plan Rows"])
            if rows > EXACT_ROWS or not self.selection.paged:
                return rows
        elif not self.selection.paged:
            source = f"temp.{COPY}"
        return int(self._reader.fetch(f"SELECT count(*) FROM {source}", {})[0][0])  # noqa: S608

    def pages(self) -> Iterator[list[Record | Reject]]:
        """The records, those of a table in the order of their keys.

        A page may be empty, when none of its rows has text: call :meth:`take_empty` after each.

        Raises:
            DatabaseError: The connection was lost and did not come back in time, or was lost in the middle of a query.
        """
        left = self._limit
        for rows in self._row_pages():
            page = self._records(rows)
            if left is not None:
                page = page[:left]
                left -= len(page)
            yield page
            if left == 0:
                break
        self._ended = True

    def sample(self, rows: int) -> list[str]:
        """The first rows."""
        selection = self.selection
        if self._postgresql or selection.paged:
            source = f"SELECT {selection.selected} FROM {selection.source()}"  # noqa: S608
        else:
            source = f"SELECT * FROM temp.{COPY}"  # noqa: S608
        found = self._reader.fetch(f"{source} LIMIT {rows}", {}, text=self._text)
        return [text for *_, text in found if isinstance(text, str) and not is_blank(text)]

    def skip_unchanged(self, known: KnownRows) -> None:
        # With a limit the rows that need nothing count as well.
        if self._elsewhere or self._limit is not None or not (self._postgresql or self.selection.paged):
            return
        self._known = known
        if not self._postgresql:
            register(self._reader.connection())

    def take_unchanged(self) -> int:
        taken, self._unchanged = self._unchanged, 0
        return taken

    def read_again(self, keys: Sequence[Key]) -> list[Record | Reject]:
        selection, found = self.selection, []
        for part in batches(keys, KEYS_PER_QUERY // len(selection.key)):
            params = Params(selection.dialect)
            numbers = range(1, len(selection.key) + 1)
            if self._postgresql:
                arrays = [f"{params(array)}::text[]" for array in text_arrays(part, len(selection.key))]
                names = ", ".join(f"kdb_fast_{number}" for number in numbers)
                wanted = f"unnest({', '.join(arrays)}) kdb_fast_k ({names})"
                same = selection.same("kdb_fast_k.kdb_fast_{number}::{type}")
            else:
                names = ", ".join(f"column{number} AS kdb_fast_{number}" for number in numbers)
                values = ", ".join(f"({params.list(key)})" for key in part)
                wanted = f"(SELECT {names} FROM (VALUES {values})) kdb_fast_k"  # noqa: S608
                same = selection.same("kdb_fast_k.kdb_fast_{number}")
            source = selection.source(f"CROSS JOIN {wanted}", same)
            query = f"SELECT {selection.selected} FROM {source}"  # noqa: S608
            found += self._records(self._reader.fetch(query, params.values, text=self._text))
        return found

    def take_empty(self) -> list[Key]:
        taken, self._emptied = self._emptied, []
        return taken

    def warnings(self) -> list[str]:
        if self.changed():
            return [f"{self._reader.address.display} was written while it was read; run the command again."]
        if self._read_first:
            return [
                f"A pooler in front of {self._reader.address.display} has one session only, so the query was read as a "
                "whole into a temporary file first."
            ]
        return []

    def changed(self) -> bool:
        return self._ended and not self._postgresql and not sqlite_reading.unchanged(self._reader.connection())

    def close(self) -> None:
        self._reader.close()

    # -- pages of rows ---------------------------------------------------------------------------------

    def _row_pages(self) -> Iterator[list[tuple[Any, ...]]]:
        """Keys and texts."""
        if self.selection.paged:
            return self._by_key()
        return self._by_cursor() if self._postgresql else self._of_copy()

    def _by_key(self) -> Iterator[list[tuple[Any, ...]]]:
        """Each page begins behind the last key of the one before, so none is read twice. A row that is added while this
        goes on is read if its key comes later; else the next run finds it."""
        selection = self.selection
        last: Sequence[Any] = ()
        while True:
            params = Params(selection.dialect)
            after = []
            if last:
                # What was read as bytes because it is not UTF-8 is compared as the text that it is.
                places = [f"CAST({params(p)} AS text)" if isinstance(p, NotText) else params(p) for p in last]
                after = [selection.after(places)]
            asked = self._page_rows
            query = f"{self._query(*after)} ORDER BY {selection.order} LIMIT {asked}"
            rows = self._reader.fetch(query, params.values, text=self._text)
            if rows:
                last = rows[-1][: len(selection.key)]
                yield self._changed(rows)
            if len(rows) < asked:
                return

    def _query(self, *conditions: str) -> str:
        """Keys and texts and, where it is known which rows need nothing, whether each is one; these have no text."""
        selection, known = self.selection, self._known
        if known is None:
            return f"SELECT {selection.selected} FROM {selection.source('', *conditions)}"  # noqa: S608
        unchanged = known.unchanged(selection.text, selection.dialect)
        if not self._postgresql:
            return f"SELECT {selection.selected}, {unchanged} FROM {selection.source(known.join, *conditions)}"  # noqa: S608
        join = f"{known.join} CROSS JOIN LATERAL (SELECT {unchanged} AS kdb_fast_same OFFSET 0) kdb_fast_u"
        text = f"CASE WHEN NOT kdb_fast_same THEN {selection.text_as_text} END"
        return f"SELECT {selection.selected_key}, {text}, kdb_fast_same FROM {selection.source(join, *conditions)}"  # noqa: S608

    def _changed(self, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Rows of :meth:`_query` without those that need nothing, which are counted."""
        if self._known is None:
            return rows
        changed = [row[:-1] for row in rows if not row[-1]]
        self._unchanged += len(rows) - len(changed)
        return changed

    def _by_cursor(self) -> Iterator[list[tuple[Any, ...]]]:
        connection = self._reader.connection()
        try:
            with tempfile.TemporaryFile("w+", prefix="kdb-fast-") as kept:
                with pg_settings.transaction(connection, ONE_READING):
                    # The lock, the look-ups and the writer need a session as well.
                    self._read_first = not self._elsewhere and is_only_session(connection, self._reader.address)
                    connection.execute(f"DECLARE {COPY} NO SCROLL CURSOR FOR {self._query()}".encode(), {})
                    while rows := connection.execute(f"FETCH {self._page_rows} FROM {COPY}", binary=True).fetchall():
                        if self._read_first:
                            print(json.dumps(rows), file=kept)
                        else:
                            yield self._changed(rows)
                kept.seek(0)
                for page in kept:
                    yield self._changed([tuple(row) for row in json.loads(page)])
        except Exception as error:
            if pg_errors.kind_of(error) is None:
                raise
            raise pg_errors.explain("reading the query", error, self._reader.address) from error

    def _copy(self) -> None:
        """SQLite: the rows of a query or view, in a temporary table; their keys are looked at there."""
        selection = self.selection
        names = [f"key_{number}" for number in range(1, len(selection.key) + 1)]
        values = [f"{value} AS {name}" for value, name in zip(selection.keys_as("{}"), names, strict=True)]
        self._reader.fetch(
            f"CREATE TEMP TABLE {COPY} AS SELECT {', '.join(values)}, {selection.text_as_text} AS text "  # noqa: S608
            f"FROM {selection.source()}",
            {},
        )
        check_unique(self._reader, selection, f"temp.{COPY}", names)

    def _of_copy(self) -> Iterator[list[tuple[Any, ...]]]:
        columns = ", ".join(f"key_{number}" for number in range(1, len(self.selection.key) + 1))
        last = 0
        while True:
            rows = self._reader.fetch(
                f"SELECT rowid, {columns}, text FROM temp.{COPY} WHERE rowid > :last ORDER BY rowid "  # noqa: S608
                f"LIMIT {self._page_rows}",
                {"last": last},
                text=self._text,
            )
            if not rows:
                return
            last = rows[-1][0]
            yield [row[1:] for row in rows]

    def _text(self, raw: bytes) -> str | NotText:
        """What SQLite holds as text."""
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._has_odd = True
            return NotText(raw)

    def _records(self, rows: list[tuple[Any, ...]]) -> list[Record | Reject]:
        """The records of a page; sets how many rows the next one has."""
        page: list[Record | Reject] = []
        if self._has_odd:
            page += [_reject(row) for row in rows if _is_odd(row)]
            rows = [row for row in rows if not _is_odd(row)]
        emptied, before, size = self._emptied, len(self._emptied), 0
        for row in rows:
            text = row[-1]
            if text is None or is_blank(text):
                emptied.append(row[:-1])
            else:
                size += len(text)
                page.append(Record(row[:-1], text))
        self.empty += len(emptied) - before
        average = max(1.0, size / max(1, len(rows)))
        self._page_rows = max(1, min(self._most_rows, 2 * self._page_rows, int(PAGE_BYTES / average)))
        return page


def _is_odd(row: tuple[Any, ...]) -> bool:
    return any(isinstance(value, NotText) for value in row)


def _reject(row: tuple[Any, ...]) -> Reject:
    """Why a row with a text that is none is no record."""
    digest = hashlib.sha256(row[-1] if isinstance(row[-1], bytes) else str(row[-1]).encode()).digest()
    key = tuple(storable_key(bytes(part)) if isinstance(part, NotText) else part for part in row[:-1])
    return Reject(key, "not_utf8", "a text of the row is not UTF-8", digest)
