"""Search: rank by vector and by keyword, fuse the two rankings, read the records that won.

The readers of the two dialects (:mod:`kdb_fast.search.readers.postgresql`, :mod:`kdb_fast.search.readers.sqlite`)
give rankings; everything that does not depend on the dialect is here.

The score is reciprocal rank fusion, as in KameleonDB: each ranking that holds a record adds 1 / (60 + rank),
rank 1 being the best. It is the same in every mode, so ``min_score`` always compares with one scale: a record
at the top of both rankings scores 2/61, at the top of one 1/61.
"""

from __future__ import annotations

import json
import math
import re
import threading
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..catalog.definitions import Entity
from ..errors import UsageError
from ..origins import Origin, QueryVector
from .readers.base import MAX_TERMS, WORD, Hit, Key, Query, Scope, SearchReader, Term

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Embedded = npt.ArrayLike | list[QueryVector]

__all__ = ["IndexStatus", "Mode", "SearchReader", "SearchResult", "fuse", "search"]

Mode = Literal["hybrid", "vector", "keyword"]
MODES = ("hybrid", "vector", "keyword")

RRF_K = 60
"""The constant of reciprocal rank fusion; KameleonDB's, and that of the paper that introduced it."""

BEST = {"hybrid": 2 / (RRF_K + 1), "vector": 1 / (RRF_K + 1), "keyword": 1 / (RRF_K + 1)}
"""The highest score of each mode: that of a record which is first in every ranking."""

MIN_DEPTH = 50
"""Least length of each ranking: a record that is tenth in both must be able to beat the first of one."""

MAX_QUERY_CHARS = 2000
"""A longer query is cut: encoders read about this much, and a keyword query of more words finds nothing."""


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
        entity: Its name.
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
            either, called once at most. Without it hybrid search is by keyword only.
        mode: ``hybrid``, ``vector`` or ``keyword``.
        entities: Names of the entities to search; empty means all.
        limit: Most results, 1 or more.
        min_score: Least fused score. See :data:`BEST`: with more than that nothing is found.
        where: Exact values of fields by logical name, all of which must hold. The number 1 equals 1.0, the
            string "1" and true do not; None also means a field without a value.
        beside: The same index on another connection. A hybrid search then ranks by keyword there, in a thread, while
            the query is embedded and ranked by vector here; the results are the same.

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
        results += [SearchResult(*key, score, *found.records[key]) for key, score in part if key in found.records]
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

    def scope(self, reader: SearchReader) -> Scope:
        scope = resolve_scope(reader.definitions(), self.entities, self.where)
        return _holdable_scope(reader, scope)._replace(excluded=self._held_by(reader).excluded)

    def by_vector(self, reader: SearchReader, embedded: Embedded | None, scope: Scope) -> list[list[Hit]]:
        """A ranking for each embedding of the query."""
        if embedded is None or scope.names == ():
            return []
        several = isinstance(embedded, list) and all(isinstance(item, QueryVector) for item in embedded)
        vectors: list[QueryVector] = embedded if several else [QueryVector(embedded, None)]  # type: ignore[assignment, arg-type]
        return [
            reader.vector(checked_vector(vector), scope._replace(maker=maker), self.depth) for vector, maker in vectors
        ]

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
        contents, data = reader.contents(new), reader.data(new, scope)
        self.records.update((key, (data[key], contents[key])) for key in new if key in contents and key in data)


class _Ranking(NamedTuple):
    """The rankings, by vector one for each embedding of the query, and what was read of their records meanwhile."""

    scope: Scope
    by_vector: list[list[Hit]]
    by_keyword: list[Hit]
    found: _Found


def _in_turn(asked: _Asked, reader: SearchReader, embed: Embed) -> _Ranking:
    vector = embed() if asked.mode != "keyword" else None
    scope = asked.scope(reader)
    return _Ranking(scope, asked.by_vector(reader, vector, scope), asked.by_keyword(reader, scope), _Found())


