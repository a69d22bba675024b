"""How fast are the vectors of a plain table, everything but the encoder?"""

from __future__ import annotations

from typing import Any

from .chart import Bar
from .measure import pairwise, spread
from .options import Options
from .results import Requirement, Result, Table
from .runner import Contender, Outcome, alternate, raw
from .session import Session, session

ROWS = 100_000
MANY_ROWS = 1_000_000
CHANGED = 1_000
"""One row in a thousand of MANY_ROWS."""

OURS = "kdb-fast, free encoder"
EXECUTEMANY = "executemany UPDATEs"
STAGING = "UPDATE … FROM a staging table"


def run(options: Options) -> Result:
    """Measure the part."""
    with session(options) as s:
        written = _written(s)
        keep, defer = _indexed(s)
        loads = _beside(s)
        again = {name: _again(s, name) for name in ("PostgreSQL", "SQLite")}
    ours, executemany, staging = written.values()
    beside, example, _, beside_sqlite = loads.values()
    requirements = [
        _after_start(ours, executemany, 1.4, "column target, every row, against executemany UPDATEs"),
        _after_start(ours, staging, 0.75, "column target, every row, against a COPY'd staging table"),
    ]
    requirements.append(
        _after_start(beside, example, 0.75, "table target, first load, against pgvector's loading example")
    )
    rates = [run["records"] / run["seconds_after_start"] for run in beside_sqlite.runs]
    requirements.append(
        Requirement("SQLite table target, first load, after the start", spread(rates), 30_000.0, unit=" rows/s")
    )
    faster = pairwise(keep.values("seconds"), defer.values("seconds"))
    text = "column target with an HNSW index, every row changed, index ready again: deferred against live"
    requirements.append(Requirement(text, faster, 3.0, unit="×"))
    for name, (nothing, few) in again.items():
        seconds = nothing.spread("seconds")
        more = spread(b - a for a, b in zip(nothing.values("seconds"), few.values("seconds"), strict=True))
        memory = spread(value / 1e6 for value in nothing.values("parent_rss_bytes"))
        rows = f"{nothing.runs[0]['records']:,} rows, {name}"
        requirements += [
            Requirement(f"nothing changed, {rows}", seconds, 20.0, True, " s"),
            Requirement(f"nothing changed, {rows}: peak of the parent", memory, 250.0, True, " MB"),
            Requirement(f"one row in a thousand changed, {rows}: more than nothing changed", more, 3.0, True, " s"),
        ]
    all_again = [outcome for pair in again.values() for outcome in pair]
    return Result(
        "tables",
        "How fast is a run over a table of one's own, with an encoder that costs nothing?",
        s.lines,
        [
            "A table of a bigint key, a text of 200 characters and a `vector(384)`, without a vector index, in the "
            "page cache.",
            "By hand means: read pages by key, write the vectors, and note hashes of text and vector, so that the next "
            "run could tell what has changed; kdb-fast also compares the text at the write, locks no row for longer "
            "than 0.3 s, checks every vector and records its run. The last column leaves out the start of its "
            "processes.",
            "The loading example has rows, vectors and hashes ready in memory, and one transaction; kdb-fast also "
            "reads the texts, and hashes them and the vectors. Both validate the foreign key in the end, within their "
            "time.",
        ],
        [
            Table(
                "Every row gets a vector",
                ("contender", "rows", "seconds", "rows/s", "times as fast, after the start"),
                [[*_row(o), "" if o is ours else _ratio(ours, o).text(2, "×")] for o in written.values()],
            ),
            Table(
                "A first load into a table of vectors beside it, with its foreign key",
                ("contender", "rows", "seconds", "rows/s", "times as fast, after the start"),
                [[*_row(o), "" if o.contender.ours else _ratio(beside, o).text(2, "×")] for o in loads.values()],
            ),
            Table(
                "Every row changed, with an HNSW index, until it is ready again",
                ("contender", "rows", "seconds", "rows/s", "times as fast"),
                [[*_row(keep), ""], [*_row(defer), faster.text(2, "×")]],
            ),
            Table(
                "Again",
                ("contender", "rows", "seconds", "rows/s", "peak of the parent, MB"),
                [[*_row(o), f"{max(o.values('parent_rss_bytes')) / 1e6:,.0f}"] for o in all_again],
            ),
        ],
        requirements=requirements,
        chart=("Rows a second", "rows/s",
               [Bar(o.contender.label, spread(o.rates), o.contender.ours) for o in written.values()]),
        raw={"written": raw(written.values()), "beside": raw(loads.values()),
             "indexed": raw([keep, defer]), "again": raw(all_again)},
    )  # fmt: skip


def _written(s: Session) -> dict[str, Outcome]:
    params = {**s.dataset("contacts", s.options.size(ROWS, 400)).params(), "conninfo": s.conninfo}
    return alternate(
        [
            Contender(OURS, "column", params, ours=True),
            Contender(EXECUTEMANY, "update_executemany", params),
            Contender(STAGING, "update_staging", params),
        ],
        s.runs,
        s.reset,
    )


def _beside(s: Session) -> dict[str, Outcome]:
    params = s.dataset("contacts", s.options.size(ROWS, 400)).params()
    server, file = {**params, "conninfo": s.conninfo}, s.work / "beside.db"
    in_file = {**params, "conninfo": f"sqlite:///{file}"}

    def reset() -> None:
        s.reset()
        file.unlink(missing_ok=True)

    return alternate(
        [
            Contender("kdb-fast", "beside", server, ours=True),
            Contender("pgvector's loading example, the same columns", "loading_beside", {**server, "noted": True}),
            Contender("pgvector's loading example, key and vector only", "loading_beside", server),
            Contender("kdb-fast, SQLite", "beside", in_file, ours=True),
        ],
        s.runs,
        reset,
    )


def _indexed(s: Session) -> tuple[Outcome, Outcome]:
    params = {**s.dataset("contacts", s.options.size(ROWS, 400)).params(), "conninfo": s.conninfo}
    keep, defer = alternate(
        [
            Contender("kdb-fast, index live", "column", {**params, "index": "keep"}, ours=True),
            Contender("kdb-fast, index deferred", "column", {**params, "index": "defer"}, ours=True),
        ],
        s.runs,
        s.reset,
    ).values()
    return keep, defer


def _again(s: Session, database: str) -> tuple[Outcome, Outcome]:
    many = s.options.size(MANY_ROWS, 1000)
    params: dict[str, Any] = {**s.dataset("contacts", many).params()}
    params["conninfo"] = f"sqlite:///{s.work}/tables.db" if database == "SQLite" else s.conninfo

    s.reset()
    few = {**params, "changed": s.options.size(CHANGED, 1)}
    # One after the other over the same table, each in a process of its own.
    _, nothing, changed = alternate(
        [
            Contender(f"{database}: every row", "column", params, ours=True),
            Contender(f"{database}: nothing changed", "column_again", params, ours=True),
            Contender(f"{database}: one row in a thousand changed", "column_again", few, ours=True),
        ],
        1,
    ).values()
    return nothing, changed


def _ratio(ours: Outcome, other: Outcome) -> Any:
    return pairwise(other.values("seconds"), ours.values("seconds_after_start"))


def _after_start(ours: Outcome, other: Outcome, bound: float, text: str) -> Requirement:
    return Requirement(text, _ratio(ours, other), bound, unit="×")


def _row(outcome: Outcome) -> list[str]:
    return [
        outcome.contender.label,
        f"{outcome.runs[0]['records']:,}",
        outcome.spread("seconds").text(2),
        spread(outcome.rates).text(0),
    ]
