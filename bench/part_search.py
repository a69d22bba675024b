"""How long does a search take?"""

from __future__ import annotations

from pathlib import Path

from .chart import Bar
from .measure import Spread, pairwise, spread
from .options import ROOT, Options, say
from .results import Requirement, Result, Table
from .runner import Contender, Outcome, alternate, ran, raw, run_once
from .session import session

RECORDS = 100_000
QUERIES, WARM_UP, LIMIT = 500, 30, 10
COLD_QUERIES = 5
P95_MS = 100
"""Required of a hybrid search at the 95th percentile, in milliseconds."""

OTHER = "the other version: "
AGAINST = {"PostgreSQL, hybrid": 0.62, "SQLite, hybrid": 0.70, "PostgreSQL, cold": 0.57, "SQLite, cold": 0.57}
"""Most that a search may take of the time of the version in which one ranking waited for the other (p95: 28 of 45 ms
and 32 of 46), and the command of that in which imports waited for the verification (0.6 of 1.05 s)."""

IN_TURN = "in turn"
WAYS = ("hybrid", "vector", "keyword")
"""What is asked in turn, query by query."""

OVER_SLOWER = 1.2
"""Most that a hybrid search may take of the slower of its two rankings alone."""


def run(options: Options) -> Result:
    """Measure the part."""
    question = "How long does a search take?"
    with session(options) as s:
        dataset = s.dataset("tickets", options.size(RECORDS, 400))
        addresses = {"PostgreSQL": s.conninfo, "SQLite": f"sqlite:///{s.work / 'bench.db'}"}
        fills = {}
        for name, conninfo in addresses.items():
            say(f"  filling {name} …")
            fills[name] = run_once("fill", {**dataset.params(), "conninfo": conninfo})
            if "skipped" in fills[name]:
                return Result("search", question, s.lines, [f"Not run: {fills[name]['skipped']}."])
        contenders = []
        for mode in ("hybrid", IN_TURN, "cold"):
            for name, conninfo in addresses.items():
                label = f"{name}, {mode}"
                contenders.append(_contender(label, mode, conninfo, options, ROOT))
                if options.against and label in AGAINST:
                    contenders.append(_contender(OTHER + label, mode, conninfo, options, options.against))
        outcomes = alternate(contenders, s.runs)
    warm = {label: o for label, o in outcomes.items() if label.endswith("hybrid")}
    in_turn = {(name, way): outcomes[f"{name}, {IN_TURN}"] for name in addresses for way in WAYS}
    return Result(
        "search",
        f"How long does a search of {dataset.records:,} records take, the embedding of the query included?",
        s.lines,
        [
            "One query after the other, in one process, connections open, model loaded, after a warm-up; each query "
            f"asks for {LIMIT} results and has about ten words. The records were created through KameleonDB, and each "
            "search reads the fields of the records it returns. `hybrid` is the library's `SearchEngine.search`; "
            "`vector` and `keyword` are one ranking alone, in turn with `hybrid`, query by query, in one process; "
            "`cold` is the command `kdb-fast search` from start to end.",
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
                    for label, o in warm.items()
                ],
            ),
            Table(
                "Milliseconds of a query, in turn with the others of its database",
                ("database, mode", "p50", "p95"),
                [
                    [f"{name}, {way}", o.spread(f"{way}_p50_ms").text(1), o.spread(f"{way}_p95_ms").text(1)]
                    for (name, way), o in in_turn.items()
                ],
            ),
            Table(
                "Milliseconds of a command",
                ("database", "p50"),
                [[label, o.spread("p50_ms").text(0)] for label, o in outcomes.items() if label.endswith("cold")],
            ),
        ],
        requirements=[
            Requirement(f"95th percentile, {o.contender.label}", o.spread("p95_ms"), P95_MS, True, " ms")
            for o in ran(outcomes) if o.contender.ours
        ]
        + [
            Requirement(f"{name}: hybrid against the slower of its rankings (p95)", _over_slower(outcomes, name),
                        OVER_SLOWER, True, "×")
            for name in addresses
        ]
        + [
            Requirement(f"{label} against the other version", _against(outcomes, label), bound, True, "×")
            for label, bound in AGAINST.items() if options.against
        ],
        chart=("Median time of a search", "ms",
               [Bar(label, spread(o.values("p50_ms")), o.contender.ours) for label, o in warm.items()]
               + [Bar(f"{name}, {way}", spread(o.values(f"{way}_p50_ms")), False)
                  for (name, way), o in in_turn.items() if way != "hybrid"]),
        raw={"fill": fills, **raw(outcomes.values())},
    )  # fmt: skip


def _contender(label: str, mode: str, conninfo: str, options: Options, root: Path) -> Contender:
    params = {"conninfo": conninfo, "limit": LIMIT, "seed": options.seed}
    if mode == "cold":
        return Contender(label, "cold", {**params, "records": options.size(COLD_QUERIES, 1), "root": str(root)})
    counts = {"records": options.size(QUERIES, 20), "warm_up": options.size(WARM_UP, 3)}
    if mode == IN_TURN:
        return Contender(label, "rankings", {**params, **counts})
    # `find` of the code that is measured: it knows how that version is searched.
    return Contender(
        label, "find", {**params, "mode": mode, **counts}, ours=mode == "hybrid" and root == ROOT, root=root
    )


def _over_slower(outcomes: dict[str, Outcome], name: str) -> Spread:
    values = outcomes[f"{name}, {IN_TURN}"].values
    slower = [max(pair) for pair in zip(values("vector_p95_ms"), values("keyword_p95_ms"), strict=True)]
    return pairwise(values("hybrid_p95_ms"), slower)


def _against(outcomes: dict[str, Outcome], label: str) -> Spread:
    key = "p50_ms" if label.endswith("cold") else "p95_ms"
    return pairwise(outcomes[label].values(key), outcomes[OTHER + label].values(key))
