"""A full index, and how long a search in it takes."""

from __future__ import annotations

import time
import warnings
from typing import Any

from kdb_fast.reindex import reindex
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
    from kdb_fast.demo import sqlalchemy_url
    from kdb_fast.sources import open_source

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
        receipt = reindex(address, lambda: open_source(address, (ENTITY,)), ReindexOptions(workers=1))
    assert receipt["stored"] + receipt["reused"] == len(texts), receipt
    return {"seconds": time.perf_counter() - started, "records": len(texts), "index": receipt["index"]}


def find(params: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each search, one after the other, on an open connection with the model loaded.

    The query is really embedded; what is looked for is a vector of the index's own kind, so that the walk through the
    index is like one among real neighbours.
    """
    from kdb_fast.encoder import Encoder, EncoderSpec
    from kdb_fast.models import resolve
    from kdb_fast.query import open_connection, open_reader
    from kdb_fast.retrieval import search

    address = database.address_of(params["conninfo"])
    mode = params["mode"]
    queries = data.questions(params["records"] + params["warm_up"], params["seed"])
    encoder = Encoder(EncoderSpec(resolve(DEFAULT_MODEL), batch_size=1))
    connection = open_connection(address)
    reader = open_reader(connection, address.dialect)
    total: list[float] = []
    embedding: list[float] = []
    found = 0
    for number, query in enumerate(queries):
        vector = vectors.of_texts([query])[0]
        started = time.perf_counter()
        if mode != "keyword":
            encoder.embed([query])
        embedded = time.perf_counter()
        results = search(
            reader, query, query_vector=None if mode == "keyword" else vector, mode=mode, limit=params["limit"]
        )
        ended = time.perf_counter()
        if number >= params["warm_up"]:
            total.append(1000 * (ended - started))
            embedding.append(1000 * (embedded - started))
            found += len(results)
    connection.close()
    return {
        "seconds": sum(total) / 1000,
        "records": len(total),
        "p50_ms": percentile(total, 0.5),
        "p95_ms": percentile(total, 0.95),
        "embed_p50_ms": percentile(embedding, 0.5),
        "results_a_query": found / len(total),
    }
