"""PostgreSQL: drop the search indexes before a large load, and build whatever index is missing.

When they are dropped: :mod:`.index_policy`.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..faults import fault
from ..pg_connection import name_session
from ..resources import available_memory, usable_cpus
from ..target import TABLE, Target
from . import schema
from .index_policy import IndexAction, IndexOutcome
from .pg_check import vector_version
from .pg_index_catalog import (
    Name,
    Relation,
    SearchIndex,
    create,
    free_name,
    obstacle,
    owner_of_name,
    qualified,
    read_indexes,
    read_relations,
)
from .pg_session import PgSession

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

ROW_BYTES_IN_BUILD = 1.3
"""pgvector keeps elements and neighbour lists in memory while building: about 1.3 × the vectors at m = 16."""

DROP_PATIENCE_MS = 2000
"""How long the dropping of the index waits for other sessions' transactions."""

STATE_KEY = "dropped_indexes"


@dataclass
class _Tree:
    """The search indexes that are there and those that were dropped, of the search table and all its partitions."""

    relations: dict[Name, Relation]
    present: list[SearchIndex]
    dropped: list[SearchIndex]
    vectors: bool
    """Whether the table's vectors can be indexed."""
    texts: bool
    """Whether there is a column for full-text search."""
    pgvector: str
    """The schema of pgvector's operator classes, as the server writes it in definitions."""

    @classmethod
    def read(cls, cursor: Cursor, target: Target) -> _Tree:
        """Read it; for the rest of the transaction the role's ``statement_timeout`` does not count."""
        cursor.execute("SET LOCAL statement_timeout = 0")
        dropped = _remembered(cursor, target)
        others = {index.place for index in dropped}
        row = cursor.execute(
            "SELECT coalesce(bool_or(attname = 'embedding' AND atttypmod BETWEEN 1 AND 2000), false), "
            "coalesce(bool_or(attname = 'tsv'), false), (SELECT quote_ident(n.nspname) FROM pg_extension e "
            "JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector') FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND NOT attisdropped",
            (target.regclass(TABLE),),
        ).fetchone()
        assert row is not None
        return cls(read_relations(cursor, target, others), read_indexes(cursor, target, others), dropped, *row)

    def found(self, index: SearchIndex) -> SearchIndex | None:
        """What is there of a dropped index: one of its name on its table, else its equal of a name that none had."""
        on_table = [p for p in self.present if p.place == index.place and p.partitioned == index.partitioned]
        for candidate in on_table:
            if candidate.name == index.name:
                return candidate
        names = {d.key for d in self.dropped}
        equal = (p for p in on_table if p.using == index.using and p.key not in names and (p.valid or p.partitioned))
        return next(equal, None)

    def lost(self) -> list[SearchIndex]:
        """Dropped indexes of tables that hold rows, which are to be built."""
        keys = {d.key: d for d in self.dropped}
        lost = []
        for index in self.dropped:
            relation = self.relations.get(index.place)
            if relation is None or not relation.leaf or index.partitioned or self.found(index) is not None:
                continue
            # Another program has made another index under the parent's name meanwhile: its parts are there.
            parent = keys.get(index.parent) if index.parent else None
            there = self.found(parent) if parent is not None else None
            if parent is None or there is None or there.using == parent.using:
                lost.append(index)
        return lost

    def broken(self) -> list[SearchIndex]:
        """Invalid indexes to be built again. Beside a valid one of its kind an invalid one is what an interrupted
        REINDEX CONCURRENTLY left behind."""
        names = {d.key for d in self.dropped}
        usable = self._usable() | {(index.place, index.vector) for index in self.lost()}
        return [
            p
            for p in self.present
            if not p.partitioned
            and not p.valid
            and (p.key in names or (self.relations[p.place].inside and (p.place, p.vector) not in usable))
        ]

    def uncovered(self, vector: bool) -> list[Name]:
        """Tables that hold rows and have no valid index of the kind, though they could."""
        if not (self.vectors if vector else self.texts):
            return []
        usable = self._usable()
        return [
            place
            for place, relation in self.relations.items()
            if relation.leaf and relation.inside and (place, vector) not in usable
        ]

    def _usable(self) -> set[tuple[Name, bool]]:
        return {(p.place, p.vector) for p in self.present if p.valid and not p.partitioned}

    def children(self, place: Name) -> list[Name]:
        """The partitions of a table, one level down."""
        return [name for name, relation in self.relations.items() if relation.parent == place]

    def parts(self, parent: SearchIndex) -> dict[Name, SearchIndex]:
        """The indexes that are attached to a partitioned one, by their table."""
        return {p.place: p for p in self.present if p.parent == parent.key}

    def unfinished(self) -> bool:
        """Whether something is to be built, or put together."""
        return (
            bool(self.lost() or self.broken() or self.uncovered(True) or self.uncovered(False))
            or any(True for _ in self.absent())
            or any(True for _ in self.detached())
            or any(True for _ in self.incomplete())
        )

    def absent(self) -> Iterator[SearchIndex]:
        """Dropped partitioned indexes that are to be made."""
        for index in self.dropped:
            relation = self.relations.get(index.place)
            if index.partitioned and relation is not None and not relation.leaf and self.found(index) is None:
                yield index

    def detached(self) -> Iterator[tuple[SearchIndex, SearchIndex]]:
        """(Part, index) that are there and were attached when they were dropped."""
        dropped = {d.key: d for d in self.dropped}
        for index in self.dropped:
            parent = dropped.get(index.parent) if index.parent else None
            part, whole = self.found(index), self.found(parent) if parent is not None else None
            if part is None or whole is None or part.parent is not None:
                continue
            if self.relations[part.place].parent == whole.place and part.place not in self.parts(whole):
                yield part, whole

    def incomplete(self) -> Iterator[SearchIndex]:
        """Partitioned indexes that are to be valid and lack parts: they were valid, or a table has no other index."""
        valid = {(found.key) for d in self.dropped if d.partitioned and d.valid and (found := self.found(d))}
        for index in self.present:
            if index.partitioned and not index.valid:
                bare = set(self.uncovered(index.vector))
                if index.key in valid or any(place in bare for place in self._leaves(index.place)):
                    yield index

    def _leaves(self, place: Name) -> Iterator[Name]:
        for child in self.children(place):
            if self.relations[child].leaf:
                yield child
            yield from self._leaves(child)


