"""A run on the vector column of a table of articles, as a command: what ``stub_command.py`` starts for "articles".

The command line does not know such targets; all else is as it is there.
"""

from __future__ import annotations

import json

from articles import Articles, TableSource

from kdb_fast.db.address import parse_address
from kdb_fast.errors import KdbFastError
from kdb_fast.indexing.reindex import reindex
from kdb_fast.settings import ReindexOptions


def run(arguments: list[str]) -> int:
    """Prints the receipt; returns the exit code.

    Args:
        arguments: The address of the database and the number of workers.
    """
    url, workers = arguments
    address = parse_address(url)
    target = Articles(address, make=False).target()
    try:
        receipt = reindex(
            address,
            TableSource(address, target, page_rows=16),
            ReindexOptions(workers=int(workers)),
            target=target,
        )
    except KdbFastError as error:
        print(error)
        return error.exit_code
    print(json.dumps(receipt.as_json()))
    return 0
