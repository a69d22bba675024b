"""Search: rank by vector and by keyword, fuse the two rankings, read the records that won.

The readers of the two dialects (:mod:`kdb_fast.search.readers.postgresql`, :mod:`kdb_fast.search.readers.sqlite`)
give rankings; everything that does not depend on the dialect is here.

The score is reciprocal rank fusion, as in KameleonDB: each ranking that holds a record adds 1 / (60 + rank),
rank 1 being the best. It is the same in every mode, so ``min_score`` always compares with one scale: a record
at the top of both rankings scores 2/61, at the top of one 1/61.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..catalog.definitions import Entity
from ..errors import UsageError
from ..origins import QueryVector
from ..records import Key
from ..tables.kdb_search import entity_and_id
from .query import MODES, RRF_K, Query, holdable_words, parse_query, why_blank
from .readers.base import DefinitionsChanged, SearchReader
from .readers.ranking import Hit
from .results import SearchResult
from .scope import Scope, holdable_scope, resolve_scope

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Embedded = npt.ArrayLike | list[QueryVector]

Mode = Literal["hybrid", "vector", "keyword"]
MIN_DEPTH = 50
"""Least length of each ranking: a record that is tenth in both must be able to beat the first of one."""


def search(
    reader: SearchReader,
    query: str,
    *,
    query_vector: Embedded | Callable[[], Embedded | None] | None,
    mode: Mode = "hybrid",
    entities: Sequence[str] = (),
    limit: int = 10,
    min_score: float = 0.0,
    where: Mapping[str, Any] | None = None,
    beside: SearchReader | None = None,
) -> list[SearchResult]:
    """The records that answer ``query`` best, best first.

    Args:
        reader: The index.
        query: What to look for. ``"a phrase"`` in quotes stays together, ``-word`` excludes in every mode (but
            ``-20`` is a number), ``or`` between words means either; in every other way any text is allowed. A query
            that says nothing (:func:`why_blank`) finds nothing.
        query_vector: Embeddings of its :func:`meaning`, one for each model that has made vectors of the index, each of
            which ranks the rows of its own model; or one row of numbers, which ranks all rows; or a function that gives
            either, not called again once it has. Without it hybrid search is by keyword only.
        mode: ``hybrid``, ``vector`` or ``keyword``.
        entities: Names of the entities to search; empty means all.
        limit: Most results, 1 or more.
        min_score: Least fused score. See :data:`~kdb_fast.search.query.BEST`: with more than that nothing is found.
        where: Exact values of fields by logical name, all of which must hold. The number 1 equals 1.0, the
            string "1" and true do not; None also means a field without a value.
        beside: The same index on another connection. A hybrid search then ranks by keyword while the query is embedded,
            and by vector beside that where it takes longer; the results are the same.

    Returns:
        At most ``limit`` results by score, then exactness, similarity and key. Deleted records are never among them.

    Raises:
        UsageError: An argument makes no sense; ``where`` names a field that no searched entity has.
        SchemaError: There is no index.
        DatabaseError: The database cannot answer.
    """
    if limit < 1:
        raise UsageError(f"limit is {limit}; expected 1 or more.")
    if mode not in MODES:
        raise UsageError(f"mode is {mode!r}; expected hybrid, vector or keyword.")
    if math.isnan(min_score):
        raise UsageError(f"min_score is {min_score}; expected a number.")
    words = parse_query(query)
    if why_blank(words, mode):
        return []
    if mode == "vector" and query_vector is None:
        raise UsageError("Vector search needs the query's embedding, and there is no embedding provider.")
    asked = _Asked(words, mode, tuple(entities), where, limit, max(4 * limit, MIN_DEPTH))
    embed = query_vector if callable(query_vector) else lambda: query_vector
    if beside is None or mode != "hybrid" or query_vector is None or not words.terms:
        ranking = _in_turn(asked, reader, embed)
    else:
        ranking = _side_by_side(asked, reader, beside, embed)
    fused = fuse(*(ranking.by_vector or [[]])[:1], ranking.by_keyword, *ranking.by_vector[1:])
    ranked = [(key, score) for key, score in fused if score >= min_score]
    found = ranking.found

    results: list[SearchResult] = []
    while ranked and len(results) < limit:
        # Records can vanish between the ranking and this read; then the next ones move up.
        part, ranked = ranked[:limit], ranked[limit:]
        found.read(reader, [key for key, _ in part], ranking.scope)
        results += [
            SearchResult(*entity_and_id(key), score, *found.records[key]) for key, score in part if key in found.records
        ]
    return results[:limit]


Embed = Callable[[], "Embedded | None"]


class _Asked(NamedTuple):
    """What is asked for. ``depth`` is the length of each ranking."""

    words: Query
    mode: Mode
    entities: tuple[str, ...]
    where: Mapping[str, Any] | None
    limit: int
    depth: int

    def scope(self, reader: SearchReader, definitions: list[Entity]) -> Scope:
        scope = resolve_scope(definitions, self.entities, self.where)
        return holdable_scope(scope, reader.missing_characters)._replace(excluded=self._held_by(reader).excluded)

    def _vectors(self, embedded: Embedded | None, scope: Scope) -> list[tuple[npt.NDArray[np.float32], Scope]]:
        """Each embedding of the query, with the rows that it ranks."""
        if embedded is None or scope.names == ():
            return []
        several = isinstance(embedded, list) and all(isinstance(item, QueryVector) for item in embedded)
        vectors: list[QueryVector] = embedded if several else [QueryVector(embedded, None)]  # type: ignore[assignment, arg-type]
        return [(checked_vector(vector), scope._replace(maker=maker)) for vector, maker in vectors]

    def begin_by_vector(
        self, reader: SearchReader, embedded: Embedded | None, scope: Scope
    ) -> Callable[[], list[list[Hit]]]:
        """Begin :meth:`by_vector`; gives the rankings."""
        vectors = self._vectors(embedded, scope)
        first = reader.begin_vector(*vectors[0], self.depth) if vectors else None
        begun = [first] if first else []
        return lambda: [take() for take in begun] + [reader.vector(*each, self.depth) for each in vectors[len(begun) :]]

    def by_vector(self, reader: SearchReader, embedded: Embedded | None, scope: Scope) -> list[list[Hit]]:
        """A ranking for each embedding of the query."""
        return [reader.vector(*each, self.depth) for each in self._vectors(embedded, scope)]

    def begin_by_keyword(self, reader: SearchReader, scope: Scope) -> Callable[[], list[Hit]] | None:
        """Begin :meth:`by_keyword`; gives the hits. None where nothing has begun."""
        words = self._held_by(reader)
        return reader.begin_keyword(words, scope, self.depth) if words.terms and scope.names != () else None

    def by_keyword(self, reader: SearchReader, scope: Scope) -> list[Hit]:
        if self.mode == "vector" or not self.words.terms or scope.names == ():
            return []
        words = self._held_by(reader)
        return reader.keyword(words, scope, self.depth) if words.terms else []

    def _held_by(self, reader: SearchReader) -> Query:
        words = self.words
        return holdable_words(words, reader.missing_characters([words.text, *(term.text for term in words.excluded)]))


class _Found:
    """The records read so far: fields and text by key. Those that are gone were only looked for."""

    def __init__(self) -> None:
        self.records: dict[Key, tuple[dict[str, Any], str]] = {}
        self._looked_for: set[Key] = set()

    def read(self, reader: SearchReader, keys: Iterable[Key], scope: Scope) -> None:
        """Read those of ``keys`` that were not looked for yet."""
        new = [key for key in keys if key not in self._looked_for]
        if not new:
            return
        self._looked_for.update(new)
        self.records.update(reader.records(new, scope))


class _Ranking(NamedTuple):
    """The rankings, by vector one for each embedding of the query, and what was read of their records meanwhile."""

    scope: Scope
    by_vector: list[list[Hit]]
    by_keyword: list[Hit]
    found: _Found


def _in_turn(asked: _Asked, reader: SearchReader, embed: Embed) -> _Ranking:
    scope = asked.scope(reader, reader.definitions())
    by_keyword = asked.by_keyword(reader, scope)
    # Last, since somebody else may still be embedding the query.
    vector = embed() if asked.mode != "keyword" else None
    return _Ranking(scope, asked.by_vector(reader, vector, scope), by_keyword, _Found())


def _side_by_side(asked: _Asked, reader: SearchReader, beside: SearchReader, embed: Embed) -> _Ranking:
    """Ranks by keyword while the query is embedded and ranked by vector.

    Neither waits for KameleonDB's definitions: those of the search before are assumed, and read again in the round trip
    of one of the rankings; where they have changed, both rank again.
    """
    embed_once = functools.cache(embed)
    assumed = reader.assumed_definitions()
    try:
        return _within(asked.scope(reader, assumed), asked, reader, beside, embed_once)
    except DefinitionsChanged:
        definitions = reader.definitions()
    except Exception:
        # It may be that of a table that is gone, or of a field that there was not yet.
        definitions = reader.definitions()
        if definitions == assumed:
            raise
    return _within(asked.scope(reader, definitions), asked, reader, beside, embed_once)


def _within(scope: Scope, asked: _Asked, reader: SearchReader, beside: SearchReader, embed: Embed) -> _Ranking:
    try:
        by_keyword = asked.begin_by_keyword(reader, scope)
        if by_keyword is not None:
            embedded = embed()
            beside.count_as(reader)
            by_vector = asked.begin_by_vector(beside, embedded, scope)
            hits = by_keyword()
            return _Ranking(scope, by_vector(), hits, _Found())
    finally:
        reader.forget()
        beside.forget()
    return _in_a_thread(scope, asked, reader, beside, embed)


def _in_a_thread(scope: Scope, asked: _Asked, reader: SearchReader, beside: SearchReader, embed: Embed) -> _Ranking:
    """Both rankings, by keyword in a thread. The best records of whichever is there first are read meanwhile."""
    # A connection is never shared: the thread uses `beside` only, the caller's thread `reader` only. `found` is written
    # by whoever takes `first`, and read by others only after the thread has ended.
    first = threading.Lock()
    found = _Found()

    def read_if_first(reader: SearchReader, hits: list[Hit]) -> None:
        if first.acquire(blocking=False):
            found.read(reader, [hit.key for hit in hits[: asked.limit]], scope)

    def rank_by_keyword() -> list[Hit]:
        hits = asked.by_keyword(beside, scope)
        read_if_first(beside, hits)
        return hits

    keyword_side = beside.thread.submit(rank_by_keyword)
    try:
        by_vector = asked.by_vector(reader, embed(), scope)
        reader.check_definitions()
        read_if_first(reader, by_vector[0] if by_vector else [])
    finally:
        wait([keyword_side])
    return _Ranking(scope, by_vector, keyword_side.result(), found)


def fuse(by_vector: Sequence[Hit], by_keyword: Sequence[Hit], *others: Sequence[Hit]) -> list[tuple[Key, float]]:
    """Reciprocal rank fusion of rankings: keys with their scores, best first.

    ``others`` are rankings by vector of rows that other models made: none of these is in two, so the scale stays.

    Ties go to an exact hit, then to the more similar vector (a record without one comes last), then to the smaller
    key. Where the ranking by keyword holds exact hits only, the best of them has at least 1/61 and a record that is
    none at most that, so one of them is first.
    """
    scores: dict[Key, float] = {}
    for ranking in (by_vector, by_keyword, *others):
        for rank, hit in enumerate(ranking, start=1):
            scores[hit.key] = scores.get(hit.key, 0.0) + 1 / (RRF_K + rank)
    similarity = {hit.key: hit.similarity for ranking in (by_vector, *others) for hit in ranking}
    exact = {hit.key for hit in by_keyword if hit.exact}
    return sorted(
        scores.items(),
        key=lambda item: (-item[1], item[0] not in exact, -similarity.get(item[0], -math.inf), item[0]),
    )


def checked_vector(vector: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The vector as float32. Raises UsageError if it has no direction: not one row, not finite, or all zeros."""
    import numpy as np

    result = np.asarray(vector, dtype=np.float32)
    if result.ndim != 1 or not result.size:
        raise UsageError(f"The query vector has the shape {result.shape}; expected one row of numbers.")
    if not np.isfinite(result).all() or not result.any():
        raise UsageError("The query vector must hold finite numbers, not all of them zero.")
    return result
