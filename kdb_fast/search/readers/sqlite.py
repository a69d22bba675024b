"""Search in SQLite: exact over all vectors, FTS5 for keywords.

The vectors stay in memory between searches; the first one goes through sqlite-vec where there is one. See
:mod:`.sqlite_vectors`, with what was measured.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...catalog.definitions import Entity, Field, Place
from ...catalog.records import json_member, owned
from ...records import Key
from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH
from ...tables.target import Dialect, Params, identifier
from ..query import Query, Term
from ..scope import Scope
from .base import SearchReader, Statement
from .fts5 import all_of, any_of, excludable, fts_string, meaningful
from .ranking import Hit, in_order
from .sqlite_vectors import ExactVectorSearch

CANDIDATES_PER_ROW = 2
"""Best vectors looked up for each row wanted: few records of the index are deleted ones."""

CANDIDATES_PER_ROW_WHERE = 20
"""The same with a ``where`` or excluded words. Only if too few of them pass it, all records are filtered, which takes
ten times as long: 160 ms for 100,000."""


class SqliteReader(SearchReader):
    """Reads the index through a sqlite3 connection; keeps the vectors in memory as long as it lives."""

    dialect: ClassVar[Dialect] = "sqlite"
    # SQLite reads the tables of a CROSS JOIN in the order they are written. Without statistics it would rather
    # read all records of an entity than look a few up.
    join: ClassVar[str] = "CROSS JOIN"
    _known: tuple[object, list[Entity]] | None = None

    def __init__(self, connection: sqlite3.Connection, index: IndexTable = KDB_SEARCH, *, once: bool = False) -> None:
        super().__init__(connection, index)
        self._full_text = self.target.table(index.full_text)
        self._vectors = ExactVectorSearch(connection, self.target, once=once)

    def assumed_definitions(self) -> list[Entity]:
        """Those of the search before while nothing was written: no more needs to be asked."""
        state = self._file_state()
        if self._known is None or self._known[0] != state:
            self._known = state, self.definitions()
        return self._known[1]

    def vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> list[Hit]:
        unit = (vector / np.linalg.norm(vector.astype(np.float64))).astype(np.float32)
        tried = limit * (CANDIDATES_PER_ROW_WHERE if scope.where or scope.excluded else CANDIDATES_PER_ROW)
        best = self._vectors.nearest(unit, scope, tried, None)
        hits = self._passing(best, scope)
        if len(hits) < limit and len(best) == tried:
            params = Params(self.dialect)
            # One by one: SQLite takes at most 500 queries in one UNION.
            queries = self._all_living(scope, params, "s.rowid")
            rowids = np.array([row[0] for query in queries for row in self._rows(query, params.values)], np.int64)
            hits = self._passing(self._vectors.nearest(unit, scope, limit, rowids), scope)
        self._vectors.keeps = True
        return in_order(hits)[:limit]

    def _file_state(self) -> object:
        (version,) = self._rows("PRAGMA data_version", {})[0]  # changes with commits of other connections
        return version, self._connection.total_changes

    def _passing(self, best: dict[int, float], scope: Scope) -> list[Hit]:
        params = Params(self.dialect)
        statement = (
            f"SELECT s.rowid, s.entity_name, s.record_id FROM json_each({params(json.dumps(list(best)))}) k "  # noqa: S608
            f"CROSS JOIN {self._index} s ON s.rowid = k.value "
            f"WHERE {self._named(scope, params)} AND {self._living(scope, params)} "
            f"AND {self._fit(scope, params)}"
        )
        return [Hit(tuple(key), best[rowid]) for rowid, *key in self._rows(statement, params.values)]

    def _with_all(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        return self._matching_text(all_of(query), query, scope, limit)

    def _with_required(self, required: Sequence[Term], query: Query, scope: Scope, limit: int) -> list[Hit]:
        every = f"({' AND '.join(map(fts_string, required))})"
        return self._matching_text(f"{every} AND ({any_of(meaningful(query.terms))})", query, scope, limit)

    def _with_any(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        terms = meaningful(query.alternatives())
        return self._matching_text(any_of(terms), query, scope, limit) if len(terms) > 1 else []

    def _without(self, excluded: Sequence[Term], params: Params) -> str:
        words = excludable(excluded)
        if not words:
            return "true"
        match = params(f"{{content}} : ({any_of(words)})")
        # By key: the rows of the full-text table need not have the numbers of those they belong to.
        matching = f"SELECT entity_name, record_id FROM {self._full_text} WHERE {self._full_text} MATCH {match}"  # noqa: S608
        return f"(s.entity_name, s.record_id) NOT IN ({matching})"

    def _matching_text(self, match: str, query: Query, scope: Scope, limit: int) -> list[Hit]:
        """Rows that match an FTS5 expression and hold nothing excluded, best first."""
        if not match:
            return []
        params = Params(self.dialect)
        match = f"({match})" + "".join(f" NOT {fts_string(term)}" for term in excludable(query.excluded))
        # Ordered by `rank` alone, FTS5 sorts first and the records are looked up only until the limit is reached.
        statement = (
            f"SELECT s.entity_name, s.record_id, s.rank FROM {self._full_text} s "  # noqa: S608
            f"WHERE {self._full_text} MATCH {params(f'{{content}} : ({match})')} "
            f"AND {self._named(scope, params)} AND {self._living(scope, params)} ORDER BY s.rank LIMIT {params(limit)}"
        )
        found = self._rows(statement, params.values)
        return in_order(Hit(tuple(key), -rank) for *key, rank in found)

    def _contents(self, keys: Sequence[Key]) -> Statement:
        return (
            f"SELECT s.entity_name, s.record_id, s.content FROM json_each(:keys) k CROSS JOIN {self._index} s "  # noqa: S608
            "ON s.entity_name = json_extract(k.value, '$[0]') AND s.record_id = json_extract(k.value, '$[1]')",
            {"keys": json.dumps(keys)},
        )

    def _stored(self, definition: Entity, place: Place, record_ids: list[str], scope: Scope) -> Statement:
        fields = place.stored(definition.fields)
        columns = ["r.data"] if place.columns is None else [f"r.{identifier(f.column, 'sqlite')}" for f in fields]
        params = Params(self.dialect)
        statement = (
            f"SELECT {', '.join(['r.id', self._matching(definition, place, scope, params), *columns])} "  # noqa: S608
            f"FROM json_each({params(json.dumps(record_ids))}) k "
            f"CROSS JOIN {self.target.table(place.table)} r ON r.id = k.value "
            f"WHERE true{owned(place, params)}"
        )
        return statement, params.values

    def _by_column(self, definition: Entity, place: Place, values: Sequence[Any]) -> Mapping[str, Any]:
        if place.columns is not None:
            return _from_columns(place.stored(definition.fields), values)
        stored = json.loads(values[0])
        return stored if isinstance(stored, dict) else {}

    def _equals(self, place: Place, field: Field, value: Any, params: Params) -> str:
        if place.columns is None:
            kind, stored = json_member(field.column, params)
        elif field.column not in place.columns:
            kind, stored = "NULL", "NULL"
        else:
            stored = f"r.{identifier(field.column, self.dialect)}"
            kind = f"typeof({stored})"
            if field.type == "bool":  # stored as 0 and 1
                kind = f"CASE {stored} WHEN 1 THEN 'true' WHEN 0 THEN 'false' ELSE 'null' END"
            elif field.type == "json":
                stored = f"CASE WHEN json_valid({stored}) THEN {stored} END"
                kind, stored = f"json_type({stored})", f"json_extract({stored}, '$')"
        if value is None:
            return f"coalesce({kind}, 'null') = 'null'"
        if isinstance(value, bool):
            return f"{kind} = {params('true' if value else 'false')}"
        if isinstance(value, str):
            return f"{kind} = 'text' AND {stored} = {params(str(value))}"
        return f"{kind} IN ('integer', 'real') AND {stored} = {params(value)}"


def _from_columns(fields: Sequence[Field], values: Sequence[Any]) -> dict[str, Any]:
    """Values of a dedicated table as shared storage would hold them: booleans and JSON as such."""
    stored = {}
    for field, value in zip(fields, values, strict=True):
        if field.type == "bool" and isinstance(value, int):
            value = bool(value)
        elif field.type == "json" and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        stored[field.column] = value
    return stored
