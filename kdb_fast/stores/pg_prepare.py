"""PostgreSQL: check the search tables before anything is embedded, create what is missing, prune."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import SchemaError
from ..faults import fault
from ..records import storable_key
from ..target import ENTITIES, RECORDS, REJECTS, RUNS, STATE, TABLE, Target, identifier, other_indexes
from . import schema, seal
from .base import HiddenRowsError
from .pg_index_catalog import free_name
from .pg_session import PgSession
from .reading import rows_of

if TYPE_CHECKING:
    import psycopg


DDL_LOCK = 0x6B64625F66617374
"""Key of the advisory lock ("kdb_fast") that keeps two first runs from creating the same table at once."""

PRUNE_BATCH = 10_000
"""Rows deleted in one transaction: short enough not to hold up other writers for long."""

NEEDED_COLUMNS = ("id", "entity_name", "record_id", "content", "embedding", "model", "dimensions", "created_at",
                  "updated_at")  # fmt: skip


TEXT = ("S", "text")
"""Any type of strings (``pg_type.typcategory``), and what KameleonDB has, for messages."""

TIME = ("timestamp", "timestamptz")

WRITTEN_COLUMNS: dict[str, tuple[str, ...]] = {
    "id": TEXT, "entity_name": TEXT, "record_id": TEXT, "content": TEXT, "embedding": (), "model": TEXT,
    "dimensions": ("int4",), "updated_at": TIME, "kdb_fast_fingerprint": TEXT, "kdb_fast_run": ("int8",),
    "kdb_fast_at": TIME[1:], "kdb_fast_source_at": TIME[1:], seal.COLUMN: ("bytea",),
}  # fmt: skip
"""Columns that a run writes, with the types (or their category) that its binary COPY fits; the last one is KameleonDB's
or our own."""


HAS_SEAL = (
    "EXISTS (SELECT FROM pg_catalog.pg_attribute WHERE attrelid = to_regclass(%s) "
    f"AND attname = '{seal.COLUMN}' AND NOT attisdropped)"
)
"""Whether the search table (a parameter) has a column for seals."""

INSERT_OR_UPDATE = 4 | 16
"""Of ``pg_trigger.tgtype``."""

CAUSES = f"""
SELECT 'trigger ' || t.tgname FROM pg_catalog.pg_trigger t WHERE NOT t.tgisinternal AND t.tgenabled <> 'D'
  AND t.tgtype & {INSERT_OR_UPDATE} <> 0 AND (t.tgrelid = to_regclass(%(table)s)
    OR t.tgrelid IN (SELECT relid FROM pg_partition_tree(to_regclass(%(table)s))))
UNION SELECT 'rule ' || rulename FROM pg_catalog.pg_rewrite
  WHERE ev_class = to_regclass(%(table)s) AND ev_type IN ('2', '3')
UNION SELECT 'type ' || format_type(atttypid, atttypmod) FROM pg_catalog.pg_attribute
  WHERE attrelid = to_regclass(%(table)s) AND attname = 'updated_at'
  AND (atttypid <> 'pg_catalog.timestamptz'::regtype OR atttypmod NOT IN (-1, 6))
