"""Search in SQLite: exact over all vectors with NumPy, FTS5 for keywords.

The vectors stay in memory as one matrix of unit vectors between searches. Before each search SQLite is asked
whether anything was written; only then the matrix is brought up to date, row by row.

sqlite-vec is not used. Many builds of Python cannot load SQLite extensions at all, its scan is exact as well, and
what a first search waits for is the reading: of 1.0 s for 100,000 × 384, the arithmetic takes 0.02 s.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..retrieval import Hit, Key, Query, Scope, SearchReader, Term, in_order
from .base import TABLE
from .status import Definition, Field, Params, json_member, quoted, rows_of

FTS = "kdb_search_fts"
VECTORS = "kdb_fast_vectors"

CACHE_BYTES = 1 << 30
"""Largest matrix kept in memory, in bytes (700,000 × 384); beyond it every search reads the file in blocks."""

BLOCK_ROWS = 8192
"""Rows read at a time: 12 MiB of vectors of 384 numbers."""

CANDIDATES_PER_ROW = 4
"""Best vectors looked at for each row wanted. Only if the filters leave too few of them, all rows are filtered."""

STOP_WORDS = frozenset(
    [
        "i",
        "me",
        "my",
        "myself",
        "we",
        "our",
        "ours",
        "ourselves",
        "you",
        "your",
        "yours",
        "yourself",
        "yourselves",
        "he",
        "him",
        "his",
        "himself",
        "she",
        "her",
        "hers",
        "herself",
        "it",
        "its",
        "itself",
        "they",
        "them",
        "their",
        "theirs",
        "themselves",
        "what",
        "which",
        "who",
        "whom",
        "this",
        "that",
        "these",
        "those",
        "am",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "have",
        "has",
        "had",
        "having",
        "do",
        "does",
        "did",
        "doing",
        "a",
        "an",
        "the",
        "and",
        "but",
        "if",
        "or",
        "because",
        "as",
        "until",
        "while",
        "of",
        "at",
        "by",
        "for",
        "with",
        "about",
        "against",
        "between",
        "into",
        "through",
        "during",
        "before",
        "after",
        "above",
        "below",
        "to",
        "from",
        "up",
        "down",
        "in",
        "out",
        "on",
        "off",
        "over",
        "under",
        "again",
        "further",
        "then",
        "once",
        "here",
        "there",
        "when",
        "where",
        "why",
        "how",
        "all",
        "any",
        "both",
        "each",
        "few",
        "more",
        "most",
        "other",
        "some",
        "such",
        "no",
        "nor",
        "not",
        "only",
        "own",
        "same",
        "so",
        "than",
        "too",
        "very",
        "s",
        "t",
        "can",
        "will",
        "just",
        "don",
        "should",
        "now",
    ]
)
"""PostgreSQL's English stop words. FTS5 has none: without this, "read a file" finds only texts with an "a"."""


