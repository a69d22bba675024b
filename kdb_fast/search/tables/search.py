"""Search of a target: embed the query, rank by vector and by keyword, fuse, read the records that won.

Only rows are ranked by vector whose vector is known to be of the query's model: the one that we wrote, and that is
still there. A vector of another program, or one that was written over ours, is searched only where its model is named.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...db import pg_settings
from ...db.address import DatabaseAddress, opened, parse_address
from ...db.reading import read
from ...errors import SchemaError, SearchWarning, UsageError
from ...origins import IndexModel, Maker, Origin, QueryVector
from ...records import Key, shell_word, storable_key
from ...stores import targets
from ...tables.definition import Definition
from ..query import MODES, Query, parse_query, why_blank
from ..readers.ranking import Hit
from ..results import LeftOut, left_out
from ..retrieval import MIN_DEPTH, checked_vector, fuse
from .base import TableReader, Wanted, nothing_embedded
from .find import find_searched
from .results import Outcome, TableResult
from .searched import SearchedTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..ahead import QueryAhead

    Vector = npt.NDArray[np.float32]

READ_ONLY = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"

Mode = Literal["hybrid", "vector", "keyword"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a target.

    Attributes:
        query: What to look for; see :func:`kdb_fast.search.retrieval.search`.
        mode: ``hybrid``, ``vector`` or ``keyword``; None for hybrid where the target has keyword search, else vector.
        where: SQL condition over the columns of the source; '' for all rows.
        columns: Names of columns of the source that the results have.
        limit: Most results.
        min_score: Least fused score.
        model: Name of the only model that embeds the query. With it, with ``model_path`` and with ``base_url``, vectors
            of which nothing is known are searched, too.
        model_path: Directory of that model.
        provider: ``fastembed`` or ``openai``.
        base_url: Address of the provider's API.
    """

    query: str
    mode: Mode | None = None
    where: str = ""
    columns: tuple[str, ...] = ()
    limit: int = 10
    min_score: float = 0.0
    model: str | None = None
    model_path: Path | None = None
    provider: str | None = None
    base_url: str | None = None

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise UsageError(f"limit is {self.limit}; expected 1 or more.")
        if self.mode is not None and self.mode not in MODES:
            raise UsageError(f"mode is {self.mode!r}; expected hybrid, vector or keyword.")
        if not self.min_score >= 0:
            raise UsageError(f"min_score is {self.min_score}; expected 0 or more.")
        if any("\x00" in text for text in (self.where, *self.columns)):
            raise UsageError("A condition or the name of a column holds a NUL character.")

    @property
    def names_model(self) -> bool:
        """Whether it says which model has made the vectors."""
        return any((self.model, self.model_path, self.base_url))


def search_table(
    url: str | DatabaseAddress,
    name: str,
    query: str,
    *,
    mode: Mode | None = None,
    where: str = "",
    columns: str | Sequence[str] = (),
    limit: int = 10,
    min_score: float = 0.0,
    model: str | None = None,
    model_path: Path | None = None,
    provider: str | None = None,
    base_url: str | None = None,
    state_schema: str | None = None,
) -> list[TableResult]:
    """Search a table that :func:`kdb_fast.reindex_table` has embedded.

    Args:
        url: Of the database: ``postgresql://…``, ``sqlite:///file.db`` or ``embedded:DIR``.
        name: Of the target, as it is kept.
        state_schema: PostgreSQL: the schema of kdb-fast's own tables, where several have a target of this name.

    Others: see :class:`Question`.

    Returns:
        The records that answer the query best, best first; [] for a query that says nothing.

    Raises:
        UsageError: An argument makes no sense, such as a condition that does not parse.
        SchemaError: There is no such target, it is not what it was, holds no vector, or has no keyword search.
        ModelError: The model of its vectors is not to be had.
        DatabaseError: The database cannot be reached, or cannot answer.
        ProviderError: The API that embeds the query does not answer.

    Warns:
        SearchWarning: Rows could not be compared with the query.
    """
    question = Question(
        query=query,
        mode=mode,
        where=where,
        columns=(columns,) if isinstance(columns, str) else tuple(columns),
        limit=limit,
        min_score=min_score,
        model=model,
        model_path=model_path,
        provider=provider,
        base_url=base_url,
    )
    with opened(parse_address(url, "url") if isinstance(url, str) else url, create=False) as address:
        if state_schema is not None and address.dialect == "postgresql":
            address = replace(address, schema=state_schema)
        outcome = search_kept(address, name, question)
    for part in outcome.left_out:
        warnings.warn(str(part), SearchWarning, stacklevel=2)
    return outcome.results


