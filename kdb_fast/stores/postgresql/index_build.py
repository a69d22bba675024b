"""PostgreSQL: build search indexes, put partitioned ones together, and look at what has come of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...db.pg_connection import name_session
from ...faults import fault
from ...resources import available_memory, usable_cpus
from ...tables.index_policy import IndexAction, IndexOutcome
from ...tables.kdb_search import POSTGRESQL_TEXT_INDEX, POSTGRESQL_VECTOR_INDEX
from ...tables.target import Target
from .check import vector_version
from .index_catalog import Name, SearchIndex, create, free_name, owner_of_name, qualified
from .index_tree import IndexTree
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

ROW_BYTES_IN_BUILD = 1.3
"""pgvector keeps elements and neighbour lists in memory while building: about 1.3 × the vectors at m = 16."""


def wanted(tree: IndexTree, target: Target) -> list[SearchIndex]:
    """What an owner would have to make, in a few statements: a partitioned index makes its parts."""
    wanted = [*tree.absent(), *tree.lost(), *tree.broken()]
    for vector in (False, True):
        covered = {index.place for index in wanted if index.vector == vector}
        if not covered and tree.uncovered(vector):
            wanted += _standard(tree, target, vector)
    return sorted(wanted, key=lambda index: index.vector)


def _standard(tree: IndexTree, target: Target, vector: bool) -> list[SearchIndex]:
    """Indexes as KameleonDB makes them: one of the whole table, or where some partitions have their own, one of each
    that has none."""
    name = target.index.vector_index if vector else target.index.text_index
    using = POSTGRESQL_VECTOR_INDEX if vector else POSTGRESQL_TEXT_INDEX
    using = using.format(pgvector=f"{tree.pgvector}.")
    home, table = target.index_schema, target.index.name
    bare = tree.uncovered(vector)
    whole = (home, table)
    if len(bare) == sum(relation.leaf and relation.inside for relation in tree.relations.values()):
        return [SearchIndex(home, table, name, using, vector, partitioned=not tree.relations[whole].leaf)]
    return [_part(target, place, using, vector) for place in bare]


def _part(target: Target, place: Name, using: str, vector: bool, like: SearchIndex | None = None) -> SearchIndex:
    """An index of one partition, with the name that the server would give it."""
    name = f"{place[1]}_{target.index.vector if vector else target.index.tsvector}_idx"
    return SearchIndex(*place, name, using, vector, tablespace=like.tablespace if like else None)


class IndexBuilder:
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
                    _settings(cursor, index.place, self._target.index.vector, serial=serial)
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
            tree = IndexTree.read(cursor, self._target)
            for index in [i for i in tree.absent() if i.vector == vector]:
                fault("store.index_build")
                self._beat(f"building {index.name}")
                self._built[index.schema, self._create(cursor, index, only=True)] = index
            tree = IndexTree.read(cursor, self._target)
            for part, whole in [pair for pair in tree.detached() if pair[0].vector == vector]:
                _attach(cursor, part, whole)
            # Partitions that came meanwhile, or were built by more().
            tree = IndexTree.read(cursor, self._target)
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
                        part = _part(self._target, place, whole.using, vector, whole)
                        parts.append(replace(part, partitioned=not leaf))
        if not parts and tree.uncovered(vector):
            parts = _standard(tree, self._target, vector)
        return parts

    def _read(self) -> IndexTree:
        with self._session.transaction() as cursor:
            return IndexTree.read(cursor, self._target)

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


def _free_equal(tree: IndexTree, place: Name, whole: SearchIndex) -> SearchIndex | None:
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


def _settings(cursor: Cursor, table: Name, vector: str, *, serial: bool = False) -> None:
    """Memory and parallel workers of an index build, for this transaction.

    A build that fits ``maintenance_work_mem`` is several times as fast as one that does not; a parallel
    one allocates all of it at once, so no more is asked for than the vectors need. Parallel builds of
    pgvector before 0.8.2 can read other tables' memory (CVE-2026-3172).
    """
    row = cursor.execute(
        "SELECT greatest(a.atttypmod, 1), pg_size_bytes(current_setting('maintenance_work_mem')) "
        "FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = %s "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        (vector, *table),
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
