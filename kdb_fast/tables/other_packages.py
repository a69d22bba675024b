"""Tables of vectors that other packages make, told by their columns: those packages embed the queries for them, too."""

from __future__ import annotations

from collections.abc import Set

COLUMNS = {
    "LangChain": (
        {"collection_id", "embedding", "document", "cmetadata"},
        {"langchain_id", "content", "embedding", "langchain_metadata"},
    ),
    "LlamaIndex": ({"node_id", "text", "metadata_", "embedding"},),
    "Open WebUI": ({"collection_name", "text", "vector", "vmetadata"},),
    "pgai": ({"embedding_uuid", "chunk_seq", "chunk", "embedding"},),
    "mem0": ({"id", "vector", "payload"},),
    "llm": ({"collection_id", "id", "embedding", "content", "content_hash"},),
}
"""Columns that tables of a package have, beside others, as its sources of November 2026 make them."""


def made_by(columns: Set[str]) -> str:
    """The package that makes tables with these columns; '' where none is known."""
    return next((name for name, shapes in COLUMNS.items() if any(shape <= columns for shape in shapes)), "")