def search_kept(address: DatabaseAddress, name: str, question: Question, ahead: QueryAhead | None = None) -> Outcome:
    """The records of the target of this name that answer a question best; see :func:`search_definition`."""
    where, definition = targets.find_in(address, name)
    return search_definition(where, definition, question, ahead)


def search_definition(
    address: DatabaseAddress, definition: Definition, question: Question, ahead: QueryAhead | None = None
) -> Outcome:
    """The records of a target that answer a question best.

    Args:
        address: The database, with the schema of our own tables where that is known.
        ahead: Verifies the model meanwhile.

    Raises:
        UsageError: An argument makes no sense, such as a condition that does not parse.
        SchemaError: The target is not what it was, holds no vector, or has no keyword search.
        DatabaseError: The database cannot answer.
        KdbFastError: As :func:`kdb_fast.search.query_model.query_vectors`.
    """
    return read(address, lambda connection: search_connected(connection, address, definition, question, ahead))


def search_connected(
    connection: Any,
    address: DatabaseAddress,
    definition: Definition,
    question: Question,
    ahead: QueryAhead | None = None,
) -> Outcome:
    """:func:`search_definition` on an open connection."""
    words = parse_query(question.query)
    mode = _mode(definition, question, words)
    with reading(connection, address.dialect):
        table = find_searched(connection, address, definition)
        reader = open_table_reader(connection, table)
        columns = reader.check(question.where, question.columns)
        origins = reader.origins()
    notes = [] if question.mode or definition.keyword else [f"By meaning only. {_no_keyword(definition)}"]
    if why_blank(words, mode):
        return Outcome([], mode, notes=notes)
    vectors: list[tuple[Vector, Wanted]] = []
    missed: list[LeftOut] = []
    if mode != "keyword" and not why_blank(words, "vector"):
        if origins or mode == "vector" or question.names_model:
            # Outside of any transaction: a provider may take its time.
            vectors, missed = query_of(table, question, words.text, origins, ahead)
        else:
            notes.append(f"By keyword only. {nothing_embedded(table)}")
        if mode == "vector" and missed and not any(wanted.fingerprints or wanted.foreign for _, wanted in vectors):
            raise SchemaError(str(missed[0])[:1].upper() + str(missed[0])[1:])
    depth = max(4 * question.limit, MIN_DEPTH)
    with reading(connection, address.dialect):
        held = reader.held(words)
        by_vector = [
            reader.vector(checked_vector(vector), wanted._replace(excluded=held.excluded), depth)
            for vector, wanted in vectors
        ]
        by_keyword: list[Hit] = []
        if mode != "vector" and held.terms:
            by_keyword = reader.keyword(held, Wanted(where=question.where, excluded=held.excluded), depth)
        results = _read(reader, table, by_vector, by_keyword, question, columns)
    return Outcome(results, mode, missed, notes)


def _mode(definition: Definition, question: Question, words: Query) -> Mode:
    """How to search: as it was asked for, where the target has what that needs."""
    if definition.keyword:
        return question.mode or "hybrid"
    if question.mode in ("hybrid", "keyword"):
        raise SchemaError(
            f"{storable_key(definition.name)} has no keyword search, which the mode {question.mode} needs.",
            remedy=f"Search by meaning: --mode vector. {_no_keyword(definition)}",
        )
    if words.excluded:
        raise SchemaError(
            f"The query excludes {storable_key(words.excluded[0].text, 60)}, which needs keyword search; "
            f"{storable_key(definition.name)} has none.",
            remedy=f"Leave it out. {_no_keyword(definition)}",
        )
    return "vector"


