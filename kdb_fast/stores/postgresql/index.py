"""PostgreSQL: drop the search indexes before a large load, and build whatever index is missing.

When they are dropped: :mod:`kdb_fast.tables.index_policy`. Which those are: :mod:`.index_catalog`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...db.pg_errors import sqlstate
from ...errors import DatabaseError, SchemaError
from ...faults import fault
from ...tables.index_policy import IndexAction, IndexOutcome, IndexPolicy
from ...tables.target import Target
from ..base import RunSpec
from . import locks
from .index_build import IndexBuilder, wanted
from .index_catalog import SearchIndex, complete, obstacle, qualified
from .index_default import default_index
from .index_tree import IndexTree, built_for, forget, note_built_for, remember
from .indexed import Indexed
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

DROP_PATIENCE_MS = 2000
"""How long the dropping of the index waits for other sessions' transactions."""

LOCK_NOT_AVAILABLE = "55P03"


def has_vector_index(cursor: Cursor, indexed: Indexed) -> bool:
    """Whether there is one that rows are written into."""
    return any(index.vector for index in IndexTree.read(cursor, indexed).present)


def check(session: PgSession, indexed: Indexed) -> None:
    """Raise SchemaError if this role could not drop and build again what indexes there are."""
    with session.transaction() as cursor:
        reason = obstacle(cursor, indexed, IndexTree.read(cursor, indexed).present)
        row = cursor.execute(
            "SELECT pg_get_userbyid(relowner), current_user::text FROM pg_class WHERE oid = to_regclass(%s)",
            (indexed.regclass,),
        ).fetchone()
    if reason is not None:
        owner, user = row or ("…", "…")
        raise SchemaError(
            f"The indexes of {indexed.shown} cannot be built again: {reason}.",
            remedy=f"Run as {owner}, let it run: GRANT {owner} TO {user}; or give --index keep.",
        )


def defer(session: PgSession, indexed: Indexed) -> IndexOutcome:
    """Drop the vector and full-text indexes; what they were is remembered in the same transaction."""
    import psycopg

    try:
        return _drop(session, indexed)
    except psycopg.errors.LockNotAvailable:
        outcome = _kept(f"another session is using {indexed.shown}, so the index could not be dropped")
        holder = _find_holder(session, indexed)
        return outcome if holder is None else replace(outcome, warnings=(f"The indexes were kept, since {holder}.",))


def _find_holder(session: PgSession, indexed: Indexed) -> str | None:
    """Who holds the table, for a message; None if it is held no more."""
    with session.transaction() as cursor:
        places = IndexTree.read(cursor, indexed).relations
        tables = {Target(schema).shown(name): Target(schema).regclass(name) for schema, name in places}
        # What is built beside others waits for their transactions too, whatever tables those are about.
        blocker = locks.find_blocker(cursor, tables) or (locks.find_oldest(cursor) if indexed.concurrently else None)
    return None if blocker is None else f"{blocker.who} holds {blocker.what}"


def _kept(why: str) -> IndexOutcome:
    return IndexOutcome(IndexAction.KEPT, why)


def _drop(session: PgSession, indexed: Indexed) -> IndexOutcome:
    with session.transaction() as cursor:
        # While this waits for a table, everybody else waits behind it.
        cursor.execute(f"SET LOCAL lock_timeout = {DROP_PATIENCE_MS}")
        tree = IndexTree.read(cursor, indexed)
        reason = obstacle(cursor, indexed, tree.present)
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
        remembered = [index for index in tree.dropped if index.key not in names]
        remembered += [_as_remembered(index, tree.dropped) for index in dropped]
        remember(cursor, indexed.home, remembered)
        for index in dropped:
            if index.parent is None:  # its parts go with it
                cursor.execute(f"DROP INDEX IF EXISTS {qualified(index.key)}".encode())
        fault("store.index_dropped")
    return IndexOutcome(IndexAction.DROPPED)


def _as_remembered(index: SearchIndex, dropped: list[SearchIndex]) -> SearchIndex:
    """What is there of it, and what a killed run had not given it back yet."""
    before = next((d for d in dropped if (d.key, d.place, d.using) == (index.key, index.place, index.using)), index)
    return replace(index, comment=index.comment or before.comment, statistics=index.statistics or before.statistics)


def finish(
    session: PgSession, indexed: Indexed, beat: Callable[[str], None], run: RunSpec | None = None
) -> IndexOutcome:
    """Build what is missing, exactly as it was (or as a new table gets it), and refresh statistics.

    Args:
        run: The run whose vectors are indexed; None where nothing has been written.

    Raises:
        DatabaseError: Another session holds the table, from which indexes may have been dropped. What is missing is
            built by the next run.
    """
    builder = IndexBuilder(session, indexed, beat, dimensions=run.dimensions if run else 1)
    try:
        # What was built before the connection was lost is reported too.
        return session.retrying("building the vector index", lambda: _finish(session, indexed, run, builder))
    except DatabaseError as error:
        holder = _find_holder(session, indexed) if sqlstate(error) == LOCK_NOT_AVAILABLE else None
        if holder is None:
            raise
        if run is not None and run.indexes is not IndexPolicy.DEFER:
            why = f"{holder}, and did not give it free in time; the next run builds what is missing"
            return IndexOutcome(IndexAction.NOT_BUILT, why, warnings=(f"An index was not built: {why}.",))
        raise DatabaseError(
            f"The indexes of {indexed.shown} could not be built: {holder}, and did not give it free in time.",
            remedy="All that was embedded is stored. Run the same command again once it has ended; that builds them.",
        ) from error


