"""``search`` and ``status``: open the index for reading, embed the query, answer with plain values."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..catalog.definitions import load_entities
from ..db.address import DatabaseAddress
from ..db.reading import read
from ..errors import DatabaseError, SchemaError
from ..origins import IndexModel
from ..records import storable_key
from ..tables.names import or_nearest
from ..tables.reading import rows_of
from ..tables.target import columns_of, find_target
from .readers import import_reader, open_reader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..origins import Origin, QueryVector
    from ..stores.base import EntityStatus
    from ..stores.past_runs import LastRun
    from ..stores.targets import TargetStatus
    from .ahead import QueryAhead
    from .readers.base import Origins
    from .results import LeftOut, SearchResult
    from .scope import Scope

    Vector = npt.NDArray[np.float32]
    Vectors = npt.NDArray[np.float32]


def embed_queries(texts: Sequence[str], model_name: str, model_path: Path | None) -> Vectors:
    """The queries' vectors (float32, texts × dimensions), always in fp32."""
    from ..embedding.encoder import Encoder, EncoderSpec
    from ..embedding.models.lookup import resolve

    model = resolve(model_name, model_path)
    return Encoder(EncoderSpec(model, batch_size=1)).embed(texts)


def run_search(
    address: DatabaseAddress,
    query: str,
    *,
    mode: str,
    entities: Sequence[str],
    limit: int,
    where: Mapping[str, Any] | None,
    min_score: float,
    model_name: str | None = None,
    model_path: Path | None = None,
    provider: str | None = None,
    base_url: str | None = None,
    alone: bool = False,
    ahead: QueryAhead | None = None,
) -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """Results as plain dictionaries with the fields of SearchResult, and what could not be ranked by vector.

    Without a model and a provider the query is embedded by every model that made vectors of what is searched.

    Args:
        alone: The process ends after it: an SQLite file is read through memory.
        ahead: Embeds the query while the database counts what made the vectors.

    Raises:
        SchemaError: There is no index; its vectors are another model's; a search by vector can compare none.
        KdbFastError: As :func:`kdb_fast.search.query_model.query_vectors`.
    """
    from .query import meaning
    from .query_model import query_vectors
    from .readers.base import count_origins, origin_of_a_row
    from .results import left_out
    from .scope import resolve_scope

    asked: dict[str, Any] = {
        "mode": mode, "entities": entities, "limit": limit, "where": where, "min_score": min_score
    }  # fmt: skip
    text = meaning(query)
    if mode == "keyword" or not text:
        return search_open(address, query, None, **asked, mapped=alone), []
    # The thread asks the database, and ranks by keyword while this one still embeds the query. It imports nothing that
    # this one imports, too: numpy's modules need each other, and two threads that import them at once get half of it.
    imported: Future[None] = Future()
    likely: Future[IndexModel | None] = Future()
    counted: Future[tuple[Origins, Scope]] = Future()
    vectors: Future[list[QueryVector]] = Future()

    def ask(connection: Any) -> list[SearchResult]:
        if not counted.done():  # else the file was written meanwhile, and is read again
            rows = rows_of(connection, address.dialect)
            target = find_target(rows, address.dialect)
            origin = origin_of_a_row(rows, target)
            likely.set_result(IndexModel.of(origin) if origin else None)
            scope = resolve_scope(load_entities(rows, target), entities, where)
            counted.set_result((count_origins(rows, target), scope))
        imported.result()
        return _ranked(connection, address, query, vectors.result, asked, counted.result()[0])

    def release(asking: Future[list[SearchResult]]) -> None:
        """After an error nobody is to wait for an answer."""
        if not likely.done():
            likely.set_result(None)
        if not counted.done():
            counted.set_exception(asking.exception() or AssertionError("not counted"))

    with ThreadPoolExecutor(1, "kdb-fast-ask") as pool:
        asking = pool.submit(read, address, ask, mapped=alone)
        asking.add_done_callback(release)
        try:
            from . import retrieval  # noqa: F401

            import_reader(address.dialect)
            imported.set_result(None)
            embedded = ahead.embed(text, likely) if ahead else None
            found, scope = counted.result()
            counts = {key: number for key, number in found.rows.items() if scope.admits(key[0])}
            origins: Counter[Origin] = Counter()
            for (_, origin), number in counts.items():
                origins[origin] += number
            by_model, why = query_vectors(
                text,
                origins,
                provider=provider,
                model=model_name,
                model_path=model_path,
                base_url=base_url,
                ahead=embedded,
            )
            missed = left_out(counts, why)
            if mode == "vector" and missed and all(map(why, origins)):
                raise SchemaError(str(missed[0])[:1].upper() + str(missed[0])[1:])
            vectors.set_result(by_model)
        except BaseException as error:
            for awaited in (imported, vectors):
                if not awaited.done():
                    awaited.set_exception(error)
            raise
        try:
            return _plain(asking.result()), missed
        except DatabaseError:
            # The connection was idle while the query was embedded, perhaps for minutes: a model may have been fetched.
            return search_open(address, query, by_model, **asked, mapped=alone), missed


