"""How fast is everything but the encoder?"""

from __future__ import annotations

from .chart import Bar
from .compare import no_worse, other
from .measure import pairwise, spread
from .options import Options
from .results import Result, Table
from .runner import Contender, alternate, raw
from .session import session

ROWS = 100_000
REPLACED = 30_000


def run(options: Options) -> Result:
    """Measure the part."""
    with session(options) as s:
        load = s.dataset("contacts", options.size(ROWS, 400))
        again = s.dataset("mixed", options.size(REPLACED, 400))
        database = {"conninfo": s.conninfo}
        load_ours = Contender("kdb-fast, free encoder", "pipeline", {**load.params(), **database}, ours=True)
        replace_ours = Contender(
            "kdb-fast, free encoder, all rows replaced", "replace", {**again.params(), **database}, ours=True
        )
        loads = alternate(
            [
                load_ours,
                *other(load_ours, options),
                Contender("pgvector-python's loading example", "loading_example", {**load.params(), **database}),
            ],
            s.runs,
            s.reset,
        )
        replaced = alternate(
            [
                replace_ours,
                *other(replace_ours, options),
                Contender("executemany upserts", "upsert_executemany", {**again.params(), **database}),
            ],
            s.runs,
            s.reset,
        )
    rows = []
    for outcomes in (loads, replaced):
        *_, second = outcomes.values()
        for o in outcomes.values():
            after = "seconds_after_start" in o.runs[0]
            rows.append(
                [
                    o.contender.label,
                    f"{o.runs[0]['records']:,}",
                    o.spread("seconds").text(2),
                    spread(o.rates).text(0),
                    o.ratio(second).text(2, "×") if after else "",
                    pairwise(second.values("seconds"), o.values("seconds_after_start")).text(2, "×") if after else "",
                ]
            )
    return Result(
        "engine",
        "How fast are reading, hashing, shared memory, worker and writer processes together, with an encoder that "
        "costs nothing, against the fastest published ways to write the same rows?",
        s.lines,
        [
            "The table has its plain indexes in all of them and the HNSW and GIN index in none; none is built.",
            "kdb-fast's time is that of the whole call of `reindex`, the start of its processes included; it hashes "
            "every text, checks every vector and records runs, and its rows have four columns more. The example has "
            "rows, vectors and ids ready in memory, and one transaction. The last column leaves kdb-fast's start out.",
            "For the replacement both write the same content again, with `force` in kdb-fast.",
        ],
        [
            Table(
                "Rows of 384 dimensions into PostgreSQL",
                ("contender", "rows", "seconds", "rows/s", "ratio", "ratio after the start"),
                rows,
            )
        ],
        requirements=[*no_worse(loads), *no_worse(replaced)],
        chart=("Rows a second, no search indexes", "rows/s",
               [Bar(o.contender.label, spread(o.rates), o.contender.ours)
                for o in (*loads.values(), *replaced.values())]),
        raw={"load": raw(loads.values()), "replace": raw(replaced.values())},
    )  # fmt: skip