class SqliteReader(SearchReader):
    """Reads the index through a sqlite3 connection; keeps the vectors in memory as long as it lives."""

    dialect: ClassVar[str] = "sqlite"

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__(connection)
        self._vectors = _Vectors(connection)

    def vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> list[Hit]:
        unit = vector / np.linalg.norm(vector)
        tried = max(CANDIDATES_PER_ROW * limit, 200)
        best = self._vectors.nearest(unit, scope, tried, None)
        hits = self._passing(best, scope)
        if len(hits) < limit and len(best) == tried:
            params = Params(self.dialect)
            passing = self._rows(self._all_living(scope, params, "s.rowid"), params.values)
            rowids = np.fromiter((row[0] for row in passing), np.int64, len(passing))
            hits = self._passing(self._vectors.nearest(unit, scope, limit, rowids), scope)
        return in_order(hits)[:limit]

    def _passing(self, best: dict[int, float], scope: Scope) -> list[Hit]:
        params = Params(self.dialect)
        statement = (
            f"SELECT s.rowid, s.entity_name, s.record_id FROM json_each({params(json.dumps(list(best)))}) k "  # noqa: S608
            f"JOIN {TABLE} s ON s.rowid = k.value "
            f"WHERE {self._named(scope, params)} AND {self._living(scope, params)}"
        )
        return [Hit(entity, record, best[rowid]) for rowid, entity, record in self._rows(statement, params.values)]

    def keyword(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        hits = self._matching_text(_all_of(query), query.excluded, scope, limit)
        terms = _meaningful(query.alternatives())
        if len(hits) >= limit or len(terms) < 2:
            return hits
        more = self._matching_text(" OR ".join(map(_fts_string, terms)), query.excluded, scope, limit)
        seen = {hit.key for hit in hits}
        return (hits + [hit for hit in more if hit.key not in seen])[:limit]

    def _matching_text(self, match: str, excluded: Sequence[Term], scope: Scope, limit: int) -> list[Hit]:
        if not match:
            return []
        params = Params(self.dialect)
        match = f"({match})" + "".join(f" NOT {_fts_string(term)}" for term in excluded)
        # Ordered by `rank` alone, FTS5 sorts first and the records are looked up only until the limit is reached.
        statement = (
            f"SELECT s.entity_name, s.record_id, s.rank FROM {FTS} s "  # noqa: S608
            f"WHERE {FTS} MATCH {params(f'{{content}} : ({match})')} "
            f"AND {self._named(scope, params)} AND {self._living(scope, params)} ORDER BY s.rank LIMIT {params(limit)}"
        )
        found = self._rows(statement, params.values)
        return in_order(Hit(entity, record_id, -rank) for entity, record_id, rank in found)

    def contents(self, keys: Sequence[Key]) -> dict[Key, str]:
        found = self._rows(
            f"SELECT s.entity_name, s.record_id, s.content FROM json_each(:keys) k JOIN {TABLE} s "  # noqa: S608
            "ON s.entity_name = json_extract(k.value, '$[0]') AND s.record_id = json_extract(k.value, '$[1]')",
            {"keys": json.dumps(keys)},
        )
        return {(entity, record_id): content for entity, record_id, content in found}

    def data(self, keys: Sequence[Key], scope: Scope) -> dict[Key, dict[str, Any]]:
        definitions = {d.entity: d for d in scope.definitions}
        result: dict[Key, dict[str, Any]] = {key: {} for key in keys if key[0] not in definitions}
        for entity in {entity for entity, _ in keys} & definitions.keys():
            definition = definitions[entity]
            fields = [f for f in definition.fields if definition.table is None or f.column in definition.columns]
            columns = [f"r.{quoted(f.column, self.dialect)}" for f in fields]
            params = Params(self.dialect)
            ids = params(json.dumps([record_id for name, record_id in keys if name == entity]))
            statement = (
                f"SELECT r.id, {'r.data' if definition.table is None else ', '.join(columns) or 'NULL'} "  # noqa: S608
                f"FROM json_each({ids}) k JOIN {self._table(definition)} r ON r.id = k.value "
                f"WHERE {self._matching(definition, scope, params)}"
            )
            for record_id, *values in self._rows(statement, params.values):
                record = dict.fromkeys(f.name for f in definition.fields)
                if definition.table is None:
                    stored = json.loads(values[0] or "null") or {}
                    record.update((f.name, stored.get(f.column)) for f in fields)
                else:
                    record.update((f.name, _from_column(v, f)) for f, v in zip(fields, values, strict=False))
                result[entity, record_id] = record
        return result

    def _equals(self, definition: Definition, field: Field, value: Any, params: Params) -> str:
        if definition.table is None:
            kind, stored = json_member(field.column, params)
        elif field.column not in definition.columns:
            kind, stored = "NULL", "NULL"
        else:
            stored = f"r.{quoted(field.column, self.dialect)}"
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


def _from_column(value: Any, field: Field) -> Any:
    """A value of a dedicated table as KameleonDB's shared storage would give it."""
    if field.type == "bool" and isinstance(value, int):
        return bool(value)
    if field.type == "json" and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _fts_string(term: Term) -> str:
    """A term as an FTS5 string: whatever is in it, the tokenizer and not the query parser reads it."""
    return '"' + term.text.replace('"', '""') + '"'


def _meaningful(terms: Sequence[Term]) -> list[Term]:
    """The terms without stop words; all of them if there is nothing else."""
    kept = [term for term in terms if term.phrase or term.text.casefold() not in STOP_WORDS]
    return kept or list(terms)


def _all_of(query: Query) -> str:
    """The FTS5 expression of all terms; a bare ``or`` binds less than the implicit AND, as in PostgreSQL."""
    groups: list[list[Term]] = [[]]
    for term in query.terms:
        if not term.phrase and term.text.casefold() == "or":
            groups.append([])
        else:
            groups[-1].append(term)
    return " OR ".join(" ".join(map(_fts_string, _meaningful(group))) for group in groups if group)


class _Block(NamedTuple):
    """Unit vectors, in the order of ``rowids``; a row without a usable vector has only zeros.

    ``entities`` are places in the list of entity names.
    """

    rowids: npt.NDArray[np.int64]
    entities: npt.NDArray[np.int32]
    usable: npt.NDArray[np.bool_]
    matrix: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, rows: int, dimensions: int) -> _Block:
        return cls(
            np.empty(rows, np.int64),
            np.empty(rows, np.int32),
            np.empty(rows, np.bool_),
            np.empty((rows, dimensions), "f4"),
        )

    def put(self, where: slice | npt.NDArray[Any], other: _Block) -> None:
        for mine, theirs in zip(self, other, strict=True):
            mine[where] = theirs

    def take(self, where: slice | npt.NDArray[Any]) -> _Block:
        return _Block(*(part[where] for part in self))


