"""Search: rank by vector and by keyword, fuse the two rankings, read the records that won.

The readers of the two dialects (:mod:`kdb_fast.stores.search_postgresql`, :mod:`kdb_fast.stores.search_sqlite`)
give rankings; everything that does not depend on the dialect is here.

The score is reciprocal rank fusion, as in KameleonDB: each ranking that holds a record adds 1 / (60 + rank),
rank 1 being the best. It is the same in every mode, so ``min_score`` always compares with one scale: a record
at the top of both rankings scores 2/61, at the top of one 1/61.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from .errors import UsageError
from .stores.base import TABLE
from .stores.status import RECORDS, Definition, Field, Params, load_definitions, quoted, rows_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Mode = Literal["hybrid", "vector", "keyword"]
MODES = ("hybrid", "vector", "keyword")

RRF_K = 60
"""The constant of reciprocal rank fusion; KameleonDB's, and that of the paper that introduced it."""

MIN_DEPTH = 50
"""Least length of each ranking: a record that is tenth in both must be able to beat the first of one."""

MAX_QUERY_CHARS = 2000
"""A longer query is cut: encoders read about this much, and a keyword query of more words finds nothing."""

MAX_TERMS = 64
"""Most words of one keyword query; SQLite limits the depth of an FTS5 expression to 256."""

Key = tuple[str, str]
"""(entity, record id)"""


@dataclass(frozen=True)
class SearchResult:
    """One record found.

    Attributes:
        entity: Name of its entity.
        id: Its record id.
        score: Fused score; higher is better, at most 2/61.
        data: Its active fields by logical name, None where it has no value; {} if KameleonDB does not define
            the entity.
        matched_text: The text in the index.
    """

    entity: str
    id: str
    score: float
    data: dict[str, Any]
    matched_text: str


@dataclass(frozen=True)
class IndexStatus:
    """State of one entity's index. The first four are KameleonDB's.

    Attributes:
        indexed: Rows with a vector.
        pending: Live records without a vector, or changed since theirs was made.
        last_updated: When the index last changed, as an aware datetime.
        stale: Rows whose vector was made by another model or another program.
        rejected: Records that could not be stored.
    """

    entity: str
    indexed: int
    pending: int
    last_updated: datetime | None
    stale: int = 0
    rejected: int = 0


class Hit(NamedTuple):
    """One place in a ranking. ``similarity`` orders it (higher is better); its scale depends on the ranking."""

    entity: str
    record_id: str
    similarity: float

    @property
    def key(self) -> Key:
        return self.entity, self.record_id


class Term(NamedTuple):
    """A word of a keyword query, or a phrase that was in quotes."""

    text: str
    phrase: bool


class Query(NamedTuple):
    """A keyword query, cleaned: its text, the terms to find (a bare ``or`` among them) and those to exclude."""

    text: str
    terms: tuple[Term, ...]
    excluded: tuple[Term, ...]

    def alternatives(self) -> tuple[Term, ...]:
        """The terms for a query that any one of them satisfies; compounds such as ``comma-separated`` also split."""
        found: dict[Term, None] = {}
        for term in self.terms:
            if term.text.casefold() == "or" and not term.phrase:
                continue
            found[term] = None
            words = _WORD.findall(term.text)
            if not term.phrase and len(words) > 1:
                found.update((Term(word, False), None) for word in words)
        return tuple(found)[:MAX_TERMS]


class Scope(NamedTuple):
    """Which rows of the index a search may return.

    Attributes:
        definitions: Entities of KameleonDB that are searched; a row of theirs counts only while its record
            lives and meets ``where``.
        names: The only entity names searched, or None for all but ``hidden``.
        hidden: Entities that KameleonDB has dropped.
        where: Logical field names with the values they must have.
    """

    definitions: tuple[Definition, ...]
    names: tuple[str, ...] | None
    hidden: tuple[str, ...]
    where: tuple[tuple[str, Any], ...]

    def admits(self, entity: str) -> bool:
        return entity not in self.hidden if self.names is None else entity in self.names


