"""PostgreSQL: drop the search indexes before a large load, and build whatever index is missing.

When they are dropped: :mod:`kdb_fast.tables.index_policy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...faults import fault
from ...tables.index_policy import IndexAction, IndexOutcome
from .index_build import IndexBuilder, wanted
from .index_catalog import obstacle, qualified
from .index_tree import IndexTree, forget, remember
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

DROP_PATIENCE_MS = 2000
"""How long the dropping of the index waits for other sessions' transactions."""


def defer(session: PgSession) -> IndexOutcome:
    """Drop the vector and full-text indexes; what they were is remembered in the same transaction."""
    import psycopg

    try:
        return _drop(session)
    except psycopg.errors.LockNotAvailable:
        return _kept(f"another session is using {session.target.index_shown}, so the index could not be dropped")


def _kept(why: str) -> IndexOutcome:
    return IndexOutcome(IndexAction.KEPT, why)


def _drop(session: PgSession) -> IndexOutcome:
    target = session.target
    with session.transaction() as cursor:
        # While this waits for a table, everybody else waits behind it.
        cursor.execute(f"SET LOCAL lock_timeout = {DROP_PATIENCE_MS}")
        tree = IndexTree.read(cursor, target)
        reason = obstacle(cursor, target, tree.present)
        if reason is not None:
            return _kept(f"{reason}, so it cannot drop and rebuild the index")
        fixed = [index.name for index in tree.present if index.fixed]
        if fixed:
            return _kept(f"{', '.join(fixed)} cannot be dropped, since something else depends on it")
        # An invalid copy of a valid index is nobody's wish; it is left alone.
        valid = {(index.place, index.using) for index in (*tree.dropped, *tree.present) if index.valid}
        dropped = [
            p
            for p in tree.present
            if tree.relations[p.place].inside
            and (p.partitioned or p.valid or p.parent is not None or (p.place, p.using) not in valid)
        ]
        names = {index.key for index in dropped}
        remembered = [index for index in tree.dropped if index.key not in names] + dropped
        remember(cursor, target, remembered)
        for index in dropped:
            if index.parent is None:  # its parts go with it
                cursor.execute(f"DROP INDEX IF EXISTS {qualified(index.key)}".encode())
        fault("store.index_dropped")
    return IndexOutcome(IndexAction.DROPPED)


def finish(session: PgSession, beat: Callable[[str], None]) -> IndexOutcome:
    """Build what is missing, exactly as it was (or as KameleonDB creates it), and refresh statistics."""
    builder = IndexBuilder(session, beat)
    # What was built before the connection was lost is reported too.
    return session.retrying("building the vector index", lambda: _finish(session, builder))


def _finish(session: PgSession, builder: IndexBuilder) -> IndexOutcome:
    target = session.target
    with session.transaction() as cursor:
        tree = IndexTree.read(cursor, target)
        if not tree.unfinished() and not builder.has_built:
            forget(cursor, target)
            return IndexOutcome(IndexAction.KEPT)
        reason = obstacle(cursor, target, tree.dropped)
    if reason is not None:
        statements = [f"{index.statement(index.name)};" for index in wanted(tree, target) if index.parent is None]
        owner = f"Let the owner run: {' '.join(statements) or 'kdb-fast reindex'}"
        return IndexOutcome(IndexAction.NOT_BUILT, reason, warnings=(owner,))
    # Full text first: it takes a second, and keyword search works while the vector index is built.
    for vector in (False, True):
        for index in (i for i in tree.broken() if i.vector == vector):
            builder.build(index, again=True)
        for index in (i for i in tree.lost() if i.vector == vector):
            builder.build(index)
        builder.put_together(vector)
        for index in builder.more(vector):
            builder.build(index)
        builder.put_together(vector)
    outcome = builder.outcome([index for index in tree.dropped if index.place not in tree.relations])
    with session.transaction() as cursor:
        forget(cursor, target)
    with session.transaction() as cursor:
        cursor.execute("SET LOCAL statement_timeout = 0")
        cursor.execute(target.statement("ANALYZE {index}"))
    return outcome