def _remembered(cursor: Cursor, target: Target) -> list[SearchIndex]:
    row = cursor.execute(target.statement("SELECT value FROM {kdb_fast_state} WHERE key = %s"), (STATE_KEY,)).fetchone()
    remembered = json.loads(row[0]) if row else []
    if isinstance(remembered, dict):
        # By a version that kept the definition alone, by name; its run was killed before the indexes were built again.
        quoted = cursor.execute("SELECT quote_ident(%s)", (target.pgvector,)).fetchone()
        pgvector = str(quoted and quoted[0])
        return [SearchIndex.from_definition(str(target.schema), pgvector, *index) for index in remembered.items()]
    return [SearchIndex.from_json(values) for values in remembered]


def defer(session: PgSession) -> IndexOutcome:
    """Drop the vector and full-text indexes; what they were is remembered in the same transaction."""
    import psycopg

    try:
        return _drop(session)
    except psycopg.errors.LockNotAvailable:
        return _kept(f"another session is using {session.target.shown(TABLE)}, so the index could not be dropped")


def _kept(why: str) -> IndexOutcome:
    return IndexOutcome(IndexAction.KEPT, why)


def _drop(session: PgSession) -> IndexOutcome:
    target = session.target
    with session.transaction() as cursor:
        # While this waits for a table, everybody else waits behind it.
        cursor.execute(f"SET LOCAL lock_timeout = {DROP_PATIENCE_MS}")
        tree = _Tree.read(cursor, target)
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
        cursor.execute(
            target.statement(
                "INSERT INTO {kdb_fast_state} VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value"
            ),
            (STATE_KEY, json.dumps([index.as_json() for index in remembered])),
        )
        for index in dropped:
            if index.parent is None:  # its parts go with it
                cursor.execute(f"DROP INDEX IF EXISTS {qualified(index.key)}".encode())
        fault("store.index_dropped")
    return IndexOutcome(IndexAction.DROPPED)


