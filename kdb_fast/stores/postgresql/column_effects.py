"""PostgreSQL: what updates of a user's table set off, told before anything is embedded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ...db.pg_errors import kind_of
from ...db.retrying import ErrorKind
from ...errors import SchemaError
from ...records import storable_key
from ...tables.column_target import NOTE_TRIGGERS, ColumnTarget, times_written, triggers_key
from ...tables.target import identifier

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

GROWTH_BYTES = 16 * 1024 * 1024
"""A table that grows by less is not worth a line."""

BESIDE_BYTES = 130
"""Of a row in a table of vectors beside the table, without its vector. Such a row is inserted in 8 to 13 us, an UPDATE
for the same vector takes 17 to 31 us: 2.2 to 3.6 times as long, for rows of 100 to 1,900 bytes (384 dimensions)."""

WIDE = 2
"""From so many times the bytes of such a row on that an UPDATE writes, the table beside is proposed."""

TABLES = (
    "(SELECT to_regclass(%(table)s)::oid AS oid UNION SELECT relid::oid FROM pg_partition_tree(to_regclass(%(table)s)))"
)
"""The table, and its partitions."""

TRIGGERS = f"""
SELECT DISTINCT g.tgname::text, g.tgtype & 2 <> 0, g.tgtype & 1 <> 0 FROM pg_catalog.pg_trigger g
WHERE NOT g.tgisinternal AND g.tgenabled NOT IN ('D', 'R') AND g.tgtype & 16 <> 0 AND g.tgrelid IN {TABLES}
AND (cardinality(g.tgattr::int2[]) = 0 OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = g.tgrelid
  AND a.attname = %(column)s AND a.attnum = ANY(g.tgattr::int2[])))
ORDER BY 1
"""  # noqa: S608 - a constant
"""Those that fire where the column is updated: name, whether before it, whether for each row."""

RULES = f"""
SELECT DISTINCT r.rulename::text, n.nspname::text, c.relname::text FROM pg_rewrite r
JOIN pg_class c ON c.oid = r.ev_class JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE r.ev_type = '2' AND r.ev_enabled NOT IN ('D', 'R') AND c.oid IN {TABLES} ORDER BY 1
"""  # noqa: S608 - a constant

UNIDENTIFIED = f"""
SELECT n.nspname::text, c.relname::text, p.pubname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_publication_tables pt ON (pt.schemaname, pt.tablename) = (n.nspname, c.relname)
JOIN pg_publication p ON p.pubname = pt.pubname AND p.pubupdate
WHERE c.oid IN {TABLES} AND c.relkind = 'r' AND c.relpersistence = 'p' AND (c.relreplident = 'n'
  OR c.relreplident IN ('d', 'i') AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid
    AND CASE c.relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END))
