"""How long does a search take?"""

from __future__ import annotations

from .chart import Bar
from .measure import spread
from .options import Options, say
from .results import Requirement, Result, Table
from .runner import Contender, alternate, ran, raw, run_once
from .session import session

RECORDS = 100_000
QUERIES, WARM_UP, LIMIT = 300, 30, 10
P95_MS = 100
"""Required of a hybrid search at the 95th percentile, in milliseconds."""


def run(options: Options) -> Result:
    """Measure the part."""
    with session(options) as s:
        dataset = s.dataset("tickets", options.size(RECORDS, 400))
        addresses = {"PostgreSQL": s.conninfo, "SQLite": f"sqlite:///{s.work / 'bench.db'}"}
        fills = {}
        for name, conninfo in addresses.items():
            say(f"  filling {name} …")
            fills[name] = run_once("fill", {**dataset.params(), "conninfo": conninfo})
            if "skipped" in fills[name]:
                return Result("search", "How long does a search take?", s.lines,
                              [f"Not run: {fills[name]['skipped']}."])  # fmt: skip
        outcomes = alternate(
            [
                Contender(
                    f"{name}, {mode}",
                    "find",
                    {"conninfo": conninfo, "mode": mode, "records": options.size(QUERIES, 20), "warm_up": WARM_UP if not
                     options.quick else 3, "limit": LIMIT, "seed": options.seed},
                    ours=mode == "hybrid",
                )
                for mode in ("hybrid", "vector", "keyword")
                for name, conninfo in addresses.items()
            ],
            s.runs,
        )  # fmt: skip
    return Result(
        "search",
        f"How long does a search of {dataset.records:,} records take, the embedding of the query included?",
        s.lines,
        [
            "One query after the other, in one process, connection open, model loaded, after a warm-up; each query "
            f"asks for {LIMIT} results and has about ten words. The records were created through KameleonDB, and each "
            "search reads the fields of the records it returns.",
            "The index holds made vectors (see `store`); the query is really embedded, and a vector of the made kind "
            "is looked for. After the warm-up SQLite's vectors are in memory, with sqlite-vec as without.",
        ],
        [
            Table(
                "Milliseconds of a query",
                ("database, mode", "p50", "p95", "of it embedding (p50)", "results"),
                [
                    [label, o.spread("p50_ms").text(1), o.spread("p95_ms").text(1), o.spread("embed_p50_ms").text(1),
                     f"{o.spread('results_a_query').median:.1f}"]
                    for label, o in outcomes.items()
                ],
            )
        ],
        requirements=[
            Requirement(f"95th percentile, {o.contender.label}", o.spread("p95_ms"), P95_MS, True, " ms")
            for o in ran(outcomes) if o.contender.ours
        ],
        chart=("Median time of a search", "ms",
               [Bar(o.contender.label, spread(o.values("p50_ms")), o.contender.ours) for o in ran(outcomes)]),
        raw={"fill": fills, **raw(outcomes.values())},
    )  # fmt: skip
