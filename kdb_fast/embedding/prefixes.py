"""What a model wants to read before a text: words by which it tells a document from a query.

A model that was trained with them finds less without them, and says nothing. Most of those below read an instruction
before queries only.
"""

from __future__ import annotations

from typing import NamedTuple


class Prefixes(NamedTuple):
    """What stands before each text of an index, and before each query.

    Attributes:
        document: Before a text; '' for nothing.
        query: Before a query; '' for nothing.
        source: Where the model's makers say so; '' where nothing was asked for.
    """

    document: str = ""
    query: str = ""
    source: str = ""


_CARD = "https://huggingface.co/"
_PASSAGES = "Represent this sentence for searching relevant passages: "
_NOMIC = ("search_document: ", "search_query: ")
_WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query"

ASKED_FOR = {
    name: Prefixes(document, query, _CARD + card)
    for name, (document, query), card in [
        # The cards of v1.5 call it optional, and advise it for short queries that look for long passages.
        ("BAAI/bge-small-en", ("", _PASSAGES), "BAAI/bge-small-en"),
        ("BAAI/bge-base-en", ("", _PASSAGES), "BAAI/bge-base-en"),
        ("BAAI/bge-small-en-v1.5", ("", _PASSAGES), "BAAI/bge-small-en-v1.5"),
        ("BAAI/bge-base-en-v1.5", ("", _PASSAGES), "BAAI/bge-base-en-v1.5"),
        ("BAAI/bge-large-en-v1.5", ("", _PASSAGES), "BAAI/bge-large-en-v1.5"),
        ("BAAI/bge-small-zh-v1.5", ("", "为这个句子生成表示以用于检索相关文章："), "BAAI/bge-small-zh-v1.5"),
        ("mixedbread-ai/mxbai-embed-large-v1", ("", _PASSAGES), "mixedbread-ai/mxbai-embed-large-v1"),
        ("snowflake/snowflake-arctic-embed-xs", ("", _PASSAGES), "Snowflake/snowflake-arctic-embed-xs"),
        ("snowflake/snowflake-arctic-embed-s", ("", _PASSAGES), "Snowflake/snowflake-arctic-embed-s"),
        ("snowflake/snowflake-arctic-embed-m", ("", _PASSAGES), "Snowflake/snowflake-arctic-embed-m"),
        ("snowflake/snowflake-arctic-embed-m-long", ("", _PASSAGES), "Snowflake/snowflake-arctic-embed-m-long"),
        ("snowflake/snowflake-arctic-embed-l", ("", _PASSAGES), "Snowflake/snowflake-arctic-embed-l"),
        ("nomic-ai/nomic-embed-text-v1", _NOMIC, "nomic-ai/nomic-embed-text-v1"),
        ("nomic-ai/nomic-embed-text-v1.5", _NOMIC, "nomic-ai/nomic-embed-text-v1.5"),
        ("nomic-ai/nomic-embed-text-v1.5-Q", _NOMIC, "nomic-ai/nomic-embed-text-v1.5"),
        ("intfloat/multilingual-e5-large", ("passage: ", "query: "), "intfloat/multilingual-e5-large"),
        # "Query:" without a blank behind it, as the card's own function writes it.
        ("Qwen/Qwen3-Embedding-0.6B", ("", _WEB_SEARCH + "\nQuery:"), "Qwen/Qwen3-Embedding-0.6B"),
        ("Qwen/Qwen3-Embedding-0.6B-Q", ("", _WEB_SEARCH + "\nQuery:"), "Qwen/Qwen3-Embedding-0.6B"),
        # Its own card was not to be had: this is the prompt "s2p_query" of the model that it is a conversion of.
        ("Qdrant/stella-en-400M-v5-doc-onnx", ("", _WEB_SEARCH + ".\nQuery: "), "NovaSearch/stella_en_400M_v5"),
        (
            "google/embeddinggemma-300m",
            ("title: none | text: ", "task: search result | query: "),
            "google/embeddinggemma-300m",
        ),
    ]
}
"""The prefixes of each of FastEmbed's models whose card asks for them."""

NOT_ASKED_FOR = frozenset(
    {
        "Qdrant/clip-ViT-B-32-text",
        "Qdrant/constella-nano",
        "Qdrant/constella-zero",
        "google/siglip2-base-patch16-224",
        "ibm-granite/granite-embedding-small-english-r2",
        "jinaai/jina-clip-v1",
        "jinaai/jina-embeddings-v2-base-code",
        "jinaai/jina-embeddings-v2-base-de",
        "jinaai/jina-embeddings-v2-base-en",
        "jinaai/jina-embeddings-v2-base-es",
        "jinaai/jina-embeddings-v2-base-zh",
        "jinaai/jina-embeddings-v2-small-en",
        "jinaai/jina-embeddings-v3",  # a task instead, which chooses among its weights: FastEmbed's is the passage's
        "minishlab/potion-base-8M",
        "minishlab/potion-multilingual-128M",
        "minishlab/potion-retrieval-32M",
        "sentence-transformers/all-MiniLM-L6-v2",
        "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
        "thenlper/gte-base",
        "thenlper/gte-large",
    }
)
"""The others of FastEmbed's models: by its own description of each, and some of them by their cards."""

_BY_NAME = {name.lower(): prefixes for name, prefixes in ASKED_FOR.items()}


def prefixes_of(model: str) -> Prefixes:
    """The prefixes that the makers of a model ask for, by its whole name in any case, whoever serves it.

    None for a name that is not known here.
    """
    return _BY_NAME.get(model.lower(), Prefixes())