ORDER BY 1, 2 LIMIT 1
"""  # noqa: S608 - a constant
"""A table whose updates are published, and that has nothing to tell its rows by there."""

ANY_UPDATE = "EXPLAIN UPDATE {table} t SET {embedding} = t.{embedding} WHERE t.ctid = '(0,0)'"
"""Fires no trigger and reads no row, yet the server says whether it would update any, in each partition."""

SIZE = f"""
SELECT sum(greatest(c.reltuples, 0))::bigint, sum(pg_relation_size(c.oid))::bigint, bool_or(c.reltuples < 0)
FROM pg_class c WHERE c.relkind = 'r' AND c.oid IN {TABLES}
"""  # noqa: S608 - a constant

MAY_VACUUM = "SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class c WHERE c.oid = to_regclass(%(table)s)"


class Trigger(NamedTuple):
    """A trigger, when it fires, and whether for each row or once for a statement."""

    name: str
    before: bool
    each_row: bool


def find_triggers(cursor: Cursor, target: ColumnTarget) -> list[Trigger]:
    """The triggers of the table that fire where the column is updated."""
    return [Trigger(*row) for row in cursor.execute(TRIGGERS.encode(), _names(target))]


def check_updates(cursor: Cursor, target: ColumnTarget) -> None:
    """Raise SchemaError where no row could be updated: for a rule, a publication, or what else the server says."""
    import psycopg

    rule = cursor.execute(RULES.encode(), _names(target)).fetchone()
    if rule:
        name, schema, table = rule
        shown = f"{identifier(schema)}.{identifier(table)}"
        raise SchemaError(
            f"The rule {storable_key(name)} of {target.shown} rewrites its updates; none could be written as it is.",
            remedy=f"Disable it meanwhile: ALTER TABLE {shown} DISABLE RULE {identifier(name)}; or give --into a table "
            "of vectors beside it.",
        )
    unidentified = cursor.execute(UNIDENTIFIED.encode(), _names(target)).fetchone()
    if unidentified:
        schema, table, publication = unidentified
        shown = f"{identifier(schema)}.{identifier(table)}"
        raise SchemaError(
            f"The publication {storable_key(publication)} publishes updates of {shown}, which has no replica identity; "
            "PostgreSQL refuses to update it.",
            remedy=f"Run: ALTER TABLE {shown} REPLICA IDENTITY USING INDEX …; with a unique index, or REPLICA IDENTITY "
            "FULL;",
        )
    try:
        with cursor.connection.transaction():
            cursor.execute(target.statement(ANY_UPDATE))
    except psycopg.Error as error:
        if kind_of(error) is not ErrorKind.REFUSED:
            raise
        why = ": ".join(filter(None, (error.diag.message_primary, error.diag.message_detail)))
        raise SchemaError(
            f"PostgreSQL would update no row of {target.shown}: {why.rstrip('.')}.",
            remedy="Let its owner change what forbids that; or give --into a table of vectors beside it.",
        ) from None
    if target.vacuum:
        row = cursor.execute(MAY_VACUUM.encode(), _names(target)).fetchone()
        if not (row and row[0]):
            raise SchemaError(
                f"This role may not vacuum {target.shown}.", remedy="Leave --vacuum out, or run as the table's owner."
            )


def forecast(cursor: Cursor, target: ColumnTarget, fingerprint: str, dimensions: int) -> list[str]:
    """What the updates of a run will set off, and how much the table grows by them."""
    row = cursor.execute(SIZE.encode(), _names(target)).fetchone()
    assert row is not None
    rows, size, unknown = row
    if unknown:
        (rows,) = cursor.execute(target.statement("SELECT count(*) FROM {table}"), ()).fetchone() or (0,)
    noted = cursor.execute(
        target.statement("SELECT count(*), count(*) FILTER (WHERE fingerprint = %s) FROM {state}"), (fingerprint,)
    ).fetchone()
    written, done = noted or (0, 0)
    pending = max(0, rows - done)
    # Where most rows have a vector of ours, the size is with it.
    vector = 4 * dimensions
    version = size // max(1, rows) + (vector if 2 * written < rows else 0)
    return [
        *_of_triggers(cursor, target, pending),
        *_growth(target, size, pending * version, version >= WIDE * (vector + BESIDE_BYTES)),
    ]


def _of_triggers(cursor: Cursor, target: ColumnTarget, pending: int) -> list[str]:
    """The triggers, unless an earlier run has told of them."""
    triggers = find_triggers(cursor, target)
    if not triggers:
        return []
    shown = ", ".join(
        f"{storable_key(t.name)} ({'before' if t.before else 'after'} {'each row' if t.each_row else 'each statement'})"
        for t in triggers[:5]
    )
    times = times_written(pending) if any(t.each_row for t in triggers) else "once with each part that is written"
    cursor.execute(target.home.statement(NOTE_TRIGGERS, value="%s"), (triggers_key(target), shown))
    if not cursor.rowcount:
        return []
    return [f"Triggers of {target.shown} fire as vectors are written, {times}: {shown}."]


def _growth(target: ColumnTarget, size: int, growth: int, wide: bool) -> list[str]:
    if growth < GROWTH_BYTES:
        return []
    text = (
        f"An UPDATE writes a new version of the whole row: {target.shown} ({size / 1e6:,.0f} MB) grows by up to "
        f"{growth / 1e6:,.0f} MB, which is free again after VACUUM"
    )
    text += " (done between the parts)." if target.vacuum else " (--vacuum does so meanwhile)."
    if wide:
        text += " Its rows are wide: a table of vectors beside it (--into) is written faster, in half the bytes."
    return [text]


def _names(target: ColumnTarget) -> dict[str, str]:
    return {"table": target.regclass, "column": target.vector.name}