class _Vectors:
    """All vectors of the index, kept up to date.

    A row is read again when its id or its ``updated_at`` is not what it was. A time in whole seconds does not
    tell two writes within one second apart, so rows that carry the newest such second are always read again.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._rows = rows_of(connection, "sqlite")
        self._seen: tuple[Any, ...] | None = None
        self._block: _Block | None = None
        self._versions: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._names: dict[str, int] = {}
        self._other_lengths: set[int] = set()
        self._copies = False

    def nearest(
        self, unit: npt.NDArray[np.float32], scope: Scope, limit: int, rowids: npt.NDArray[np.int64] | None
    ) -> dict[int, float]:
        """The ``limit`` rows of the searched entities, among ``rowids`` if given, nearest to ``unit``: rowid → cosine."""
        best_rowids, best = np.empty(0, np.int64), np.empty(0, np.float32)
        usable = False
        for block in self._blocks(len(unit)):
            scores = block.matrix @ unit
            allowed = block.usable
            usable = usable or bool(allowed.any())
            codes = [code for name, code in self._names.items() if scope.admits(name)]
            if len(codes) < len(self._names):
                allowed = allowed & np.isin(block.entities, codes)
            if rowids is not None:
                allowed = allowed & np.isin(block.rowids, rowids)
            chosen = np.flatnonzero(allowed)
            scores = scores[chosen]
            if len(scores) > limit:
                top = np.argpartition(scores, len(scores) - limit)[len(scores) - limit :]
                chosen, scores = chosen[top], scores[top]
            best_rowids, best = np.append(best_rowids, block.rowids[chosen]), np.append(best, scores)
        if self._other_lengths and not usable:
            raise UsageError(
                f"The query vector has {len(unit)} numbers, the vectors of the index have {max(self._other_lengths)}.",
                remedy="Search with the model that the index was made with.",
            )
        order = np.argsort(-best, kind="stable")[:limit]
        return dict(zip(best_rowids[order].tolist(), best[order].tolist(), strict=True))

    def _blocks(self, dimensions: int) -> Iterator[_Block]:
        """The current vectors: in one block from memory, or block by block from the file if they are too many."""
        # Asked first: what is written after this is noticed by the next search.
        seen = (
            *self._rows("PRAGMA data_version", {})[0],  # commits of other connections
            *self._rows("PRAGMA schema_version", {})[0],
            self._connection.total_changes,  # our own writes
            dimensions,
        )
        if self._block is None or seen != self._seen:
            ours = self._connection.in_transaction
            if not ours:
                self._connection.execute("BEGIN")  # one state for all statements
            try:
                rows = self._rows(f"SELECT count(*) FROM {TABLE}", {})[0][0]  # noqa: S608
                if rows * dimensions * 4 > CACHE_BYTES:
                    self._block = None
                    self._start_reading(dimensions)
                    yield from (block for _, block in self._read(dimensions))
                    return
                self._refresh(rows, dimensions)
            finally:
                if not ours:
                    self._connection.execute("COMMIT")
            # What a caller's transaction wrote may still be rolled back, which nothing would tell.
            self._seen = None if ours else seen
        assert self._block is not None
        yield self._block

    def _refresh(self, rows: int, dimensions: int) -> None:
        old = self._block
        if old is None or old.matrix.shape[1] != dimensions:
            return self._load(rows, dimensions)
        found = self._rows(
            f"SELECT rowid, id, coalesce(updated_at, created_at) FROM {TABLE} "  # noqa: S608
            "WHERE embedding IS NOT NULL ORDER BY rowid",
            {},
        )
        rowids = np.fromiter((row[0] for row in found), np.int64, len(found))
        versions = _versions(found)
        place = np.searchsorted(old.rowids, rowids)
        known = place < len(old.rowids)
        known[known] = (old.rowids[place[known]] == rowids[known]) & (self._versions[place[known]] == versions[known])
        known &= versions != UNSETTLED
        changed = np.flatnonzero(~known)
        if 2 * len(changed) > len(rowids):
            return self._load(rows, dimensions)
        if np.array_equal(old.rowids, rowids):
            block = old
        else:
            block = _Block.empty(len(rowids), dimensions)
            block.put(known, old.take(place[known]))
        done = 0
        for _, part in self._read(dimensions, rowids[changed].tolist()):
            block.put(changed[done : done + len(part.rowids)], part)
            done += len(part.rowids)
        self._block, self._versions = block, versions

    def _load(self, rows: int, dimensions: int) -> None:
        self._block = None  # free the memory before the new matrix is filled
        self._start_reading(dimensions)
        block = _Block.empty(rows, dimensions)
        stamps: list[tuple[Any, ...]] = []
        for part_stamps, part in self._read(dimensions):
            block.put(slice(len(stamps), len(stamps) + len(part_stamps)), part)
            stamps += part_stamps
        self._block, self._versions = block.take(slice(len(stamps))), _versions(stamps)

    def _start_reading(self, dimensions: int) -> None:
        self._names, self._other_lengths = {}, set()
        self._copies = VECTORS in columns_of(self._rows, "sqlite", [VECTORS]) and self._copies_are_true(dimensions)

    def _copies_are_true(self, dimensions: int) -> bool:
        """Whether the float32 copies are of the rows they point to.

        They point by rowid, which a dump and restore of the file gives anew: then all rows after the first gap
        are wrong, the last ones among them.
        """
        return all(
            _parsed(embedding) is not None and np.allclose(_parsed(embedding), np.frombuffer(copy, "<f4"), atol=1e-4)
            for embedding, copy in self._rows(
                f"SELECT s.embedding, v.vector FROM {TABLE} s JOIN {VECTORS} v "  # noqa: S608
                "ON v.search_rowid = s.rowid AND v.at = s.updated_at AND length(v.vector) = :bytes "
                "WHERE s.embedding IS NOT NULL ORDER BY s.rowid DESC LIMIT 16",
                {"bytes": 4 * dimensions},
            )
        )

    def _read(self, dimensions: int, rowids: list[int] | None = None) -> Iterator[tuple[list[tuple[Any, ...]], _Block]]:
        """Rows with an embedding (all, or those of ``rowids``) in the order of their rowid, BLOCK_ROWS at a time.

        Each with its (rowid, id, time). The float32 copy is taken where it is as new as the row, else the JSON.
        """
        copy, join = "NULL", ""
        if self._copies:
            copy = "v.vector"
            join = (
                f"LEFT JOIN {VECTORS} v ON v.search_rowid = s.rowid AND v.at = s.updated_at "
                f"AND length(v.vector) = {4 * dimensions}"
            )
        chosen = "" if rowids is None else "AND s.rowid IN (SELECT value FROM json_each(:rowids))"
        statement = (
            f"SELECT s.rowid, s.id, coalesce(s.updated_at, s.created_at), s.entity_name, {copy}, "  # noqa: S608
            f"CASE WHEN {copy} IS NULL THEN s.embedding END FROM {TABLE} s {join} "
            f"WHERE s.embedding IS NOT NULL {chosen} ORDER BY s.rowid"
        )
        with sqlite_cursor(self._connection) as cursor:
            cursor.execute(statement, {"rowids": json.dumps(rowids)} if rowids is not None else {})
            while rows := cursor.fetchmany(BLOCK_ROWS):
                vectors = b"".join(copy or self._bytes(embedding, dimensions) for *_, copy, embedding in rows)
                matrix, usable = _unit(np.frombuffer(vectors, "<f4").reshape(len(rows), dimensions))
                codes = [self._names.setdefault(row[3], len(self._names)) for row in rows]
                block = _Block(np.array([r[0] for r in rows], np.int64), np.array(codes, np.int32), usable, matrix)
                yield [row[:3] for row in rows], block

    def _bytes(self, embedding: Any, dimensions: int) -> bytes:
        """KameleonDB's JSON text as float32; zeros if it is no vector of this length."""
        vector = _parsed(embedding)
        if vector is not None and len(vector) == dimensions:
            return vector.tobytes()
        if vector is not None:
            self._other_lengths.add(len(vector))
        return bytes(4 * dimensions)


UNSETTLED = -1
"""Version of a row that may change without its time changing; no hash has this value."""


def _versions(rows: Sequence[tuple[Any, ...]]) -> npt.NDArray[np.int64]:
    """A number for each (rowid, id, time) that changes when the row is written again."""
    times = [str(row[2]).replace("T", " ") for row in rows]
    newest = max((time[:19] for time in times), default="")
    return np.fromiter(
        (
            UNSETTLED if len(time) == 19 and time == newest else hash((row[1], time))
            for row, time in zip(rows, times, strict=True)
        ),
        np.int64,
        len(rows),
    )


def _parsed(embedding: Any) -> npt.NDArray[np.float32] | None:
    try:
        vector = np.asarray(json.loads(embedding), np.dtype("<f4"))
    except (ValueError, TypeError, OverflowError):
        return None
    return vector if vector.ndim == 1 else None


def _unit(matrix: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Rows scaled to length 1, and which have a direction at all; the others become zeros."""
    with np.errstate(all="ignore"):
        norms = np.sqrt(np.einsum("ij,ij->i", matrix, matrix))
        usable = np.isfinite(norms) & (norms > 0)
        return np.where(usable[:, None], matrix / np.where(usable, norms, 1)[:, None], 0), usable