def _side_by_side(asked: _Asked, reader: SearchReader, beside: SearchReader, embed: Embed) -> _Ranking:
    """Ranks by keyword in a thread. The best records of whichever ranking is there first are read meanwhile."""
    scoped: Future[Scope] = Future()
    first = threading.Lock()
    found = _Found()

    def read_if_first(reader: SearchReader, hits: list[Hit]) -> None:
        if first.acquire(blocking=False):
            found.read(reader, [hit.key for hit in hits[: asked.limit]], scoped.result())

    def rank_by_keyword() -> list[Hit]:
        try:
            scoped.set_result(asked.scope(beside))
        except BaseException as error:
            scoped.set_exception(error)
            raise
        hits = asked.by_keyword(beside, scoped.result())
        read_if_first(beside, hits)
        return hits

    with ThreadPoolExecutor(1, "kdb-fast-keyword") as pool:
        keyword_side = pool.submit(rank_by_keyword)
        vector = embed()
        by_vector = asked.by_vector(reader, vector, scoped.result())
        read_if_first(reader, by_vector[0] if by_vector else [])
        return _Ranking(scoped.result(), by_vector, keyword_side.result(), found)


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


def parse_where(text: str | None) -> dict[str, Any] | None:
    """The fields of ``--where``, a JSON object; None without one.

    Raises:
        UsageError: It is something else.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--where is not JSON: {error}.", remedy='Expected an object: {"city": "Oslo"}') from None
    if not isinstance(value, dict):
        raise UsageError(f'--where is a JSON {type(value).__name__}; expected an object such as {{"city": "Oslo"}}.')
    return value


def check_query(query: str, mode: str, min_score: float) -> None:
    """Raises UsageError for a query that says nothing, and for a least score that every result has or none can have."""
    if blank := why_blank(parse_query(query), mode):
        raise UsageError(blank, remedy='Give words to look for: kdb-fast search "angry customer"')
    if not 0 <= min_score <= BEST[mode]:
        best = math.floor(BEST[mode] * 1e5) / 1e5
        raise UsageError(
            f"--min-score is {min_score:g}; expected 0 to {best:.5f}, the score of a record that is first in "
            f"{'both rankings (2/61)' if mode == 'hybrid' else 'the ranking (1/61)'}.",
            remedy="A record at place n of a ranking gets 1/(60 + n) from it.",
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


_UNFIT = re.compile("[\x00\ud800-\udfff]")  # PostgreSQL and SQLite refuse NUL and lone surrogates
# websearch_to_tsquery() reads a dash between spaces as NOT the next word, and "--force" as NOT NOT force.
_DASHES = re.compile(r"(?<!\S)(?:-{2,}|-(?!\S))")
_TERM = re.compile(r'(-?)(?:"([^"]*)"|([^\s"]+))')
_SIGNED = re.compile(r"[^\w\s]?\d")  # -20, -.5, -$5: the dash is a sign


def parse_query(query: str) -> Query:
    """Read a query a person typed. Any string is allowed; what has no letter or digit is no term."""
    text = _DASHES.sub(" ", _UNFIT.sub(" ", query[:MAX_QUERY_CHARS])).strip()
    terms: list[Term] = []
    excluded: list[Term] = []
    kept: list[str] = []
    done = 0
    for match in _TERM.finditer(text):
        dash, phrase, word = match.groups()
        # A dash inside a word (comma-separated) is part of it; only one after a space excludes.
        dash = dash if match.start() == 0 or text[match.start() - 1].isspace() else ""
        if dash and word and _SIGNED.match(word):
            dash, word = "", dash + word
        term = Term(word if phrase is None else phrase, phrase is not None)
        if WORD.search(term.text):
            (excluded if dash else terms).append(term)
        if dash:
            kept.append(text[done : match.start()])
            done = match.end()
    kept.append(text[done:])
    return Query("".join(kept).strip(), tuple(terms[:MAX_TERMS]), tuple(excluded[:MAX_TERMS]))


def meaning(query: str) -> str:
    """What of a query is embedded: all but what it excludes; '' if it says nothing."""
    words = parse_query(query)
    return "" if why_blank(words, "vector") else words.text


def why_blank(query: Query, mode: str) -> str:
    """Why nothing can be found by this query, in a sentence; '' if something can.

    A vector can be looked for by signs such as an emoji as well, a keyword only by letters and digits.
    """
    signs = mode != "keyword" and any(not c.isascii() and unicodedata.category(c)[0] in "MS" for c in query.text)
    if query.terms or signs:
        return ""
    if query.excluded:
        return "The query only excludes words; nothing in it says what to look for."
    return "The query is blank: it holds no word or number to look for."


def holdable_words(words: Query, missing: frozenset[str]) -> Query:
    """The words as they can be looked for in a database that cannot hold some characters.

    A term with such a letter is in no text, so it is left out. Signs are no part of a term: they count as spaces.
    """
    if not missing:
        return words
    blank = {ord(character): " " for character in missing}
    letters = {character for character in missing if WORD.match(character)}

    def held(terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return tuple(t._replace(text=t.text.translate(blank)) for t in terms if letters.isdisjoint(t.text))

    terms = held(words.terms)
    text = words.text.translate(blank)
    if len(terms) < len(words.terms):
        text = " ".join(f'"{term.text}"' if term.phrase else term.text for term in terms)
    return Query(text, terms, held(words.excluded))


def _holdable_scope(reader: SearchReader, scope: Scope) -> Scope:
    """The scope without names that no row of this database can have; with no names where no field can have a value."""
    names = scope.names or ()
    values = [value for _, value in scope.where if isinstance(value, str)]
    missing = reader.missing_characters([*names, *values])
    if not missing:
        return scope
    if any(not missing.isdisjoint(value) for value in values):
        return scope._replace(names=())
    return scope._replace(names=tuple(name for name in names if missing.isdisjoint(name)))


class LeftOut(NamedTuple):
    """Rows that a ranking by vector could not compare with the query.

    Attributes:
        entities: Names of their entities.
        model: Name of the model that made their vectors; None if nothing tells it.
        rows: Their number in the index.
        reason: Why, as the end of a sentence.
    """

    entities: list[str]
    model: str | None
    rows: int
    reason: str

    def __str__(self) -> str:
        names = ", ".join(self.entities[:3]) + (", …" if len(self.entities) > 3 else "")
        made = f"the model {self.model}" if self.model else "an unknown model"
        counted = f"{self.rows:,} row{'s' if self.rows != 1 else ''} of {names}"
        return f"left out of the ranking by meaning: {counted}, embedded by {made}: {self.reason}"


def left_out(counts: Mapping[tuple[str, Origin], int], why: Callable[[Origin], str]) -> list[LeftOut]:
    """What of an index was not compared, by model and reason; ``why`` gives '' for an origin that was."""
    found: dict[tuple[str | None, str], dict[str, int]] = {}
    for (entity, origin), rows in sorted(counts.items(), key=lambda item: item[0][0]):
        if reason := why(origin):
            entities = found.setdefault((origin.model, reason), {})
            entities[entity] = entities.get(entity, 0) + rows
    return [LeftOut(list(rows), model, sum(rows.values()), reason) for (model, reason), rows in found.items()]


def resolve_scope(definitions: Iterable[Entity], entities: Sequence[str], where: Mapping[str, Any] | None) -> Scope:
    """What a search may return. Raises UsageError if ``where`` has an unknown field or an unusable value."""
    every = list(definitions)
    hidden = tuple(d.name for d in every if not d.active)
    requested = tuple(dict.fromkeys(entities))
    searched = [d for d in every if d.active and (not requested or d.name in requested)]
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
    return Scope(matching, tuple(d.name for d in matching), hidden, tuple(where.items()))


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
