"""PostgreSQL: create what is missing of the tables, and prune."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import SchemaError
from ...faults import fault
from ...tables import kdb_search, seal
from ...tables.hidden_rows import check_whole
from ...tables.reading import rows_of
from ...tables.target import OWN, LiveRows, Params, Target, identifier, other_indexes, rows_on
from ..runs import Holder, wait_for_lock
from . import locks, migrate
from . import runs as pg_runs
from .check import check_kind, check_rights, check_table, column_names, exists, vector_version
from .index_catalog import free_name
from .seal import find_causes
from .session import PgSession, read_only

if TYPE_CHECKING:
    import psycopg

PRUNE_BATCH = 10_000
"""Rows deleted in one transaction: short enough not to hold up other writers for long."""


Make = Callable[["psycopg.Cursor[tuple[Any, ...]]", Target], tuple[str, ...]]
"""Checks the table of the vectors and makes what is missing for it; returns what the user should know."""


def prepare(session: PgSession, make: Make, wait: float, tables: tuple[str, ...]) -> tuple[str, ...]:
    """See :meth:`kdb_fast.stores.base.Store.prepare`.

    Args:
        make: Called within a transaction; nothing is made if it refuses.
        tables: Those of our schema that ``make`` makes or checks.
    """

    def attempt() -> tuple[str, ...] | Holder:
        return session.retrying("preparing the tables", lambda: _prepare(session, make, tables))

    return wait_for_lock(attempt, wait, session.on_wait)


def _prepare(session: PgSession, make: Make, tables: tuple[str, ...]) -> tuple[str, ...] | Holder:
    """What the user should know; or the run that keeps our own tables from being changed."""
    import psycopg

    notes: tuple[str, ...] | None = None
    try:
        while True:
            with session.transaction() as cursor:
                if cursor.execute("SELECT current_setting('transaction_read_only')").fetchone() == ("on",):
                    raise read_only()
                cursor.execute("SET LOCAL default_tablespace TO DEFAULT")  # tables are made where the user's would be
                locks.take(cursor)
                migration = migrate.find_next(cursor, session.target)
                holder = pg_runs.living(cursor, session.target) if migration is not None else None
                if holder is not None:
                    return holder
                if notes is None:
                    _extension(cursor)
                    notes = make(cursor, session.find_target())
                if migration is None:
                    check_rights(cursor, session.target, tables)
                    return notes
                migrate.apply(cursor, session.target, migration)
            fault("store.migrated")
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"The role {session.connection().info.user!r} may not prepare the index: {error.diag.message_primary}.",
            remedy=f"Run once as the owner of the schema, or let the owner run: GRANT CREATE ON SCHEMA "
            f"{session.target.shown()} TO …; ALTER TABLE {session.target.index_shown} OWNER TO …;",
        ) from None
    except psycopg.errors.ReadOnlySqlTransaction:
        raise read_only() from None
    except psycopg.errors.LockNotAvailable as error:
        raise _locked(session, error) from None


def _locked(session: PgSession, error: psycopg.Error) -> SchemaError:
    """Who holds what we have waited for, and what to do about it."""
    with session.transaction() as cursor:
        target = session.target
        names = (target.index.name, *OWN)
        blocker = locks.find_blocker(cursor, {target.shown(name): target.regclass(name) for name in names})
    if blocker is None:
        return SchemaError(
            f"Cannot prepare the index: another session held a lock for too long ({error.diag.message_primary}).",
            remedy="It has ended by now; run the same command again.",
        )
    return SchemaError(
        f"Cannot prepare the index: {blocker.who} holds {blocker.what}, and did not give it free in time.",
        remedy=f"Run the same command again once it has ended, or end it: SELECT pg_terminate_backend({blocker.pid});",
    )


def _others(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> tuple[str, ...]:
    """A note on other indexes that the search path shows, before one is made in this schema."""
    found = other_indexes(rows_of(cursor.connection, target.dialect), target)
    if not found:
        return ()
    return (
        f"The index was made in {target.index_shown}, the schema of the records. Another one on the search_path, "
        f"{', '.join(found)}, is left as it is, whoever made it: see whether rows of this schema's records are in it.",
    )


def _extension(cursor: psycopg.Cursor[tuple[Any, ...]]) -> None:
    import psycopg

    row = cursor.execute(
        "SELECT n.nspname::text, has_schema_privilege(n.oid, 'USAGE'), current_user::text FROM pg_extension e "
        "JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
    ).fetchone()
    if row is None:
        # Not into a tenant's schema where there is a choice: dropping that would take the others' vectors along.
        found = cursor.execute("SELECT 'public' = ANY (current_schemas(false))").fetchone()
        schema_clause = b" SCHEMA public" if found and found[0] else b""
        try:
            with cursor.connection.transaction():
                cursor.execute(b"CREATE EXTENSION vector" + schema_clause)
        except psycopg.errors.InsufficientPrivilege:
            raise SchemaError(
                "The extension pgvector is not installed in this database, and this role may not install it.",
                remedy="Let a superuser run in this database: CREATE EXTENSION vector;",
            ) from None
        except psycopg.Error:
            raise SchemaError(
                "The extension pgvector is not available on this server; kdb-fast needs version 0.5.0 or newer.",
                remedy="Install pgvector on the server (package postgresql-NN-pgvector), then CREATE EXTENSION vector;",
            ) from None
    elif not row[1]:
        raise SchemaError(
            f"The extension pgvector is installed in the schema {Target(row[0]).shown()}, which the role "
            f"{row[2]!r} may not use.",
            remedy=f"Let its owner run: GRANT USAGE ON SCHEMA {Target(row[0]).shown()} TO {row[2]};",
        )
    version = vector_version(cursor)
    if version < (0, 5, 0):
        raise SchemaError(
            f"pgvector is version {'.'.join(map(str, version))}; kdb-fast needs 0.5.0 or newer (HNSW).",
            remedy="Upgrade the package, then: ALTER EXTENSION vector UPDATE;",
        )


def search_table(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, dimensions: int) -> tuple[str, ...]:
    """Check the search table or make it, and add our columns; what the user should know."""
    notes: tuple[str, ...] = ()
    if exists(cursor, target, target.index.name):
        check_kind(cursor, target, target.index.name)
        check_table(cursor, target, dimensions)
    else:
        name = target.index_regclass
        if cursor.execute("SELECT to_regtype(%s) IS NOT NULL", (name,)).fetchone() == (True,):
            raise SchemaError(
                f"{target.index_shown} is a data type; expected a table, whose rows are of such a type.",
                remedy="Rename it, or use another schema or database for this index.",
            )
        notes = _others(cursor, target)
        if dimensions > 2000:
            raise SchemaError(
                f"The model gives {dimensions} dimensions; a pgvector HNSW index holds at most 2000.",
                remedy="Choose a model with at most 2000 dimensions, or ask an API for fewer: --dimensions N.",
            )
        cursor.execute(target.statement(kdb_search.POSTGRESQL_SEARCH, dimensions=str(int(dimensions))))
        for name, using in kdb_search.postgresql_indexes(target.index).items():
            # An earlier table that was renamed keeps its indexes, and so their names.
            free = identifier(free_name(cursor, target.index_schema, name))
            cursor.execute(target.statement("CREATE INDEX {name} ON {index} " + using, name=free))
    have = column_names(cursor, target, target.index.name)
    wanted = [f"ADD COLUMN {name} {kind}" for name, kind in kdb_search.POSTGRESQL_COLUMNS.items() if name not in have]
    if wanted:
        # Nullable columns without a default: no row is rewritten, the lock is held for milliseconds.
        cursor.execute(target.statement("ALTER TABLE {index} " + ", ".join(wanted)))
    if seal.COLUMN not in have and find_causes(cursor, target) and _owns_table(cursor, target):
        cursor.execute(target.statement(f"ALTER TABLE {{index}} ADD COLUMN {seal.COLUMN} bytea"))
    return notes


def _owns_table(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> bool:
    """Whether this role may drop and create indexes of the search table."""
    row = cursor.execute(
        "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(%s)",
        (target.index_regclass,),
    ).fetchone()
    return bool(row and row[0])


def prune(session: PgSession, entity: str, live_rows: LiveRows) -> int:
    """See :meth:`kdb_fast.stores.base.Store.prune`."""
    total = 0
    while True:
        fault("store.prune")
        with session.transaction() as cursor:
            # One snapshot: an entity that moves to a table of its own meanwhile must not look empty. And what a policy
            # hides must not look deleted: in this transaction hiding is an error.
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SET LOCAL row_security = off")
            deleted = _prune_once(cursor, session.target, entity, live_rows)
        total += deleted
        if deleted < PRUNE_BATCH:
            return total


def _prune_once(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, entity: str, live_rows: LiveRows) -> int:
    rows, params = rows_on(cursor, target.dialect), Params(target.dialect)
    check_whole(rows, target, (target.index.name,))
    live = live_rows(rows, target, entity, params)
    if live is None:
        return 0
    statement = target.statement(
        # By their keys: in another partition another row has the same ctid.
        "DELETE FROM {index} WHERE {group} = {entity} AND {member} = ANY (ARRAY(SELECT s.{member} "
        "FROM {index} s WHERE s.{group} = {entity} AND NOT {live} LIMIT {batch}))",
        entity=params(entity),
        live=live,
        batch=params(PRUNE_BATCH),
    )
    return cursor.execute(statement, params.values).rowcount
