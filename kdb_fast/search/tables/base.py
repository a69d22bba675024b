"""What the readers of the two dialects share: what a ranking is asked for, and what made the vectors."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import SchemaError, UsageError
from ...origins import Origin
from ...records import Key, shell_word, storable_key
from ...tables.names import as_one_expression, or_nearest, said_of_expression
from ...tables.target import RUNS, Params, columns_of
from ..query import Query, Term
from ..readers.ranking import Hit, KeywordRanking
from .results import Chunk
from .searched import SearchedTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

CHANGED = "Was the table changed since it was embedded? Run: kdb-fast reindex with its name."

ORIGINS = """
SELECT st.fingerprint, {model}, {dimensions}, st.rows
FROM (SELECT {fingerprint} AS fingerprint, count(*) AS rows FROM {state} GROUP BY 1) st
"""
OF_RUN = (
    "(SELECT r.{column} FROM {runs} r WHERE r.target = {identity} AND r.fingerprint = st.fingerprint "
    "ORDER BY r.run DESC LIMIT 1)"
)


class Wanted(NamedTuple):
    """Which rows may be ranked.

    Attributes:
        where: SQL condition over the columns of the source; '' for all.
        excluded: Terms that no record may hold.
        fingerprints: Of the models with whose vectors the query's may be compared.
        foreign: Whether vectors of which nothing is known may be ranked, too.
    """

    where: str = ""
    excluded: tuple[Term, ...] = ()
    fingerprints: tuple[str, ...] = ()
    foreign: bool = False


class Found(NamedTuple):
    """A record as it is read for the result.

    Attributes:
        key: Its values, with the types of the driver.
        text: What matched.
        columns: Values of the columns that were asked for.
        chunk: The piece that matched.
    """

    key: tuple[Any, ...]
    text: str
    columns: tuple[Any, ...]
    chunk: Chunk | None


class TableReader(KeywordRanking[Wanted]):
    """Rankings and records of one target on an open connection. Nothing is written. Not shared between threads.

    A hit's key is one opaque value for the reader itself, such that keys can be ordered. Every method raises
    :class:`~kdb_fast.errors.DatabaseError` when the database cannot answer, and
    :class:`~kdb_fast.errors.SchemaError` where something is not what it must be.

    Args:
        connection: Within a transaction.
        table: What is searched.
    """

    def __init__(self, connection: Any, table: SearchedTable) -> None:
        self._connection, self._table = connection, table
        self.chunks: dict[Key, int] = {}
        """The piece of each record that matched best, by the ranking that came first."""
        self.where = ""
        """The condition that is part of the statements now."""
        self.has_state = True
        """Whether the table of what is known is there."""

    def check(self, where: str, columns: Sequence[str]) -> list[str]:
        """Look at what the user has written, before anything is done.

        Returns:
            The columns as the source has them.

        Raises:
            UsageError: A condition that does not parse, or a column that the source does not have.
        """
        table = self._table
        try:
            if where:
                self._checked(self._select(as_one_expression(where), "") + " LIMIT 0")
            self._checked(self._select(table.each_key("{column}"), where) + " LIMIT 0")
        except Exception as error:
            if where and (complaint := self._complaint(error)):
                raise bad_condition(where, complaint) from None
            raise self._explained(error) from error
        there = {self._folded(name): name for name in (self._names() if columns else ())}
        for name in columns:
            if self._folded(name) not in there:
                raise bad_column(name, list(there.values()))
        return [there[self._folded(name)] for name in columns]

    @abstractmethod
    def _names(self) -> Sequence[str]:
        """The columns of the source."""

    def _folded(self, name: str) -> str:
        return name.lower() if self._table.dialect == "sqlite" else name

    @abstractmethod
    def _checked(self, statement: str) -> list[str]:
        """Names of the columns of a SELECT without parameters; errors of the driver are passed on."""

    @abstractmethod
    def _complaint(self, error: Exception) -> str:
        """What the database says of a statement that it does not take; '' for any other error."""

    def _explained(self, error: Exception) -> Exception:
        """The error of kdb-fast that says what one of the driver's means."""
        complaint = self._complaint(error)
        if complaint and self.where:
            return UsageError(
                f"--where fails on a row: {complaint}.",
                remedy="Expected an SQL condition that holds or does not hold for every row, and writes nothing.",
            )
        if complaint:
            return SchemaError(f"{self._table.shown} cannot be searched: {complaint}.", remedy=CHANGED)
        return self._failure(error)

    @abstractmethod
    def _failure(self, error: Exception) -> Exception:
        """The error of kdb-fast for any other of the driver's."""

    def _select(self, columns: str, where: str) -> str:
        """A SELECT of columns of the source, of the rows that meet a condition. In it no name of ours is to be seen."""
        table = self._table
        source = f"{table.source} AS {table.column(table.name)}" if table.source.startswith("(") else table.source
        # What a row of a column target must meet to be one of its records; a table of vectors has only those.
        own = "" if table.definition.into else table.definition.filter
        conditions = [condition for condition in (own, where) if condition]
        # A condition may end in a comment.
        met = " AND ".join(f"(\n{condition}\n)" for condition in conditions)
        return f"SELECT {columns} FROM {source}{' WHERE ' + met if met else ''}"  # noqa: S608

    def _selects(self, where: str) -> bool:
        """Whether not every row of the source is to be found."""
        return bool(where) or bool(self._table.definition.filter and not self._table.definition.into)

    def _met(self, where: str, row: str) -> str:
        """The condition that the record of a row is there and meets ``where``.

        Args:
            row: Template of a column of the row's key.
        """
        if not self._selects(where):
            return "true"
        keys = self._table.each_key("{column} AS kdb_fast_source_{number}")
        same = self._table.same_key("s.kdb_fast_source_{number}", row)
        return f"EXISTS (SELECT 1 FROM ({self._select(keys, where)}) s WHERE {same})"  # noqa: S608

    def _check_length(self, dimensions: int) -> None:
        table = self._table
        if table.vector.dimensions not in (None, dimensions):
            raise UsageError(
                f"{table.shown}.{storable_key(table.vector.name)} holds vectors of {table.vector.dimensions} numbers; "
                f"the model of the query gives {dimensions}.",
                remedy="Search with the model that made them.",
            )

    def vector(self, vector: Vector, wanted: Wanted, limit: int) -> list[Hit]:
        """The ``limit`` records nearest to ``vector`` (float32, shape (dimensions,)) by cosine, best first."""
        self._check_length(len(vector))
        with self._under(wanted.where):
            return self._nearest(vector, wanted, limit)

    def keyword(self, query: Query, scope: Wanted, limit: int) -> list[Hit]:
        with self._under(scope.where):
            return super().keyword(query, scope, limit)

    @contextlib.contextmanager
    def _under(self, where: str) -> Iterator[None]:
        """The condition is part of the statements within."""
        self.where = where
        try:
            yield
        finally:
            self.where = ""

    def held(self, words: Query) -> Query:
        """The words as they can be looked for in this database."""
        return words

    @abstractmethod
    def _nearest(self, vector: Vector, wanted: Wanted, limit: int) -> list[Hit]:
        """See :meth:`vector`."""

    @abstractmethod
    def read(self, keys: Sequence[Key], columns: Sequence[str]) -> dict[Key, Found]:
        """These records; those that are gone are left out."""

    @abstractmethod
    def _query(self, statement: str, params: Params) -> list[tuple[Any, ...]]:
        """All rows of a statement."""

    def origins(self) -> dict[Origin, int]:
        """What made the vectors that are known, with the number of rows."""
        table, rows = self._table, self._rows
        self.has_state = self._finds_state() and RUNS in columns_of(rows, table.home, (RUNS,))
        if not self.has_state:
            return {}
        params = Params(table.dialect)
        runs, identity = table.home.table(RUNS), params(table.identity)
        statement = ORIGINS.format(
            model=OF_RUN.format(column="model", runs=runs, identity=identity),
            dimensions=OF_RUN.format(column="dimensions", runs=runs, identity=identity),
            fingerprint=table.fingerprint,
            state=table.state,
        )
        # Where the runs are not kept, such as in a restored table: the target's model, if the fingerprint says so.
        name, length = table.definition.model or None, table.definition.dimensions or table.vector.dimensions
        return {
            Origin(fingerprint, model or name, dimensions or length): count
            for fingerprint, model, dimensions, count in self._query(statement, params)
        }

    def _rows(self, statement: str, values: Any) -> list[tuple[Any, ...]]:
        params = Params(self._table.dialect)
        params.values.update(values)
        return self._query(statement, params)

    @abstractmethod
    def _finds_state(self) -> bool:
        """Whether the table of what is known is there."""

    def _read_parts(self, columns: Sequence[str], key: str) -> dict[str, str]:
        """Parts of the statement that reads records.

        Args:
            key: Template of a column of the wanted keys, ``k``.
        """
        table = self._table
        # SQLite reads the tables of a CROSS JOIN in the order they are written: each row is looked up by its key.
        join = " CROSS JOIN" if table.dialect == "sqlite" else " JOIN"
        joins, of = "", "t"
        if not table.text:
            of = "v"
            piece = " AND v.chunk = k.kdb_fast_chunk" if table.chunked else ""
            joins += f"{join} {table.state} v ON {table.same_key(f'v.{table.state_key}', key)}{piece}"
        # What has no record any more is not found. A query would run again for that; it is pruned by the next run.
        if table.text or (table.beside and (columns or not table.source.startswith("("))):
            joins += f"{join} {table.source} t ON {table.same_key('t.{column}', key)}"
        of_columns = "t" if table.text or table.beside else "v"
        return {
            "keys": table.each_key(of + ".{column}"),
            "text": f"CAST(({table.text or 'v.content'}) AS text)",
            "piece": "v.chunk, v.start_char, v.end_char" if table.chunked else "NULL, NULL, NULL",
            "columns": "".join(f", {of_columns}.{table.column(name)}" for name in columns),
            "joins": joins,
        }

    def _found(self, row: Sequence[Any]) -> Found:
        """A record from the row that :meth:`_read_parts` gives."""
        width = len(self._table.key)
        text, chunk, start, end, *columns = row[width:]
        piece = None if chunk is None else Chunk(chunk, start, end)
        return Found(tuple(row[:width]), text or "", tuple(columns), piece)

    def _first_of_each(self, found: Sequence[tuple[Key, float, int | None]]) -> Iterator[Hit]:
        """One hit a record: of its pieces the nearest."""
        seen: set[Key] = set()
        for key, similarity, chunk in found:
            if key not in seen:
                seen.add(key)
                if chunk is not None:
                    self.chunks.setdefault(key, chunk)
                yield Hit(key, similarity)


def nothing_embedded(table: SearchedTable) -> SchemaError:
    """The error for a target without any vector of ours."""
    return SchemaError(
        f"Of {table.shown} no vector is known to be of any model.",
        remedy=f"Embed it: kdb-fast reindex {shell_word(table.name)}. Vectors of another program stay then, unless "
        "with --replace; to search them name their model: --model.",
    )


def bad_condition(where: str, why: str) -> UsageError:
    """The error for a condition that the database does not take."""
    return UsageError(
        f"--where is no condition over the columns of the source: {said_of_expression(why)}.",
        remedy=f"""Expected SQL such as --where "published AND lang = 'en'"; found {storable_key(where, 100)}""",
    )


def bad_column(name: str, there: Sequence[str]) -> UsageError:
    """The error for a column that the source does not have."""
    return UsageError(
        f"The source has no column {storable_key(name)!r}{or_nearest(name, there)}",
        remedy="Names, with commas between: --columns a,b",
    )
