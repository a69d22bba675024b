"""What people use today. All get their model loaded and their table made before the clock starts; kdb-fast does not."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np

from kdb_fast.embedding.models.lookup import resolve
from kdb_fast.settings import DEFAULT_MODEL

from .. import data, database
from ..contender import Skip
from ..source import ENTITY

STATEMENT_ROWS = 1000
"""Rows of one ``executemany`` and its commit: larger ones were not faster."""


def fastembed(params: dict[str, Any]) -> dict[str, Any]:
    """FastEmbed's defaults: ``TextEmbedding.embed(texts)``, batches of 256, all cores. Embedding only."""
    texts = list(data.read(params["data"], params["records"]))
    model = _fastembed_model()
    started = time.perf_counter()
    done = sum(1 for _ in model.embed(texts))
    return {"seconds": time.perf_counter() - started, "records": done}


def kameleondb_way(params: dict[str, Any]) -> dict[str, Any]:
    """One ``embed([text])`` and one committed upsert a record, all indexes live, as KameleonDB does it."""
    texts = list(data.read(params["data"], params["records"]))
    model = _fastembed_model()
    with database.connect(params["conninfo"]) as connection:
        database.create_table(connection, search_indexes=True)
        started = time.perf_counter()
        for number, text in enumerate(texts):
            vector = next(iter(model.embed([text])))
            connection.execute(database.UPSERT, _row(number, text, vector))
        seconds = time.perf_counter() - started
    database.verify(params["conninfo"], len(texts))
    return {"seconds": seconds, "records": len(texts)}


def fastembed_executemany(params: dict[str, Any]) -> dict[str, Any]:
    """FastEmbed's defaults, then ``executemany`` upserts into the table as it is, all indexes live."""
    texts = list(data.read(params["data"], params["records"]))
    model = _fastembed_model()
    with database.connect(params["conninfo"]) as connection:
        database.create_table(connection, search_indexes=True)
        started = time.perf_counter()
        rows = (_row(i, text, v) for i, (text, v) in enumerate(zip(texts, model.embed(texts), strict=True)))
        with connection.cursor() as cursor:
            while part := list(islice(rows, STATEMENT_ROWS)):
                with connection.transaction():
                    cursor.executemany(database.UPSERT, part)
        seconds = time.perf_counter() - started
    database.verify(params["conninfo"], len(texts))
    return {"seconds": seconds, "records": len(texts)}


def fastembed_parallel_copy(params: dict[str, Any]) -> dict[str, Any]:
    """The best that documentation leads to: ``embed(parallel=N)``, binary COPY row by row, indexes built afterwards."""
    from kdb_fast.resources import usable_cpus

    texts = list(data.read(params["data"], params["records"]))
    model = _fastembed_model(threads=1)
    vectors = model.embed(texts, parallel=usable_cpus(), batch_size=params.get("batch_size", 32))
    return _copy_and_index(params, texts, vectors)


def sentence_transformers(params: dict[str, Any]) -> dict[str, Any]:
    """sentence-transformers (PyTorch, fp32), batches of 32 sorted by length, then as the one above.

    ``KDB_FAST_BENCH_ST_MODEL`` names a directory of the model where the hub cannot be reached.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise Skip("sentence-transformers is not installed") from None
    name = os.environ.get("KDB_FAST_BENCH_ST_MODEL") or DEFAULT_MODEL
    try:
        model = SentenceTransformer(name, device="cpu")
    except Exception as error:
        raise Skip(f"sentence-transformers cannot load the model here ({type(error).__name__})") from None
    texts = list(data.read(params["data"], params["records"]))
    parts = (model.encode(texts[i : i + 4096], batch_size=32) for i in range(0, len(texts), 4096))
    return _copy_and_index(params, texts, (vector for part in parts for vector in part))


def _copy_and_index(params: dict[str, Any], texts: Sequence[str], vectors: Iterable[Any]) -> dict[str, Any]:
    with database.connect(params["conninfo"]) as connection:
        database.create_table(connection, search_indexes=False)
        started = time.perf_counter()
        with connection.cursor().copy(database.COPY_ROWS) as copy:
            copy.set_types(database.COPY_TYPES)
            for number, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
                copy.write_row(_row(number, text, vector))
        written = time.perf_counter()
        database.create_search_indexes(connection)
        seconds = time.perf_counter() - started
    database.verify(params["conninfo"], len(texts))
    return {"seconds": seconds, "records": len(texts), "index_seconds": seconds - (written - started)}


def _row(number: int, text: str, vector: Any) -> tuple[Any, ...]:
    vector = np.asarray(vector, dtype=np.float32)
    return str(uuid.uuid4()), ENTITY, str(number), text, vector, DEFAULT_MODEL, len(vector)


def _fastembed_model(threads: int | None = None) -> Any:
    """FastEmbed with the same files that kdb-fast uses."""
    from fastembed import TextEmbedding

    model = resolve(DEFAULT_MODEL)
    return TextEmbedding(
        model_name=model.name,
        specific_model_path=str(model.path),
        cache_dir=str(model.path),
        local_files_only=True,
        threads=threads,
    )
