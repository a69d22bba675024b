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
from ..errors import DatabaseError, LockedError, ResourceError, SchemaError
from ..faults import fault
from ..records import Reject, storable_key
from ..slab import NO_STAMP
from . import pg_index, pg_prepare, pg_runs, pgcopy
from .base import FlushResult, FlushSlot, IndexOutcome, RunSpec, Store, Stored

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")

RETRY_SECONDS = 60.0
"""How long a flush tries to reach a database that went away: longer than a restart, shorter than patience."""

STAGING_COLUMNS = 10
TABLE_COLUMNS = 12

COPY_TABLE = (
    "COPY kdb_search (id, entity_name, record_id, content, embedding, model, dimensions, updated_at, "
    "kdb_fast_fingerprint, kdb_fast_run, kdb_fast_at, kdb_fast_source_at) FROM STDIN (FORMAT BINARY)"
)
CREATE_STAGING = (
    "CREATE TEMP TABLE kdb_fast_staging (slot int4, row int4, known bool, stamp timestamptz, id varchar(36), "
    "entity_name varchar(255), record_id varchar(36), content text, embedding vector, source_at timestamptz) "
    "ON COMMIT DROP"
)
COPY_STAGING = "COPY kdb_fast_staging FROM STDIN (FORMAT BINARY)"
MERGE_KNOWN = """
UPDATE kdb_search t SET content = s.content, embedding = s.embedding, model = %(model)s,
  dimensions = %(dimensions)s, updated_at = now(), kdb_fast_fingerprint = %(fingerprint)s,
  kdb_fast_run = %(run)s, kdb_fast_at = now(), kdb_fast_source_at = s.source_at
FROM kdb_fast_staging s
WHERE t.entity_name = s.entity_name AND t.record_id = s.record_id
  AND ((s.known AND t.updated_at IS NOT DISTINCT FROM s.stamp)
       OR (t.kdb_fast_run = %(run)s AND t.kdb_fast_at = t.updated_at))
"""
MERGE_MISSING = """
INSERT INTO kdb_search (id, entity_name, record_id, content, embedding, model, dimensions, updated_at,
  kdb_fast_fingerprint, kdb_fast_run, kdb_fast_at, kdb_fast_source_at)
SELECT s.id, s.entity_name, s.record_id, s.content, s.embedding, %(model)s, %(dimensions)s, now(),
  %(fingerprint)s, %(run)s, now(), s.source_at
FROM kdb_fast_staging s
WHERE NOT EXISTS (SELECT FROM kdb_search t WHERE t.entity_name = s.entity_name AND t.record_id = s.record_id)
ON CONFLICT (entity_name, record_id) DO NOTHING
"""
LOST_ROWS = """
SELECT s.slot, s.row FROM kdb_fast_staging s
WHERE NOT EXISTS (SELECT FROM kdb_search t WHERE t.entity_name = s.entity_name AND t.record_id = s.record_id
                  AND t.kdb_fast_run = %(run)s AND t.kdb_fast_at = now())
ORDER BY s.slot, s.row
"""


class PostgreSQLStore(Store):
    """One connection to a search index in PostgreSQL. Reconnects by itself where a repeat is safe."""

    dialect = "postgresql"
    has_vector_index = True

    def __init__(self, address: DatabaseAddress, role: str, *, retry_seconds: float = RETRY_SECONDS) -> None:
        self.address = address
        self._role = role
        self._retry_seconds = retry_seconds
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None
        self._has_rejects = True
        self._merge_all = False
        self.on_wait: Callable[[str], None] = lambda what: None
        self.connection()

    def connection(self) -> psycopg.Connection[tuple[Any, ...]]:
        """The connection, opened again if it was lost."""
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
            writer = _FlushWriter(cursor, run, state[2], merge_all=self._merge_all)
            for flush_slot in slots:
                writer.add(flush_slot)
            fault("store.before_copy")
            writer.write(careful)
            self._merge_all = self._merge_all or writer.met_conflict
            fault("store.after_copy")
            deleted = _delete(cursor, deletes)
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