def search_open(
    address: DatabaseAddress,
    query: str,
    vector: Vector | list[QueryVector] | None,
    *,
    mapped: bool = False,
    **asked: Any,
) -> list[dict[str, Any]]:
    """Results as plain dictionaries with the fields of SearchResult.

    Args:
        vector, asked: As of :func:`kdb_fast.search.retrieval.search`; no vector for keywords only.
        mapped: As of :func:`read`.
    """
    return _plain(read(address, lambda connection: _ranked(connection, address, query, vector, asked), mapped=mapped))


def _ranked(
    connection: Any,
    address: DatabaseAddress,
    query: str,
    vector: Vector | list[QueryVector] | Callable[[], list[QueryVector]] | None,
    asked: Mapping[str, Any],
    counted: Origins | None = None,
) -> list[SearchResult]:
    """The results; ``counted`` is what made the vectors, where that has been counted just before."""
    from .retrieval import search

    reader = open_reader(connection, address.dialect, once=True)
    if counted is not None:
        reader.assume_origins(counted)
    return search(reader, query, query_vector=vector, **asked)


def _plain(results: list[SearchResult]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(result) for result in results]


def unknown_entities(address: DatabaseAddress, names: Sequence[str]) -> list[str]:
    """What is to be said of names of entities that neither KameleonDB nor the index knows."""

    def work(connection: Any) -> list[str]:
        rows = rows_of(connection, address.dialect)
        target = find_target(rows, address.dialect)
        known = {entity.name for entity in load_entities(rows, target)}
        if columns_of(rows, target, [target.index.name]):
            known.update(name for (name,) in rows(target.text("SELECT DISTINCT entity_name FROM {index}"), {}))
        return [f"There is no entity {storable_key(n)}{or_nearest(n, known)}" for n in names if n not in known]

    return read(address, work)


class Status(NamedTuple):
    """What there is in a database.

    Attributes:
        database: As it may be printed.
        schema: Of our own tables; None on SQLite.
        entities: The counts of each entity of KameleonDB and of the index.
        run: The newest run of KameleonDB's index; None where there was none.
        targets: The tables whose vectors are kept up to date.
        hidden_targets: What the role needs to see the targets that it may not read, a sentence for each schema.
    """

    database: str
    schema: str | None
    entities: list[EntityStatus]
    run: LastRun | None
    targets: list[TargetStatus]
    hidden_targets: tuple[str, ...]

    @property
    def indexed(self) -> int:
        """Rows of KameleonDB's index with a vector."""
        return sum(row.indexed for row in self.entities)

    @property
    def pending(self) -> int:
        """Records of KameleonDB without one, or changed since."""
        return sum(row.pending or 0 for row in self.entities)

    @property
    def stale(self) -> int:
        """Rows whose vector another model made, or another program."""
        return sum(row.stale for row in self.entities)

    @property
    def rejected(self) -> int:
        """Records of KameleonDB that could not be stored."""
        return sum(row.rejected for row in self.entities)

    def as_json(self) -> dict[str, Any]:
        """What ``status --json`` prints."""
        return {
            "database": self.database,
            "schema": self.schema,
            "indexed": self.indexed,
            "pending": self.pending,
            "stale": self.stale,
            "rejected": self.rejected,
            "entities": [row._asdict() for row in self.entities],
            "run": self.run._asdict() if self.run else None,
            "targets": [target.as_json() for target in self.targets],
            "hidden_targets": list(self.hidden_targets),
        }


def run_status(address: DatabaseAddress) -> Status:
    """The state of each entity, the last run, and the targets that are kept."""
    from ..stores.past_runs import last_run
    from ..stores.targets import homes_on
    from ..stores.targets import statuses as target_statuses
    from .status import statuses

    def work(connection: Any) -> Status:
        rows = rows_of(connection, address.dialect)
        schema = find_target(rows, address.dialect).schema
        homes = homes_on(connection, address)
        of_index = statuses(connection, address.dialect, None), last_run(connection, address.dialect)
        return Status(address.display, schema, *of_index, target_statuses(rows, homes.meant), homes.notes)

    return read(address, work)