"""  # noqa: S608 - constants
"""What may keep ``updated_at`` from being stored as it is written."""


class Column(NamedTuple):
    """A column of the search table: its type as declared; the same or, of a domain, the one below it; its category; its
    modifier; whether the column is generated, and whether a row must give it a value."""

    declared: str
    type: str
    category: str
    modifier: int
    generated: bool
    needs_value: bool


def prepare(session: PgSession, dimensions: int) -> tuple[str, ...]:
    """See :meth:`kdb_fast.stores.base.Store.prepare`."""
    import psycopg

    notes: tuple[str, ...] = ()
    try:
        with session.transaction() as cursor:
            if cursor.execute("SELECT current_setting('transaction_read_only')").fetchone() == ("on",):
                raise _read_only()
            cursor.execute("SET LOCAL default_tablespace TO DEFAULT")  # new tables are made where the user's would be
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", (DDL_LOCK,))
            _extension(cursor)
            target = session.find_target()
            if _exists(cursor, target, TABLE):
                _check_kind(cursor, target, TABLE)
                _check_table(cursor, target, dimensions)
            else:
                name = target.regclass(TABLE)
                if cursor.execute("SELECT to_regtype(%s) IS NOT NULL", (name,)).fetchone() == (True,):
                    raise SchemaError(
                        f"{target.shown(TABLE)} is a data type; expected a table, whose rows are of such a type.",
                        remedy="Rename it, or use another schema or database for this index.",
                    )
                notes = _others(cursor, target)
                if dimensions > 2000:
                    raise SchemaError(
                        f"The model gives {dimensions} dimensions; a pgvector HNSW index holds at most 2000.",
                        remedy="Choose a model with at most 2000 dimensions, or ask an API for fewer: --dimensions N.",
                    )
                cursor.execute(target.statement(schema.POSTGRESQL_SEARCH, dimensions=str(int(dimensions))))
                home = str(target.schema)
                for name, using in {**schema.POSTGRESQL_PLAIN_INDEXES, **schema.POSTGRESQL_SEARCH_USING}.items():
                    # An earlier table that was renamed keeps its indexes, and so their names.
                    on = f"CREATE INDEX {identifier(free_name(cursor, home, name))} ON {{kdb_search}} "
                    cursor.execute(target.statement(on + using))
            _own_parts(cursor, target)
            _check_rights(cursor, target)
        return notes
    except psycopg.errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"The role {session.connection().info.user!r} may not prepare the index: {error.diag.message_primary}.",
            remedy=f"Run once as the owner of the schema, or let the owner run: GRANT CREATE ON SCHEMA "
            f"{session.target.shown()} TO …; ALTER TABLE {session.target.shown(TABLE)} OWNER TO …;",
        ) from None
    except psycopg.errors.ReadOnlySqlTransaction:
        raise _read_only() from None
    except psycopg.errors.LockNotAvailable:
        raise SchemaError(
            "The search table is locked by another session for more than 30 s.",
            remedy="See pg_locks and pg_stat_activity for who holds it; run the same command again later.",
        ) from None


def check(session: PgSession, dimensions: int) -> None:
    """Raise SchemaError if the search table is not, or no longer, what rows of this length can be written to."""
    with session.transaction() as cursor:
        _check_table(cursor, session.target, dimensions)


def _read_only() -> SchemaError:
    return SchemaError(
        "The server is read-only (a standby, or default_transaction_read_only is on).",
        remedy="Give the address of the primary server, or add target_session_attrs=read-write.",
    )


def _exists(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, table: str) -> bool:
    row = cursor.execute("SELECT to_regclass(%s) IS NOT NULL", (target.regclass(table),)).fetchone()
    return bool(row and row[0])


def _others(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> tuple[str, ...]:
    """A note on other indexes that the search path shows, before one is made in this schema."""
    found = other_indexes(rows_of(cursor.connection, target.dialect), target)
    if not found:
        return ()
    return (
        f"The index was made in {target.shown(TABLE)}, the schema of the records. Another one on the search_path, "
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


def vector_version(cursor: psycopg.Cursor[tuple[Any, ...]]) -> tuple[int, ...]:
    """Version of pgvector in this database, for example (0, 8, 5)."""
    row = cursor.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
    return tuple(int(part) for part in str(row[0] if row else "0").split(".") if part.isdigit())


RELATIONS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence",
             "c": "a composite type", "i": "an index", "I": "a partitioned index"}  # fmt: skip
"""What a name may belong to instead of a table, by ``pg_class.relkind``."""


def _check_kind(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, table: str) -> None:
    statement = "SELECT relkind::text FROM pg_class WHERE oid = to_regclass(%s)"
    row = cursor.execute(statement, (target.regclass(table),)).fetchone()
    if row and row[0] in RELATIONS:
        raise SchemaError(
            f"{target.shown(table)} is {RELATIONS[row[0]]}; expected a table.",
            remedy="Rename it, or use another schema or database for this index.",
        )


def _check_table(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, dimensions: int) -> None:
    shown, oid = target.shown(TABLE), target.regclass(TABLE)
    columns = {
        row[0]: Column(*row[1:])
        for row in cursor.execute(
            # Of a domain, what it is a domain of: a domain of domains is another program's business.
            "SELECT a.attname, t.typname, coalesce(b.typname, t.typname), t.typcategory::text, a.atttypmod, "
            "a.attgenerated <> '', (a.attnotnull OR t.typnotnull) AND NOT a.atthasdef "
            "AND t.typdefault IS NULL AND a.attidentity = '' FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid "
            "LEFT JOIN pg_type b ON b.oid = t.typbasetype "
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
    kind, found = columns["embedding"].declared, columns["embedding"].modifier
    if kind != "vector":
        raise SchemaError(
            f"{shown}.embedding is of type {kind}; expected vector({dimensions}).",
            remedy=f"Move the table away (ALTER TABLE {shown} RENAME TO {TABLE}_old;); it is created anew.",
        )
    _check_columns(cursor, target, columns)
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
        foreign = cursor.execute(
            "SELECT string_agg(relid::text, ', ') FROM pg_partition_tree(%s) t JOIN pg_class c ON c.oid = t.relid "
            "WHERE c.relkind = 'f'",
            (oid,),
        ).fetchone()
        raise SchemaError(
            f"{shown} has no unique constraint on (entity_name, record_id); without it records could be doubled.",
            remedy=f"Run: ALTER TABLE {shown} ADD UNIQUE (entity_name, record_id);"
            if not (foreign and foreign[0])
            else f"A partition that is a foreign table ({foreign[0]}) can have none: detach it, then run: "
            f"ALTER TABLE {shown} ADD UNIQUE (entity_name, record_id);",
        )


def _check_columns(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, columns: dict[str, Column]) -> None:
    """Raise SchemaError where no row could be written: that is known before anything is embedded."""
    shown = target.shown(TABLE)
    for name, column in columns.items():
        if name in WRITTEN_COLUMNS and column.generated:
            raise SchemaError(
                f"{shown}.{name} is a generated column, and kdb-fast writes it.",
                remedy=f"Run: ALTER TABLE {shown} ALTER COLUMN {name} DROP EXPRESSION;",
            )
        wanted = WRITTEN_COLUMNS.get(name, ())
        if wanted and column.type not in wanted and column.category not in wanted:
            raise SchemaError(
                f"{shown}.{name} is of type {column.type}; expected {wanted[-1]}.",
                remedy=f"Run: ALTER TABLE {shown} ALTER COLUMN {name} TYPE …; or use another schema for this index.",
            )
    unfilled = [name for name, column in columns.items() if name not in WRITTEN_COLUMNS and column.needs_value]
    if unfilled:
        names = storable_key(", ".join(unfilled), 300)
        changes = storable_key(", ".join(f"ALTER COLUMN {identifier(name)} SET DEFAULT …" for name in unfilled), 500)
        raise SchemaError(
            f"The table {shown} needs a value in {names}, which kdb-fast does not write: no row could be stored.",
            remedy=f"Give a default (ALTER TABLE {shown} {changes};), or allow NULL (DROP NOT NULL).",
        )
    if constraint := _unmet_check(cursor, target):
        raise SchemaError(
            f"The constraint {storable_key(constraint)} of {shown} refuses every row: it is about columns that are "
            "left to their defaults, since they are not KameleonDB's.",
            remedy=f"Give these columns defaults that it allows, or run: ALTER TABLE {shown} DROP CONSTRAINT "
            f"{storable_key(identifier(constraint))};",
        )


def _unmet_check(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> str | None:
    """Name of a CHECK constraint that only looks at columns which are not written, and refuses their defaults."""
    import psycopg

    constraints = cursor.execute(
        "SELECT c.conname, pg_get_expr(c.conbin, c.conrelid), array_agg(quote_ident(a.attname)), "
        "array_agg(format('CAST(%%s AS %%s)', coalesce(pg_get_expr(d.adbin, d.adrelid), 'NULL'), "
        "format_type(a.atttypid, a.atttypmod))) FROM pg_constraint c "
        "JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey) "
        "LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum "
        "WHERE c.conrelid = to_regclass(%s) AND c.contype = 'c' GROUP BY c.oid, c.conname, c.conbin, c.conrelid "
        "HAVING NOT bool_or(a.attname = ANY (%s) OR a.attgenerated <> '' OR a.attidentity <> '')",
        (target.regclass(TABLE), list(WRITTEN_COLUMNS)),
    ).fetchall()
    for name, expression, columns, defaults in constraints:
        given = ", ".join(f"{value} AS {column}" for column, value in zip(columns, defaults, strict=True))
        try:
            with cursor.connection.transaction():
                # What the server itself gives as the text of the constraint and of the defaults.
                statement = f"SELECT {expression} FROM (SELECT {given}) {TABLE}"  # noqa: S608
                if cursor.execute(statement.encode()).fetchone() == (False,):
                    return str(name)
        except psycopg.Error:
            continue  # it is not for us to say: each row is asked for itself
    return None


def _own_parts(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> None:
    have = _column_names(cursor, target, TABLE)
    wanted = [f"ADD COLUMN {name} {kind}" for name, kind in schema.POSTGRESQL_COLUMNS.items() if name not in have]
    if wanted:
        # Nullable columns without a default: no row is rewritten, the lock is held for milliseconds.
        cursor.execute(target.statement("ALTER TABLE {kdb_search} " + ", ".join(wanted)))
    if seal.COLUMN not in have and _causes(cursor, target) and owns_table(cursor, target):
        cursor.execute(target.statement(f"ALTER TABLE {{kdb_search}} ADD COLUMN {seal.COLUMN} bytea"))
    for table, statement in zip((RUNS, REJECTS, STATE), schema.POSTGRESQL_OWN, strict=True):
        if not _exists(cursor, target, table):
            cursor.execute(target.statement(statement))
            continue
        _check_kind(cursor, target, table)
        have = _column_names(cursor, target, table)
        if missing := [name for name in schema.columns_in(statement) if name not in have]:
            shown = target.shown(table)
            raise SchemaError(
                f"The table {shown} has no column {', '.join(missing)}; expected kdb-fast's own table.",
                remedy=f"Is it another program's? ALTER TABLE {shown} RENAME TO …; then it is made anew.",
            )


def _causes(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> list[str]:
    rows = cursor.execute(CAUSES.encode(), {"table": target.regclass(TABLE)}).fetchall()
    return [storable_key(row[0]) for row in rows]


def altered(session: PgSession, run: int, columns: tuple[str, ...]) -> list[str]:
    """See :meth:`kdb_fast.stores.base.Store.altered`.

    Args:
        columns: The column for seals, where the table has it.
    """
    target, sealed = session.target, bool(columns)
    with session.transaction() as cursor:
        causes = _causes(cursor, target)
        if not causes:
            return []
        held = f"{seal.COLUMN} IS NOT DISTINCT FROM {seal.of_row('postgresql')}" if sealed else "true"
        times, others = cursor.execute(
            target.statement(
                "SELECT count(*) FILTER (WHERE held AND kdb_fast_at IS DISTINCT FROM updated_at), "
                "count(*) FILTER (WHERE NOT held) FROM (SELECT kdb_fast_at, updated_at, <held> AS held "
                "FROM {kdb_search} WHERE kdb_fast_run = %s) t".replace("<held>", held)
            ),
            (run,),
        ).fetchall()[0]
    remedy = "To spare that, let a trigger leave a time alone that the writer sets: WHEN (NEW.updated_at IS NOT "
    remedy += "DISTINCT FROM OLD.updated_at), on INSERT WHEN (NEW.updated_at IS NULL)."
    if not sealed:
        remedy = f"Let the owner run: ALTER TABLE {target.shown(TABLE)} ADD COLUMN {seal.COLUMN} bytea;"
    return seal.warnings(target.shown(TABLE), causes, times, others, sealed=sealed, remedy=remedy)


def _column_names(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, table: str) -> set[str]:
    rows = cursor.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
        (target.regclass(table),),
    )
    return {row[0] for row in rows}


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


def prune(session: PgSession, entity: str) -> int:
    """See :meth:`kdb_fast.stores.base.Store.prune`."""
    total = 0
    while True:
        fault("store.prune")
        with session.transaction() as cursor:
            # One snapshot: an entity that moves to a table of its own meanwhile must not look empty. And what a policy
            # hides must not look deleted: in this transaction hiding is an error.
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; SET LOCAL row_security = off")
            statement, parameters = _prune_statement(cursor, session.target, entity)
            deleted = cursor.execute(statement, parameters).rowcount if statement is not None else 0
        total += deleted
        if deleted < PRUNE_BATCH:
            return total


def _check_whole(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, *tables: str) -> None:
    """Raises HiddenRowsError where one of the tables may not show this role all its rows."""
    for table, (kind, filtered, role) in _kinds(cursor, target, tables).items():
        if kind not in ("r", "p"):
            what = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}.get(kind, "no table")
            raise HiddenRowsError(f"{target.shown(table)} is {what}, which may leave records out")
        if filtered:
            raise HiddenRowsError(
                f"row level security lets the role {role} see only a part of {target.shown(table)}; "
                "run as a role that sees all of it (BYPASSRLS, or the table's owner)"
            )


def _kinds(
    cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, tables: Sequence[str]
) -> dict[str, tuple[str, bool, str]]:
    """By table, where it exists: its ``relkind``, whether row level security filters it for this role, and the role."""
    rows = cursor.execute(
        "SELECT t, c.relkind::text, row_security_active(c.oid), current_user::text "
        "FROM unnest(%s::text[], %s::text[]) x(t, q) JOIN pg_class c ON c.oid = to_regclass(q)",
        (list(tables), [target.regclass(table) for table in tables]),
    )
    return {row[0]: (row[1], row[2], row[3]) for row in rows}


def check_open(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> None:
    """Raise SchemaError where a run would not see, or could not write, every row of the index's tables.

    A run looks up what is stored, and who holds the index. A row that it does not see it would embed again and then
    collide with; a run that it does not see it would run beside.
    """
    for table, (_, filtered, role) in _kinds(cursor, target, (TABLE, RUNS, REJECTS, STATE)).items():
        if filtered:
            raise SchemaError(
                f"Row level security on {target.shown(table)} lets the role {role} see only a part of it; a run must "
                "see every row.",
                remedy=f"Run as a role that sees all of it: the owner (without FORCE ROW LEVEL SECURITY), or one with "
                f"BYPASSRLS (ALTER ROLE {role} BYPASSRLS;).",
            )
    rules = [
        row[0]
        for row in cursor.execute(
            "SELECT rulename::text FROM pg_rewrite WHERE ev_class = to_regclass(%s) AND ev_type IN ('2', '3') "
            "AND ev_enabled <> 'D' ORDER BY 1",
            (target.regclass(TABLE),),
        )
    ]
    if rules:
        raise SchemaError(
            f"{target.shown(TABLE)} has rules for INSERT or UPDATE ({', '.join(map(storable_key, rules))}); PostgreSQL "
            "allows no INSERT … ON CONFLICT there, and COPY does not heed them.",
            remedy=f"Make them triggers, or drop them: DROP RULE … ON {target.shown(TABLE)};",
        )


def _prune_statement(
    cursor: psycopg.Cursor[tuple[Any, ...]], target: Target, entity: str
) -> tuple[bytes | None, dict[str, Any]]:
    _check_whole(cursor, target, TABLE, ENTITIES, RECORDS)
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
        _check_whole(cursor, target, dedicated)
        table = target.table(dedicated)
        live = (
            f"(EXISTS (SELECT FROM {table} r WHERE r.id = t.record_id AND NOT r.is_deleted) OR ({live} "  # noqa: S608
            f"AND NOT EXISTS (SELECT FROM {table} r WHERE r.id = t.record_id)))"
        )
    statement = target.statement(
        # By their keys: in another partition another row has the same ctid.
        "DELETE FROM {kdb_search} WHERE entity_name = %(entity)s AND record_id = ANY (ARRAY(SELECT t.record_id "
        "FROM {kdb_search} t WHERE t.entity_name = %(entity)s AND NOT {live} LIMIT %(batch)s))",
        live=live,
    )
    return statement, {"entity": entity, "entity_id": entity_id, "batch": PRUNE_BATCH}