class _FlushWriter:
    """Rows of one flush on their way into the tables, within the flush's transaction."""

    def __init__(self, cursor: psycopg.Cursor[tuple[Any, ...]], run: RunSpec, now: int, *, merge_all: bool) -> None:
        self.cursor, self.run, self.now = cursor, run, now
        self.met_conflict = False
        self.rows = self.bytes = 0
        self.lost: list[tuple[int, int]] = []
        self.rejected: list[tuple[int, int, str, str]] = []
        self._merge_all = merge_all
        self._fresh: list[tuple[FlushSlot, list[int]]] = []
        self._known: list[tuple[FlushSlot, list[int]]] = []
        stamp = pgcopy.timestamp_field(now)
        self._constant = (
            pgcopy.text_field(run.model[:100])
            + pgcopy.int_field(run.dimensions, 4)
            + stamp
            + pgcopy.text_field(run.fingerprint)
            + pgcopy.int_field(run.number, 8)
            + stamp
        )

    def add(self, flush_slot: FlushSlot) -> None:
        known = flush_slot.slot.known[: flush_slot.slot.rows].tolist()
        for group, wanted in ((self._fresh, 0), (self._known, 1)):
            rows = [i for i, k in enumerate(known) if k == wanted and i not in flush_slot.skip]
            if rows:
                group.append((flush_slot, rows))

    def write(self, careful: bool) -> None:
        import psycopg

        fresh, known = self._fresh, self._known
        if fresh and not careful and not self._merge_all:
            try:
                with self.cursor.connection.transaction():
                    self._copy(COPY_TABLE, (self._table_rows(s, rows) for s, rows in fresh))
                self.rows += sum(len(rows) for _, rows in fresh)
                fresh = []
            except psycopg.errors.UniqueViolation:
                # Somebody else indexed one of these since the parent looked: merge decides whose is newer.
                self.met_conflict = True
        if fresh or known:
            self._merge([*fresh, *known], careful)

    def _merge(self, groups: list[tuple[FlushSlot, list[int]]], careful: bool) -> None:
        cursor, parameters = self.cursor, self._parameters()
        if careful:
            for flush_slot, rows in groups:
                self._merge_halving(flush_slot, rows)
            return
        staged = self._stage(groups)
        done = self._merge_staged(parameters)
        if done != staged:
            self.lost += [(r[0], r[1]) for r in cursor.execute(LOST_ROWS, parameters)]
        self.rows += staged - len(self.lost)

    def _stage(self, groups: list[tuple[FlushSlot, list[int]]]) -> int:
        self.cursor.execute(CREATE_STAGING)
        self._copy(COPY_STAGING, (self._staging_rows(s, rows) for s, rows in groups))
        # Without this a flush of some thousand rows may be joined by reading the whole index (2 KB a row).
        self.cursor.execute(
            "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; "
            "ANALYZE kdb_fast_staging (entity_name, record_id)"
        )
        return sum(len(rows) for _, rows in groups)

    def _merge_staged(self, parameters: dict[str, Any]) -> int:
        return (
            self.cursor.execute(MERGE_KNOWN, parameters).rowcount
            + self.cursor.execute(MERGE_MISSING, parameters).rowcount
        )

    def _merge_halving(self, flush_slot: FlushSlot, rows: list[int]) -> None:
        """Merge what can be merged; halve on refusal until the single rows that are refused are found."""
        import psycopg

        try:
            with self.cursor.connection.transaction():
                staged = self._stage([(flush_slot, rows)])
                done = self._merge_staged(self._parameters())
                lost: list[tuple[int, int]] = []
                if done != staged:
                    lost = [(r[0], r[1]) for r in self.cursor.execute(LOST_ROWS, self._parameters())]
                self.cursor.execute("DROP TABLE kdb_fast_staging")
            self.lost += lost
            self.rows += staged - len(lost)
        except psycopg.Error as error:
            if classify(error) != "data":
                raise
            if len(rows) == 1:
                self.rejected.append((flush_slot.slot.number, rows[0], *refusal(error)))
                return
            middle = len(rows) // 2
            self._merge_halving(flush_slot, rows[:middle])
            self._merge_halving(flush_slot, rows[middle:])

    def _parameters(self) -> dict[str, Any]:
        run = self.run
        return {
            "run": run.number,
            "model": run.model[:100],
            "dimensions": run.dimensions,
            "fingerprint": run.fingerprint,
        }

    def _copy(self, statement: str, chunks: Iterable[bytes]) -> None:
        with self.cursor.copy(statement) as copy:
            copy.write(pgcopy.SIGNATURE)
            for chunk in chunks:
                self.bytes += len(chunk)
                copy.write(chunk)
            copy.write(pgcopy.TRAILER)

    def _keys_and_texts(self, flush_slot: FlushSlot, rows: list[int]) -> list[bytes]:
        raw = flush_slot.slot.raw_rows()
        size = int.to_bytes
        return [
            b"%b%b%b%b%b%b" % (size(len(e), 4, "big"), e, size(len(r), 4, "big"), r, size(len(c), 4, "big"), c)
            for e, r, c in ([raw[i] for i in rows] if len(rows) < len(raw) else raw)
        ]

    def _table_rows(self, flush_slot: FlushSlot, rows: list[int]) -> bytes:
        slot = flush_slot.slot
        return pgcopy.pack_rows(
            TABLE_COLUMNS,
            [
                pgcopy.uuid4_fields(len(rows)),
                self._keys_and_texts(flush_slot, rows),
                pgcopy.vector_fields(slot.vectors[rows]),
                self._constant,
                pgcopy.timestamp_fields(slot.source[rows]),
            ],
            len(rows),
        )

    def _staging_rows(self, flush_slot: FlushSlot, rows: list[int]) -> bytes:
        slot = flush_slot.slot
        number = pgcopy.int_field(slot.number, 4)
        flags = (b"\0\0\0\1\0", b"\0\0\0\1\1")
        return pgcopy.pack_rows(
            STAGING_COLUMNS,
            [
                [number + pgcopy.int_field(i, 4) + flags[int(slot.known[i])] for i in rows],
                pgcopy.timestamp_fields(slot.stamp[rows]),
                pgcopy.uuid4_fields(len(rows)),
                self._keys_and_texts(flush_slot, rows),
                pgcopy.vector_fields(slot.vectors[rows]),
                pgcopy.timestamp_fields(slot.source[rows]),
            ],
            len(rows),
        )