def finish(session: PgSession, beat: Callable[[str], None]) -> IndexOutcome:
    """Build what is missing, exactly as it was (or as KameleonDB creates it), and refresh statistics."""
    builder = _Builder(session, beat)
    # What was built before the connection was lost is reported too.
    return session.retrying("building the vector index", lambda: _finish(session, builder))


def _finish(session: PgSession, builder: _Builder) -> IndexOutcome:
    target = session.target
    with session.transaction() as cursor:
        tree = _Tree.read(cursor, target)
        if not tree.unfinished() and not builder.has_built:
            _forget(cursor, target)
            return IndexOutcome(IndexAction.KEPT)
        reason = obstacle(cursor, target, tree.dropped)
    if reason is not None:
        statements = [f"{index.statement(index.name)};" for index in _wanted(tree, target) if index.parent is None]
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
        _forget(cursor, target)
    with session.transaction() as cursor:
        cursor.execute("SET LOCAL statement_timeout = 0")
        cursor.execute(target.statement("ANALYZE {kdb_search}"))
    return outcome


def _forget(cursor: Cursor, target: Target) -> None:
    cursor.execute(target.statement("DELETE FROM {kdb_fast_state} WHERE key = %s"), (STATE_KEY,))


def _wanted(tree: _Tree, target: Target) -> list[SearchIndex]:
    """What an owner would have to make, in a few statements: a partitioned index makes its parts."""
    wanted = [*tree.absent(), *tree.lost(), *tree.broken()]
    for vector in (False, True):
        covered = {index.place for index in wanted if index.vector == vector}
        if not covered and tree.uncovered(vector):
            wanted += _standard(tree, target, vector)
    return sorted(wanted, key=lambda index: index.vector)


def _standard(tree: _Tree, target: Target, vector: bool) -> list[SearchIndex]:
    """Indexes as KameleonDB makes them: one of the whole table, or where some partitions have their own, one of each
    that has none."""
    name = schema.VECTOR_INDEX if vector else schema.FTS_INDEX
    using = schema.POSTGRESQL_SEARCH_USING[name].format(pgvector=f"{tree.pgvector}.")
    home = str(target.schema)
    bare = tree.uncovered(vector)
    whole = (home, TABLE)
    if len(bare) == sum(relation.leaf and relation.inside for relation in tree.relations.values()):
        return [SearchIndex(home, TABLE, name, using, vector, partitioned=not tree.relations[whole].leaf)]
    return [_part(place, using, vector) for place in bare]


def _part(place: Name, using: str, vector: bool, like: SearchIndex | None = None) -> SearchIndex:
    """An index of one partition, with the name that the server would give it."""
    name = f"{place[1]}_{'embedding' if vector else 'tsv'}_idx"
    return SearchIndex(*place, name, using, vector, tablespace=like.tablespace if like else None)


