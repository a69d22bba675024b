"""SQLite: keep the full-text table in step with the search table.

The full-text table has a row of its own for each row of the search table, but no index on any key: to find
the row of one record, SQLite reads the whole table. So a row is found in one of two ways:

1. it has the same rowid as its row in the search table: true for all rows that kdb-fast writes, and for those
   of KameleonDB that were never changed;
2. by a temporary map from key to rowid, made by reading the table once, when the first record needs it.

Whatever is found is checked before it is used, since KameleonDB may write between our transactions.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence

from ...db.sqlite import select_in
from ...db.sqlite_session import transaction
from ...records import Key
from ...tables.target import Target

FullTextRow = tuple[int, str, Key, str]
"""(rowid, id, key, content)."""


class FullText:
    """The rows of the full-text table, by record.

    Args:
        connection: The connection of the store.
        target: Whose full-text table it is.
        shared: Others write through the same connection too, so that SQLite cannot tell us of their changes.
    """

    def __init__(self, connection: sqlite3.Connection, target: Target, *, shared: bool) -> None:
        self._connection, self._text = connection, target.text
        self._unknown = ",".join("?" * len(target.index.key))
        self._shared = shared
        self._version: int | None = None
        self._mapped = False

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A write transaction, in which all the rest here is called. The map does not outlive a rollback."""
        if self._shared:
            self._mapped = False
        try:
            with transaction(self._connection):
                yield
        except BaseException:
            self._mapped = False
            raise

    def last_rowid(self) -> int:
        """The greatest rowid, or 0 for an empty table."""
        row = self._connection.execute(
            self._text("SELECT rowid FROM {full_text} ORDER BY rowid DESC LIMIT 1")
        ).fetchone()
        return int(row[0]) if row else 0

    def locate(self, records: Sequence[tuple[Key, int]]) -> tuple[dict[Key, int], set[int]]:
        """Find the full-text rows of records.

        Args:
            records: (key, rowid in the search table) of each.

        Returns:
            The rowid in the full-text table of each key that has a row there, and those of the given rowids
            that a row of another record occupies.
        """
        there = self._read([rowid for _, rowid in records])
        found = {key: rowid for key, rowid in records if there.get(rowid) == key}
        taken = {rowid for key, rowid in records if there.get(rowid, key) != key}
        missing = [key for key, _ in records if key not in found]
        if missing and self._mapped and not self._is_exact():
            found |= self._look_up(missing)
            missing = [key for key in missing if key not in found]
        if missing:
            if not self._is_exact():
                self._build_map()
            found |= self._look_up(missing)
        return found, taken

    def add(self, rows: Sequence[FullTextRow]) -> None:
        """Insert rows; their rowids must be free."""
        self._connection.executemany(
            self._text(
                "INSERT INTO {full_text} (rowid, {id}, {key}, {content}) VALUES (?, ?, {values}, ?)",
                values=self._unknown,
            ),
            [(rowid, search_id, *key, content) for rowid, search_id, key, content in rows],
        )
        if self._mapped:
            self._connection.executemany(
                self._text("INSERT INTO temp.kdb_fast_fts_keys VALUES (?, {values})", values=self._unknown),
                [(rowid, *key) for rowid, _, key, _ in rows],
            )

    def change(self, rows: Sequence[tuple[int, str, str]]) -> None:
        """Give rows another text: (rowid, id, content)."""
        self._connection.executemany(
            self._text("UPDATE {full_text} SET {id} = ?2, {content} = ?3 WHERE rowid = ?1"),
            rows,
        )

    def remove(self, rowids: Sequence[int]) -> None:
        """Delete rows."""
        if not rowids:
            return
        parameters = [(rowid,) for rowid in rowids]
        self._connection.executemany(self._text("DELETE FROM {full_text} WHERE rowid = ?"), parameters)
        if self._mapped:
            self._connection.executemany("DELETE FROM temp.kdb_fast_fts_keys WHERE fts_rowid = ?", parameters)

    def orphans(self, entity: str, among: Sequence[int] | None = None) -> list[int]:
        """Rowids of an entity's full-text rows without a row in the search table, of all or among the given."""
        query = self._text(
            "SELECT s.rowid FROM {full_text} s WHERE s.{group} = ? "
            "AND NOT EXISTS (SELECT 1 FROM {index} t WHERE {same_key})"
        )
        if among is None:
            return [rowid for (rowid,) in self._connection.execute(query, (entity,))]
        rows = select_in(self._connection, query + " AND s.rowid IN (…)", among, entity)
        return [rowid for (rowid,) in rows]

    def _read(self, rowids: Sequence[int]) -> dict[int, Key]:
        rows = select_in(
            self._connection, self._text("SELECT rowid, {key} FROM {full_text} WHERE rowid IN (…)"), rowids
        )
        return {rowid: tuple(key) for rowid, *key in rows}

    def _look_up(self, keys: Sequence[Key]) -> dict[Key, int]:
        candidates: dict[int, Key] = {}
        statement = self._text(
            "SELECT fts_rowid FROM temp.kdb_fast_fts_keys WHERE ({key}) = ({values})", values=self._unknown
        )
        for key in keys:
            rows = self._connection.execute(statement, key)
            candidates.update((rowid, key) for (rowid,) in rows)
        there = self._read(list(candidates))
        return {key: rowid for rowid, key in candidates.items() if there.get(rowid) == key}

    def _is_exact(self) -> bool:
        """Whether nobody but us can have changed the full-text table since the map was made."""
        return self._mapped and self._version == self._data_version()

    def _data_version(self) -> int:
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    def _build_map(self) -> None:
        execute = self._connection.execute
        execute("DROP TABLE IF EXISTS temp.kdb_fast_fts_keys")
        execute(self._text("CREATE TEMP TABLE kdb_fast_fts_keys (fts_rowid INTEGER PRIMARY KEY, {key})"))
        execute(self._text("INSERT INTO temp.kdb_fast_fts_keys SELECT rowid, {key} FROM {full_text}"))
        execute(self._text("CREATE INDEX temp.kdb_fast_fts_by_key ON kdb_fast_fts_keys ({member}, {group})"))
        self._mapped, self._version = True, self._data_version()
