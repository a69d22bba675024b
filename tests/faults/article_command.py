"""A run on a table of articles, into a column of it or a table beside it, as a command: what ``stub_command.py`` starts
for "articles".

The command line does not know such targets; all else is as it is there.
"""

from __future__ import annotations

import json

from articles import Articles, ArticleSource

from kdb_fast.db.address import parse_address
from kdb_fast.errors import KdbFastError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.settings import ReindexOptions

PIECE_CHARS = 10


class StubSplitter:
    """Stands for the tokenizer of the model that is stubbed."""

    @classmethod
    def of_model(cls, *args: object) -> StubSplitter:
        return cls()

    def split(self, text: str) -> list[tuple[int, int]]:
        return [(start, min(start + PIECE_CHARS, len(text))) for start in range(0, len(text), PIECE_CHARS)]


def run(arguments: list[str]) -> int:
    """Prints the receipt; returns the exit code.

    Args:
        arguments: The address of the database, the number of workers, and the table of vectors where they are not to go
            into a column; then "pieces", where it has a row for each PIECE_CHARS characters. For a column also
            "--index" and what is done with the indexes.
    """
    url, workers, *into = arguments
    index = into[1] if into[:1] == ["--index"] else None
    into = [] if index else into
    address = parse_address(url)
    articles = Articles(address, make=False)
    pieces = into[1:] == ["pieces"]
    target = articles.into(into[0], chunked=pieces, content=pieces) if into else articles.target()
    try:
        receipt = reindex(
            address,
            ArticleSource(address, articles.target(), page_rows=16, complete=bool(into)),
            ReindexOptions(workers=int(workers), chunk=40 if pieces else 0, index=index),
            target=target,
        )
    except KdbFastError as error:
        print(error)
        return error.exit_code
    print(json.dumps(receipt.as_json()))
    return 0
