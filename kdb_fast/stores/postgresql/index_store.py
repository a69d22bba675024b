"""PostgreSQL: a search index as KameleonDB has it, as a store.

Its rows are written by runs, and by the library without one; see :mod:`.flush` for how.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ...db.address import DatabaseAddress
from ...db.pg_errors import explain, kind_of
from ...db.pg_settings import ENCODING
from ...db.retrying import ErrorKind
from ...records import Key, Record
from ...tables import seal
from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH
from ...tables.key import text_arrays
from ...tables.target import OWN, LiveRows, Target
from ..base import Answer, FlushSlot, Found, IndexStore, RunSpec, Stored
from ..rejects import refusal_of_unit
from . import check as pg_check
from . import migrate as pg_migrate
from . import prepare as pg_prepare
from . import rejects as pg_rejects
from . import seal as pg_seal
from .flush import STATEMENT_ROWS, FlushWriter, dropped
from .indexed import Indexed
from .pgcopy import row_version
from .session import LIMITS
from .store import PostgreSQLStore

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]


COMPARED = (
    "SELECT array_agg(place) FILTER (WHERE same), array_agg(place) FILTER (WHERE NOT same), "
    "array_agg(hash) FILTER (WHERE NOT same), array_agg(fingerprint) FILTER (WHERE NOT same), "
    "array_agg(version) FILTER (WHERE NOT same) FROM ("
    "SELECT r.*, coalesce(r.hash = substr(w.hashes, r.place::int * 32 - 31, 32) AND r.fingerprint = w.fingerprint, "
    "false) same FROM (<rows>) r, (SELECT %b::bytea hashes, %s::text fingerprint) w OFFSET 0) AS compared"
)
"""The places of the rows that are the same, and the rows that are not, as one row of arrays: rows that are sent to be
told unchanged cost more than all else of the look-up. The hashes are one value, of 32 bytes each."""


class PostgreSQLIndexStore(PostgreSQLStore, IndexStore):
    """Writes the rows of one search index."""

    def __init__(
        self,
        address: DatabaseAddress,
        role: str,
        *,
        retry_seconds: float | None = None,
        patient: bool = False,
        borrowed: psycopg.Connection[tuple[Any, ...]] | None = None,
        limits: str = LIMITS,
        index: IndexTable = KDB_SEARCH,
    ) -> None:
        """As :class:`~kdb_fast.stores.postgresql.session.PgSession`, whose session this store works in."""
        super().__init__(
            address, role, retry_seconds=retry_seconds, patient=patient, borrowed=borrowed, limits=limits, index=index
        )
        self._columns: tuple[str, ...] | None = None

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int, wait: float = 0.0) -> tuple[str, ...]:
        self._columns = None

        def make(cursor: Cursor, target: Target) -> tuple[str, ...]:
            return pg_prepare.search_table(cursor, target, dimensions)

        return pg_prepare.prepare(self.session, make, wait, (self.target.index.name,))

    def is_prepared(self) -> bool:
        """Whether all tables of the index are in its schema, and up to date."""

        def work() -> bool:
            with self.session.transaction() as cursor:
                there = all(pg_check.exists(cursor, self.target, name) for name in (self.target.index.name, *OWN))
                return there and pg_migrate.find_next(cursor, self.target) is None

        return self.session.retrying("looking for the tables", work)

    def column_dimensions(self) -> int | None:
        index = self.target.index

        def work() -> int | None:
            statement = (
                "SELECT a.atttypmod FROM pg_attribute a WHERE a.attrelid = to_regclass(%s) "
                "AND a.attname = %s AND a.atttypmod > 0"
            )
            parameters = (self.target.regclass(index.name), index.vector)
            row = self.session.connection().execute(statement, parameters).fetchone()
            return int(row[0]) if row else None

        return self.session.retrying("reading the table's definition", work)

    def _seal_column(self) -> tuple[str, ...]:
        """The column for seals where the table has it; asked for once."""
        if self._columns is None:
            self._columns = pg_seal.column(self.session)
        return self._columns

    def altered(self, run: int) -> list[str]:
        def work() -> list[str]:
            return pg_seal.altered(self.session, run, self._seal_column())

        return self.session.retrying("looking at what was stored", work)

    @property
    def indexed(self) -> Indexed:
        return Indexed.of_search_table(self.target)

    def count(self) -> int:
        def work() -> int:
            row = self.session.connection().execute(self.target.statement("SELECT count(*) FROM {index}")).fetchone()
            return int(row[0]) if row else 0

        return self.session.retrying("counting rows", work)

    def is_empty(self) -> bool:
        def work() -> bool:
            statement = self.target.statement("SELECT NOT EXISTS (SELECT FROM {index})")
            row = self.session.connection().execute(statement).fetchone()
            return bool(row and row[0])

        return self.session.retrying("looking for rows", work)

    # -- reading and writing ---------------------------------------------------------------------------

    def lookup(self, keys: Sequence[Key]) -> dict[Key, Stored]:
        if self.session.encoding != ENCODING:
            keys = self.session.holdable(keys)

        def work() -> dict[Key, Stored]:
            statement = self.target.statement(self._row_of_key())
            rows = self.session.connection().execute(statement, self._arrays(keys))
            return {keys[r[0] - 1]: Stored(r[1], r[2], row_version(r[3])) for r in rows}

        return self.session.retrying("looking up what is stored", work)

    def compare(self, records: Sequence[Record], hashes: Sequence[bytes], fingerprint: str) -> Found | Answer:
        if self.session.encoding != ENCODING:
            return super().compare(records, hashes, fingerprint)  # not all of the keys can be asked for
        keys = [record.key for record in records]
        statement = self.target.statement(COMPARED.replace("<rows>", self._row_of_key()))
        parameters = [*self._arrays(keys), b"".join(hashes), fingerprint]
        rows = self.session.send("looking up what is stored", statement, parameters)

        def found() -> Found:
            ((unchanged, *others),) = rows()
            differ = zip(*(column or () for column in others), strict=True)
            return Found(
                {keys[place - 1]: Stored(text, of_row, row_version(at)) for place, text, of_row, at in differ},
                {place - 1 for place in unchanged or ()},
            )

        return found

    def _row_of_key(self) -> str:
        """Statement of place, hash, fingerprint and version of the row of each of some keys."""
        # Key by key (OFFSET keeps it so): on a table without statistics the server would rather read all rows
        # of the entity for a thousand keys. By its place, since the column decides which text is its equal.
        return (
            "SELECT s.place, r.* FROM unnest({key_arrays}) WITH ORDINALITY s({key}, place), "
            "LATERAL (SELECT sha256(convert_to(t.{content}, 'UTF8')) hash, "
            "CASE WHEN t.{embedding} IS NOT NULL AND <ours> THEN t.kdb_fast_fingerprint END fingerprint, "
            "timestamptz_send(t.{updated_at}) version FROM {index} t WHERE {same_key} OFFSET 0) r"
        ).replace("<ours>", seal.ours(self.dialect, self._seal_column(), "t."))

    def _arrays(self, keys: Sequence[Key]) -> list[str]:
        return text_arrays(keys, len(self.target.index.key))

    def _check(self, dimensions: int) -> None:
        pg_check.check(self.session, dimensions)

    def _writer(self, cursor: Cursor, run: RunSpec, now: int) -> FlushWriter:
        sealed = bool(self._seal_column())
        return FlushWriter(cursor, self.target, run, now, merge_all=self._merge_all, pieces=self._pieces, sealed=sealed)

    def _delete(self, cursor: Cursor, keys: Sequence[Key]) -> int:
        statement = self.target.statement(
            "DELETE FROM {index} t USING unnest({key_arrays}) AS s({key}) WHERE {same_key}"
        )
        parts = (keys[start : start + STATEMENT_ROWS] for start in range(0, len(keys), STATEMENT_ROWS))
        return sum(cursor.execute(statement, text_arrays(part, len(self.key))).rowcount for part in parts)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self.session.transaction():
            yield

    def upsert(self, run: RunSpec, slots: Sequence[FlushSlot], deletes: Sequence[Key], *, vectors: bool = True) -> None:
        import psycopg

        connection, target = self.session.connection(), self.target
        with connection.cursor() as cursor:
            statement = f"SELECT (extract(epoch FROM now()) * 1000000)::bigint, {pg_seal.HAS_SEAL}"  # noqa: S608
            row = cursor.execute(statement.encode(), (target.index_regclass,)).fetchone()
            assert row is not None
            now, sealed = row

            def write(careful: bool) -> FlushWriter:
                writer = FlushWriter(
                    cursor, target, run, now, merge_all=True, force=True, vectors=vectors, sealed=sealed
                )
                for flush_slot in slots:
                    writer.add(flush_slot)
                writer.write(careful)
                return writer

            try:
                with connection.transaction():
                    writer = write(False)
            except psycopg.Error as error:
                if kind_of(error) is not ErrorKind.DATA:
                    raise explain("writing", error, self.address) from error
                writer = write(True)
            unwritten = [*writer.rejected, *((*place, *dropped(target.index.name)) for place in writer.superseded)]
            if unwritten:
                raise refusal_of_unit(slots, unwritten)
            self._delete(cursor, self.session.holdable(deletes))
            pg_rejects.forget_keys(cursor, target, slots)

    def prune(self, entity: str, live_rows: LiveRows) -> int:
        return self.session.retrying(
            "removing deleted records", lambda: pg_prepare.prune(self.session, entity, live_rows)
        )
