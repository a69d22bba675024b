"""PostgreSQL: the foreign key of a table of vectors, by which a row goes with its record.

Rows are loaded without one: to check each of them costs more than to write it. After the load the key is added NOT
VALID, which locks both tables for an instant; then all rows are checked at once, which holds up no writer. Where a
record was deleted meanwhile, the rows without one go, and they are checked again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ...db.pg_errors import kind_of, primary_message
from ...db.retrying import ErrorKind
from ...tables.table_target import TableTarget
from .session import PgSession
from .table_delete import delete_rows

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

PATIENCE_MS = 300
"""How long other sessions' transactions are waited for: all who want to write the table wait behind us."""

TRIES = 10
"""How often the lock is tried for, PATIENCE_MS apart."""

FOUND = """
SELECT c.conname::text, c.convalidated FROM pg_constraint c
WHERE c.conrelid = to_regclass(%(table)s) AND c.confrelid = to_regclass(%(source)s) AND c.contype = 'f'
  AND c.confdeltype = 'c' AND c.conparentid = 0
  AND ARRAY(SELECT a.attname::text FROM unnest(c.conkey) k JOIN pg_attribute a ON a.attrelid = c.conrelid
    AND a.attnum = k ORDER BY 1) = %(key)s
  AND ARRAY(SELECT a.attname::text FROM unnest(c.confkey) k JOIN pg_attribute a ON a.attrelid = c.confrelid
    AND a.attnum = k ORDER BY 1) = %(key)s
"""

OBSTACLES = """
SELECT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = s.oid AND i.indisunique AND i.indisvalid AND i.indimmediate
    AND i.indpred IS NULL AND i.indexprs IS NULL AND ARRAY(SELECT a.attname::text FROM pg_attribute a
      WHERE a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) ORDER BY 1) = %(key)s),
  (SELECT bool_and(has_column_privilege(s.oid, k, 'REFERENCES')) FROM unnest(%(key)s::text[]) k),
  pg_has_role(t.relowner, 'USAGE'), t.relkind = 'p', s.relpersistence = 'u' AND t.relpersistence = 'p',
  current_user::text
FROM pg_class s, pg_class t WHERE s.oid = to_regclass(%(source)s) AND t.oid = to_regclass(%(table)s)
"""

ADD = "ALTER TABLE {table} ADD FOREIGN KEY ({columns}) REFERENCES {source} ({columns}) ON DELETE CASCADE NOT VALID"
DELETE_ORPHANS = "DELETE FROM {table} t WHERE NOT {living}"
VALIDATE = "ALTER TABLE {table} VALIDATE CONSTRAINT {name}"


MAY_LOCK = "SELECT has_any_column_privilege(to_regclass(%(source)s), 'UPDATE')"


class Reference(NamedTuple):
    """What holds for each row that is written.

    Attributes:
        exists: There is a foreign key: the server checks it, and locks the record.
        lockable: This role may lock records itself, and so leave out those that another program has locked.
    """

    exists: bool = False
    lockable: bool = False


def find_reference(cursor: Cursor, target: TableTarget) -> Reference:
    """Whether the table refers to the one that is read by now."""
    if target.source is None:
        return Reference()
    parameters = _parameters(target)
    exists = cursor.execute(FOUND.encode(), parameters).fetchone() is not None
    (lockable,) = cursor.execute(MAY_LOCK, parameters).fetchone() or (False,)
    return Reference(exists, bool(lockable))


def _parameters(target: TableTarget) -> dict[str, Any]:
    assert target.source is not None
    return {
        "table": target.regclass,
        "source": target.source.regclass,
        "key": sorted(key.name for key in target.key),
    }


def why_no_foreign_key(cursor: Cursor, target: TableTarget) -> str | None:
    """Why the table cannot refer to the one that is read, as the end of a sentence; None where it can, or does."""
    assert target.source is not None
    parameters = _parameters(target)
    if cursor.execute(FOUND.encode(), parameters).fetchone():
        return None
    source = target.source.shown
    row = cursor.execute(OBSTACLES.encode(), parameters).fetchone()
    if row is None:
        return f"there is no table {source}"
    unique, may_refer, owned, partitioned, unlogged, user = row
    columns = ", ".join(key.name for key in target.key)
    if not unique:
        return f"{source} has no unique constraint on ({columns}) that can be referred to"
    if not may_refer:
        return (
            f"the role {user!r} may not refer to {source} (let its owner run: GRANT REFERENCES ON {source} TO {user};)"
        )
    if not owned:
        return f"it belongs to another role than {user!r}"
    if partitioned:
        return "it is partitioned"
    if unlogged:
        return f"{source} is unlogged"
    return None


class Referred(NamedTuple):
    """What became of the foreign key.

    Attributes:
        checked: All rows were checked just now: each has its record.
        deleted: Records in the table without one there, which were removed for it.
        warnings: What a person should know, if that could not be.
    """

    checked: bool = False
    deleted: int = 0
    warnings: tuple[str, ...] = ()


def refer(session: PgSession, target: TableTarget) -> Referred:
    """See that the table refers to the one that is read; rows are checked where they have not been yet."""
    if target.source is None:
        return Referred()
    return session.retrying("adding the foreign key", lambda: _refer(session, target))


def _refer(session: PgSession, target: TableTarget) -> Referred:
    import psycopg

    deleted = 0
    try:
        with session.transaction() as cursor:
            if why_no_foreign_key(cursor, target) is not None:
                return Referred()  # which was said before the run
            found = cursor.execute(FOUND.encode(), _parameters(target)).fetchone()
        if found is None:
            if not _add(session, target):
                why = (
                    f"{target.shown} has no foreign key yet, since other sessions were writing "
                    f"{_parameters(target)['source']}: the next run adds it."
                )
                return Referred(warnings=(why,))
            with session.transaction() as cursor:
                found = cursor.execute(FOUND.encode(), _parameters(target)).fetchone()
        if found is None or found[1]:
            return Referred()
        try:
            _validate(session, target, found[0])
        except psycopg.errors.ForeignKeyViolation:
            with session.transaction() as cursor:
                cursor.execute("SET LOCAL statement_timeout = 0; SET LOCAL row_security = off")
                orphans = target.statement(DELETE_ORPHANS, living=target.has_record("t.{column}"))
                deleted = delete_rows(cursor, target, orphans, ())[1]
            _validate(session, target, found[0])
    except psycopg.Error as error:
        if kind_of(error) not in (ErrorKind.REFUSED, ErrorKind.DATA):
            raise
        why = f"The foreign key of {target.shown} is not in force for all its rows: {primary_message(error)}."
        return Referred(deleted=deleted, warnings=(why,))
    return Referred(True, deleted)


def _validate(session: PgSession, target: TableTarget, name: str) -> None:
    """Have all rows checked."""
    with session.transaction() as cursor:
        cursor.execute("SET LOCAL statement_timeout = 0; SET LOCAL row_security = off")
        cursor.execute(target.statement(VALIDATE, name=target.column(name)))


def _add(session: PgSession, target: TableTarget) -> bool:
    """Add the key for rows to come; False where the lock was not to be had."""
    import psycopg

    for attempt in range(TRIES):
        if attempt:
            time.sleep(PATIENCE_MS / 1000)
        try:
            with session.transaction() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = {PATIENCE_MS}")
                cursor.execute(target.statement(ADD))
            return True
        except psycopg.errors.LockNotAvailable:
            continue
    return False
