"""What the readers of the two dialects share: a search's parts, and its filters as SQL both understand."""

from __future__ import annotations

import functools
import math
import os
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...catalog.definitions import Entity, Field, Place, load_entities
from ...catalog.records import LIVES, counted, owned
from ...origins import BY_NAME, NAME_CHARS, Maker, Origin, base_of, same_name
from ...records import Key
from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH, entity_and_id
from ...tables.reading import no_index, rows_of
from ...tables.target import Dialect, Params, Rows, Target, columns_of, find_target
from ..query import Query, Term
from ..scope import Scope
from .ranking import Hit, KeywordRanking

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Statement = tuple[str, Mapping[str, Any]]
"""A statement and its parameters."""

COUNT_EVERY = 100
"""Origins are counted again when 100 times the time that it took has passed: it takes one per cent of the time."""

QUICK = 0.002
"""Seconds of a count that may be made in every search."""


class Origins(NamedTuple):
    """What made the vectors of an index.

    Attributes:
        rows: Number of rows with a vector, by entity and origin.
        tracked: Whether the index has the columns in which kdb-fast keeps fingerprints.
    """

    rows: Mapping[tuple[str, Origin], int]
    tracked: bool


def count_origins(rows: Rows, target: Target) -> Origins:
    """Count what made the vectors of the index, by reading all rows: 100,000 take 50 ms on PostgreSQL, 270 on SQLite.

    Raises:
        SchemaError: There is no index.
        DatabaseError: The database cannot answer.
    """
    columns = columns_of(rows, target, (target.index.name,)).get(target.index.name)
    if columns is None:
        raise no_index(rows, target)
    tracked = {"kdb_fast_fingerprint", "kdb_fast_at"} <= columns
    ours = "CASE WHEN kdb_fast_at = updated_at THEN kdb_fast_fingerprint END" if tracked else "NULL"
    found: Counter[tuple[str, Origin]] = Counter()
    for entity, *origin, count in rows(
        f"SELECT entity_name, {ours}, model, dimensions, count(*) FROM {target.table(target.index.name)} "  # noqa: S608
        "WHERE embedding IS NOT NULL GROUP BY 1, 2, 3, 4",
        {},
    ):
        found[entity, Origin(*origin)] += count
    return Origins(found, tracked)


def origin_of_a_row(rows: Rows, target: Target) -> Origin | None:
    """What made the vector of some row, found at once; None where no row has one, or there is no index.

    Raises:
        DatabaseError: The database cannot answer.
    """
    columns = columns_of(rows, target, (target.index.name,)).get(target.index.name)
    if columns is None:
        return None
    fingerprint = "kdb_fast_fingerprint" if "kdb_fast_fingerprint" in columns else "NULL"
    found = rows(
        f"SELECT {fingerprint}, model, dimensions FROM {target.table(target.index.name)} "  # noqa: S608
        "WHERE embedding IS NOT NULL LIMIT 1",
        {},
    )
    return Origin(*found[0]) if found else None


class DefinitionsChanged(Exception):
    """KameleonDB's entities are not any more what a ranking assumed: it is to be made again."""