def _finish(session: PgSession, indexed: Indexed, run: RunSpec | None, builder: IndexBuilder) -> IndexOutcome:
    with session.transaction() as cursor:
        tree = IndexTree.read(cursor, indexed)
        missing = _find_missing(cursor, tree, run)
        outdated = _find_outdated(cursor, tree, run)
        if isinstance(missing, SearchIndex):
            tree.dropped.append(missing)
        if not tree.unfinished() and not outdated and not builder.has_built:
            _note_model(cursor, tree, run)
            forget(cursor, indexed.home)
            return _nothing_to_build(tree, missing)
        reason = obstacle(cursor, indexed, tree.dropped)
        if reason is None and isinstance(missing, SearchIndex):
            # As if it had been there: whoever comes next completes it.
            remember(cursor, indexed.home, tree.dropped)
    if reason is not None:
        how = "CONCURRENTLY " if indexed.concurrently else ""
        lacking = [index for index in wanted(tree) if index.parent is None]
        statements = [f"{index.statement(index.name, concurrently=indexed.concurrently)};" for index in lacking]
        statements += [f"REINDEX INDEX {how}{qualified(index.key)};" for index in outdated]
        owner = f"Let the owner run: {' '.join(statements) or 'kdb-fast reindex'}"
        return IndexOutcome(IndexAction.NOT_BUILT, reason, warnings=(owner,), live=tree.live())
    live = 0 if tree.dropped else tree.live()
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
    for index in outdated:
        builder.refresh(index)
    outcome = builder.outcome([index for index in tree.dropped if index.place not in tree.relations])
    with session.transaction() as cursor:
        built = IndexTree.read(cursor, indexed)
        for index in built.dropped:
            found = built.found(index)
            if found is not None and (found.comment, found.statistics) == (None, {}):
                complete(cursor, index, found.name)  # one that was built beside others
        _note_model(cursor, built, run)
        forget(cursor, indexed.home)
    with session.transaction() as cursor:
        cursor.execute("SET LOCAL statement_timeout = 0")
        cursor.execute(f"ANALYZE (SKIP_LOCKED) {indexed.qualified}".encode())
    if isinstance(missing, SearchIndex):
        outcome = replace(outcome, detail=f"{outcome.detail} (HNSW for the cosine, since there was none)")
    return replace(outcome, live=live)


def _find_missing(cursor: Cursor, tree: IndexTree, run: RunSpec | None) -> SearchIndex | str:
    """The index that a table gets that has none; or why it gets none, '' where that is not worth a word."""
    if tree.indexed.standard or run is None or any(index.vector for index in (*tree.present, *tree.dropped)):
        return ""
    if run.indexes is IndexPolicy.NONE:
        return "--index none"
    return default_index(cursor, tree.indexed, run.dimensions)


def _nothing_to_build(tree: IndexTree, missing: SearchIndex | str) -> IndexOutcome:
    if missing:
        return IndexOutcome(IndexAction.NONE, f"no index of {tree.indexed.shown}.{tree.indexed.vector}: {missing}")
    warnings = [
        f"The index {name} is invalid, so no search uses it: REINDEX INDEX CONCURRENTLY {name};"
        for name in tree.unused()
    ]
    return IndexOutcome(IndexAction.KEPT, warnings=tuple(warnings), live=tree.live())


def _follows_model(tree: IndexTree, run: RunSpec) -> list[SearchIndex]:
    """Those that are built again after a change of the model: ivfflat, and all where that is asked for."""
    every = run.indexes is IndexPolicy.CONCURRENTLY
    return [
        index
        for index in tree.present
        if index.vector and index.valid and not index.partitioned and tree.relations[index.place].inside
        and (every or index.is_ivfflat)
    ]  # fmt: skip


def _find_outdated(cursor: Cursor, tree: IndexTree, run: RunSpec | None) -> list[SearchIndex]:
    """Indexes that were built for other vectors than this run, or an unfinished one before it, has written."""
    found = [] if run is None else _follows_model(tree, run)
    return found if found and run is not None and _has_changed_model(cursor, tree, run) else []


def _has_changed_model(cursor: Cursor, tree: IndexTree, run: RunSpec) -> bool:
    home = tree.indexed.home
    if built_for(cursor, home) == run.fingerprint:
        return False
    statement = "SELECT FROM {kdb_fast_runs} WHERE target = %s AND fingerprint = %s AND last_flush > 0 LIMIT 1"
    return cursor.execute(home.statement(statement), (home.name, run.fingerprint)).fetchone() is not None


def _note_model(cursor: Cursor, tree: IndexTree, run: RunSpec | None) -> None:
    """Whatever index there is now, or is made by the next run, is one of this run's vectors."""
    if run is None or (tree.indexed.standard and not _follows_model(tree, run)):
        return
    if _has_changed_model(cursor, tree, run):
        note_built_for(cursor, tree.indexed.home, run.fingerprint)