class SearchReader(ABC):
    """Rankings and records of one open connection. Nothing is written. Not shared between threads.

    Every method raises :class:`~kdb_fast.errors.SchemaError` where there is no index, and
    :class:`~kdb_fast.errors.DatabaseError` when the database cannot answer.
    """

    dialect: ClassVar[str]

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._rows = rows_of(connection, self.dialect)

    def definitions(self) -> list[Definition]:
        """The entities of KameleonDB in this database."""
        return load_definitions(self._rows, self.dialect)

    @abstractmethod
    def vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> list[Hit]:
        """The ``limit`` rows nearest to ``vector`` (float32, shape (dimensions,)) by cosine, best first.

        Raises:
            UsageError: The index holds vectors of another length.
        """

    @abstractmethod
    def keyword(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        """Up to ``limit`` rows by keyword, best first: those with all terms, then those with any."""

    @abstractmethod
    def contents(self, keys: Sequence[Key]) -> dict[Key, str]:
        """The stored text of these rows; rows that are gone are left out."""

    @abstractmethod
    def data(self, keys: Sequence[Key], scope: Scope) -> dict[Key, dict[str, Any]]:
        """The fields of these records by logical name; records that are gone are left out."""

    @abstractmethod
    def _equals(self, definition: Definition, field: Field, value: Any, params: Params) -> str:
        """The condition that ``field`` of the record ``r`` has ``value``."""

    # What follows writes the scope as SQL that both dialects understand.

    def _named(self, scope: Scope, params: Params) -> str:
        """The condition that a row ``s`` is of an entity that is searched."""
        if scope.names is not None:
            return f"s.entity_name IN ({params.list(scope.names)})"
        return f"s.entity_name NOT IN ({params.list(scope.hidden)})" if scope.hidden else "true"

    def _living(self, scope: Scope, params: Params) -> str:
        """The condition that the record of a row ``s`` lives and meets ``where``, checked row by row.

        A scalar subquery, not EXISTS: PostgreSQL would hash the whole records table for that one.
        """
        branches = [
            f"WHEN {params(d.entity)} THEN (SELECT true FROM {self._table(d)} r "  # noqa: S608
            f"WHERE r.id = s.record_id AND {self._matching(d, scope, params)})"
            for d in scope.definitions
        ]
        return f"CASE s.entity_name {' '.join(branches)} ELSE true END" if branches else "true"

    def _all_living(self, scope: Scope, params: Params, columns: str) -> str:
        """A query for ``columns`` of every row ``s`` in scope that has a vector, record by record.

        The joins find the few rows of a selective ``where`` fast.
        """
        queries = [
            f"SELECT {columns} FROM {self._table(d)} r JOIN {TABLE} s ON s.record_id = r.id "  # noqa: S608
            f"AND s.entity_name = {params(d.entity)} "
            f"WHERE s.embedding IS NOT NULL AND {self._matching(d, scope, params)}"
            for d in scope.definitions
        ]
        defined = [d.entity for d in scope.definitions]
        other = ""
        if scope.names is None:
            defined += scope.hidden
            other = f"s.entity_name NOT IN ({params.list(defined)})" if defined else "true"
        elif undefined := [name for name in scope.names if name not in defined]:
            other = f"s.entity_name IN ({params.list(undefined)})"
        if other:
            queries.append(f"SELECT {columns} FROM {TABLE} s WHERE s.embedding IS NOT NULL AND {other}")  # noqa: S608
        return " UNION ALL ".join(queries)

    def _matching(self, definition: Definition, scope: Scope, params: Params) -> str:
        conditions = ["NOT r.is_deleted"]
        if definition.table is None:
            conditions.append(f"r.entity_id = {params(definition.id)}")
        fields = {field.name: field for field in definition.fields}
        conditions += [self._equals(definition, fields[name], value, params) for name, value in scope.where]
        return " AND ".join(conditions)

    def _table(self, definition: Definition) -> str:
        return quoted(definition.table or RECORDS, self.dialect)


def search(
    reader: SearchReader,
    query: str,
    *,
    query_vector: npt.NDArray[np.float32] | None,
    mode: Mode = "hybrid",
    entities: Sequence[str] = (),
    limit: int = 10,
    min_score: float = 0.0,
    where: Mapping[str, Any] | None = None,
) -> list[SearchResult]:
    """The records that answer ``query`` best, best first.

    Args:
        reader: The index.
        query: What to look for. ``"a phrase"`` in quotes stays together, ``-word`` excludes, ``or`` between
            words means either; in every other way any text is allowed. A blank query finds nothing.
        query_vector: Its embedding, shape (dimensions,). Without it hybrid search is by keyword only.
        mode: ``hybrid``, ``vector`` or ``keyword``.
        entities: Names of the entities to search; empty means all.
        limit: Most results, 1 or more.
        min_score: Least fused score.
        where: Exact values of fields by logical name, all of which must hold. The number 1 equals 1.0, the
            string "1" and true do not; None also means a field without a value.

    Returns:
        At most ``limit`` results by score, then similarity, then key. Deleted records are never among them.

    Raises:
        UsageError: An argument makes no sense; ``where`` names a field that no searched entity has.
        SchemaError: There is no index.
        DatabaseError: The database cannot answer.
    """
    if limit < 1:
        raise UsageError(f"limit is {limit}; expected 1 or more.")
    if mode not in MODES:
        raise UsageError(f"mode is {mode!r}; expected hybrid, vector or keyword.")
    if mode == "vector" and query_vector is None:
        raise UsageError("Vector search needs the query's embedding, and there is no embedding provider.")
    words = parse_query(query)
    if not words.text:
        return []
    scope = resolve_scope(reader.definitions(), entities, where)
    if scope.names == ():
        return []
    depth = max(4 * limit, MIN_DEPTH)
    by_vector: list[Hit] = []
    if query_vector is not None and mode != "keyword":
        by_vector = reader.vector(checked_vector(query_vector), scope, depth)
    by_keyword = reader.keyword(words, scope, depth) if mode != "vector" and words.terms else []
    ranked = [(key, score) for key, score in fuse(by_vector, by_keyword) if score >= min_score]

    results: list[SearchResult] = []
    while ranked and len(results) < limit:
        # Records can vanish between the ranking and this read; then the next ones move up.
        part, ranked = ranked[:limit], ranked[limit:]
        keys = [key for key, _ in part]
        contents, data = reader.contents(keys), reader.data(keys, scope)
        for key, score in part:
            if key in contents and key in data:
                results.append(SearchResult(*key, score, data[key], contents[key]))
    return results[:limit]


def fuse(by_vector: Sequence[Hit], by_keyword: Sequence[Hit]) -> list[tuple[Key, float]]:
    """Reciprocal rank fusion of two rankings: keys with their scores, best first.

    Ties go to the more similar vector (a record without one comes last), then to the smaller key.
    """
    scores: dict[Key, float] = {}
    for ranking in (by_vector, by_keyword):
        for rank, hit in enumerate(ranking, start=1):
            scores[hit.key] = scores.get(hit.key, 0.0) + 1 / (RRF_K + rank)
    similarity = {hit.key: hit.similarity for hit in by_vector}
    return sorted(scores.items(), key=lambda item: (-item[1], -similarity.get(item[0], -math.inf), item[0]))


def in_order(hits: Iterable[Hit]) -> list[Hit]:
    """The hits by similarity, then key, without those that have none (NaN: the vector is all zeros)."""
    return sorted((h for h in hits if not math.isnan(h.similarity)), key=lambda h: (-h.similarity, h.key))


def checked_vector(vector: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The vector as float32. Raises UsageError if it has no direction: not one row, not finite, or all zeros."""
    import numpy as np

    result = np.asarray(vector, dtype=np.float32)
    if result.ndim != 1 or not result.size:
        raise UsageError(f"The query vector has the shape {result.shape}; expected one row of numbers.")
    if not np.isfinite(result).all() or not result.any():
        raise UsageError("The query vector must hold finite numbers, not all of them zero.")
    return result


_UNFIT = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL and SQLite refuse NUL and lone surrogates
_WORD = re.compile(r"[^\W_]+")
# websearch_to_tsquery() reads a dash between spaces as NOT the next word, and "--force" as NOT NOT force.
_DASHES = re.compile(r"(?<!\S)(?:-{2,}|-(?!\S))")
_TERM = re.compile(r'(-?)(?:"([^"]*)"|([^\s"]+))')


def parse_query(query: str) -> Query:
    """Read a query a person typed. Any string is allowed; what has no letter or digit is no term."""
    text = _DASHES.sub(" ", _UNFIT.sub(" ", query[:MAX_QUERY_CHARS])).strip()
    terms: list[Term] = []
    excluded: list[Term] = []
    for match in _TERM.finditer(text):
        dash, phrase, word = match.groups()
        term = Term(word if phrase is None else phrase, phrase is not None)
        if _WORD.search(term.text):
            # A dash inside a word (comma-separated) is part of it; only one after a space excludes.
            fresh = match.start() == 0 or text[match.start() - 1].isspace()
            (excluded if dash and fresh else terms).append(term)
    return Query(text, tuple(terms[:MAX_TERMS]), tuple(excluded[:MAX_TERMS]))


def resolve_scope(definitions: Iterable[Definition], entities: Sequence[str], where: Mapping[str, Any] | None) -> Scope:
    """What a search may return. Raises UsageError if ``where`` has an unknown field or an unusable value."""
    every = list(definitions)
    hidden = tuple(d.entity for d in every if not d.live)
    requested = tuple(dict.fromkeys(entities))
    searched = [d for d in every if d.live and (not requested or d.entity in requested)]
    if not where:
        names = tuple(name for name in requested if name not in hidden) if requested else None
        return Scope(tuple(searched), names, hidden, ())
    known = {field.name for d in searched for field in d.fields}
    for name, value in where.items():
        if name not in known:
            having = ", ".join(sorted(known)) or "none"
            raise UsageError(f"No searched entity has a field {name!r}.", remedy=f"Fields that there are: {having}.")
        _check_value(name, value)
    matching = tuple(d for d in searched if where.keys() <= {field.name for field in d.fields})
    return Scope(matching, tuple(d.entity for d in matching), hidden, tuple(where.items()))


def _check_value(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str | int | float):
        raise UsageError(
            f"The value of {name!r} is {type(value).__name__}; expected text, a number, true, false or null."
        )
    if isinstance(value, str) and _UNFIT.search(value):
        raise UsageError(f"The value of {name!r} holds a NUL character or a lone surrogate, which no field can hold.")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"The value of {name!r} is {value}; expected a finite number.")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise UsageError(f"The value of {name!r} is beyond 64 bits; expected a smaller number.")
