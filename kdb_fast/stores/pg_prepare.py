"""PostgreSQL: check the search tables before anything is embedded, create what is missing, prune."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import SchemaError
from ..faults import fault
from ..target import RECORDS, REJECTS, RUNS, STATE, TABLE, Target
from . import schema

if TYPE_CHECKING:
    import psycopg

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
            target = store.find_target()
            if _exists(cursor, target, TABLE):
                _check_table(cursor, target, dimensions)
            else:
                if dimensions > 2000:
                    raise SchemaError(
                        f"The model gives {dimensions} dimensions; a pgvector HNSW index holds at most 2000.",
                        remedy="Choose a model with at most 2000 dimensions.",
                    )
                cursor.execute(target.statement(schema.POSTGRESQL_SEARCH, dimensions=str(int(dimensions))))
                for statement in schema.POSTGRESQL_PLAIN_INDEXES.values():
                    cursor.execute(target.statement(statement))
                for statement in schema.POSTGRESQL_SEARCH_INDEXES.values():
                    cursor.execute(target.statement(statement))
            _own_parts(cursor, target)
            _check_rights(cursor, target)
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"The role {store.connection().info.user!r} may not prepare the index: {error.diag.message_primary}.",
            remedy=f"Run once as the owner of the schema, or let the owner run: GRANT CREATE ON SCHEMA "
            f"{store.target.shown()} TO …; ALTER TABLE {store.target.shown(TABLE)} OWNER TO …;",
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
        _check_table(cursor, store.target, dimensions)


def _read_only() -> SchemaError:
    return SchemaError(
        "The server is read-only (a standby, or default_transaction_read_only is on).",
        remedy="Give the address of the primary server, or add target_session_attrs=read-write.",
    )


def _exists(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, table: str) -> bool:
    row = cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (target.regclass(table),)).fetchone()
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


def _check_table(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, dimensions: int) -> None:
    shown, oid = target.shown(TABLE), target.regclass(TABLE)
    columns: dict[str, tuple[str, int]] = {
        r[0]: (r[1], r[2])
        for r in cursor.execute(
            "SELECT a.attname, t.typname, a.atttypmod FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped",
            (oid,),
        )
    }
    missing = [name for name in NEEDED_COLUMNS if name not in columns]
    if missing:
        raise SchemaError(
            f"The table {shown} has no column {', '.join(missing)}; expected KameleonDB's search table.",
            remedy="Is it another program's table? Use another schema or database for this index.",
        )
    kind, found = columns["embedding"]
    if kind != "vector":
        raise SchemaError(
            f"{shown}.embedding is of type {kind}; expected vector({dimensions}).",
            remedy=f"Move the table away (ALTER TABLE {shown} RENAME TO {TABLE}_old;); it is created anew.",
        )
    if found == -1:
        row = cursor.execute(
            target.statement(
                "SELECT {pgvector}vector_dims(embedding) FROM (SELECT embedding FROM {kdb_search} "
                "WHERE embedding IS NOT NULL LIMIT 1000) s WHERE {pgvector}vector_dims(embedding) <> %s LIMIT 1"
            ),
            (dimensions,),
        ).fetchone()
        found = int(row[0]) if row else dimensions
    if found != dimensions:
        raise SchemaError(
            f"{shown}.embedding holds vectors of {found} dimensions; the model gives {dimensions}.",
            remedy=f"Choose a --model with {found} dimensions, or change the column and lose the old vectors: "
            f"DROP INDEX IF EXISTS {target.shown(schema.VECTOR_INDEX)}; ALTER TABLE {shown} ALTER COLUMN embedding "
            f"TYPE vector({dimensions}) USING NULL;",
        )
    row = cursor.execute(
        "SELECT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = to_regclass(%s) AND i.indisunique "
        "AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 2 AND ARRAY(SELECT a.attname::text "
        "FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = ANY (i.indkey::int2[]) ORDER BY 1) "
        "= ARRAY['entity_name', 'record_id'])",
        (oid,),
    ).fetchone()
    if not (row and row[0]):
        raise SchemaError(
            f"{shown} has no unique constraint on (entity_name, record_id); without it records could be doubled.",
            remedy=f"Run: ALTER TABLE {shown} ADD UNIQUE (entity_name, record_id);",
        )


def _own_parts(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> None:
    have = {
        r[0]
        for r in cursor.execute(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND NOT attisdropped",
            (target.regclass(TABLE),),
        )
    }
    wanted = [f"ADD COLUMN {name} {kind}" for name, kind in schema.POSTGRESQL_COLUMNS.items() if name not in have]
    if wanted:
        # Nullable columns without a default: no row is rewritten, the lock is held for milliseconds.
        cursor.execute(target.statement("ALTER TABLE {kdb_search} " + ", ".join(wanted)))
    for table, statement in zip((RUNS, REJECTS, STATE), schema.POSTGRESQL_OWN, strict=True):
        if not _exists(cursor, target, table):
            cursor.execute(target.statement(statement))


def _check_rights(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> None:
    lacking = [
        f"{right} ON {target.shown(table)}"
        for table in (TABLE, RUNS, REJECTS, STATE)
        for right, has in cursor.execute(
            "SELECT r, has_table_privilege(%s, r) FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) r",
            (target.regclass(table),),
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


def owns_table(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> bool:
    """Whether this role may drop and create indexes of the search table."""
    row = cursor.execute(
        "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = to_regclass(%s)", (target.regclass(TABLE),)
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
            statement, parameters = _prune_statement(cursor, store.target, entity)
            deleted = cursor.execute(statement, parameters).rowcount if statement is not None else 0
        total += deleted
        if deleted < PRUNE_BATCH:
            return total


def _prune_statement(
    cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, entity: str
) -> tuple[bytes | None, dict[str, Any]]:
    row = cursor.execute(
        target.statement("SELECT id, storage_mode, dedicated_table_name FROM {kdb_entity_definitions} WHERE name = %s"),
        (entity,),
    ).fetchone()
    if row is None:
        return None, {}
    entity_id, mode, dedicated = row
    live = (
        f"EXISTS (SELECT FROM {target.table(RECORDS)} r WHERE r.id = t.record_id AND r.entity_id = %(entity_id)s "
        "AND NOT r.is_deleted)"
    )
    if mode == "dedicated" and dedicated:
        # KameleonDB 0.2 goes on inserting into the shared table after an entity was materialised.
        table = target.table(dedicated)
        live = (
            f"(EXISTS (SELECT FROM {table} r WHERE r.id = t.record_id AND NOT r.is_deleted) OR ({live} "  # noqa: S608
            f"AND NOT EXISTS (SELECT FROM {table} r WHERE r.id = t.record_id)))"
        )
    statement = target.statement(
        "DELETE FROM {kdb_search} WHERE ctid = ANY (ARRAY(SELECT t.ctid FROM {kdb_search} t "
        "WHERE t.entity_name = %(entity)s AND NOT {live} LIMIT %(batch)s))",
        live=live,
    )
    return statement, {"entity": entity, "entity_id": entity_id, "batch": PRUNE_BATCH}
