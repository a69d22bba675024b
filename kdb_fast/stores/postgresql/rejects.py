"""PostgreSQL: records that could not be stored, with their reasons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...records import Key, Reject
from ...tables.target import Target
from .. import rejects as shared
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

WRITE = (
    f"INSERT {shared.INTO_TABLE} ON CONFLICT (entity_name, record_id, content_hash, position) "
    "DO UPDATE SET reason = EXCLUDED.reason, detail = EXCLUDED.detail, run = EXCLUDED.run, rejected_at = now()"
)


def write(cursor: psycopg.Cursor[tuple[Any, ...]], session: PgSession, run: int, rejects: Sequence[Reject]) -> None:
    """Keep rejected records, within a flush's transaction."""
    rows = [shared.row_of(reject, run, session.storable) for reject in rejects]
    cursor.executemany(session.target.statement(WRITE), rows)


def forget_stored(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, run: int) -> bool:
    """A record that a run has stored is no longer rejected; what this run itself rejected stays.

    Returns:
        Whether any rejects are left.
    """
    cursor.execute(
        target.statement(
            "DELETE FROM {kdb_fast_rejects} r USING {index} t WHERE t.{group} = r.entity_name "
            "AND t.{member} = r.record_id AND t.kdb_fast_run = %s AND r.run <> %s"
        ),
        (run, run),
    )
    row = cursor.execute(target.statement("SELECT EXISTS (SELECT FROM {kdb_fast_rejects})")).fetchone()
    return bool(row and row[0])


def forget_keys(cursor: psycopg.Cursor[tuple[Any, ...]], session: PgSession, run: int, stored: Iterable[Key]) -> bool:
    """As :func:`forget_stored`, where the keys are known: of few rejects and many rows those that are both."""
    target = session.target
    rejected = target.statement("SELECT entity_name, record_id FROM {kdb_fast_rejects} WHERE run <> %s")
    before = set(cursor.execute(rejected, (run,)).fetchall())
    gone = before.intersection(shared.key_columns(key, session.storable) for key in stored) if before else ()
    forget = target.statement("DELETE FROM {kdb_fast_rejects} WHERE entity_name = %s AND record_id = %s AND run <> %s")
    cursor.executemany(forget, [(*key, run) for key in gone])
    row = cursor.execute(target.statement("SELECT EXISTS (SELECT FROM {kdb_fast_rejects})")).fetchone()
    return bool(row and row[0])


def read(session: PgSession, entity: str | None) -> list[dict[str, Any]]:
    """See :meth:`kdb_fast.stores.base.Store.rejects`."""
    where = "" if entity is None else "WHERE entity_name = %s "
    values = () if entity is None else (session.storable(entity),)

    def work() -> list[dict[str, Any]]:
        statement = session.target.statement(shared.READ + where + shared.NEWEST_FIRST)
        return [shared.as_dictionary(row) for row in session.connection().execute(statement, values)]

    return session.retrying("reading the rejects", work)


def forget_older(session: PgSession, entities: Sequence[str], run: int) -> int:
    """See :meth:`kdb_fast.stores.base.Store.forget_older_rejects`."""
    names = [session.storable(entity) for entity in entities]
    statement = session.target.statement(
        "DELETE FROM {kdb_fast_rejects} WHERE entity_name = ANY(%s) AND run < %s AND record_id <> ''"
    )
    return session.retrying(
        "forgetting older rejects", lambda: session.connection().execute(statement, (names, run)).rowcount
    )


def forget_of_input(session: PgSession, entity: str, name: str, run: int) -> int:
    """See :meth:`kdb_fast.stores.base.Store.forget_rejects_of_input`."""
    entity = session.storable(entity)
    receipts = session.target.statement(shared.RECEIPTS)
    forget = session.target.statement("DELETE FROM {kdb_fast_rejects} WHERE entity_name = %s AND run = ANY(%s)")

    def work() -> int:
        runs = shared.runs_of_input(session.connection().execute(receipts, (run, entity)).fetchall(), name)
        return session.connection().execute(forget, (entity, runs)).rowcount if runs else 0

    return session.retrying("forgetting older rejects", work)


def clear(session: PgSession, keys: Iterable[Key] | None) -> int:
    """See :meth:`kdb_fast.stores.base.Store.clear_rejects`."""
    wanted = None if keys is None else [shared.key_columns(key, session.storable) for key in keys]

    def work() -> int:
        with session.transaction() as cursor:
            if wanted is None:
                return cursor.execute(session.target.statement("DELETE FROM {kdb_fast_rejects}")).rowcount
            statement = session.target.statement(
                "DELETE FROM {kdb_fast_rejects} WHERE entity_name = %s AND record_id = %s"
            )
            return sum(cursor.execute(statement, key).rowcount for key in wanted)

    return session.retrying("clearing the rejects", work)
