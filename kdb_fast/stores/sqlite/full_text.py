"""SQLite: keep the full-text table in step with the search table.

``kdb_search_fts`` has a row of its own for each row of ``kdb_search``, but no index on any key: to find
the row of one record, SQLite reads the whole table. So a row is found in one of two ways:

1. it has the same rowid as its row in ``kdb_search``: true for all rows that kdb-fast writes, and for those
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

FullTextRow = tuple[int, str, Key, str]
"""(rowid, id, key, content)."""


class FullText:
    """The rows of ``kdb_search_fts``, by record.

    Args:
        connection: The connection of the store.
        shared: Others write through the same connection too, so that SQLite cannot tell us of their changes.
    """

    def __init__(self, connection: sqlite3.Connection, *, shared: bool) -> None:
        self._connection = connection
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
        row = self._connection.execute("SELECT rowid FROM kdb_search_fts ORDER BY rowid DESC LIMIT 1").fetchone()
        return int(row[0]) if row else 0

    def locate(self, records: Sequence[tuple[Key, int]]) -> tuple[dict[Key, int], set[int]]:
        """Find the full-text rows of records.

        Args:
            records: (key, rowid in ``kdb_search``) of each.

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
            "INSERT INTO kdb_search_fts (rowid, id, entity_name, record_id, content) VALUES (?, ?, ?, ?, ?)",
            [(rowid, search_id, *key, content) for rowid, search_id, key, content in rows],
        )
        if self._mapped:
            self._connection.executemany(
                "INSERT INTO temp.kdb_fast_fts_keys VALUES (?, ?, ?)",
                [(rowid, *key) for rowid, _, key, _ in rows],
            )

    def change(self, rows: Sequence[tuple[int, str, str]]) -> None:
        """Give rows another text: (rowid, id, content)."""
        self._connection.executemany(
            "UPDATE kdb_search_fts SET id = ?2, content = ?3 WHERE rowid = ?1",
            rows,
        )

    def remove(self, rowids: Sequence[int]) -> None:
        """Delete rows."""
        if not rowids:
            return
        parameters = [(rowid,) for rowid in rowids]
        self._connection.executemany("DELETE FROM kdb_search_fts WHERE rowid = ?", parameters)
        if self._mapped:
            self._connection.executemany("DELETE FROM temp.kdb_fast_fts_keys WHERE fts_rowid = ?", parameters)

    def orphans(self, entity: str, among: Sequence[int] | None = None) -> list[int]:
        """Rowids of an entity's full-text rows without a row in ``kdb_search``, of all or among the given."""
        query = (
            "SELECT f.rowid FROM kdb_search_fts f WHERE f.entity_name = ? AND NOT EXISTS (SELECT 1 FROM kdb_search s "
            "WHERE s.entity_name = f.entity_name AND s.record_id = f.record_id)"
        )
        if among is None:
            return [rowid for (rowid,) in self._connection.execute(query, (entity,))]
        rows = select_in(self._connection, query + " AND f.rowid IN (…)", among, entity)
        return [rowid for (rowid,) in rows]

    def _read(self, rowids: Sequence[int]) -> dict[int, Key]:
        rows = select_in(
            self._connection, "SELECT rowid, entity_name, record_id FROM kdb_search_fts WHERE rowid IN (…)", rowids
        )
        return {rowid: tuple(key) for rowid, *key in rows}

    def _look_up(self, keys: Sequence[Key]) -> dict[Key, int]:
        candidates: dict[int, Key] = {}
        for key in keys:
            rows = self._connection.execute(
                "SELECT fts_rowid FROM temp.kdb_fast_fts_keys WHERE entity_name = ? AND record_id = ?", key
            )
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
        execute("CREATE TEMP TABLE kdb_fast_fts_keys (fts_rowid INTEGER PRIMARY KEY, entity_name TEXT, record_id TEXT)")
        execute("INSERT INTO temp.kdb_fast_fts_keys SELECT rowid, entity_name, record_id FROM kdb_search_fts")
        execute("CREATE INDEX temp.kdb_fast_fts_by_key ON kdb_fast_fts_keys (record_id, entity_name)")
        self._mapped, self._version = True, self._data_version()