class _Builder:
    """Builds indexes, each in a transaction of its own, and looks at what it has built."""

    def __init__(self, session: PgSession, beat: Callable[[str], None]) -> None:
        self._session, self._target, self._beat = session, session.target, beat
        self._warnings: list[str] = []
        self._built: dict[Name, SearchIndex] = {}
        """What was to be built, by the name it got."""
        self._wholes: set[Name] = set()
        """Partitioned indexes that are to become valid."""

    @property
    def has_built(self) -> bool:
        return bool(self._built)

    def build(self, index: SearchIndex, *, again: bool = False) -> None:
        """Build an index, or ``again`` one that is there and is invalid; with one process if memory is short."""
        import psycopg

        serial = False
        while True:
            fault("store.index_build")
            self._beat(f"building {index.name}")
            try:
                with self._session.transaction() as cursor, _notices(self._session, self._warnings):
                    _name_session(cursor)
                    settings(cursor, index.place, serial=serial)
                    if again:
                        cursor.execute(f"REINDEX INDEX {qualified(index.key)}".encode())
                        name = index.name
                    else:
                        name = self._create(cursor, index)
                self._built[index.schema, name] = replace(index, valid=True)
                return
            except (psycopg.errors.DuplicateTable, psycopg.errors.UniqueViolation):
                # Another program has made one of this name meanwhile; what it is, is looked at.
                tree = self._read()
                found = tree.found(index) or next(
                    (p for p in tree.present if (p.place, p.using) == (index.place, index.using)), None
                )
                if found is not None:
                    return
            except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory) as error:
                if serial:
                    raise
                serial = True
                self._warnings.append(
                    f"The parallel build of {index.name} ran out of shared memory ({error.diag.message_primary}); "
                    "built with one process. Give the server's container a larger --shm-size."
                )

    def _create(self, cursor: Cursor, index: SearchIndex, *, only: bool = False) -> str:
        name = free_name(cursor, index.schema, index.name)
        if name != index.name:
            whose = owner_of_name(cursor, index.key)
            self._warnings.append(
                f"The name {index.name} is taken by {whose}, so the index of {index.table} is {name}. To give it the "
                f"name, free that and run: ALTER INDEX {qualified((index.schema, name))} RENAME TO "
                f"{qualified(index.key).rpartition('.')[2]};"
            )
        self._warnings += create(cursor, index, name, only=only)
        return name

    def put_together(self, vector: bool) -> None:
        """Make the partitioned indexes that are missing, and attach to them what was attached."""
        with self._session.transaction() as cursor:
            tree = _Tree.read(cursor, self._target)
            for index in [i for i in tree.absent() if i.vector == vector]:
                fault("store.index_build")
                self._beat(f"building {index.name}")
                self._built[index.schema, self._create(cursor, index, only=True)] = index
            tree = _Tree.read(cursor, self._target)
            for part, whole in [pair for pair in tree.detached() if pair[0].vector == vector]:
                _attach(cursor, part, whole)
            # Partitions that came meanwhile, or were built by more().
            tree = _Tree.read(cursor, self._target)
            self._wholes |= {index.key for index in tree.incomplete()}
            for whole in [i for i in tree.present if i.vector == vector and i.key in self._wholes and not i.valid]:
                for place in tree.children(whole.place):
                    # One that is attached may have been invalid until now.
                    found = tree.parts(whole).get(place) or _free_equal(tree, place, whole)
                    if found is not None:
                        _attach(cursor, found, whole)

    def more(self, vector: bool) -> list[SearchIndex]:
        """What is missing beyond what was dropped."""
        tree = self._read()
        parts = []
        for whole in tree.incomplete():
            if whole.vector == vector:
                have = tree.parts(whole)
                for place in tree.children(whole.place):
                    if place not in have and _free_equal(tree, place, whole) is None:
                        leaf = tree.relations[place].leaf
                        parts.append(replace(_part(place, whole.using, vector, whole), partitioned=not leaf))
        if not parts and tree.uncovered(vector):
            parts = _standard(tree, self._target, vector)
        return parts

    def _read(self) -> _Tree:
        with self._session.transaction() as cursor:
            return _Tree.read(cursor, self._target)

    def outcome(self, homeless: Sequence[SearchIndex]) -> IndexOutcome:
        """What was built, as the catalogue says; and what was not.

        Args:
            homeless: Dropped indexes whose table is gone.
        """
        present = {index.key: index for index in self._read().present}
        good: list[Name] = []
        bad: list[Name] = []
        for key, wanted in self._built.items():
            found = present.get(key)
            is_so = found is not None and (found.place, found.using) == (wanted.place, wanted.using)
            is_valid = found is not None and (found.valid or not wanted.valid)
            (good if is_so and is_valid else bad).append(key)
        whole = [key for key in good if present[key].parent not in self._built]
        text = ", ".join(name for _, name in whole)
        if len(good) > len(whole):
            text += f" ({len(good) - len(whole)} on partitions)"
        for index in homeless:
            self._warnings.append(
                f"The index {index.name} was not built again: its table {qualified(index.place)} is gone."
            )
        invalid = tuple(name for _, name in bad)
        if invalid:
            self._warnings.append(
                f"{', '.join(invalid)}: looked at after building, the index is not there or not valid. Another session "
                "may have changed it; run the same command again."
            )
        action = IndexAction.BUILT if self._built else IndexAction.KEPT
        return IndexOutcome(action, text, invalid, tuple(self._warnings))


