"""PostgreSQL with pgvector: look up what is stored, write a flush in one transaction.

A flush takes one of two ways for each row:

* *fresh*, no row had that key when the parent looked: binary COPY straight into ``kdb_search``;
* *known*, or a fresh one that met a unique violation: binary COPY into a temporary table, then an UPDATE
  join that leaves rows alone which another program has changed since, then an INSERT of what is missing.

Straight COPY writes a first load 1.5 times as fast as staging and merging it (ARCHITECTURE.md, measurements).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from .. import pg_settings
from ..database import DatabaseAddress, connect_postgresql
from ..errors import DatabaseError, LockedError, RecordError
from ..faults import fault
from ..pg_characters import Characters, escaped
from ..pg_connection import Patience
from ..records import Reject, storable_key
from ..target import REJECTS, RUNS, STATE, TABLE, Target, find_target
from . import pg_index, pg_prepare, pg_runs, seal
from .base import FlushResult, FlushSlot, RunSpec, Store, Stored, runs_of_input
from .index_policy import IndexOutcome
from .pg_errors import classify, explain, refusal
from .pg_flush import DROPPED, FlushWriter, delete_keys
from .pgcopy import row_stamp
from .reading import rows_of

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")

LIMITS = (
    # Nobody's lock is waited for longer, and nobody waits longer for ours.
    "SET LOCAL lock_timeout = '30s'; SET LOCAL idle_in_transaction_session_timeout = '60s'; "
    # The server notices within 25 s that our machine is gone, instead of two hours.
    "SET LOCAL tcp_keepalives_idle = 10; SET LOCAL tcp_keepalives_interval = 5; SET LOCAL tcp_keepalives_count = 3"
)
"""Of each transaction. Behind a transaction-mode pooler a setting of the session would leak to others."""

MOST_PIECES = 64
"""Statements that the rows of a flush are divided among where a short ``statement_timeout`` asks for it."""

CHECK_CLIENT = "; SET LOCAL client_connection_check_interval = '2s'"
"""A statement ends soon after its client was killed, and its locks with it (PostgreSQL 14 or newer on a Unix)."""


class PostgreSQLStore(Store):
    """One connection to a search index in PostgreSQL. Reconnects by itself where a repeat is safe."""

    dialect = "postgresql"
    has_vector_index = True

    def __init__(
        self,
        address: DatabaseAddress,
        role: str,
        *,
        retry_seconds: float | None = None,
        patient: bool = False,
        borrowed: psycopg.Connection[tuple[Any, ...]] | None = None,
        limits: str = LIMITS,
    ) -> None:
        """
        Args:
            address: The database.
            role: What the connection is for; shown in the server's list of sessions.
            retry_seconds: How long a lost database is waited for; None for ``KDB_FAST_PATIENCE``.
            patient: Wait so long for the first connection too: the database was there a moment ago.
            borrowed: A connection of the caller's to use instead of an own one, within the caller's transaction if
                there is one.
            limits: Statements that bound the waits of each transaction.
        """
        self.address = address
        self._borrowed = borrowed
        self._role = role
        self._retry_seconds = retry_seconds
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._has_rejects = True
        self._merge_all = False
        self._pieces = 1
        self._limits = limits
        self._session = 0
        self._characters: Characters | None = None
        self._columns: tuple[str, ...] | None = None
        self.on_wait: Callable[[str], None] = lambda what: None
        connection = self.retrying("connecting", self.connection, seconds=None if patient else 0.0)
        try:
            self._characters = Characters.of(connection)
            if self._characters is not None:
                self.encoding = self._characters.encoding
            self.target = self.retrying("finding the tables", self.find_target, seconds=None if patient else 0.0)
        except BaseException:
            self.close()
            raise

    def find_target(self) -> Target:
        """Where the tables are, asked for anew; kept as ``target``, since what is written belongs into one index."""
        self.target = find_target(rows_of(self.connection(), self.dialect), self.dialect, self.address.schema)
        return self.target

    def connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The connection, opened again if it was lost."""
        if self._borrowed is not None:
            return self._borrowed
        if self._connection is None or self._connection.closed:
            self._connection = connect_postgresql(self.address, role=self._role)
            # The server may not know that our last connection is lost, and keep its locks, which we would wait for.
            row = self._connection.execute(
                "SELECT version(), (SELECT bool_and(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE pid = %s "
                "AND application_name = %s AND datname = current_database() AND usename = current_user)",
                (self._session, f"kdb-fast/{self._role}"),
            ).fetchone()
            self._session = self._connection.info.backend_pid
            modern = self._connection.info.server_version >= 140_000 and "windows" not in str(row).lower()
            self._limits = LIMITS + CHECK_CLIENT if modern else LIMITS
        return self._connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        """A transaction whose waits for locks and for us are bounded; within the caller's, those are the caller's."""
        connection = self.connection()
        with pg_settings.transaction(connection, self._limits), connection.cursor() as cursor:
            yield cursor

    def missing_characters(self, texts: Iterable[str]) -> frozenset[str]:
        characters = self._characters
        if characters is None:
            return frozenset()
        known = list(texts)
        return self.retrying("looking at characters", lambda: characters.missing(self.connection(), known))

    def _holdable(self, keys: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
        """Those of the keys that a row can have in this database."""
        missing = self.missing_characters(part for key in keys for part in key)
        return [key for key in keys if missing.isdisjoint("".join(key))] if missing else keys

    def _name(self, value: object, limit: int = 200) -> str:
        """:func:`~kdb_fast.records.storable_key` as this database can hold it."""
        text = storable_key(value, limit)
        return escaped(text, self.missing_characters([text]))

    def retrying(self, what: str, work: Callable[[], T], *, rows: bool = False, seconds: float | None = None) -> T:
        """``work()``, again after a passing failure (lost connection, restart, deadlock) for a bounded time.

        Args:
            what: What is being done, for messages: "writing", "taking the lock".
            rows: Errors that a row is at fault for are psycopg's own: the caller deals with them.
            seconds: How long from the first failure on, where not as long as usual. An index may be built for
                an hour before the connection is lost.

        Raises:
            DatabaseError, ResourceError, SchemaError, LockedError: what the last failure means for the user.
        """
        import psycopg

        # In a transaction of the caller's nothing can be repeated.
        patience = Patience(0.0 if self._borrowed is not None else self._retry_seconds if seconds is None else seconds)
        timeouts = 0
        while True:
            try:
                return work()
            except (psycopg.Error, DatabaseError) as error:
                kind = classify(error)
                if rows and kind == "data":
                    raise
                state = getattr(error, "sqlstate", None) or ""
                timeouts += state in ("57014", "55P03")
                if patience.is_over or kind != "passing" or timeouts > 3:
                    raise explain(what, error, self.address) from error
                if state == "25006":
                    self.close()  # after a failover another host of the address may be the one that can be written
                self.on_wait(f"waiting for the database ({what})")
                patience.pause()

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int) -> tuple[str, ...]:
        self._columns = None
        return self.retrying("preparing the tables", lambda: pg_prepare.prepare(self, dimensions))

    def is_prepared(self) -> bool:
        """Whether all tables of the index are in its schema."""

        def work() -> bool:
            statement = "SELECT bool_and(to_regclass(t) IS NOT NULL) FROM unnest(%s::text[]) t"
            names = [self.target.regclass(name) for name in (TABLE, RUNS, REJECTS, STATE)]
            row = self.connection().execute(statement, (names,)).fetchone()
            return bool(row and row[0])

        return self.retrying("looking for the tables", work)

    def column_dimensions(self) -> int | None:
        def work() -> int | None:
            statement = (
                "SELECT a.atttypmod FROM pg_attribute a WHERE a.attrelid = to_regclass(%s) "
                "AND a.attname = 'embedding' AND a.atttypmod > 0"
            )
            row = self.connection().execute(statement, (self.target.regclass(TABLE),)).fetchone()
            return int(row[0]) if row else None

        return self.retrying("reading the table's definition", work)

    def _seal_column(self) -> tuple[str, ...]:
        """The column for seals where the table has it; asked for once."""
        if self._columns is None:
            statement = "SELECT " + pg_prepare.HAS_SEAL
            row = self.connection().execute(statement.encode(), (self.target.regclass(TABLE),)).fetchone()
            self._columns = (seal.COLUMN,) if row and row[0] else ()
        return self._columns

    def altered(self, run: int) -> list[str]:
        return self.retrying("looking at what was stored", lambda: pg_prepare.altered(self, run, self._seal_column()))

    def begin_run(self, *, fingerprint: str, model: str, dimensions: int, wait: float) -> RunSpec:
        return pg_runs.begin(self, fingerprint=fingerprint, model=model, dimensions=dimensions, wait=wait)

    def after_a_crash(self, run: int) -> bool:
        return self.retrying("looking at earlier runs", lambda: pg_runs.after_a_crash(self, run))

    def heartbeat(self, run: int, phase: str) -> None:
        pg_runs.heartbeat(self, run, phase)

    def end_run(self, run: int, state: str, receipt: dict[str, Any]) -> None:
        pg_runs.end(self, run, state, receipt)

    def defer_index(self) -> IndexOutcome:
        return self.retrying("dropping the vector index", lambda: pg_index.defer(self))

    def finish_index(self, beat: Callable[[str], None]) -> IndexOutcome:
        return pg_index.finish(self, beat)

    def index_missing(self) -> bool:
        return self.retrying("looking at the indexes", lambda: pg_index.missing(self))

    def count(self, entity: str | None = None) -> int:
        if entity is not None and self.missing_characters([entity]):
            return 0

        def work() -> int:
            statement = self.target.statement(
                "SELECT count(*) FROM {kdb_search} WHERE %s::text IS NULL OR entity_name = %s"
            )
            with self.transaction() as cursor:
                row = cursor.execute(statement, (entity, entity)).fetchone()
            return int(row[0]) if row else 0

        return self.retrying("counting rows", work)

    # -- reading ---------------------------------------------------------------------------------------

    def lookup(self, entity: str, record_ids: Sequence[str]) -> dict[str, Stored]:
        if self._characters is not None:
            record_ids = [record_id for _, record_id in self._holdable([(entity, r) for r in record_ids])]
            if not record_ids:
                return {}

        def work() -> dict[str, Stored]:
            ours = seal.ours(self.dialect, self._seal_column())
            rows = self.connection().execute(
                # Key by key (OFFSET keeps it so): on a table without statistics the server would rather read all rows
                # of the entity for a thousand keys.
                self.target.statement(
                    "SELECT t.* FROM unnest(%s::text[]) k(id), LATERAL ("
                    "SELECT record_id, sha256(convert_to(content, 'UTF8')), "
                    "CASE WHEN embedding IS NOT NULL AND <ours> THEN kdb_fast_fingerprint END, "
                    "timestamptz_send(updated_at) "
                    "FROM {kdb_search} WHERE entity_name = %s AND record_id = k.id OFFSET 0) t".replace("<ours>", ours)
                ),
                (list(record_ids), entity),
            )
            return {r[0]: Stored(r[1], r[2], row_stamp(r[3])) for r in rows}

        return self.retrying("looking up what is stored", work)

    # -- writing ---------------------------------------------------------------------------------------

    def flush(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[tuple[str, str]],
    ) -> FlushResult:
        import psycopg

        deletes = self._holdable(deletes)

        def attempt(careful: bool) -> FlushResult:
            try:
                return self._flush_once(run, number, slots, rejects, deletes, careful)
            except psycopg.errors.QueryCanceled:
                # statement_timeout holds for one statement: smaller ones may pass.
                self._pieces = min(2 * self._pieces, MOST_PIECES)
                raise

        try:
            return self.retrying("writing", lambda: attempt(False), rows=True)
        except psycopg.Error:
            # A column of another type would refuse every row.
            self.retrying("checking the table", lambda: pg_prepare.check(self, run.dimensions))
            # A row that the database refuses: find it by halving; all others are written.
            return self.retrying("writing", lambda: attempt(True), rows=True)

    def _flush_once(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[tuple[str, str]],
        careful: bool,
    ) -> FlushResult:
        target = self.target
        fault("store.before_begin")
        with self.transaction() as cursor:
            state = cursor.execute(
                target.statement(
                    "UPDATE {kdb_fast_runs} SET heartbeat_at = clock_timestamp(), phase = 'write' "
                    "WHERE run = %s AND state = 'running' "
                    "RETURNING last_flush, last_result, (extract(epoch FROM now()) * 1000000)::bigint"
                ),
                (run.number,),
            ).fetchone()
            if state is None:
                raise LockedError(
                    f"Run {run.number} no longer holds the index: another run took it over.",
                    remedy="This one stopped long enough to be taken for dead; what it committed is kept.",
                )
            if state[0] >= number:
                return _result_from_json(state[1])
            if careful:
                # A row that only the COMMIT would refuse could not be found by halving.
                cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
            writer = FlushWriter(
                cursor,
                target,
                run,
                state[2],
                merge_all=self._merge_all,
                pieces=self._pieces,
                sealed=bool(self._seal_column()),
            )
            for flush_slot in slots:
                writer.add(flush_slot)
            fault("store.before_copy")
            writer.write(careful)
            self._merge_all = self._merge_all or writer.met_conflict
            fault("store.after_copy")
            deleted = delete_keys(cursor, target, deletes)
            self._write_rejects(cursor, run, rejects, slots, writer.rejected)
            if self._has_rejects:
                self._forget_rejects(cursor, run)
            result = FlushResult(writer.rows, writer.bytes, deleted, tuple(writer.lost), tuple(writer.rejected))
            cursor.execute(
                target.statement("UPDATE {kdb_fast_runs} SET last_flush = %s, last_result = %s WHERE run = %s"),
                (number, json.dumps(result), run.number),
            )
            fault("store.before_commit")
        fault("store.after_commit")
        return result

    def _write_rejects(
        self,
        cursor: psycopg.Cursor[tuple[Any, ...]],
        run: RunSpec,
        rejects: Sequence[Reject],
        slots: Sequence[FlushSlot],
        refused: Sequence[tuple[int, int, str, str]],
    ) -> None:
        rows = list(rejects)
        by_number = {s.slot.number: s.slot for s in slots}
        for slot_number, row, reason, detail in refused:
            entity, record_id, content = by_number[slot_number].raw_rows()[row]
            rows.append(Reject(entity.decode(), record_id.decode(), reason, detail, hashlib.sha256(content).digest()))
        if not rows:
            return
        cursor.executemany(
            self.target.statement(
                "INSERT INTO {kdb_fast_rejects} (entity_name, record_id, content_hash, reason, detail, position, run) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (entity_name, record_id, content_hash, position) "
                "DO UPDATE SET reason = EXCLUDED.reason, detail = EXCLUDED.detail, run = EXCLUDED.run, "
                "rejected_at = now()"
            ),
            [
                (self._name(r.entity), self._name(r.record_id), r.content_hash, r.reason,
                 self._name(r.detail, 500), r.position, run.number)
                for r in rows
            ],
        )  # fmt: skip
        self._has_rejects = True

    def _forget_rejects(self, cursor: psycopg.Cursor[tuple[Any, ...]], run: RunSpec) -> None:
        """A record that is stored now is no longer rejected."""
        cursor.execute(
            self.target.statement(
                "DELETE FROM {kdb_fast_rejects} r USING {kdb_search} t WHERE t.entity_name = r.entity_name "
                "AND t.record_id = r.record_id AND t.kdb_fast_run = %s AND r.run <> %s"
            ),
            (run.number, run.number),
        )
        row = cursor.execute(self.target.statement("SELECT EXISTS (SELECT FROM {kdb_fast_rejects})")).fetchone()
        self._has_rejects = bool(row and row[0])

    @contextlib.contextmanager
    def unit(self) -> Iterator[None]:
        with self.transaction():
            yield

    def put(
        self, run: RunSpec, slots: Sequence[FlushSlot], deletes: Sequence[tuple[str, str]], *, vectors: bool = True
    ) -> None:
        import psycopg

        with self.connection().cursor() as cursor:
            statement = f"SELECT (extract(epoch FROM now()) * 1000000)::bigint, {pg_prepare.HAS_SEAL}"  # noqa: S608
            row = cursor.execute(statement.encode(), (self.target.regclass(TABLE),)).fetchone()
            assert row is not None
            writer = FlushWriter(
                cursor, self.target, run, row[0], merge_all=True, force=True, vectors=vectors, sealed=row[1]
            )
            for flush_slot in slots:
                writer.add(flush_slot)
            try:
                writer.write(False)
            except psycopg.Error as error:
                if classify(error) != "data":
                    raise explain("writing", error, self.address) from error
                reason, detail = refusal(error)
                raise RecordError(
                    f"A record was refused ({reason}): {detail}.", remedy="Nothing of the batch was stored."
                ) from None
            if writer.lost or writer.rejected:
                reason, detail = DROPPED
                raise RecordError(
                    f"A record was refused ({reason}): {detail}.", remedy="Nothing of the batch was stored."
                )
            delete_keys(cursor, self.target, self._holdable(deletes))

    def prune(self, entity: str) -> int:
        return self.retrying("removing deleted records", lambda: pg_prepare.prune(self, entity))

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    def rejects(self, entity: str | None = None) -> Iterable[dict[str, Any]]:
        names = ("entity", "record_id", "reason", "detail", "position", "run", "rejected_at", "content_hash")
        entity = None if entity is None else self._name(entity)

        def work() -> list[dict[str, Any]]:
            rows = self.connection().execute(
                self.target.statement(
                    "SELECT entity_name, record_id, reason, detail, position, run, rejected_at, "
                    "encode(content_hash, 'hex') FROM {kdb_fast_rejects} WHERE %s::text IS NULL OR entity_name = %s "
                    "ORDER BY run DESC, position, record_id"
                ),
                (entity, entity),
            )
            return [dict(zip(names, row, strict=True)) for row in rows]

        return self.retrying("reading the rejects", work)

    def forget_older_rejects(self, entities: Sequence[str], run: int) -> int:
        names = [self._name(entity) for entity in entities]

        def work() -> int:
            return (
                self.connection()
                .execute(
                    self.target.statement(
                        "DELETE FROM {kdb_fast_rejects} WHERE entity_name = ANY(%s) AND run < %s AND record_id <> ''"
                    ),
                    (names, run),
                )
                .rowcount
            )

        return self.retrying("forgetting older rejects", work)

    def forget_rejects_of_input(self, entity: str, name: str, run: int) -> int:
        entity = self._name(entity)

        def work() -> int:
            receipts = self.connection().execute(
                self.target.statement(
                    "SELECT n.run, n.receipt FROM {kdb_fast_runs} n WHERE n.run < %s AND n.run IN "
                    "(SELECT r.run FROM {kdb_fast_rejects} r WHERE r.entity_name = %s)"
                ),
                (run, entity),
            )
            runs = runs_of_input(receipts.fetchall(), name)
            forget = "DELETE FROM {kdb_fast_rejects} WHERE entity_name = %s AND run = ANY(%s)"
            return self.connection().execute(self.target.statement(forget), (entity, runs)).rowcount if runs else 0

        return self.retrying("forgetting older rejects", work)

    def clear_rejects(self, keys: Iterable[tuple[str, str]] | None = None) -> int:
        wanted = None if keys is None else [(self._name(entity), self._name(key)) for entity, key in keys]

        def work() -> int:
            with self.transaction() as cursor:
                if wanted is None:
                    return cursor.execute(self.target.statement("DELETE FROM {kdb_fast_rejects}")).rowcount
                statement = self.target.statement(
                    "DELETE FROM {kdb_fast_rejects} WHERE entity_name = %s AND record_id = %s"
                )
                return sum(cursor.execute(statement, key).rowcount for key in wanted)

        return self.retrying("clearing the rejects", work)


def _result_from_json(text: str | None) -> FlushResult:
    rows, size, deleted, lost, rejected = json.loads(text or "[0,0,0,[],[]]")
    return FlushResult(
        rows, size, deleted, tuple((s, r) for s, r in lost), tuple((s, r, why, how) for s, r, why, how in rejected)
    )
