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
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..database import DatabaseAddress, connect_postgresql, redact
from ..errors import DatabaseError, LockedError, RecordError, ResourceError, SchemaError
from ..faults import fault
from ..records import Reject, storable_key
from ..slab import NO_STAMP
from . import pg_index, pg_prepare, pg_runs
from .base import FlushResult, FlushSlot, IndexOutcome, RunSpec, Store, Stored
from .pg_errors import classify, refusal
from .pg_flush import DROPPED, FlushWriter, delete_keys

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")

RETRY_SECONDS = 60.0
"""How long a flush tries to reach a database that went away: longer than a restart, shorter than patience."""


class PostgreSQLStore(Store):
    """One connection to a search index in PostgreSQL. Reconnects by itself where a repeat is safe."""

    dialect = "postgresql"
    has_vector_index = True

    def __init__(
        self,
        address: DatabaseAddress,
        role: str,
        *,
        retry_seconds: float = RETRY_SECONDS,
        borrowed: psycopg.Connection[tuple[Any, ...]] | None = None,
    ) -> None:
        """
        Args:
            address: The database.
            role: What the connection is for; shown in the server's list of sessions.
            retry_seconds: How long a lost database is waited for.
            borrowed: A connection of the caller's to use instead of an own one, within the caller's transaction.
        """
        self.address = address
        self._borrowed = borrowed
        self._role = role
        self._retry_seconds = retry_seconds
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._has_rejects = True
        self._merge_all = False
        self.on_wait: Callable[[str], None] = lambda what: None
        self.connection()

    def connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The connection, opened again if it was lost."""
        if self._borrowed is not None:
            return self._borrowed
        if self._connection is None or self._connection.closed:
            connection = connect_postgresql(self.address, role=self._role)
            # Behind a transaction-mode pooler a session setting would leak to others, so all are SET LOCAL.
            self._connection = connection
        return self._connection

    @contextlib.contextmanager
    def transaction(self) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        """A transaction whose waits for locks and for us are bounded."""
        connection = self.connection()
        with connection.transaction(), connection.cursor() as cursor:
            if self._borrowed is not None:
                # The caller's transaction keeps the caller's settings.
                yield cursor
                return
            cursor.execute("SET LOCAL lock_timeout = '30s'; SET LOCAL idle_in_transaction_session_timeout = '60s'")
            yield cursor

    def retrying(self, what: str, work: Callable[[], T]) -> T:
        """``work()``, again after a passing failure (lost connection, restart, deadlock) for a bounded time.

        Raises:
            DatabaseError, ResourceError, SchemaError, LockedError: what the last failure means for the user.
        """
        import psycopg

        deadline = time.monotonic() + self._retry_seconds
        delay, timeouts = 0.1, 0
        while True:
            try:
                return work()
            except (psycopg.Error, DatabaseError) as error:
                kind = classify(error)
                state = getattr(error, "sqlstate", None) or ""
                if isinstance(error, psycopg.Error) and kind == "data":
                    raise
                if kind == "passing" and state in ("57014", "55P03"):
                    timeouts += 1
                if kind != "passing" or time.monotonic() + delay > deadline or timeouts > 3:
                    raise self._explain(what, error, kind) from error
                if self._connection is not None and (self._connection.broken or self._connection.closed):
                    self._connection = None
                self.on_wait(f"waiting for the database ({what})")
                time.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter, not a secret
                delay = min(2 * delay, 3.0)

    def _explain(self, what: str, error: Exception, kind: str) -> Exception:
        if isinstance(error, (DatabaseError, LockedError)):
            return error
        state = getattr(error, "sqlstate", None) or "no SQLSTATE"
        diag = getattr(error, "diag", None)
        text = redact(" ".join(((diag and diag.message_primary) or str(error)).split()), self.address)
        if kind == "resource":
            return ResourceError(
                f"PostgreSQL ran out of a resource while {what}: {text} ({state}).",
                remedy="Free disk space or memory on the server, then run the same command again; a failed COPY "
                "leaves dead rows, so VACUUM kdb_search.",
            )
        if kind == "schema":
            return SchemaError(
                f"PostgreSQL refused {what}: {text} ({state}).",
                remedy="Was the table changed or a right revoked during the run? What was committed is kept.",
            )
        if state == "57014":
            return DatabaseError(
                f"A statement was cancelled each time while {what}: {text} ({state}).",
                remedy="Raise statement_timeout for this role, then run the same command again.",
            )
        if state == "55P03":
            return DatabaseError(
                f"A lock was not granted while {what}: {text} ({state}).",
                remedy="Another session holds a lock on kdb_search (see pg_locks); run the same command again later.",
            )
        return DatabaseError(
            f"The database was lost while {what}: {text} ({state}).",
            remedy="What was committed is safe; run the same command again.",
        )

    # -- before and after a run ------------------------------------------------------------------------

    def prepare(self, dimensions: int) -> None:
        pg_prepare.prepare(self, dimensions)

    def column_dimensions(self) -> int | None:
        row = (
            self.connection()
            .execute(
                "SELECT a.atttypmod FROM pg_attribute a WHERE a.attrelid = to_regclass('kdb_search') "
                "AND a.attname = 'embedding' AND a.atttypmod > 0"
            )
            .fetchone()
        )
        return int(row[0]) if row else None

    def begin_run(self, *, fingerprint: str, model: str, dimensions: int, wait: float) -> RunSpec:
        return pg_runs.begin(self, fingerprint=fingerprint, model=model, dimensions=dimensions, wait=wait)

    def heartbeat(self, run: int, phase: str) -> None:
        pg_runs.heartbeat(self, run, phase)

    def end_run(self, run: int, state: str, receipt: dict[str, Any]) -> None:
        pg_runs.end(self, run, state, receipt)

    def defer_index(self) -> str:
        return self.retrying("dropping the vector index", lambda: pg_index.defer(self))

    def finish_index(self, beat: Callable[[str], None]) -> IndexOutcome:
        return self.retrying("building the vector index", lambda: pg_index.finish(self, beat))

    def index_missing(self) -> bool:
        return pg_index.missing(self)

    def count(self, entity: str | None = None) -> int:
        def work() -> int:
            statement = "SELECT count(*) FROM kdb_search WHERE %s::text IS NULL OR entity_name = %s"
            row = self.connection().execute(statement, (entity, entity)).fetchone()
            return int(row[0]) if row else 0

        return self.retrying("counting rows", work)

    # -- reading ---------------------------------------------------------------------------------------

    def lookup(self, entity: str, record_ids: Sequence[str]) -> dict[str, Stored]:
        def work() -> dict[str, Stored]:
            rows = self.connection().execute(
                "SELECT record_id, sha256(convert_to(content, 'UTF8')), "
                "CASE WHEN embedding IS NOT NULL AND kdb_fast_at = updated_at THEN kdb_fast_fingerprint END, "
                "(extract(epoch FROM updated_at) * 1000000)::bigint "
                "FROM kdb_search WHERE entity_name = %s AND record_id = ANY(%s)",
                (entity, list(record_ids)),
            )
            return {r[0]: Stored(r[1], r[2], NO_STAMP if r[3] is None else r[3]) for r in rows}

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

        try:
            return self.retrying("writing", lambda: self._flush_once(run, number, slots, rejects, deletes, False))
        except psycopg.Error:
            # A row that the database refuses: find it by halving; all others are written.
            return self.retrying("writing", lambda: self._flush_once(run, number, slots, rejects, deletes, True))

    def _flush_once(
        self,
        run: RunSpec,
        number: int,
        slots: Sequence[FlushSlot],
        rejects: Sequence[Reject],
        deletes: Sequence[tuple[str, str]],
        careful: bool,
    ) -> FlushResult:
        fault("store.before_begin")
        with self.transaction() as cursor:
            state = cursor.execute(
                "UPDATE kdb_fast_runs SET heartbeat_at = clock_timestamp(), phase = 'write' "
                "WHERE run = %s AND state = 'running' "
                "RETURNING last_flush, last_result, (extract(epoch FROM now()) * 1000000)::bigint",
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
            writer = FlushWriter(cursor, run, state[2], merge_all=self._merge_all)
            for flush_slot in slots:
                writer.add(flush_slot)
            fault("store.before_copy")
            writer.write(careful)
            self._merge_all = self._merge_all or writer.met_conflict
            fault("store.after_copy")
            deleted = delete_keys(cursor, deletes)
            self._write_rejects(cursor, run, rejects, slots, writer.rejected)
            if self._has_rejects:
                self._forget_rejects(cursor, run)
            result = FlushResult(writer.rows, writer.bytes, deleted, tuple(writer.lost), tuple(writer.rejected))
            cursor.execute(
                "UPDATE kdb_fast_runs SET last_flush = %s, last_result = %s WHERE run = %s",
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
            "INSERT INTO kdb_fast_rejects (entity_name, record_id, content_hash, reason, detail, position, run) "
            "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (entity_name, record_id, content_hash, position) "
            "DO UPDATE SET reason = EXCLUDED.reason, detail = EXCLUDED.detail, run = EXCLUDED.run, rejected_at = now()",
            [
                (storable_key(r.entity), storable_key(r.record_id), r.content_hash, r.reason,
                 storable_key(r.detail, 500), r.position, run.number)
                for r in rows
            ],
        )  # fmt: skip
        self._has_rejects = True

    def _forget_rejects(self, cursor: psycopg.Cursor[tuple[Any, ...]], run: RunSpec) -> None:
        """A record that is stored now is no longer rejected."""
        cursor.execute(
            "DELETE FROM kdb_fast_rejects r USING kdb_search t WHERE t.entity_name = r.entity_name "
            "AND t.record_id = r.record_id AND t.kdb_fast_run = %s AND r.run <> %s",
            (run.number, run.number),
        )
        row = cursor.execute("SELECT EXISTS (SELECT FROM kdb_fast_rejects)").fetchone()
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
            row = cursor.execute("SELECT (extract(epoch FROM now()) * 1000000)::bigint").fetchone()
            assert row is not None
            writer = FlushWriter(cursor, run, row[0], merge_all=True, force=True, vectors=vectors)
            for flush_slot in slots:
                writer.add(flush_slot)
            try:
                writer.write(False)
            except psycopg.Error as error:
                if classify(error) != "data":
                    raise self._explain("writing", error, classify(error)) from error
                reason, detail = refusal(error)
                raise RecordError(
                    f"A record was refused ({reason}): {detail}.", remedy="Nothing of the batch was stored."
                ) from None
            if writer.lost or writer.rejected:
                reason, detail = DROPPED
                raise RecordError(
                    f"A record was refused ({reason}): {detail}.", remedy="Nothing of the batch was stored."
                )
            delete_keys(cursor, deletes)

    def prune(self, entity: str) -> int:
        return self.retrying("removing deleted records", lambda: pg_prepare.prune(self, entity))

    def interrupt(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.cancel_safe(timeout=2.0)

    def close(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
            self._connection = None

    def rejects(self, entity: str | None = None) -> Iterable[dict[str, Any]]:
        names = ("entity", "record_id", "reason", "detail", "position", "run", "rejected_at", "content_hash")
        rows = self.connection().execute(
            "SELECT entity_name, record_id, reason, detail, position, run, rejected_at, encode(content_hash, 'hex') "
            "FROM kdb_fast_rejects WHERE %s::text IS NULL OR entity_name = %s ORDER BY run DESC, position, record_id",
            (entity, entity),
        )
        return [dict(zip(names, row, strict=True)) for row in rows]

    def clear_rejects(self, keys: Iterable[tuple[str, str]] | None = None) -> int:
        connection = self.connection()
        if keys is None:
            return connection.execute("DELETE FROM kdb_fast_rejects").rowcount
        total = 0
        for entity, record_id in keys:
            total += connection.execute(
                "DELETE FROM kdb_fast_rejects WHERE entity_name = %s AND record_id = %s", (entity, record_id)
            ).rowcount
        return total


def _result_from_json(text: str | None) -> FlushResult:
    rows, size, deleted, lost, rejected = json.loads(text or "[0,0,0,[],[]]")
    return FlushResult(
        rows, size, deleted, tuple((s, r) for s, r in lost), tuple((s, r, why, how) for s, r, why, how in rejected)
    )