def _no_keyword(definition: Definition) -> str:
    return f"To search by keyword, too: kdb-fast reindex {shell_word(definition.name)} --keyword"


@contextlib.contextmanager
def reading(connection: Any, dialect: str) -> Iterator[None]:
    """A transaction that writes nothing, in which all statements see one state of the database."""
    if dialect == "postgresql":
        with pg_settings.transaction(connection, READ_ONLY):
            yield
        return
    connection.execute("PRAGMA query_only = ON")
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def open_table_reader(connection: Any, table: SearchedTable) -> TableReader:
    """The reader of rankings for this dialect, on an open connection."""
    if table.dialect == "sqlite":
        from .sqlite import SqliteTableReader

        return SqliteTableReader(connection, table)
    from .postgresql import PostgresqlTableReader

    return PostgresqlTableReader(connection, table)


def query_of(
    table: SearchedTable,
    question: Question,
    text: str,
    origins: Mapping[Origin, int],
    ahead: QueryAhead | None = None,
) -> tuple[list[tuple[Vector, Wanted]], list[LeftOut]]:
    """The query's vectors, each with the rows that it may be compared with, and what cannot be compared with any.

    Args:
        origins: What made the vectors that are known, with the number of rows.

    Raises:
        SchemaError: There is no vector of which anything is known.
        KdbFastError: As :func:`kdb_fast.search.query_model.query_vectors`.
    """
    from ..query_model import embed_query, query_vectors

    definition = table.definition
    text = definition.query_prefix + text
    if not (origins or question.names_model):
        raise nothing_embedded(table)
    by_api = definition.provider if definition.provider != "fastembed" else None
    embedded = None
    if ahead and (question.names_model or not by_api):
        likely: Future[IndexModel | None] = Future()
        most = None if question.names_model else max(origins, key=origins.__getitem__)
        likely.set_result(most and IndexModel.of(most))
        embedded = ahead.embed(text, likely)
    if question.names_model:
        vector, maker = embed_query(
            text,
            None,
            provider=question.provider,
            model=question.model or (definition.model if question.base_url else None),
            model_path=question.model_path,
            base_url=question.base_url,
            ahead=embedded,
        )
        vectors = [QueryVector(vector, maker)]
        why: Callable[[Origin], str] = lambda origin: (  # noqa: E731
            "" if maker.has_made(origin) else "another one was asked for."
        )
    else:
        vectors, why = query_vectors(
            text,
            origins,
            provider=question.provider or by_api,
            base_url=definition.base_url or None,
            ahead=embedded,
        )
    wanted = [
        (
            vector,
            Wanted(where=question.where, fingerprints=_made_by(maker, origins), foreign=question.names_model),
        )
        for vector, maker in vectors
    ]
    return wanted, left_out({(table.shown, origin): rows for origin, rows in origins.items()}, why)


def _made_by(maker: Maker | None, origins: Mapping[Origin, int]) -> tuple[str, ...]:
    return tuple(o.fingerprint for o in origins if o.fingerprint and (maker is None or maker.has_made(o)))


def _read(
    reader: TableReader,
    table: SearchedTable,
    by_vector: Sequence[list[Hit]],
    by_keyword: list[Hit],
    question: Question,
    columns: Sequence[str],
) -> list[TableResult]:
    """The records that came first; where some are gone, the next ones move up."""
    fused = fuse(*(by_vector or [[]])[:1], by_keyword, *by_vector[1:])
    similarity: dict[Key, float] = {hit.key: hit.similarity for hits in by_vector for hit in hits}
    ranked = [(key, score) for key, score in fused if score >= question.min_score]
    names = [column.name for column in table.key]
    results: list[TableResult] = []
    while ranked and len(results) < question.limit:
        part, ranked = ranked[: question.limit], ranked[question.limit :]
        found = reader.read([key for key, _ in part], columns)
        results += [
            TableResult(
                dict(zip(names, row.key, strict=True)),
                score,
                similarity.get(key),
                row.text,
                dict(zip(columns, row.columns, strict=True)),
                row.chunk,
            )
            for key, score in part
            if (row := found.get(key))
        ]
    return results[: question.limit]
