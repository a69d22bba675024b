"""PostgreSQL: the column for seals, and what makes it necessary (see :mod:`.seal`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...records import storable_key
from ...tables import seal
from ...tables.target import Target
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

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
  WHERE attrelid = to_regclass(%(table)s) AND attname = %(updated_at)s
  AND (atttypid <> 'pg_catalog.timestamptz'::regtype OR atttypmod NOT IN (-1, 6))
"""  # noqa: S608 - constants
"""What may keep ``updated_at`` from being stored as it is written."""


def column(session: PgSession) -> tuple[str, ...]:
    """The column for seals, where the search table has it."""
    statement = f"SELECT {HAS_SEAL}"
    row = session.connection().execute(statement.encode(), (session.target.index_regclass,)).fetchone()
    return (seal.COLUMN,) if row and row[0] else ()


def find_causes(cursor: psycopg.Cursor[tuple[Any, ...]], target: Target) -> list[str]:
    """What may keep ``updated_at`` from being stored as it is written, as messages name it."""
    rows = cursor.execute(
        CAUSES.encode(), {"table": target.index_regclass, "updated_at": target.index.updated_at}
    ).fetchall()
    return [storable_key(row[0]) for row in rows]


def altered(session: PgSession, run: int, columns: tuple[str, ...]) -> list[str]:
    """See :meth:`kdb_fast.stores.base.Store.altered`.

    Args:
        columns: The column for seals, where the table has it.
    """
    target, sealed = session.target, bool(columns)
    with session.transaction() as cursor:
        causes = find_causes(cursor, target)
        if not causes:
            return []
        held = f"{seal.COLUMN} IS NOT DISTINCT FROM {seal.of_row('postgresql')}" if sealed else "true"
        times, others = cursor.execute(
            target.statement(
                "SELECT count(*) FILTER (WHERE held AND kdb_fast_at IS DISTINCT FROM {updated_at}), "
                "count(*) FILTER (WHERE NOT held) FROM (SELECT kdb_fast_at, {updated_at}, <held> AS held "
                "FROM {index} WHERE kdb_fast_run = %s) t".replace("<held>", held)
            ),
            (run,),
        ).fetchall()[0]
    remedy = "To spare that, let a trigger leave a time alone that the writer sets: WHEN (NEW.updated_at IS NOT "
    remedy += "DISTINCT FROM OLD.updated_at), on INSERT WHEN (NEW.updated_at IS NULL)."
    if not sealed:
        remedy = f"Let the owner run: ALTER TABLE {target.index_shown} ADD COLUMN {seal.COLUMN} bytea;"
    return seal.warnings(target.index_shown, causes, times, others, sealed=sealed, remedy=remedy)
