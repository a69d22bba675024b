"""PostgreSQL: build search indexes, put partitioned ones together, and look at what has come of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...faults import fault
from ...tables.index_policy import IndexAction, IndexOutcome
from ...tables.kdb_search import POSTGRESQL_TEXT_INDEX, POSTGRESQL_VECTOR_INDEX
from .index_catalog import (
    Name,
    SearchIndex,
    create,
    drop_copies,
    find_tablespace,
    free_name,
    owner_of_name,
    qualified,
)
from .index_progress import watched
from .index_session import apply, beside_others, build_settings, name_build, notices
from .index_tree import IndexTree
from .indexed import Indexed
from .session import PgSession

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]

CLEAR_PATIENCE = "2s"
"""How long the removal of what an unfinished build has left waits for others: they wait behind it meanwhile."""


def wanted(tree: IndexTree) -> list[SearchIndex]:
    """What an owner would have to make, in a few statements: a partitioned index makes its parts."""
    wanted = [*tree.absent(), *tree.lost(), *tree.broken()]
    for vector in (False, True):
        covered = {index.place for index in wanted if index.vector == vector}
        if not covered and tree.uncovered(vector):
            wanted += _standard(tree, vector)
    return sorted(wanted, key=lambda index: index.vector)


def _standard(tree: IndexTree, vector: bool) -> list[SearchIndex]:
    """Indexes as KameleonDB makes them: one of the whole table, or where some partitions have their own, one of each
    that has none."""
    index = tree.indexed.home.index
    name = index.vector_index if vector else index.text_index
    using = POSTGRESQL_VECTOR_INDEX if vector else POSTGRESQL_TEXT_INDEX
    using = using.format(pgvector=f"{tree.pgvector}.")
    whole = schema, table = tree.indexed.schema, tree.indexed.table
    bare = tree.uncovered(vector)
    if len(bare) == sum(relation.leaf and relation.inside for relation in tree.relations.values()):
        return [SearchIndex(schema, table, name, using, vector, partitioned=not tree.relations[whole].leaf)]
    return [_part(tree.indexed, place, using, vector) for place in bare]


def _part(indexed: Indexed, place: Name, using: str, vector: bool, like: SearchIndex | None = None) -> SearchIndex:
    """An index of one partition, with the name that the server would give it."""
    name = f"{place[1]}_{indexed.vector if vector else indexed.texts[-1]}_idx"
    return SearchIndex(*place, name, using, vector, tablespace=like.tablespace if like else None)


class IndexBuilder:
    """Builds indexes, each in a transaction of its own or beside others, and looks at what it has built.

    Args:
        dimensions: Of the vectors, where their column does not say; 1 where nobody knows.
    """

    def __init__(
        self, session: PgSession, indexed: Indexed, beat: Callable[[str], None], *, dimensions: int = 1
    ) -> None:
        self._session, self._indexed, self._beat, self._dimensions = session, indexed, beat, dimensions
        self._warnings: list[str] = []
        self._again: list[str] = []
        self._built: dict[Name, SearchIndex] = {}
        """What was to be built, by the name it got."""
        self._wholes: set[Name] = set()
        """Partitioned indexes that are to become valid."""

    @property
    def has_built(self) -> bool:
        return bool(self._built or self._again)

    def refresh(self, index: SearchIndex) -> None:
        """Build one that is there and valid once more."""
        if index.name not in self._again:
            self.build(index, again=True)
            del self._built[index.key]
            self._again.append(index.name)

    def build(self, index: SearchIndex, *, again: bool = False) -> None:
        """Build an index, or ``again`` one that is there; with one process if memory is short."""
        import psycopg

        beside = self._indexed.concurrently and not index.partitioned
        build = self._build_beside if beside else self._build
        serial = False
        while True:
            fault("store.index_build")
            self._beat(f"building {index.name}")
            try:
                with watched(self._session.address, index.place, f"building {index.name}", self._beat):
                    name = build(index, again, serial)
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

    def _build(self, index: SearchIndex, again: bool, serial: bool) -> str:
        """In a transaction: nobody writes the table meanwhile. Returns the name."""
        with self._session.transaction() as cursor, notices(self._session.connection(), self._warnings):
            name_build(cursor)
            apply(cursor, self._settings(cursor, index, serial))
            if not again:
                return self._create(cursor, index)
            cursor.execute(f"REINDEX INDEX {qualified(index.key)}".encode())
            return index.name

    def _build_beside(self, index: SearchIndex, again: bool, serial: bool) -> str:
        """While others write the table. Returns the name."""
        import psycopg

        with self._session.transaction() as cursor:
            settings = self._settings(cursor, index, serial)
            if again:
                cursor.execute("SELECT set_config('lock_timeout', %s, true)", (CLEAR_PATIENCE,))
                drop_copies(cursor, index, IndexTree.read(cursor, self._indexed).present)
                name, statement = index.name, f"REINDEX INDEX CONCURRENTLY {qualified(index.key)}"
            else:
                name = self._name(cursor, index)
                statement = index.statement(name, concurrently=True)
                tablespace, warnings = find_tablespace(cursor, index, name)
                self._warnings += warnings
                if tablespace is not None:
                    settings["default_tablespace"] = tablespace
        built = replace(index, name=name)
        with beside_others(self._session, settings) as cursor, notices(cursor.connection, self._warnings):
            try:
                cursor.execute(statement.encode())
            except psycopg.errors.DuplicateTable:
                raise
            except psycopg.Error:
                self._clear(built, again)
                raise
        return name

    def _clear(self, index: SearchIndex, again: bool) -> None:
        """Remove what a build that failed has left, if it can be done at once; else the next run does."""
        import psycopg

        try:
            with self._session.transaction() as cursor:
                cursor.execute("SELECT set_config('lock_timeout', %s, true)", (CLEAR_PATIENCE,))
                present = IndexTree.read(cursor, self._indexed).present
                drop_copies(cursor, index, present)
                if not again and any(p.key == index.key and not p.valid for p in present):
                    cursor.execute(f"DROP INDEX IF EXISTS {qualified(index.key)}".encode())
        except psycopg.Error:
            self._beat(f"{index.name} is unfinished")

    def _settings(self, cursor: Cursor, index: SearchIndex, serial: bool) -> dict[str, str]:
        return build_settings(cursor, index.place, self._indexed.vector, self._dimensions, serial=serial)

    def _create(self, cursor: Cursor, index: SearchIndex, *, only: bool = False) -> str:
        name = self._name(cursor, index)
        self._warnings += create(cursor, index, name, only=only)
        return name

    def _name(self, cursor: Cursor, index: SearchIndex) -> str:
        """That of the index, or one that is free."""
        name = free_name(cursor, index.schema, index.name)
        if name != index.name:
            whose = owner_of_name(cursor, index.key)
            self._warnings.append(
                f"The name {index.name} is taken by {whose}, so the index of {index.table} is {name}. To give it the "
                f"name, free that and run: ALTER INDEX {qualified((index.schema, name))} RENAME TO "
                f"{qualified(index.key).rpartition('.')[2]};"
            )
        return name

    def put_together(self, vector: bool) -> None:
        """Make the partitioned indexes that are missing, and attach to them what was attached."""
        with self._session.transaction() as cursor:
            tree = IndexTree.read(cursor, self._indexed)
            for index in [i for i in tree.absent() if i.vector == vector]:
                fault("store.index_build")
                self._beat(f"building {index.name}")
                self._built[index.schema, self._create(cursor, index, only=True)] = index
            tree = IndexTree.read(cursor, self._indexed)
            for part, whole in [pair for pair in tree.detached() if pair[0].vector == vector]:
                _attach(cursor, part, whole)
            # Partitions that came meanwhile, or were built by more().
            tree = IndexTree.read(cursor, self._indexed)
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
                        part = _part(self._indexed, place, whole.using, vector, whole)
                        parts.append(replace(part, partitioned=not leaf))
        if not parts and tree.uncovered(vector):
            parts = _standard(tree, vector)
        return parts

    def _read(self) -> IndexTree:
        with self._session.transaction() as cursor:
            return IndexTree.read(cursor, self._indexed)

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
        again = ", ".join(self._again) + (" for the vectors of this model" if self._again else "")
        action = IndexAction.BUILT if self.has_built else IndexAction.KEPT
        return IndexOutcome(action, text, invalid, tuple(self._warnings), again)


def _free_equal(tree: IndexTree, place: Name, whole: SearchIndex) -> SearchIndex | None:
    """A valid index of a partition that could be attached, and is attached to nothing."""
    return next(
        (p for p in tree.present if p.place == place and p.using == whole.using and p.parent is None
         and (p.valid or p.partitioned)),
        None,
    )  # fmt: skip


def _attach(cursor: Cursor, part: SearchIndex, whole: SearchIndex) -> None:
    cursor.execute(f"ALTER INDEX {qualified(whole.key)} ATTACH PARTITION {qualified(part.key)}".encode())
