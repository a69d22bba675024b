"""PostgreSQL: check the search tables before anything is embedded, create what is missing, prune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import SchemaError
from ..faults import fault
from . import schema
from .base import TABLE

if TYPE_CHECKING:
    import psycopg
    from psycopg import sql

    from .postgresql import PostgreSQLStore

DDL_LOCK = 0x6B64625F66617374
"""Key of the advisory lock ("kdb_fast") that keeps two first runs from creating the same table at once."""

PRUNE_BATCH = 10_000
"""Rows deleted in one transaction: short enough not to hold up other writers for long."""

NEEDED_COLUMNS = ("id", "entity_name", "record_id", "content", "embedding", "model", "dimensions", "created_at",
                  "updated_at")  # fmt: skip


def prepare(store: PostgreSQLStore, dimensions: int) -> None:
    """See :meth:`kdb_fast.stores.base.Store.prepare`."""
    import psycopg

    try:
        with store.transaction() as cursor:
            if cursor.execute("SELECT current_setting('transaction_read_only')").fetchone() == ("on",):
                raise _read_only()
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
            _extension(cursor)
            if _exists(cursor, TABLE):
                _check_table(cursor, dimensions)
            else:
                if dimensions > 2000:
                    raise SchemaError(
                        f"The model gives {dimensions} dimensions; a pgvector HNSW index holds at most 2000.",
                        remedy="Choose a model with at most 2000 dimensions.",
                    )
                cursor.execute(schema.POSTGRESQL_SEARCH.format(dimensions=int(dimensions)).encode())
                for statement in schema.POSTGRESQL_PLAIN_INDEXES.values():
                    cursor.execute(statement.encode())
                for statement in schema.POSTGRESQL_SEARCH_INDEXES.values():
                    cursor.execute(statement.encode())
            _own_parts(cursor)
            _check_rights(cursor)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"The role {store.connection().info.user!r} may not prepare the index: {error.diag.message_primary}.",
            remedy="Run once as the owner of the schema, or let the owner run: GRANT CREATE ON SCHEMA public TO "
            "…; ALTER TABLE kdb_search OWNER TO …;",
        ) from None
    except psycopg.errors.ReadOnlySqlTransaction:
        raise _read_only() from None
    except psycopg.errors.LockNotAvailable:
        raise SchemaError(
            "The search table is locked by another session for more than 30 s.",
            remedy="See pg_locks and pg_stat_activity for who holds it; run the same command again later.",
        ) from None


def check(store: PostgreSQLStore, dimensions: int) -> None:
    """Raise SchemaError if the search table is not, or no longer, what rows of this length can be written to."""
    with store.transaction() as cursor:
        _check_table(cursor, dimensions)


def _read_only() -> SchemaError:
    return SchemaError(
        "The server is read-only (a standby, or default_transaction_read_only is on).",
        remedy="Give the address of the primary server, or add target_session_attrs=read-write.",
    )


def _exists(cursor: psycopg.Cursor[tuple[Any, ...]], table: str) -> bool:
    row = cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (table,)).fetchone()
    return bool(row and row[0])


def _extension(cursor: psycopg.Cursor[tuple[Any, ...]]) -> None:
    import psycopg

    row = cursor.execute(
        "SELECT e.extversion, n.nspname = ANY (current_schemas(true)) FROM pg_extension e "
        "JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector'"
    ).fetchone()
    if row is None:
        try:
            with cursor.connection.transaction():
                cursor.execute("CREATE EXTENSION vector")
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
            "The extension pgvector is installed in a schema that is not on the search_path.",
            remedy="Add its schema: ALTER ROLE … SET search_path = public, extensions;",
        )
    version = vector_version(cursor)
    if version < (0, 5, 0):
        raise SchemaError(
            f"pgvector is version {'.'.join(map(str, version))}; kdb-fast needs 0.5.0 or newer (HNSW).",
            remedy="Upgrade the package, then: ALTER EXTENSION vector UPDATE;",
        )


def vector_version(cursor: psycopg.Cursor[tuple[Any, ...]]) -> tuple[int, ...]:
    """Version of pgvector in this database, for example (0, 8, 5)."""
    row = cursor.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    return tuple(int(part) for part in str(row[0] if row else "0").split(".") if part.isdigit())


def _check_table(cursor: psycopg.Cursor[tuple[Any, ...]], dimensions: int) -> None:
    columns: dict[str, tuple[str, int]] = {
        r[0]: (r[1], r[2])
        for r in cursor.execute(
            "SELECT a.attname, t.typname, a.atttypmod FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped",
            (TABLE,),
        )
    }
    missing = [name for name in NEEDED_COLUMNS if name not in columns]
    if missing:
        raise SchemaError(
            f"The table {TABLE} has no column {', '.join(missing)}; expected KameleonDB's search table.",
            remedy=f"Is {TABLE} another program's table? Use another schema or database for this index.",
        )
    kind, found = columns["embedding"]
    if kind != "vector":
        raise SchemaError(
            f"{TABLE}.embedding is of type {kind}; expected vector({dimensions}).",
            remedy=f"Move the table away (ALTER TABLE {TABLE} RENAME TO {TABLE}_old;); it is created anew.",
        )
    if found == -1:
        row = cursor.execute(
            f"SELECT vector_dims(embedding) FROM (SELECT embedding FROM {TABLE} WHERE embedding IS NOT NULL LIMIT 1000)"  # noqa: S608 - constant
            " s WHERE vector_dims(embedding) <> %s LIMIT 1",
            (dimensions,),
        ).fetchone()
        found = int(row[0]) if row else dimensions
    if found != dimensions:
        raise SchemaError(
            f"{TABLE}.embedding holds vectors of {found} dimensions; the model gives {dimensions}.",
            remedy=f"Choose a --model with {found} dimensions, or change the column and lose the old vectors: "
            f"DROP INDEX IF EXISTS {schema.VECTOR_INDEX}; ALTER TABLE {TABLE} ALTER COLUMN embedding "
            f"TYPE vector({dimensions}) USING NULL;",
        )
    row = cursor.execute(
        "SELECT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = to_regclass(%s) AND i.indisunique "
        "AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 2 AND ARRAY(SELECT a.attname::text "
        "FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::int2[]) ORDER BY 1) "
        "= ARRAY['entity_name', 'record_id'])",
        (TABLE,),
    ).fetchone()
    if not (row and row[0]):
        raise SchemaError(
            f"{TABLE} has no unique constraint on (entity_name, record_id); without it records could be doubled.",
            remedy=f"Run: ALTER TABLE {TABLE} ADD UNIQUE (entity_name, record_id);",
        )


def _own_parts(cursor: psycopg.Cursor[tuple[Any, ...]]) -> None:
    have = {
        r[0]
        for r in cursor.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND NOT attisdropped", (TABLE,)
        )
    }
    wanted = [f"ADD COLUMN {name} {kind}" for name, kind in schema.POSTGRESQL_COLUMNS.items() if name not in have]
    if wanted:
        # Nullable columns without a default: no row is rewritten, the lock is held for milliseconds.
        cursor.execute(f"ALTER TABLE {TABLE} {', '.join(wanted)}".encode())
    for table, statement in zip(("kdb_fast_runs", "kdb_fast_rejects", "kdb_fast_state"), schema.POSTGRESQL_OWN,
                                strict=True):  # fmt: skip
        if not _exists(cursor, table):
            cursor.execute(statement.encode())


def _check_rights(cursor: psycopg.Cursor[tuple[Any, ...]]) -> None:
    lacking = [
        f"{right} ON {table}"
        for table in (TABLE, "kdb_fast_runs", "kdb_fast_rejects", "kdb_fast_state")
        for right, has in cursor.execute(
            "SELECT r, has_table_privilege(%s, r) FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) r",
            (table,),
        ).fetchall()
        if not has
    ]
    row = cursor.execute("SELECT has_database_privilege(current_database(), 'TEMP'), current_user").fetchone()
    assert row is not None
    if not row[0]:
        lacking.append("TEMP ON DATABASE (this one)")
    if lacking:
        raise SchemaError(
            f"The role {row[1]!r} lacks rights: {', '.join(lacking)}.",
            remedy="Let the owner run: "
            + " ".join(f"GRANT {right} TO {row[1]};" for right in lacking).replace(" (this one)", " …"),
        )


def owns_table(cursor: psycopg.Cursor[tuple[Any, ...]]) -> bool:
    """Whether this role may drop and create indexes of the search table."""
    row = cursor.execute(
        "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(%s)", (TABLE,)
    ).fetchone()
    return bool(row and row[0])


def prune(store: PostgreSQLStore, entity: str) -> int:
    """See :meth:`kdb_fast.stores.base.Store.prune`."""
    total = 0
    while True:
        fault("store.prune")
        with store.transaction() as cursor:
            # One snapshot: an entity that moves to a table of its own meanwhile must not look empty.
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            statement, parameters = _prune_statement(cursor, entity)
            deleted = cursor.execute(statement, parameters).rowcount if statement is not None else 0
        total += deleted
        if deleted < PRUNE_BATCH:
            return total


def _prune_statement(
    cursor: psycopg.Cursor[tuple[Any, ...]], entity: str
) -> tuple[sql.Composed | None, dict[str, Any]]:
    from psycopg import sql

    row = cursor.execute(
        "SELECT id, storage_mode, dedicated_table_name FROM kdb_entity_definitions WHERE name = %s", (entity,)
    ).fetchone()
    if row is None:
        return None, {}
    entity_id, mode, dedicated = row
    shared = "EXISTS (SELECT FROM kdb_records r WHERE r.id = t.record_id AND r.entity_id = %(entity_id)s"
    live: sql.Composable = sql.SQL(shared + " AND NOT r.is_deleted)")
    if mode == "dedicated" and dedicated:
        # KameleonDB 0.2 goes on inserting into the shared table after an entity was materialised.
        live = sql.SQL(
            "(EXISTS (SELECT FROM {table} r WHERE r.id = t.record_id AND NOT r.is_deleted) OR ("  # noqa: S608 - constant
            + shared
            + " AND NOT r.is_deleted) AND NOT EXISTS (SELECT FROM {table} r WHERE r.id = t.record_id)))"
        ).format(table=sql.Identifier(dedicated.replace("%", "%%")))  # not the start of a placeholder
    statement = sql.SQL(
        "DELETE FROM kdb_search WHERE ctid = ANY (ARRAY(SELECT t.ctid FROM kdb_search t "
        "WHERE t.entity_name = %(entity)s AND NOT {live} LIMIT %(batch)s))"
    ).format(live=live)
    return statement, {"entity": entity, "entity_id": entity_id, "batch": PRUNE_BATCH}
