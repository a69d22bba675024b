"""Search of a target in PostgreSQL, through whatever index its vectors have.

The user's own condition stands alone in a subquery over the source, so that no name of ours can be mistaken for one of
its columns. It is the user's SQL, on the user's connection; all of it runs in a transaction that can write nothing.

The rows are taken in the order of an index and checked one by one until there are enough (with pgvector 0.8 or newer
an index goes on for as long as it takes). Where that leaves the ranking short, or there is no index that fits, the
order is that of the exact distance. What an index orders by something else than the whole vector's cosine is ranked
again by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...db import pg_errors
from ...db.pg_characters import Characters
from ...db.retrying import ErrorKind
from ...errors import SchemaError
from ...records import Key
from ...tables.key import array_literal
from ...tables.target import Params
from ..query import Query, Term, holdable_words
from ..readers.postgresql import MAX_RANKED
from ..readers.postgresql_texts import rank_of, tsquery
from ..readers.ranking import Hit, in_order
from .base import Found, TableReader, Wanted
from .indexes import FIND, OF_BITS, VectorIndex, find_indexes, uses
from .searched import SearchedTable

if TYPE_CHECKING:
    import psycopg

    from .base import Vector

OVERSAMPLED = 4
"""Rows taken from an index for each one wanted, where its order is not that of the whole vectors' cosine, and where
several rows may be pieces of one record."""

RANK = """
SELECT {keys}, 1 - x.kdb_fast_distance, {chunk} FROM (
  SELECT {row_keys}, {distance} AS kdb_fast_distance, {row_chunk} AS kdb_fast_chunk
  FROM {rows} WHERE v.{embedding} IS NOT NULL{length} ORDER BY {order}
) x WHERE {ours} AND {without} LIMIT {limit}
"""
"""Rows in their order, and only as many of them looked at as it takes."""

OURS = """
coalesce((SELECT CASE WHEN st.{seal} = sha256({sender}(t.{embedding}))
    THEN st.{fingerprint} = ANY({fingerprints}::text[]) ELSE {foreign} END
  FROM {state} st JOIN {vectors} t ON {same_row} WHERE {same_state}), {foreign})
"""
"""A vector is the model's that we noted while it is the one that we noted."""

BY_KEYWORD = """
SELECT {keys}, x.kdb_fast_rank, x.kdb_fast_chunk FROM (
  SELECT {row_keys}, {rank} AS kdb_fast_rank, {row_chunk} AS kdb_fast_chunk
  FROM (SELECT * FROM {state} p WHERE p.tsv @@ {tsquery} LIMIT {cap}) p ORDER BY kdb_fast_rank DESC, {names} OFFSET 0
) x WHERE {met} AND {without} ORDER BY x.kdb_fast_rank DESC, {x_names} LIMIT {limit}
"""
"""Records are looked up in the order of rank until there are enough, not for every match."""

WITHOUT = "NOT EXISTS (SELECT FROM {state} e WHERE {same} AND e.tsv @@ ({excluded}))"

COLUMNS = (
    "SELECT attname::text FROM pg_attribute WHERE attrelid = to_regclass(%(table)s) AND attnum > 0 AND NOT attisdropped"
)

READ = """
SELECT k.kdb_fast_i, {keys}, {text}, {piece}{columns}
FROM unnest({arrays}) WITH ORDINALITY AS k({names}, kdb_fast_i){joins}
"""


