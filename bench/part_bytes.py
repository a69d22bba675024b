"""How many bytes does a record take in the database, in its log, and in memory while its index is built?"""

from __future__ import annotations

from typing import Any

from .chart import Bar
from .measure import spread
from .options import Options
from .results import Result, Table
from .runner import Contender, Outcome, alternate, raw
from .session import Session, session

ROWS = 100_000

KINDS = ("rows", "toast", "keys", "noted", "gin", "hnsw")

PLACES: dict[str, dict[str, Any]] = {
    "KameleonDB's index": {"place": "kameleondb"},
    "column, vector(384)": {"place": "column", "type": "vector"},
    "column, halfvec(384)": {"place": "column", "type": "halfvec"},
    "table of vectors": {"place": "table"},
}


def run(options: Options) -> Result:
    """Measure the part. Bytes do not depend on what else the machine does: one run of each is enough."""
    with session(options) as s:
        contacts = _sizes(s, "contacts", indexed=True)
        tickets = _sizes(s, "tickets", indexed=False)
    indexed = [o for o in contacts.values() if "log_index" in o.runs[0]]
    return Result(
        "bytes",
        "How many bytes does a record take in the database, in its log, and in memory while its index is built?",
        s.lines,
        [
            "A first load of empty places; every vector is another one (an HNSW index keeps equal vectors once). The "
            "table of one's own has a bigint key and the text.",
            "The load of a column leaves the old versions of its rows behind, which are in these figures; VACUUM gives "
            "their room to later rows. The log has whole pages where a page was changed for the first time since a "
            "checkpoint, one of which was made before each measurement.",
            "Noted: kdb-fast's own tables, with what is known of each row of a column.",
            "In memory: the rows of the graph that 64 MB hold, PostgreSQL's default of `maintenance_work_mem`, in one "
            "process, and its rate before and after. The whole build has 512 MB and PostgreSQL's own number of "
            "parallel workers.",
        ],
        [
            _table("Bytes of a contact", contacts),
            _table("Bytes of a ticket", tickets),
            Table(
                "Building the HNSW index",
                ("place", "bytes of a row in memory", "rows/s in memory", "rows/s when full", "whole build, rows/s"),
                [_build(o) for o in indexed],
            ),
        ],
        chart=("Bytes of a contact with its HNSW index", "bytes",
               [Bar(o.contender.label, spread([sum(o.runs[0]["index"].values()) / o.runs[0]["records"]]), True)
                for o in indexed]),
        raw={"contacts": raw(contacts.values()), "tickets": raw(tickets.values())},
    )  # fmt: skip


def _sizes(s: Session, name: str, *, indexed: bool) -> dict[str, Outcome]:
    params = {**s.dataset(name, s.options.size(ROWS, 400)).params(), "conninfo": s.conninfo}
    contenders = [
        Contender(label, "sizes", {**params, **place, "index": indexed and place["place"] == "column"}, ours=True)
        for label, place in PLACES.items()
    ]
    return alternate(contenders, 1, s.reset)


def _table(title: str, outcomes: dict[str, Outcome]) -> Table:
    columns = ("place", "text", "rows", "TOAST", "keys", "noted", "GIN", "HNSW", "log of the load", "log of the index")
    return Table(title, columns, [_row(outcome) for outcome in outcomes.values()])


def _row(outcome: Outcome) -> list[str]:
    (report,) = outcome.runs
    found = report.get("index", report["load"])
    sizes = [report["text_bytes"], *(found[kind] for kind in KINDS), report["log_load"], report.get("log_index", 0)]
    return [outcome.contender.label, *(f"{size / report['records']:,.0f}" for size in sizes)]


def _build(outcome: Outcome) -> list[str]:
    (report,) = outcome.runs
    small = report["small_memory"]
    memory = report["small_memory_bytes"] / small["rows"] if small["rows"] else 0.0
    whole = report["records"] / report["index_seconds"]
    return [outcome.contender.label, *(f"{x:,.0f}" for x in (memory, small["in_memory"], small["on_disk"], whole))]
