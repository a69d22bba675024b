"""LangChain's own index in PostgreSQL; run by another Python than that of the tests.

A job comes on standard input: ``make`` the index of texts with given vectors, or ``find`` those nearest to a query.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_postgres import PGVector


class Given:
    """The vectors that the tests' own model has made."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self._vectors = vectors

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self._vectors[text] for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return self._vectors[text]


def main(job: dict[str, Any]) -> list[str]:
    store = PGVector(embeddings=Given(job["vectors"]), collection_name="notes", connection=job["url"], use_jsonb=True)
    if job["do"] == "make":
        ids: list[str] = store.add_texts(job["texts"], metadatas=[{"length": len(text)} for text in job["texts"]])
        return ids
    found: list[str] = [document.page_content for document in store.similarity_search(job["query"], k=job["count"])]
    return found


print(json.dumps(main(json.load(sys.stdin))))