class PostgresqlTableReader(TableReader):
    """Reads a target through a psycopg connection."""

    _connection: psycopg.Connection[Any]

    def __init__(self, connection: Any, table: SearchedTable) -> None:
        super().__init__(connection, table)
        _load_as_text_what_python_lacks(connection)
        self._indexes: list[VectorIndex] | None = None
        self._iterative = False

    def _checked(self, statement: str) -> list[str]:
        # Without parameters, but in the extended protocol, which takes one statement only.
        with self._connection.transaction():
            cursor = self._connection.execute(statement.encode(), binary=True)
            return [column.name for column in cursor.description or ()]

    def _names(self) -> Sequence[str]:
        table = self._table
        if not table.source_regclass:
            return self._checked(self._select("*", "") + " LIMIT 0")
        # Not by SELECT *, which a role with rights on some columns may not.
        return [name for (name,) in self._rows(COLUMNS, {"table": table.source_regclass})]

    def _complaint(self, error: Exception) -> str:
        of_statement = pg_errors.kind_of(error) in (ErrorKind.REFUSED, ErrorKind.DATA)
        writes = pg_errors.sqlstate(error) == pg_errors.READ_ONLY
        return pg_errors.primary_message(error) if of_statement or writes else ""

    def _failure(self, error: Exception) -> Exception:
        return pg_errors.explain("searching", error)

    def _explained(self, error: Exception) -> Exception:
        if pg_errors.sqlstate(error) == pg_errors.NO_RIGHT:
            return SchemaError(
                f"{self._table.shown} cannot be searched: {pg_errors.primary_message(error)}.",
                remedy="Let its owner grant this role SELECT on it, and USAGE on its schema.",
            )
        return super()._explained(error)

    def _nearest(self, vector: Vector, wanted: Wanted, limit: int) -> list[Hit]:
        index = self._index_for(vector, wanted, limit)
        if index is not None:
            rows = limit * self._oversampled(index)
            self._set_scan(index, rows)
            hits = self._hits(self._ranked(vector, wanted, rows, index))
            if len(hits) >= limit:
                return hits[:limit]
        rows = limit
        while True:
            found = self._ranked(vector, wanted, rows)
            hits = self._hits(found)
            if len(hits) >= limit or len(found) < rows:
                return hits[:limit]
            rows *= OVERSAMPLED

    def _oversampled(self, index: VectorIndex) -> int:
        times: int = (not index.exact) + (index.distance in OF_BITS) + self._table.chunked
        return int(OVERSAMPLED**times)

    def _hits(self, found: Sequence[tuple[Key, float, int | None]]) -> list[Hit]:
        return in_order(self._first_of_each(sorted(found, key=lambda row: -row[1])))

    def _index_for(self, vector: Vector, wanted: Wanted, limit: int) -> VectorIndex | None:
        """The index in whose order to rank: one that the server would use, as far as that matters; None without."""
        for index in self._all_indexes():
            if index.fits:
                return index
            rows = limit * self._oversampled(index)
            self._set_scan(index, rows)
            statement, params = self._rank(vector, wanted, rows, index)
            found = self._attempt("EXPLAIN (FORMAT JSON, COSTS OFF) " + statement, params)
            if found and uses(found[0][0], index.names):
                return index
        return None

    def _all_indexes(self) -> list[VectorIndex]:
        if self._indexes is None:
            table = self._table
            # With this path the server writes names with their schema.
            (path, _), *_ = self._rows(
                "SELECT current_setting('search_path'), set_config('search_path', 'pg_catalog, pg_temp', true)", {}
            )
            params = Params(table.dialect)
            regclass, column = params(table.vectors_regclass), params(table.vector.name)
            self._indexes = find_indexes(self._query(FIND.format(table=regclass, column=column), params))
            version = self._rows("SELECT extversion FROM pg_extension WHERE extname = 'vector'", {})
            numbers = [int(n) for n in version[0][0].split(".")[:2] if n.isdigit()] if version else []
            self._iterative = numbers >= [0, 8]
            self._rows("SELECT set_config('search_path', %(path)s, true)", {"path": path})
        return self._indexes

    def _set_scan(self, index: VectorIndex, rows: int) -> None:
        settings = index.settings(rows, iterative=self._iterative)
        params = Params(self._table.dialect)
        calls = ", ".join(f"set_config({params(name)}, {params(value)}, true)" for name, value in settings.items())
        self._query(f"SELECT {calls}", params)

    def _ranked(
        self, vector: Vector, wanted: Wanted, rows: int, index: VectorIndex | None = None
    ) -> list[tuple[Key, float, int | None]]:
        found = self._query(*self._rank(vector, wanted, rows, index))
        return [(tuple(key), similarity, chunk) for *key, similarity, chunk in found]

    def _rank(self, vector: Vector, wanted: Wanted, rows: int, index: VectorIndex | None) -> tuple[str, Params]:
        """The statement for a ranking: in the order of an index, or without one in that of the distance itself."""
        table = self._table
        params = Params(table.dialect)
        query = f"{params('[' + ','.join(map(str, vector.tolist())) + ']')}::{table.vector.type}"
        pgvector = table.home.statement("{pgvector}").decode()
        distance = f"v.{table.embedding} OPERATOR({pgvector}<=>) {query}"
        if index is None:
            distance = f"({distance}) + 0"  # keeps the planner from an index, whose order this is not
        order = distance if index is None else index.order(query, table.embedding)
        any_length = table.vector.dimensions is None
        length = f" AND {pgvector}vector_dims(v.{table.embedding}) = {len(vector)}" if any_length else ""
        statement = RANK.format(
            keys=table.each_key("x.kdb_fast_{number}::text"),
            chunk="x.kdb_fast_chunk",
            row_keys=table.each_key("v.{column} AS kdb_fast_{number}"),
            distance=distance,
            row_chunk="v.chunk" if table.chunked else "NULL::int",
            rows=self._ranked_rows(wanted.where),
            embedding=table.embedding,
            length=length,
            order=order,
            ours=self._ours(wanted, params),
            without=self._without(wanted.excluded, params),
            limit=params(rows),
        )
        return statement, params

    def _ranked_rows(self, where: str) -> str:
        """The rows with vectors, as an item ``v`` of FROM, of the records that meet the condition."""
        table = self._table
        if not table.beside:
            columns = ", ".join([table.each_key("{column}"), table.embedding])
            return f"({escaped(self._select(columns, where))}) v"
        if not where:
            return f"{table.vectors} v"
        keys = table.each_key("{column} AS kdb_fast_source_{number}")
        same = table.same_key("v.{column}", "s.kdb_fast_source_{number}")
        return f"{table.vectors} v JOIN ({escaped(self._select(keys, where))}) s ON {same}"

    def _ours(self, wanted: Wanted, params: Params) -> str:
        """The condition that the vector of a row ``x`` may be compared with the query's."""
        if not self.has_state:
            return "true" if wanted.foreign else "false"
        table = self._table
        chunk = [" AND st.chunk = t.chunk", " AND st.chunk = x.kdb_fast_chunk"] if table.chunked else ["", ""]
        return OURS.format(
            seal=table.seal,
            sender=table.vector.sender,
            embedding=table.embedding,
            fingerprint=table.fingerprint,
            fingerprints=params(array_literal(wanted.fingerprints)),
            foreign="true" if wanted.foreign else "false",
            state=table.state,
            vectors=table.vectors,
            same_row=table.same_key(f"st.{table.state_key}", "t.{column}") + chunk[0],
            same_state=table.same_key(f"st.{table.state_key}", "x.kdb_fast_{number}") + chunk[1],
        )

    def _with_all(self, query: Query, scope: Wanted, limit: int) -> list[Hit]:
        params = Params(self._table.dialect)
        every = f"websearch_to_tsquery({self._configuration(params)}, {params(query.websearch())})"
        return self._matching(every, params, scope, limit)

    def _with_required(self, required: Sequence[Term], query: Query, scope: Wanted, limit: int) -> list[Hit]:
        params = Params(self._table.dialect)
        configuration = self._configuration(params)
        every = " && ".join(tsquery(term, params, True, configuration) for term in required)
        either = " || ".join(tsquery(term, params, True, configuration) for term in query.terms)
        return self._matching(f"({every} && ({either}))", params, scope, limit)

    def _with_any(self, query: Query, scope: Wanted, limit: int) -> list[Hit]:
        params = Params(self._table.dialect)
        configuration = self._configuration(params)
        either = " || ".join(tsquery(term, params, term.phrase, configuration) for term in query.alternatives())
        return self._matching(f"({either})", params, scope, limit)

    def _configuration(self, params: Params) -> str:
        return f"{params(self._table.definition.keyword)}::regconfig"

    def _matching(self, wanted: str, params: Params, scope: Wanted, limit: int) -> list[Hit]:
        """Records of which a text matches the tsquery ``wanted`` (its values are in ``params``), best first."""
        table = self._table
        chunked = table.chunked
        statement = BY_KEYWORD.format(
            keys=table.each_key("x.kdb_fast_{number}::text"),
            row_keys=table.each_key(f"p.{table.state_key} AS kdb_fast_{{number}}"),
            rank=rank_of("p.tsv", wanted),
            tsquery=wanted,
            row_chunk="p.chunk" if chunked else "NULL::int",
            state=table.state,
            cap="%(cap)s",
            names=table.each_key("kdb_fast_{number}"),
            x_names=table.each_key("x.kdb_fast_{number}"),
            met=escaped(self._met(scope.where, "x.kdb_fast_{number}")),
            without=self._without(scope.excluded, params),
            limit="%(limit)s",
        )
        cap: int | None = MAX_RANKED
        rows = limit * (OVERSAMPLED if chunked else 1)
        while True:
            params.values |= {"cap": cap, "limit": rows}
            found = self._query(statement, params)
            hits = self._hits([(tuple(key), value, chunk) for *key, value, chunk in found])
            if len(hits) >= limit or (cap is None and len(found) < rows):
                return hits[:limit]
            if len(found) == rows:
                rows *= OVERSAMPLED
            else:
                cap = None  # the condition may have left too few of those that were ranked

    def _without(self, excluded: Sequence[Term], params: Params) -> str:
        """The condition that a row ``x`` is of a record that holds none of these terms."""
        if not excluded:
            return "true"
        table = self._table
        configuration = self._configuration(params)
        return WITHOUT.format(
            state=table.state,
            same=table.same_key(f"e.{table.state_key}", "x.kdb_fast_{number}"),
            excluded=" || ".join(tsquery(term, params, True, configuration) for term in excluded),
        )

    def held(self, words: Query) -> Query:
        characters = Characters.of(self._connection)
        if characters is None:
            return words
        texts = [words.text, *(term.text for term in words.excluded)]
        return holdable_words(words, characters.missing(self._connection, texts))

    def read(self, keys: Sequence[Key], columns: Sequence[str]) -> dict[Key, Found]:
        table = self._table
        params = Params(table.dialect)
        arrays = [f"{params(array_literal(parts))}::text[]" for parts in zip(*keys, strict=True)]
        names = table.each_key("kdb_fast_key_{number}")
        if table.chunked:
            arrays.append(f"{params([self.chunks[key] for key in keys])}::int[]")
            names += ", kdb_fast_chunk"
        parts = self._read_parts(columns, "k.kdb_fast_key_{number}::{type}")
        parts |= {"text": escaped(parts["text"]), "joins": escaped(parts["joins"])}
        statement = READ.format(**parts, arrays=", ".join(arrays), names=names)
        return {keys[i - 1]: self._found(row) for i, *row in self._query(statement, params)}

    def _query(self, statement: str, params: Params) -> list[tuple[Any, ...]]:
        import psycopg

        try:
            return self._connection.execute(statement.encode(), params.values).fetchall()
        except psycopg.Error as error:
            raise self._explained(error) from error

    def _attempt(self, statement: str, params: Params) -> list[tuple[Any, ...]]:
        """All rows of a statement; none where the server does not take it."""
        import psycopg

        try:
            with self._connection.transaction():
                return self._connection.execute(statement.encode(), params.values).fetchall()
        except psycopg.Error as error:
            if pg_errors.kind_of(error) is not ErrorKind.REFUSED:
                raise self._explained(error) from error
            return []

    def _finds_state(self) -> bool:
        return bool(
            self._rows("SELECT true WHERE to_regclass(%(state)s) IS NOT NULL", {"state": self._table.state_regclass})
        )


def escaped(sql: str) -> str:
    """SQL of the user's within a statement that has parameters: psycopg takes a per cent sign for one."""
    return sql.replace("%", "%%")


def _load_as_text_what_python_lacks(connection: psycopg.Connection[Any]) -> None:
    """Times that Python has no value for (``infinity``, years before Christ, 24:00) come as PostgreSQL writes them, and
    so do all intervals: a month is no number of days."""
    from psycopg.types import datetime as times
    from psycopg.types.string import TextLoader

    connection.adapters.register_loader("interval", TextLoader)
    for name in ("date", "time", "timetz", "timestamp", "timestamptz"):
        base = getattr(times, f"{name.capitalize()}Loader")
        connection.adapters.register_loader(name, type(base.__name__, (base,), {"load": _tolerant(base.load)}))


def _tolerant(load: Any) -> Any:
    import psycopg

    def loaded(self: Any, data: Any) -> Any:
        try:
            return load(self, data)
        except psycopg.DataError:
            return bytes(data).decode()

    return loaded
