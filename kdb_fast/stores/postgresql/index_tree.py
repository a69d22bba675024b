"""PostgreSQL: what search indexes there are, which were dropped, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...tables.target import Target
from .index_catalog import Name, Relation, SearchIndex, qualified, read_indexes, read_relations
from .indexed import Indexed

if TYPE_CHECKING:
    import psycopg

    Cursor = psycopg.Cursor[tuple[Any, ...]]


def _state_key(target: Target) -> str:
    """Under which dropped indexes are remembered."""
    return f"dropped_indexes/{target.name}"


@dataclass
class IndexTree:
    """The search indexes that are there and those that were dropped, of the search table and all its partitions."""

    indexed: Indexed
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
    def read(cls, cursor: Cursor, indexed: Indexed) -> IndexTree:
        """Read it; for the rest of the transaction the role's ``statement_timeout`` does not count."""
        cursor.execute("SET LOCAL statement_timeout = 0")
        dropped = _remembered(cursor, indexed.home)
        others = {index.place for index in dropped}
        row = cursor.execute(
            "SELECT coalesce(bool_or(attname = %s AND atttypmod BETWEEN 1 AND 2000), false), "
            "coalesce(bool_or(attname = %s), false), (SELECT quote_ident(n.nspname) FROM pg_extension e "
            "JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'vector') FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND NOT attisdropped",
            (indexed.vector, indexed.home.index.tsvector, indexed.regclass),
        ).fetchone()
        assert row is not None
        relations, present = read_relations(cursor, indexed, others), read_indexes(cursor, indexed, others)
        return cls(indexed, relations, present, dropped, *row)

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
        REINDEX CONCURRENTLY left behind; and one of a user's table may be just being built."""
        names = {d.key for d in self.dropped}
        usable = self._usable() | {(index.place, index.vector) for index in self.lost()}
        return [
            p
            for p in self.present
            if not p.partitioned
            and not p.valid
            and (p.key in names or (self._is_standard(p.place) and (p.place, p.vector) not in usable))
        ]

    def uncovered(self, vector: bool) -> list[Name]:
        """Tables that hold rows and have no valid index of the kind, though they could and should."""
        if not (self.vectors if vector else self.texts):
            return []
        usable = self._usable()
        return [
            place
            for place, relation in self.relations.items()
            if relation.leaf and self._is_standard(place) and (place, vector) not in usable
        ]

    def _is_standard(self, place: Name) -> bool:
        """Whether the table is to have KameleonDB's indexes."""
        return self.indexed.standard and self.relations[place].inside

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

    def live(self) -> int:
        """HNSW indexes that each row which is written costs time."""
        graphs = [p.place for p in self.present if p.using.startswith("USING hnsw") and not p.partitioned]
        return max((graphs.count(place) for place in graphs), default=0)

    def unused(self) -> list[str]:
        """Invalid indexes of a user's table, which no search uses and which are not ours to build again."""
        names = {d.key for d in self.dropped}
        invalid = [p for p in self.present if not p.valid and not p.partitioned and p.key not in names]
        return [] if self.indexed.standard else [qualified(p.key) for p in invalid]


def _remembered(cursor: Cursor, target: Target) -> list[SearchIndex]:
    row = cursor.execute(
        target.statement("SELECT value FROM {kdb_fast_state} WHERE key = %s"), (_state_key(target),)
    ).fetchone()
    remembered = json.loads(row[0]) if row else []
    if isinstance(remembered, dict):
        place = target.index_schema, target.index.name
        # By a version that kept the definition alone, by name; its run was killed before the indexes were built again.
        quoted = cursor.execute("SELECT quote_ident(%s)", (target.pgvector,)).fetchone()
        pgvector = str(quoted and quoted[0])
        return [SearchIndex.from_definition(place, pgvector, *index) for index in remembered.items()]
    return [SearchIndex.from_json(values) for values in remembered]


def remember(cursor: Cursor, target: Target, indexes: Iterable[SearchIndex]) -> None:
    """Keep in the database what was dropped, so that whoever comes next can build it again."""
    _keep(cursor, target, _state_key(target), json.dumps([index.as_json() for index in indexes]))


def forget(cursor: Cursor, target: Target) -> None:
    """All that was dropped is there again."""
    cursor.execute(target.statement("DELETE FROM {kdb_fast_state} WHERE key = %s"), (_state_key(target),))


def built_for(cursor: Cursor, target: Target) -> str | None:
    """Fingerprint of the vectors that the indexes were last built for; None where that is not known."""
    statement = target.statement("SELECT value FROM {kdb_fast_state} WHERE key = %s")
    row = cursor.execute(statement, (f"indexed_for/{target.name}",)).fetchone()
    return None if row is None else str(row[0])


def note_built_for(cursor: Cursor, target: Target, fingerprint: str) -> None:
    """The indexes are those of the vectors with this fingerprint."""
    _keep(cursor, target, f"indexed_for/{target.name}", fingerprint)


def _keep(cursor: Cursor, target: Target, key: str, value: str) -> None:
    statement = "INSERT INTO {kdb_fast_state} VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value"
    cursor.execute(target.statement(statement), (key, value))
