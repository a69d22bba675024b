"""Search in PostgreSQL: the HNSW index of pgvector for vectors, full-text search for keywords.

Vectors are first ranked through the HNSW index, which stops after a number of rows that do not pass the
filters; where that leaves the ranking short, it is done again exactly, so a result is never missing because
a filter was selective. Measured on 100,000 × 384: 8 ms a search; with a ``where`` that every second record
passes the same, with one that few pass 80 to 130 ms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...catalog.definitions import Entity, Field, Place, load_entities
from ...catalog.records import owned
from ...db import pg_settings
from ...db.pg_characters import Characters
from ...errors import UsageError
from ...records import Key
from ...tables.index_table import IndexTable
from ...tables.kdb_search import KDB_SEARCH
from ...tables.reading import postgresql_errors
from ...tables.target import Dialect, Params, Target, identifier
from ..query import Query, Term
from ..scope import Scope
from .base import DefinitionsChanged, SearchReader, Statement
from .postgresql_texts import (
    BEST_TEXTS,
    FEW,
    RANKED_TEXTS,
    TextQuery,
    any_of,
    every,
    first_of,
    rank_of,
    required_of,
    tsquery,
)
from .ranking import Hit, in_order

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_EF_SEARCH = 1000
"""pgvector's upper limit of ``hnsw.ef_search``."""

EF_PER_ROW = 4
"""``hnsw.ef_search`` for each row of the ranking. Of the true first ten of 100,000 × 384, 97.5 % are found with
1, 98.7 % with 2, 99.9 % with 4, in nearly the same time."""

SCAN_PER_ROW = 40
"""Rows the index scan looks at for each row of the ranking, before it is done exactly instead. Looking at 2,000
rows takes 30 ms, at 20,000 (pgvector's default) 300 ms; the exact way takes 50 ms for a selective filter."""

MAX_RANKED = 20_000
"""Matches that are ranked by keyword. Ranking costs 1.5 µs each; words that more texts hold say little."""


Answers = Callable[[], list[list[tuple[Any, ...]]]]
"""Waits for the rows of statements that were sent."""


class _Known(NamedTuple):
    """KameleonDB's entities as they were read, with the statements that read them and what these gave."""

    target: Target
    entities: list[Entity]
    statements: list[Statement]
    answers: list[list[tuple[Any, ...]]]


