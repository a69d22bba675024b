"""LlamaIndex's own index in PostgreSQL; run by another Python than that of the tests, as ``langchain_job.py`` is."""

from __future__ import annotations

import json
import sys
from typing import Any

from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index.vector_stores.postgres import PGVectorStore


def main(job: dict[str, Any]) -> list[str]:
    store = PGVectorStore.from_params(
        connection_string=job["url"],
        async_connection_string=job["url"].replace("+psycopg2", "+asyncpg"),
        table_name="notes",
        embed_dim=len(next(iter(job["vectors"].values()))),
        hnsw_kwargs={"hnsw_m": 16, "hnsw_ef_construction": 64, "hnsw_ef_search": 40},
    )
    if job["do"] == "make":
        nodes = [TextNode(text=text, embedding=job["vectors"][text]) for text in job["texts"]]
        return list(store.add(nodes))
    query = VectorStoreQuery(query_embedding=job["vectors"][job["query"]], similarity_top_k=job["count"])
    return [node.get_content() for node in store.query(query).nodes or ()]


print(json.dumps(main(json.load(sys.stdin))))
