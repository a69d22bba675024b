"""Search of a target in SQLite: exact, over all vectors of the rows that meet the condition.

They are read block by block and compared in NumPy, as :mod:`kdb_fast.search.readers.sqlite_vectors` does; nothing is
kept for another search. The user's own condition stands alone in a subquery over the source.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...db import sqlite_errors
from ...db.retrying import ErrorKind
from ...db.sqlite import KEYS_PER_QUERY, batches
from ...records import Key, key_json, key_of_json
from ...tables.keyword import NUMBER
from ...tables.target import Params
from ..query import Query, Term
from ..readers.fts5 import STOP_WORDS, all_of, any_of, excludable, fts_string, meaningful
from ..readers.ranking import Hit, in_order
from ..readers.sqlite_vectors import BLOCK_ROWS, cosines, parsed, products, unit_rows
from .base import Found, TableReader, Wanted
from .searched import SearchedTable

MARGIN = 4
"""Rows that sqlite-vec is asked for, for each one wanted: it may order by something else than the cosine."""

MOST_OF_VEC0 = 4096
"""Rows that sqlite-vec gives at most."""

ROUNDING = 1e-5
"""Of a cosine that is summed in float32."""

VECTORS = "SELECT {keys}, {chunk}, CAST(v.{embedding} AS BLOB) FROM {rows} WHERE v.{embedding} IS NOT NULL"

NEAREST_VEC0 = (
    "SELECT v.rowid, NULL, CAST(v.{embedding} AS BLOB) FROM {vectors} v "
    "WHERE v.{embedding} MATCH :query AND k = :rows{met}"
)

KNOWN = (
    "WITH k(kdb_fast_i, {names}) AS (VALUES {rows}) SELECT k.kdb_fast_i, st.{fingerprint}, st.{seal} "
    "FROM k CROSS JOIN {state} st ON {same_state}"
)

BY_KEYWORD = (
    "SELECT {keys}, -{full_text}.rank, {chunk} FROM {full_text} CROSS JOIN {state} p ON p.{number} = {full_text}.rowid "
    "WHERE {full_text} MATCH {match} AND {met} AND {without} ORDER BY {full_text}.rank LIMIT {limit}"
)
"""Ordered by ``rank`` alone, FTS5 sorts first, and rows are looked up only until there are enough."""

EXCLUDED = (
    "SELECT {keys} FROM {full_text} CROSS JOIN {state} p ON p.{number} = {full_text}.rowid "
    "WHERE {full_text} MATCH {match}"
)

READ = (
    "WITH k(kdb_fast_i, {names}) AS (VALUES {rows}) SELECT k.kdb_fast_i, {keys}, {text}, {piece}{columns} FROM k{joins}"
)


class _Candidate(NamedTuple):
    """A row whose vector is near.

    Attributes:
        key: Of the record.
        chunk: The piece of its text; None where texts are whole.
        seal: SHA-256 of the vector as it is stored.
        cosine: Of its angle with the query.
    """

    key: Key
    chunk: int | None
    seal: bytes
    cosine: float


class SqliteTableReader(TableReader):
    """Reads a target through a sqlite3 connection. A hit's key is the record's in JSON, since values of different types
    have no order."""

    _connection: sqlite3.Connection

    def __init__(self, connection: Any, table: SearchedTable) -> None:
        super().__init__(connection, table)
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")

    def _nearest(self, vector: npt.NDArray[np.float32], wanted: Wanted, limit: int) -> list[Hit]:
        unit = (vector / np.linalg.norm(vector.astype(np.float64))).astype(np.float32)
        found = self._by_index(unit, wanted, limit) if self._table.vec0 else None
        if found is None:
            found = []
            for rows in self._blocks(wanted.where):
                found = _first_of_each([*found, *self._nearest_of(rows, unit, wanted, limit, found)])[:limit]
        return in_order(self._first_of_each([((key_json(c.key),), c.cosine, c.chunk) for c in found]))

    def _by_index(self, unit: npt.NDArray[np.float32], wanted: Wanted, limit: int) -> list[_Candidate] | None:
        """By sqlite-vec's own search, which looks at all rows; None where too few of what it gives may be ranked."""
        table = self._table
        rows = min(limit * MARGIN, MOST_OF_VEC0)
        met = ""
        if self._selects(wanted.where):
            met = f" AND v.rowid IN ({self._select(table.each_key('{column}'), wanted.where)})"
        statement = NEAREST_VEC0.format(embedding=table.embedding, vectors=table.vectors, met=met)
        params = Params(table.dialect)
        params.values |= {"query": unit.tobytes(), "rows": rows}
        found = self._query(statement, params)
        best = _first_of_each(self._nearest_of(found, unit, wanted, limit, ()))
        return best[:limit] if len(best) >= limit or len(found) < rows else None

    def _blocks(self, where: str) -> Iterator[list[tuple[Any, ...]]]:
        """Key, piece and vector of the rows that meet the condition, BLOCK_ROWS at a time."""
        table = self._table
        if table.beside and where:
            keys = table.each_key("{column} AS kdb_fast_source_{number}")
            same = table.same_key("v.rowid" if table.vec0 else "v.{column}", "s.kdb_fast_source_{number}")
            rows = f"({self._select(keys, where)}) s JOIN {table.vectors} v ON {same}"
        elif table.beside:
            rows = f"{table.vectors} v"
        else:
            columns = ", ".join([table.each_key("{column}"), table.embedding])
            rows = f"({self._select(columns, where)}) v"
        statement = VECTORS.format(
            keys="v.rowid" if table.vec0 else table.each_key("v.{column}"),
            chunk="v.chunk" if table.chunked else "NULL",
            embedding=table.embedding,
            rows=rows,
        )
        with self._errors():
            cursor = self._connection.execute(statement)
        while True:
            with self._errors():
                block = cursor.fetchmany(BLOCK_ROWS)
            if not block:
                return
            yield block

    def _nearest_of(
        self,
        rows: Sequence[tuple[Any, ...]],
        unit: npt.NDArray[np.float32],
        wanted: Wanted,
        limit: int,
        best: Sequence[_Candidate],
    ) -> list[_Candidate]:
        """The nearest of these rows that may be ranked, of at least ``limit`` records as far as they are nearer than
        the ``best`` ones of other rows."""
        matrix, usable = unit_rows(self._matrix([row[-1] for row in rows], len(unit)))
        scores = products(matrix, unit)
        if len(best) == limit:
            usable = usable & (scores > best[-1].cosine - ROUNDING)
        chosen = np.flatnonzero(usable)
        order = chosen[np.argsort(-scores[chosen], kind="stable")]
        passed: list[_Candidate] = []
        for start in range(0, len(order), 2 * limit):
            part = order[start : start + 2 * limit]
            near = [
                _Candidate(rows[i][:-2], rows[i][-2], hashlib.sha256(rows[i][-1]).digest(), cosine)
                for i, cosine in zip(part.tolist(), cosines(matrix, part, unit).tolist(), strict=True)
            ]
            passed += self._rankable(near, wanted)
            if len({candidate.key for candidate in passed}) >= limit:
                break
        return passed

    def _matrix(self, stored: Sequence[bytes], dimensions: int) -> npt.NDArray[np.float32]:
        """Vectors as rows; one of another length, or that is none, is all zeros."""
        nothing = bytes(4 * dimensions)
        if self._table.vector.type == "json":
            read = [parsed(value) for value in stored]
            stored = [nothing if vector is None else vector.tobytes() for vector in read]
        raw = b"".join([value if len(value) == 4 * dimensions else nothing for value in stored])
        return np.frombuffer(raw, "<f4").reshape(len(stored), dimensions)

    def _rankable(self, candidates: Sequence[_Candidate], wanted: Wanted) -> list[_Candidate]:
        """Those whose vector is of a model that may be compared with the query."""
        table = self._table
        if not self.has_state:
            return list(candidates) if wanted.foreign else []
        known: dict[int, tuple[str, bytes]] = {}
        keys: list[Key] = [(*c.key, c.chunk or 0) if table.chunked else c.key for c in candidates]
        same_state = table.same_key(f"st.{table.state_key}", "k.kdb_fast_{number}")
        names = table.each_key("kdb_fast_{number}")
        if table.chunked:
            same_state, names = f"{same_state} AND st.chunk = k.kdb_fast_chunk", f"{names}, kdb_fast_chunk"
        for number, fingerprint, seal in self._by_keys(
            KNOWN,
            keys,
            names=names,
            fingerprint=table.fingerprint,
            seal=table.seal,
            state=table.state,
            same_state=same_state,
        ):
            known[number] = fingerprint, seal

        excluded: set[Key] = set()
        if terms := excludable(wanted.excluded, self._stop):
            params = Params(table.dialect)
            excluded = set(self._query(self._holding(terms, params), params))

        def rankable(number: int, candidate: _Candidate) -> bool:
            if candidate.key in excluded:
                return False
            fingerprint, seal = known.get(number, ("", b""))
            return fingerprint in wanted.fingerprints if seal == candidate.seal else wanted.foreign

        return [candidate for number, candidate in enumerate(candidates) if rankable(number, candidate)]

    def _with_all(self, query: Query, scope: Wanted, limit: int) -> list[Hit]:
        return self._matching(all_of(query, self._stop), scope, limit)

    def _with_required(self, required: Sequence[Term], query: Query, scope: Wanted, limit: int) -> list[Hit]:
        every = f"({' AND '.join(map(fts_string, required))})"
        return self._matching(f"{every} AND ({any_of(meaningful(query.terms, self._stop))})", scope, limit)

    def _with_any(self, query: Query, scope: Wanted, limit: int) -> list[Hit]:
        terms = meaningful(query.alternatives(), self._stop)
        return self._matching(any_of(terms), scope, limit) if len(terms) > 1 else []

    @property
    def _stop(self) -> frozenset[str]:
        """Words that are not looked for; FTS5 has none of its own, and they are those of English."""
        return STOP_WORDS if "porter" in self._table.definition.keyword else frozenset()

    def _matching(self, match: str, scope: Wanted, limit: int) -> list[Hit]:
        """Records of which a text matches an FTS5 expression, best first."""
        if not match:
            return []
        table = self._table
        keys = table.each_key(f"p.{table.state_key}")
        params = Params(table.dialect)
        excluded = excludable(scope.excluded, self._stop)
        without = "true"
        if excluded:
            without = f"({keys}) NOT IN ({self._holding(excluded, params)})"
        statement = BY_KEYWORD.format(
            keys=keys,
            full_text=table.full_text,
            chunk="p.chunk" if table.chunked else "NULL",
            state=table.state,
            number=NUMBER,
            match=params(match),
            met=self._met(scope.where, f"p.{table.state_key}"),
            without=without,
            limit=":limit",
        )
        rows = limit
        while True:
            params.values["limit"] = rows
            found = self._query(statement, params)
            near = [((key_json(tuple(key)),), value, chunk) for *key, value, chunk in found]
            hits = in_order(self._first_of_each(near))
            if len(hits) >= limit or len(found) < rows:
                return hits[:limit]
            rows *= 4

    def _holding(self, terms: Sequence[Term], params: Params) -> str:
        """A SELECT of the keys of the records that hold any of these terms."""
        table = self._table
        return EXCLUDED.format(
            keys=table.each_key(f"p.{table.state_key}"),
            full_text=table.full_text,
            state=table.state,
            number=NUMBER,
            match=params(any_of(terms)),
        )

    def read(self, keys: Sequence[Key], columns: Sequence[str]) -> dict[Key, Found]:
        table = self._table
        names = table.each_key("kdb_fast_key_{number}") + (", kdb_fast_chunk" if table.chunked else "")
        wanted = [key_of_json(str(key[0])) + ((self.chunks[key],) if table.chunked else ()) for key in keys]
        parts = self._read_parts(columns, "k.kdb_fast_key_{number}")
        return {keys[number]: self._found(row) for number, *row in self._by_keys(READ, wanted, names=names, **parts)}

    def _by_keys(self, template: str, wanted: Sequence[Key], **parts: str) -> Iterator[tuple[Any, ...]]:
        """Rows of a statement about many keys, each of which begins with the place of its key."""
        width = len(wanted[0]) + 1 if wanted else 1
        for part in batches(list(enumerate(wanted)), KEYS_PER_QUERY // width):
            rows = ", ".join([f"({', '.join('?' * width)})"] * len(part))
            values = [value for number, key in part for value in (number, *key)]
            with self._errors():
                yield from self._connection.execute(template.format(rows=rows, **parts), values).fetchall()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _query(self, statement: str, params: Params) -> list[tuple[Any, ...]]:
        with self._errors():
            return self._connection.execute(statement, params.values).fetchall()

    def _finds_state(self) -> bool:
        return bool(self._rows("SELECT 1 FROM sqlite_master WHERE name = :name", {"name": self._table.state_regclass}))

    def _checked(self, statement: str) -> list[str]:
        return [column[0] for column in self._connection.execute(statement).description]

    def _names(self) -> Sequence[str]:
        with self._errors():
            return self._checked(self._select("*", "") + " LIMIT 0")

    def _complaint(self, error: Exception) -> str:
        # Python's own errors: a placeholder in the condition, a second statement behind it.
        own = isinstance(error, (sqlite3.ProgrammingError, sqlite3.Warning))
        return str(error) if own or sqlite_errors.kind_of(error) is ErrorKind.REFUSED else ""

    def _failure(self, error: Exception) -> Exception:
        return sqlite_errors.explain(error, "searching") if isinstance(error, sqlite3.Error) else error


def _first_of_each(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """The nearest of each record, the nearest first."""
    first: dict[Key, _Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: -c.cosine):
        first.setdefault(candidate.key, candidate)
    return list(first.values())