class PostgresqlReader(SearchReader):
    """Reads the index through a psycopg connection, best in autocommit mode. Settings last for one transaction."""

    dialect: ClassVar[Dialect] = "postgresql"
    _iterative: bool | None = None
    _known: _Known | None = None
    _unchecked: _Known | None = None
    _under_way: Answers | None = None
    _first_texts: list[tuple[Any, ...]] | None = None

    def __init__(self, connection: Any, index: IndexTable = KDB_SEARCH) -> None:
        super().__init__(connection, index)
        self._characters = Characters.of(connection)

    def _read(self, *statements: Statement) -> list[list[tuple[Any, ...]]]:
        """The rows of each statement, in one round trip."""
        with postgresql_errors():
            return pg_settings.at_once(self._connection, [(text.encode(), params) for text, params in statements])

    def definitions(self) -> list[Entity]:
        self._unchecked = None
        statements: list[Statement] = []
        answers: list[list[tuple[Any, ...]]] = []

        def rows(statement: str, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
            answers.append(self._rows(statement, params))
            statements.append((statement, params))
            return answers[-1]

        self._known = _Known(self.target, load_entities(rows, self.target), statements, answers)
        return self._known.entities

    def assumed_definitions(self) -> list[Entity]:
        if self._known is None or self._known.target != self.target:
            return self.definitions()
        self._unchecked = self._known
        return self._known.entities

    def check_definitions(self) -> None:
        if self._unchecked:
            self._read_and_check()

    def begin_keyword(self, query: Query, scope: Scope, limit: int) -> Callable[[], list[Hit]] | None:
        wanted = first_of(query)
        answers = self._send(self._ranked_texts(wanted, query, scope, limit, MAX_RANKED))
        if answers is None:
            return None

        def hits() -> list[Hit]:
            (self._first_texts,) = answers()
            return self.keyword(query, scope, limit)

        return hits

    def begin_vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> Callable[[], list[Hit]] | None:
        text = _as_text(vector)
        answers = self._send(*self._index_scan(text, scope, limit))
        return answers and (lambda: self._nearest(text, scope, limit, lambda: answers()[-1]))

    def _send(self, *statements: Statement) -> Answers | None:
        """Send statements, and do not wait for them. With them definitions that are assumed are read again.

        Returns:
            As :func:`pg_settings.send`; raises DefinitionsChanged if the definitions are others now.
        """
        assumed = self._unchecked
        both = [*_statements(assumed), *statements]
        with postgresql_errors():
            answers = pg_settings.send(self._connection, [(text.encode(), params) for text, params in both])
        if answers is None:
            return None
        self._unchecked, self._under_way = None, answers

        def taken() -> list[list[tuple[Any, ...]]]:
            self._under_way = None
            with postgresql_errors():
                found = answers()
            return _checked(assumed, found)

        return taken

    def forget(self) -> None:
        answers, self._under_way = self._under_way, None
        if answers is not None:
            with contextlib.suppress(Exception):
                answers()

    def _read_and_check(self, *statements: Statement) -> list[list[tuple[Any, ...]]]:
        """:meth:`_read`; definitions that are assumed are read again in the same round trip."""
        assumed, self._unchecked = self._unchecked, None
        return _checked(assumed, self._read(*_statements(assumed), *statements))

    def missing_characters(self, texts: Iterable[str]) -> frozenset[str]:
        if self._characters is None:
            return frozenset()
        with postgresql_errors():
            return self._characters.missing(self._connection, texts)

    def vector(self, vector: npt.NDArray[np.float32], scope: Scope, limit: int) -> list[Hit]:
        text = _as_text(vector)
        return self._nearest(text, scope, limit, lambda: self._by_index(text, scope, limit))

    def _nearest(self, text: str, scope: Scope, limit: int, by_index: Callable[[], list[tuple[Any, ...]]]) -> list[Hit]:
        """What the index gives, in order; where that is too little, the ``limit`` nearest by the exact distance."""
        import psycopg

        try:
            found = by_index()
            if len(found) < limit:
                found = self._exactly(text, scope, limit)
        except psycopg.errors.DataException as error:
            if "dimensions" not in (error.diag.message_primary or ""):
                raise
            raise UsageError(
                f"The query vector has another length than the vectors of the index: {error.diag.message_primary}.",
                remedy="Search with the model that the index was made with.",
            ) from None
        return in_order(Hit(tuple(key), 1.0 - distance) for *key, distance in found)

    def _with_all(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        return self._matching_text([every(query)], query, scope, limit)[0]

    def _with_required(self, required: Sequence[Term], query: Query, scope: Scope, limit: int) -> list[Hit]:
        return self._matching_text([required_of(required, query)], query, scope, limit)[0]

    def _with_any(self, query: Query, scope: Scope, limit: int) -> list[Hit]:
        return self._matching_text([any_of(query)], query, scope, limit)[0]

    def _all_then_any(self, query: Query, scope: Scope, limit: int) -> tuple[list[Hit], list[Hit]]:
        hits, *others = self._matching_text(first_of(query), query, scope, limit)
        return hits, others[0] if others else []

    def _without(self, excluded: Sequence[Term], params: Params) -> str:
        return " AND ".join(f"NOT s.tsv @@ {tsquery(term, params)}" for term in excluded) or "true"

    def _contents(self, keys: Sequence[Key]) -> Statement:
        return (
            f"SELECT s.entity_name, s.record_id, s.content FROM {self._index} s "  # noqa: S608
            "JOIN unnest(%(e)s::text[], %(r)s::text[]) AS k (e, r) ON s.entity_name = k.e AND s.record_id = k.r",
            {"e": [key[0] for key in keys], "r": [key[1] for key in keys]},
        )

    def _stored(self, definition: Entity, place: Place, record_ids: list[str], scope: Scope) -> Statement:
        params = Params(self.dialect)
        # to_jsonb() writes timestamps as shared storage holds them: in ISO format.
        data = "r.data" if place.columns is None else "to_jsonb(r)"
        statement = (
            f"SELECT r.id, {self._matching(definition, place, scope, params)}, {data} "  # noqa: S608
            f"FROM {self.target.table(place.table)} r "
            f"WHERE r.id = ANY({params(record_ids)}::text[]){owned(place, params)}"
        )
        return statement, params.values

    def _by_column(self, definition: Entity, place: Place, values: Sequence[Any]) -> Mapping[str, Any]:
        return values[0] if isinstance(values[0], dict) else {}

    def _index_scan(self, text: str, scope: Scope, limit: int) -> tuple[Statement, Statement]:
        """What sets the scan of the vector index, for the transaction that it is in; and the scan."""
        if self._iterative is None:
            version = self._rows("SELECT extversion FROM pg_extension WHERE extname = 'vector'", {})
            numbers = [int(n) for n in version[0][0].split(".")[:2] if n.isdigit()] if version else []
            self._iterative = numbers >= [0, 8]
        # Without iterative scans (pgvector before 0.8) all rows must come from one list of candidates.
        wanted = limit * EF_PER_ROW if self._iterative else limit * SCAN_PER_ROW
        settings = {"hnsw.ef_search": str(min(max(wanted, 40), MAX_EF_SEARCH))}
        if self._iterative:
            settings["hnsw.iterative_scan"] = "strict_order"
            settings["hnsw.max_scan_tuples"] = str(limit * SCAN_PER_ROW)
        set_params = Params(self.dialect)
        calls = ", ".join(
            f"set_config({set_params(name)}, {set_params(value)}, true)" for name, value in settings.items()
        )
        params = Params(self.dialect)
        distance = self._distance(params(text))
        nearest = (
            f"SELECT s.entity_name, s.record_id, {distance} FROM {self._index} s "  # noqa: S608
            f"WHERE s.embedding IS NOT NULL AND {self._named(scope, params)} AND {self._living(scope, params)} "
            f"AND {self._fit(scope, params)} ORDER BY {distance} LIMIT {params(limit)}"
        )
        return (f"SELECT {calls}", set_params.values), (nearest, params.values)

    def _by_index(self, text: str, scope: Scope, limit: int) -> list[tuple[Any, ...]]:
        return self._read_and_check(*self._index_scan(text, scope, limit))[-1]

    def _distance(self, vector: str) -> str:
        """The cosine distance between a row ``s`` and the vector of this placeholder."""
        return self.target.statement("s.embedding OPERATOR({pgvector}<=>) " + vector + "::{vector}").decode()

    def _exactly(self, text: str, scope: Scope, limit: int) -> list[tuple[Any, ...]]:
        params = Params(self.dialect)
        columns = f"s.entity_name, s.record_id, {self._distance(params(text))} AS distance"
        living = " UNION ALL ".join(self._all_living(scope, params, columns))
        # Adding 0 keeps the planner from the HNSW index, whose order this is not.
        return self._rows(
            f"SELECT entity_name, record_id, distance FROM ({living}) x "  # noqa: S608
            f"ORDER BY distance + 0 LIMIT {params(limit)}",
            params.values,
        )

    def _matching_text(self, wanted: Sequence[TextQuery], query: Query, scope: Scope, limit: int) -> list[list[Hit]]:
        """For each of the text queries the rows that match it and hold nothing excluded, best first."""
        rows, self._first_texts = self._first_texts, None
        if rows is None:
            rows = self._rows(*self._ranked_texts(wanted, query, scope, limit, MAX_RANKED))
        ranked = {number: count for number, entity, _, count in rows if entity is None}
        best: list[list[Hit]] = []
        for number, text_query in enumerate(wanted):
            hits = _hits_of(number, rows)
            if len(hits) < limit and ranked[number] >= MAX_RANKED:  # the filters left too few of those that were ranked
                hits = _hits_of(0, self._rows(*self._ranked_texts([text_query], query, scope, limit, None)))
            best.append(hits)
        return best

    def _ranked_texts(
        self, wanted: Sequence[TextQuery], query: Query, scope: Scope, limit: int, most: int | None
    ) -> Statement:
        """Number of the text query, key and rank of the rows that match it; without a key, how many were ranked.

        One is asked only where those before it gave fewer than ``limit``. Records are looked up in the order of rank
        until there are ``limit``, not for every match.
        """
        params = Params(self.dialect)
        named, living = self._named(scope, params), self._living(scope, params)
        tables = []
        for number, text_query in enumerate(wanted):
            text = text_query(params)
            ranked = RANKED_TEXTS.format(
                number=number,
                rank=rank_of("m.tsv", text),
                index=self._index,
                text=text,
                named=named,
                without=self._without(query.excluded, params),
                few=FEW.format(before=number - 1, limit=params(limit)) if number else "true",
                most=params(most),
                living=living,
                limit=params(limit),
            )
            tables.append(ranked)
        rows = [BEST_TEXTS.format(number=number) for number in range(len(wanted))]
        return f"WITH {', '.join(tables)} {' UNION ALL '.join(rows)}", params.values

    def _equals(self, place: Place, field: Field, value: Any, params: Params) -> str:
        if place.columns is None:
            stored = f"(r.data -> {params(field.column)}::text)"
        elif field.column not in place.columns:
            stored = "NULL::jsonb"
        else:
            column = f"r.{identifier(field.column)}"
            if field.type == "datetime" and isinstance(value, str):
                with contextlib.suppress(ValueError):
                    return f"{column} = {params(datetime.fromisoformat(value))}"
                return "false"
            # As JSON a value of another type is just not equal, where = on the column would be an error.
            stored = f"to_jsonb({column})"
        if value is None:
            return f"({stored} IS NULL OR {stored} = 'null'::jsonb)"
        if isinstance(value, bool):
            return f"{stored} = to_jsonb({params(value)}::boolean)"
        if isinstance(value, str):
            return f"{stored} = to_jsonb({params(value)}::text)"
        # By its digits: a float8 parameter would be rounded to 15 of them.
        digits = repr(float(value)) if isinstance(value, float) else str(int(value))
        return f"{stored} = to_jsonb({params(digits)}::numeric)"


def _hits_of(number: int, rows: Sequence[tuple[Any, ...]]) -> list[Hit]:
    """Those of one text query, of the rows that :meth:`PostgresqlReader._ranked_texts` gives in any order."""
    return in_order(
        Hit((entity, record), rank) for of, entity, record, rank in rows if of == number and entity is not None
    )


def _as_text(vector: npt.NDArray[np.float32]) -> str:
    # Nine digits tell any two float32 numbers apart.
    return "[" + ",".join(["%.9g"] * len(vector)) % tuple(vector.tolist()) + "]"


def _statements(assumed: _Known | None) -> list[Statement]:
    return assumed.statements if assumed else []


def _checked(assumed: _Known | None, answers: list[list[tuple[Any, ...]]]) -> list[list[tuple[Any, ...]]]:
    """The answers behind those to :func:`_statements`. Raises DefinitionsChanged if these are not as they were."""
    if assumed is None:
        return answers
    number = len(assumed.statements)
    if answers[:number] != assumed.answers:
        raise DefinitionsChanged
    return answers[number:]
