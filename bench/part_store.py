"""Which way of writing and indexing is the fastest?"""

from __future__ import annotations

from pathlib import Path

from .chart import Bar
from .measure import Spread, pairwise, spread
from .options import Options
from .results import Result, Table
from .runner import Contender, Outcome, alternate, raw
from .session import DataSet, Session, session

ROWS = 30_000
LIVE = 5000
"""Rows for the ways that keep the HNSW index live: they are slow, and slower the larger the table gets."""

WRITE = {
    "executemany upsert, all indexes live": "upsert live",
    "executemany upsert, no search index": "upsert",
    "binary COPY, write_row": "copy",
    "binary COPY to unlogged staging, packed": "stage",
    "merge staging → empty table": "merge empty",
    "merge staging → all rows conflicting": "merge conflicting",
    "merge staging → table, all indexes live": "merge live",
    "kdb-fast's writer": "ours",
}
BUILD = {"HNSW, no parallel worker": "hnsw 0", "HNSW, 1": "hnsw 1", "HNSW, 2": "hnsw 2", "GIN": "gin"}
READY = {"kdb-fast's writer": "ours ready", "COPY + one parallel build by hand": "copy ready"}


def run(options: Options) -> Result:
    """Measure the part."""
    with session(options) as s:
        dataset = s.dataset("contacts", options.size(ROWS, 400))
        write, build, ready = (_measure(s, dataset, ways) for ways in (WRITE, BUILD, READY))
        sqlite = _measure(s, dataset, {"kdb-fast on SQLite": "sqlite"})
    ours, by_hand = ready.values()
    return Result(
        "store",
        "How fast is each way to write rows of 384 dimensions and to make them searchable?",
        s.lines,
        [
            "Rows, vectors and ids are ready in memory; one connection; server settings are the defaults, except that "
            "indexes are built by hand with `maintenance_work_mem` of 512 MB.",
            "The vectors are made, not embedded: weighted means of three of 1,024 random directions. Build times of "
            "HNSW depend on the vectors; they are the same for all ways.",
            "kdb-fast's writer begins with filled slots; it also writes four columns more, and records the run.",
        ],
        [
            Table("Writing", ("way", "rows", "seconds", "rows/s"), _rows(write)),
            Table("Building an index over the full table", ("index", "rows", "seconds", "rows/s"), _rows(build)),
            Table(
                "From nothing to both search indexes ready",
                ("way", "rows", "seconds", "rows/s", "ratio of times"),
                [
                    [*row, _times(by_hand, o).text(2, "×") if o is ours else ""]
                    for row, o in zip(_rows(ready), ready.values(), strict=True)
                ],
            ),
            Table("SQLite, ready to search", ("way", "rows", "seconds", "rows/s"), _rows(sqlite)),
        ],
        chart=("Rows a second", "rows/s",
               [Bar(label, spread(o.rates), o.contender.ours) for label, o in (*write.items(), *sqlite.items())]),
        raw={"write": raw(write.values()), "build": raw(build.values()), "ready": raw(ready.values()),
             "sqlite": raw(sqlite.values())},
    )  # fmt: skip


def _measure(s: Session, dataset: DataSet, ways: dict[str, str]) -> dict[str, Outcome]:
    file = s.work / "bench.db"
    contenders = []
    for label, way in ways.items():
        conninfo = f"sqlite:///{file}" if way == "sqlite" else s.conninfo
        rows = s.options.size(LIVE, 100) if "live" in way else None
        params = {**dataset.params(rows), "conninfo": conninfo, "way": way}
        contenders.append(Contender(label, "way", params, ours="kdb-fast" in label))

    def before() -> None:
        s.reset()
        for leftover in (file, Path(f"{file}-wal"), Path(f"{file}-shm")):
            leftover.unlink(missing_ok=True)

    return alternate(contenders, s.runs, before)


def _rows(outcomes: dict[str, Outcome]) -> list[list[str]]:
    return [
        [label, f"{o.runs[0]['records']:,}", o.spread("seconds").text(2), spread(o.rates).text(0)]
        for label, o in outcomes.items()
    ]


def _times(slower: Outcome, faster: Outcome) -> Spread:
    return pairwise(slower.values("seconds"), faster.values("seconds"))
