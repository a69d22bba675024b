"""A full index, and how long a search in it takes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote

from kdb_fast import FastEmbedProvider, SearchEngine
from kdb_fast.db.reading import open_connection
from kdb_fast.indexing.reindex import reindex
from kdb_fast.search.readers import open_reader
from kdb_fast.search.retrieval import search as ranked_search
from kdb_fast.settings import DEFAULT_MODEL, ReindexOptions

from .. import data, database, free_encoder, vectors
from ..contender import Skip
from ..measure import percentile
from ..watched import watched

ENTITY = "Ticket"
INSERT_ROWS = 5000


def fill(params: dict[str, Any]) -> dict[str, Any]:
    """Create the records through KameleonDB and index them with a free encoder."""
    try:
        from kameleondb import KameleonDB
    except ImportError:
        raise Skip("kameleondb is not installed") from None
    from kdb_fast.cli.demo import sqlalchemy_url
    from kdb_fast.sources import SourceSpec

    address = database.address_of(params["conninfo"])
    started = time.perf_counter()
    texts = list(data.read(params["data"], params["records"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = KameleonDB(sqlalchemy_url(address))
        entity = client.create_entity(name=ENTITY, fields=[{"name": "text", "type": "text"}])
        for start in range(0, len(texts), INSERT_ROWS):
            entity.insert_many([{"text": text} for text in texts[start : start + INSERT_ROWS]])
        client.close()
    with watched(worker_target=free_encoder.run):
        receipt = reindex(address, SourceSpec((ENTITY,)), ReindexOptions(workers=1))
    assert receipt.written == len(texts), receipt
    if address.dialect == "postgresql":
        # Else the server does it by itself, beside the first searches.
        with contextlib.closing(database.connect(params["conninfo"])) as connection:
            connection.execute("VACUUM (ANALYZE)")
            connection.execute("CHECKPOINT")
    return {"seconds": time.perf_counter() - started, "records": len(texts), "index": receipt.index}


class _MadeVectors:
    """Really embeds a query, and gives a vector of the index's own kind: the walk is like one among real neighbours."""

    def __init__(self) -> None:
        self._real = FastEmbedProvider(DEFAULT_MODEL)
        self.dimensions, self.model_name = self._real.dimensions, self._real.model_name
        self.vector: Any = None
        self.milliseconds: list[float] = []

    def embed(self, text: str) -> Any:
        started = time.perf_counter()
        self._real.embed(text)
        self.milliseconds.append(1000 * (time.perf_counter() - started))
        return self.vector

    def embed_batch(self, texts: list[str]) -> Any:
        raise NotImplementedError


def find(params: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each search, one after the other, on an open connection with the model loaded.

    ``hybrid`` goes through the library's SearchEngine; ``vector`` and ``keyword`` measure one ranking alone, the
    embedding included.
    """
    address = database.address_of(params["conninfo"])
    provider = _MadeVectors()
    with contextlib.ExitStack() as stack:
        if params["mode"] == "hybrid":
            engine = stack.enter_context(SearchEngine(address, provider))
            search: Callable[[str], Sequence[Any]] = functools.partial(engine.search, limit=params["limit"])
        else:
            search = _one_ranking(stack.enter_context(contextlib.closing(open_connection(address))), provider, params)
        total: list[float] = []
        found = 0
        for number, query in enumerate(data.questions(params["records"] + params["warm_up"], params["seed"])):
            provider.vector = vectors.of_texts([query])[0]
            started = time.perf_counter()
            results = search(query)
            ended = time.perf_counter()
            if number >= params["warm_up"]:
                total.append(1000 * (ended - started))
                found += len(results)
    return {
        "seconds": sum(total) / 1000,
        "records": len(total),
        "p50_ms": percentile(total, 0.5),
        "p95_ms": percentile(total, 0.95),
        "embed_p50_ms": percentile(provider.milliseconds or [0.0], 0.5),
        "results_a_query": found / len(total),
    }


def rankings(params: dict[str, Any]) -> dict[str, Any]:
    """As :func:`find`, a hybrid search and each of its rankings alone in turn, query by query.

    So what else the machine does for some seconds meets all three.
    """
    address = database.address_of(params["conninfo"])
    provider = _MadeVectors()
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(SearchEngine(address, provider))
        ways: dict[str, Callable[[str], Sequence[Any]]] = {
            "hybrid": functools.partial(engine.search, limit=params["limit"]),
            **{
                mode: _one_ranking(
                    stack.enter_context(contextlib.closing(open_connection(address))),
                    provider,
                    {**params, "mode": mode},
                )
                for mode in ("vector", "keyword")
            },
        }
        total: dict[str, list[float]] = {way: [] for way in ways}
        queries = data.questions(len(ways) * (params["records"] + params["warm_up"]), params["seed"])
        for query, (way, search) in zip(queries, itertools.cycle(ways.items()), strict=False):
            provider.vector = vectors.of_texts([query])[0]
            started = time.perf_counter()
            search(query)
            total[way].append(1000 * (time.perf_counter() - started))
    measured = {way: times[params["warm_up"] :] for way, times in total.items()}
    return {
        "seconds": sum(sum(times) for times in measured.values()) / 1000,
        "records": sum(len(times) for times in measured.values()),
        **{f"{way}_p50_ms": percentile(times, 0.5) for way, times in measured.items()},
        **{f"{way}_p95_ms": percentile(times, 0.95) for way, times in measured.items()},
    }


def _one_ranking(connection: Any, provider: _MadeVectors, params: dict[str, Any]) -> Callable[[str], Sequence[Any]]:
    reader = open_reader(connection, "sqlite" if params["conninfo"].startswith("sqlite:") else "postgresql")
    mode = params["mode"]

    def search(query: str) -> Sequence[Any]:
        vector = provider.embed(query) if mode == "vector" else None
        return ranked_search(reader, query, query_vector=vector, mode=mode, limit=params["limit"])

    return search


def cold(params: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the command ``kdb-fast search`` from its start to its end, with the code in the directory ``root``."""
    address = database.address_of(params["conninfo"])
    url = params["conninfo"]
    if address.dialect == "postgresql":
        from psycopg.conninfo import conninfo_to_dict

        given = conninfo_to_dict(address.conninfo)
        url = f"postgresql://{given['user']}@/{given['dbname']}?host={quote(str(given['host']))}&port={given['port']}"
    command = [sys.executable, "-m", "kdb_fast", "search", "--db", url, "--json"]
    times = []
    for query in data.questions(params["records"], params["seed"]):
        started = time.perf_counter()
        done = subprocess.run([*command, query], cwd=params["root"], capture_output=True, timeout=60, check=True)
        times.append(time.perf_counter() - started)
        assert len(json.loads(done.stdout)["results"]) == params["limit"]
    return {"seconds": sum(times), "records": len(times), "p50_ms": 1000 * percentile(times, 0.5)}