class SearchReader(KeywordRanking[Scope]):
    """Rankings and records of one open connection. Nothing is written. Not shared between threads.

    Every method raises :class:`~kdb_fast.errors.SchemaError` where there is no index, and
    :class:`~kdb_fast.errors.DatabaseError` when the database cannot answer.
    """

    dialect: ClassVar[Dialect]
    join: ClassVar[str] = "JOIN"
    _thread: tuple[int, ThreadPoolExecutor] | None = None

    def __init__(self, connection: Any, index: IndexTable = KDB_SEARCH) -> None:
        self._connection, self._table = connection, index
        self._rows = rows_of(connection, self.dialect)
        self._counted = Origins({}, False)
        self._counted_at: object = None
        self._count_again = 0.0

    @functools.cached_property
    def target(self) -> Target:
        """The schema that this connection's search path gives, asked for once."""
        return find_target(self._rows, self.dialect, index=self._table)

    @property
    def thread(self) -> ThreadPoolExecutor:
        """A thread for this reader, kept as long as it lives: to begin one takes 0.7 ms of a search."""
        if self._thread is None or self._thread[0] != os.getpid():  # a fork has none of its parent's threads
            self._thread = os.getpid(), ThreadPoolExecutor(1, "kdb-fast-keyword")
        return self._thread[1]

    @property
    def _index(self) -> str:
        """The search table, for a statement."""
        return self.target.table(self.target.index.name)

    def definitions(self) -> list[Entity]:
        """The entities of KameleonDB in this database."""
        return load_entities(self._rows, self.target)

    def assumed_definitions(self) -> list[Entity]:
        """The entities of KameleonDB as this reader read them last, where to read them again takes a round trip.

        The next ranking by vector, or :meth:`check_definitions`, asks on its way whether they still are what the
        database has, and raises :class:`DefinitionsChanged` if not.
        """
        return self.definitions()

    def check_definitions(self) -> None:
        """Ask whether :meth:`assumed_definitions` hold, where no ranking by vector has asked since.

        Raises:
            DefinitionsChanged: They do not.
        """

    def begin_keyword(self, query: Query, scope: Scope, limit: int) -> Callable[[], list[Hit]] | None:
        """Begin :meth:`keyword` in the database, without waiting for it.

        It is in the way of everything else that this reader does until its hits are taken, or :meth:`forget`.

        Returns:
            Gives the hits; None where nothing has begun, since the database is in this process, say.
        """
        return None

    def begin_vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> Callable[[], list[Hit]] | None:
        """As :meth:`begin_keyword`, for :meth:`vector`."""
        return None

    def forget(self) -> None:
        """Wait for what has begun, if anything has, and leave its result alone."""

    def missing_characters(self, texts: Iterable[str]) -> frozenset[str]:
        """The characters in ``texts`` that this database cannot hold; no row and no field has one."""
        return frozenset()

    def origins(self) -> Mapping[tuple[str, Origin], int]:
        """Rows with a vector, by entity and what made it; those of a moment ago where counting takes long.

        Raises:
            SchemaError: There is no index.
        """
        state = self._file_state()
        if self._counted_at is None or (state != self._counted_at and time.monotonic() >= self._count_again):
            started = time.monotonic()
            self._counted, self._counted_at = count_origins(self._rows, self.target), state
            took = time.monotonic() - started
            self._count_again = started + COUNT_EVERY * took if took > QUICK else 0.0
        return self._counted.rows

    def count_as(self, other: SearchReader) -> None:
        """Take what another reader of the same index has counted."""
        self._counted, self._counted_at, self._count_again = other._counted, other._counted_at, other._count_again

    def assume_origins(self, counted: Origins) -> None:
        """Take these for what made the vectors; for a reader of one search, which has counted just before."""
        self._counted, self._counted_at, self._count_again = counted, object(), math.inf

    def _file_state(self) -> object:
        """Something that changes with the database; equal to nothing where that cannot be known."""
        return object()

    @abstractmethod
    def vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> list[Hit]:
        """The ``limit`` rows nearest to ``vector`` (float32, shape (dimensions,)) by cosine, best first.

        Raises:
            UsageError: The index holds vectors of another length.
        """

    @abstractmethod
    def _without(self, excluded: Sequence[Term], params: Params) -> str:
        """The condition that a row ``s`` holds none of these terms."""

    def records(self, keys: Sequence[Key], scope: Scope) -> dict[Key, tuple[dict[str, Any], str]]:
        """The fields of these records by logical name, and their stored text; those that are gone are left out."""
        data, contents = self._fields(keys, scope, self._contents(keys))
        return {tuple(key): (data[tuple(key)], content) for *key, content in contents if tuple(key) in data}

    def data(self, keys: Sequence[Key], scope: Scope) -> dict[Key, dict[str, Any]]:
        """The fields of these records by logical name; those that are gone are left out."""
        return self._fields(keys, scope)[0]

    def _fields(
        self, keys: Sequence[Key], scope: Scope, *others: Statement
    ) -> tuple[dict[Key, dict[str, Any]], list[tuple[Any, ...]]]:
        """:meth:`data`, and what the ``others`` give that are read with it."""
        ids: dict[str, list[str]] = {}
        for entity, record_id in map(entity_and_id, keys):
            ids.setdefault(entity, []).append(record_id)
        places = [(d, place) for d in scope.definitions if d.name in ids for place in d.places]
        stored = self._read(*(self._stored(d, place, ids[d.name], scope) for d, place in places), *others)
        defined = {d.name for d, _ in places}
        result: dict[Key, dict[str, Any]] = {key: {} for key in keys if key[0] not in defined}
        seen: set[Key] = set()
        for (definition, place), rows in zip(places, stored[: len(places)], strict=True):
            for record_id, matches, *values in rows:
                # It counts where it is found first, be it out of scope there.
                key = (definition.name, record_id)
                if matches and key not in seen:
                    by_column = self._by_column(definition, place, values)
                    result[key] = {field.name: by_column.get(field.column) for field in definition.fields}
                seen.add(key)
        return result, [row for rows in stored[len(places) :] for row in rows]

    def _read(self, *statements: Statement) -> list[list[tuple[Any, ...]]]:
        """The rows of each statement."""
        return [self._rows(statement, params) for statement, params in statements]

    @abstractmethod
    def _contents(self, keys: Sequence[Key]) -> Statement:
        """Key and stored text of these rows."""

    @abstractmethod
    def _stored(self, definition: Entity, place: Place, record_ids: list[str], scope: Scope) -> Statement:
        """Those of these records that are in this place: id, whether it lives and meets ``where``, what is stored."""

    @abstractmethod
    def _by_column(self, definition: Entity, place: Place, values: Sequence[Any]) -> Mapping[str, Any]:
        """What :meth:`_stored` gives of a record that is in scope, by column."""

    @abstractmethod
    def _equals(self, place: Place, field: Field, value: Any, params: Params) -> str:
        """The condition that ``field`` of the record ``r`` in this place has ``value``; it may be NULL."""

    # What follows writes the scope as SQL that both dialects understand.

    def _named(self, scope: Scope, params: Params) -> str:
        """The condition that a row ``s`` is of an entity that is searched."""
        if scope.names is not None:
            return f"s.entity_name IN ({params.list(scope.names)})"
        return f"s.entity_name NOT IN ({params.list(scope.hidden)})" if scope.hidden else "true"

    def _fit(self, scope: Scope, params: Params) -> str:
        """The condition that a row ``s`` may be ranked by vector: nothing excluded is in it, and its model is right."""
        return f"{self._without(scope.excluded, params)} AND {self._comparable(scope.maker, params)}"

    def _comparable(self, maker: Maker | None, params: Params) -> str:
        """The condition that this model has made the vector of a row ``s``, as :meth:`Maker.has_made` has it.

        A CASE: of what it compares PostgreSQL would expect so few rows that it left the vector index alone.
        """
        if maker is None:
            return "true"
        known = {origin.model for _, origin in self.origins() if origin.model and same_name(origin.model, maker.model)}
        named = f"s.model IN ({params.list(sorted(known | {maker.model[:NAME_CHARS]}))})"
        if maker.by_name or not self._counted.tracked:
            return f"CASE WHEN {named} THEN true ELSE false END"
        base = base_of(maker.fingerprint)
        return (
            f"CASE WHEN s.kdb_fast_at = s.updated_at AND s.kdb_fast_fingerprint NOT LIKE {params(BY_NAME + '%')} "
            f"THEN s.kdb_fast_fingerprint = {params(base)} OR s.kdb_fast_fingerprint LIKE {params(base + '-%')} "
            f"ELSE {named} END"
        )

    def _living(self, scope: Scope, params: Params) -> str:
        """The condition that the record of a row ``s`` lives and meets ``where``, checked row by row.

        A scalar subquery, not EXISTS: PostgreSQL would hash the whole records table for that one.
        """
        branches = []
        for definition in scope.definitions:
            found = [
                f"(SELECT coalesce({self._matching(definition, place, scope, params)}, false) "  # noqa: S608
                f"FROM {self.target.table(place.table)} r WHERE r.id = s.record_id{owned(place, params)})"
                for place in definition.places
            ]
            branches.append(f"WHEN {params(definition.name)} THEN coalesce({', '.join(found)}, false)")
        return f"CASE s.entity_name {' '.join(branches)} ELSE true END" if branches else "true"

    def _all_living(self, scope: Scope, params: Params, columns: str) -> list[str]:
        """Queries that together give ``columns`` of every row ``s`` in scope that has a vector.

        They begin with the records, so the few rows of a selective ``where`` are found fast.
        """
        queries = []
        fit = f"s.embedding IS NOT NULL AND {self._fit(scope, params)}"
        for definition in scope.definitions:
            for place in definition.places:
                queries.append(
                    f"SELECT {columns} FROM {self.target.table(place.table)} r "  # noqa: S608
                    f"{self.join} {self._index} s "
                    f"ON s.record_id = r.id AND s.entity_name = {params(definition.name)} "
                    f"WHERE {fit} AND {self._matching(definition, place, scope, params)}"
                    f"{owned(place, params)}{counted(place, self.target)}"
                )
        defined = [d.name for d in scope.definitions]
        other = ""
        if scope.names is None:
            defined += scope.hidden
            other = f"s.entity_name NOT IN ({params.list(defined)})" if defined else "true"
        elif undefined := [name for name in scope.names if name not in defined]:
            other = f"s.entity_name IN ({params.list(undefined)})"
        if other:
            queries.append(f"SELECT {columns} FROM {self._index} s WHERE {fit} AND {other}")  # noqa: S608
        return queries

    def _matching(self, definition: Entity, place: Place, scope: Scope, params: Params) -> str:
        """The condition that a record ``r`` lives and meets ``where``; it may be NULL."""
        fields = {field.name: field for field in definition.fields}
        met = [f"({self._equals(place, fields[name], value, params)})" for name, value in scope.where]
        return " AND ".join([LIVES, *met])