def _delete(cursor: psycopg.Cursor[tuple[Any, ...]], keys: Sequence[tuple[str, str]]) -> int:
    if not keys:
        return 0
    return cursor.execute(
        "DELETE FROM kdb_search t USING unnest(%s::text[], %s::text[]) AS k(entity, id) "
        "WHERE t.entity_name = k.entity AND t.record_id = k.id",
        ([k[0] for k in keys], [k[1] for k in keys]),
    ).rowcount


def _result_from_json(text: str | None) -> FlushResult:
    rows, size, deleted, lost, rejected = json.loads(text or "[0,0,0,[],[]]")
    return FlushResult(
        rows, size, deleted, tuple((s, r) for s, r in lost), tuple((s, r, why, how) for s, r, why, how in rejected)
    )


def classify(error: BaseException) -> str:
    """What an error means for a flush: ``data`` (a row is at fault), ``passing``, ``resource`` or ``schema``."""
    import psycopg

    if isinstance(error, DatabaseError):
        return "passing"
    state = getattr(error, "sqlstate", None)
    if state is None:
        # No SQLSTATE: libpq lost the connection, or psycopg itself could not do something.
        return "passing" if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)) else "schema"
    if state in ("53100", "53200") or state.startswith("58"):
        return "resource"
    if state[:2] in ("08", "57", "40", "53") or state in ("55P03", "25006", "25P03", "55006"):
        return "passing"
    if state[:2] in ("22", "23", "21", "54", "P0", "44", "09", "27"):
        return "data"
    return "schema"


def refusal(error: psycopg.Error) -> tuple[str, str]:
    """(reason, detail) of a refused row, without the row's text: the server's DETAIL may quote it."""
    names = {
        "22021": "bad_encoding", "22P05": "bad_encoding", "22001": "too_long", "23502": "not_null",
        "23503": "foreign_key", "23505": "unique", "23514": "check", "54000": "too_large", "22000": "bad_vector",
    }  # fmt: skip
    state = error.sqlstate or "unknown"
    constraint = error.diag.constraint_name
    detail = f"the database refused the row with SQLSTATE {state}"
    if constraint:
        detail += f", constraint {constraint}"
    return names.get(state, "database_refused"), detail