def _free_equal(tree: _Tree, place: Name, whole: SearchIndex) -> SearchIndex | None:
    """A valid index of a partition that could be attached, and is attached to nothing."""
    return next(
        (p for p in tree.present if p.place == place and p.using == whole.using and p.parent is None
         and (p.valid or p.partitioned)),
        None,
    )  # fmt: skip


def _attach(cursor: Cursor, part: SearchIndex, whole: SearchIndex) -> None:
    cursor.execute(f"ALTER INDEX {qualified(whole.key)} ATTACH PARTITION {qualified(part.key)}".encode())


def _name_session(cursor: Cursor) -> None:
    """A build may be silent for an hour; behind a pooler only the server can tell which of its processes does it."""
    row = cursor.execute("SELECT pg_backend_pid()").fetchone()
    assert row is not None
    name_session(cursor.connection, row[0])


def settings(cursor: Cursor, table: Name, *, serial: bool = False) -> None:
    """Memory and parallel workers of an index build, for this transaction.

    A build that fits ``maintenance_work_mem`` is several times as fast as one that does not; a parallel
    one allocates all of it at once, so no more is asked for than the vectors need. Parallel builds of
    pgvector before 0.8.2 can read other tables' memory (CVE-2026-3172).
    """
    row = cursor.execute(
        "SELECT greatest(a.atttypmod, 1), pg_size_bytes(current_setting('maintenance_work_mem')) "
        "FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'embedding' "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        table,
    ).fetchone()
    assert row is not None
    counted = cursor.execute(f"SELECT count(*) FROM {qualified(table)}".encode()).fetchone()  # noqa: S608 - quoted
    rows = int(counted[0]) if counted else 0
    # Vector, element and neighbour lists: 4 bytes a dimension and about 700 bytes of graph at m = 16.
    needed = int(rows * (4 * row[0] * ROW_BYTES_IN_BUILD + 700)) + (16 << 20)
    local = cursor.connection.info.host.startswith("/") or cursor.connection.info.host in ("localhost", "127.0.0.1")
    allowed = available_memory() // 4 if local else row[1]
    memory = max(row[1], min(needed, allowed))
    cursor.execute("SELECT set_config('maintenance_work_mem', %s, true)", (f"{memory // 1024}kB",))
    workers = 0 if serial or vector_version(cursor) < (0, 8, 2) else max(1, usable_cpus() - 1) if local else 2
    cursor.execute("SELECT set_config('max_parallel_maintenance_workers', %s, true)", (str(workers),))
    cursor.execute("SET LOCAL statement_timeout = 0")


@contextlib.contextmanager
def _notices(session: PgSession, into: list[str]) -> Iterator[None]:
    """Collect what the server says meanwhile, such as that the graph no longer fits into memory."""
    lock = threading.Lock()

    def take(diagnostic: psycopg.errors.Diagnostic) -> None:
        with lock:
            if diagnostic.message_primary and "hnsw" in diagnostic.message_primary:
                into.append(" ".join(p for p in (diagnostic.message_primary, diagnostic.message_hint) if p))

    connection = session.connection()
    connection.add_notice_handler(take)
    try:
        yield
    finally:
        connection.remove_notice_handler(take)
