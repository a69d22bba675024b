"""One contender in a process of its own: ``python -m bench.contender NAME '{"parameter": value}'``.

Prints one JSON object: ``seconds`` and ``records``, what else it measured, and ``peak_rss_bytes`` of this process.
A contender that cannot run here prints ``{"skipped": reason}``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

CONTENDERS = {
    "fastembed": "peers:fastembed",
    "kameleondb_way": "peers:kameleondb_way",
    "fastembed_executemany": "peers:fastembed_executemany",
    "fastembed_parallel_copy": "peers:fastembed_parallel_copy",
    "sentence_transformers": "peers:sentence_transformers",
    "reindex": "ours:whole",
    "precision": "ours:precision",
    "help": "ours:help_text",
    "encode": "encode:encode",
    "pipeline": "pipeline:pipeline",
    "replace": "pipeline:replace",
    "loading_example": "pipeline:loading_example",
    "upsert_executemany": "pipeline:upsert_executemany",
    "way": "ways:way",
    "column": "tables:column",
    "column_again": "tables:column_again",
    "beside": "tables:beside",
    "loading_beside": "tables:loading_beside",
    "update_executemany": "tables:update_executemany",
    "update_staging": "tables:update_staging",
    "sizes": "sizes:sizes",
    "fill": "find:fill",
    "find": "find:find",
    "rankings": "find:rankings",
    "cold": "find:cold",
    "simulated": "cluster:simulated",
    "ray_cost": "cluster:ray_cost",
    "hosts": "cluster:hosts",
}
"""Name → module of ``bench.contenders`` and function, which takes the parameters and returns the report."""


class Skip(Exception):
    """This contender cannot run here, for the reason given."""


def main(arguments: list[str]) -> int:
    """Run one contender."""
    if not arguments or arguments[0] not in CONTENDERS:
        print(f"usage: python -m bench.contender {{{'|'.join(CONTENDERS)}}} [JSON]", file=sys.stderr)
        return 2
    module, _, function = CONTENDERS[arguments[0]].partition(":")
    params = json.loads(arguments[1]) if len(arguments) > 1 else {}
    # What libraries print must not get between the report and its reader.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # The class that contenders raise is that of the importable module, not of __main__.
    skip = importlib.import_module("bench.contender").Skip
    try:
        call: Callable[[dict[str, Any]], dict[str, Any]] = getattr(
            importlib.import_module(f"bench.contenders.{module}"), function
        )
        report = call(params)
    except skip as reason:
        report = {"skipped": str(reason)}
    from kdb_fast.resources import peak_rss_bytes

    report["peak_rss_bytes"] = peak_rss_bytes()
    print(json.dumps(report), file=out, flush=True)
    # Thread pools of some libraries never end by themselves.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
