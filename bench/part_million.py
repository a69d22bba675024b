"""Does a row of a million cost more than one of a hundred thousand, in time or in memory?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdb_fast.resources import usable_cpus

from . import data, database
from .chart import Bar
from .measure import Sampler, pairwise, spread, tree
from .options import Options
from .results import Requirement, Result, Table
from .runner import Contender, Outcome, alternate, raw
from .session import DataSet, Session, session

SIZES, QUICK_SIZES = (100_000, 300_000, 1_000_000), (300, 900, 3000)

CHANGED_EVERY = 1000
"""One row in so many has another text in the last run."""

MOST_OF_A_ROW = 1.1
"""Of the time of a row with the fewest records, from the first worker that is ready to the last COMMIT."""

MOST_MEMORY = 1.15
"""Of parent and writer with the fewest records."""

MOST_OF_OTHER = 0.8
"""Of the other version's time, where nothing changed."""

SERVER_SECONDS = 5.0
"""Between two samples of a server's memory: to read that of gigabytes takes tenths of a second, in which it waits."""

NEW, AGAIN, CHANGED = "all new", "nothing changed", "one in a thousand changed"
OURS, OTHER = "this version", "the other version"

FEWEST, LARGER, EARLIER = "fewest", "larger", "earlier"
"""Databases: of the fewest records, of a larger number, and of the other version."""


@dataclass
class _Size:
    """The outcomes of one database and number of records, by what was done."""

    database: str
    records: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.database}, {self.records:,}"


def run(options: Options) -> Result:
    """Measure the part."""
    counts = sorted(options.records or (QUICK_SIZES if options.quick else SIZES))
    fewest, most = counts[0], counts[-1]
    sizes: list[_Size] = []
    against: dict[str, dict[str, Outcome]] = {}
    with session(options) as s:
        dataset = s.dataset("contacts", most)
        changed = s.work / "contacts-changed.jsonl"
        data.write(changed, [t if i % CHANGED_EVERY else f"{t} | changed: yes" for i, t in _numbered(dataset.path)])
        for name in options.databases:
            of_one = [_Size(name, records) for records in counts]
            for number in range(s.runs):
                for size in of_one:
                    _load(s, size, dataset, LARGER if size is not of_one[0] else FEWEST)
                    if number == 0:
                        _again(size, changed)
                    if size is not of_one[0]:
                        _load(s, of_one[0], dataset, FEWEST)
                if number == 0 and options.against:
                    against[name] = _against(s, of_one[-1], {**dataset.params(), "data": str(changed)})
            sizes += of_one
            for which in (FEWEST, LARGER, EARLIER):
                _empty(s, name, which)  # gigabytes of pages of files, of which the next database is to have the memory
    return Result(
        # A database at a time has a page of its own.
        "million" if len(options.databases) > 1 else f"million-{options.databases[0].lower()}",
        f"Does a row of {most:,} cost more than one of {fewest:,}, in time or in memory?",
        s.lines,
        [
            "With an encoder that costs nothing, into KameleonDB's index: on PostgreSQL with HNSW and full text, on "
            "SQLite with full text. The records are read from a file; of the smaller sizes they are its first.",
            "The encoder has 4,096 different vectors, so the index is a graph of many equal ones: its time is not that "
            "of vectors of texts (see `store`) and is shown apart.",
            "Before and behind each larger number the fewest records are loaded, into a database of their own; a ratio "
            "is that to the mean of these two, since a host's speed may change within a minute.",
            "A new row is measured from the first worker that is ready to the last COMMIT, any other by the whole call "
            "of `reindex`. Parent and writer: the largest resident set (VmHWM) of each, with the slots that they share "
            "in both. Server: the proportional set size of all its processes at one moment; while the index is built "
            "it holds the graph (`maintenance_work_mem`).",
        ],
        [_table(sizes), *([_against_table(against, most)] if against else [])],
        requirements=[
            *(requirement for size in sizes if size.records > fewest
              for requirement in _no_bend(size, [other for other in sizes if other.database == size.database])),
            *(Requirement(f"{AGAIN}, {name}, {most:,}: time against the other version",
                          pairwise(pair[OURS].values("seconds"), pair[OTHER].values("seconds")),
                          MOST_OF_OTHER, True, "×") for name, pair in against.items()),
        ],
        chart=("A new row, index apart", "µs",
               [Bar(size.label, spread(_new_row(size)), True) for size in sizes]),
        raw={
            **{size.label: raw(size.outcomes.values()) for size in sizes},
            **{f"{name}, against": raw(pair.values()) for name, pair in against.items()},
        },
    )  # fmt: skip


def _numbered(path: Path) -> enumerate[str]:
    return enumerate(data.read(path))


def _load(s: Session, size: _Size, dataset: DataSet, which: str) -> None:
    """Every record into an empty database."""
    # With a number of workers even a few rows are not embedded by the parent, with the real model.
    params = {**dataset.params(size.records), "free_encoder": True, "workers": usable_cpus()}
    new = _step(Contender(NEW, "reindex", {**params, "conninfo": _empty(s, size.database, which)}, ours=True))
    new.runs[:0] = size.outcomes[NEW].runs if NEW in size.outcomes else []
    size.outcomes[NEW] = new


def _again(size: _Size, changed: Path) -> None:
    """Nothing changed, then one in CHANGED_EVERY: each in a process of its own."""
    there = size.outcomes[NEW].contender.params
    size.outcomes[AGAIN] = _step(Contender(AGAIN, "reindex", there, ours=True))
    size.outcomes[CHANGED] = _step(Contender(CHANGED, "reindex", {**there, "data": str(changed)}, ours=True))


def _against(s: Session, most: _Size, params: dict[str, Any]) -> dict[str, Outcome]:
    """Nothing changed, in turn with another version, which has a database of its own; no index is built."""
    assert s.options.against is not None
    params = {**params, "free_encoder": True, "build_index": False}
    there = most.outcomes[NEW].contender.params["conninfo"]
    ours = Contender(OURS, "reindex", {**params, "conninfo": there}, ours=True)
    earlier = _empty(s, most.database, EARLIER)
    other = Contender(OTHER, "reindex", {**params, "conninfo": earlier}, root=s.options.against)
    alternate([other], 1)  # every record new
    return alternate([ours, other], s.runs)


def _conninfo(s: Session, name: str, which: str) -> str:
    return f"sqlite:///{s.work / which}.db" if name == "SQLite" else database.named(s.conninfo, f"bench_{which}")


def _empty(s: Session, name: str, which: str) -> str:
    """Address of a new database."""
    if name == "SQLite":
        file = s.work / f"{which}.db"
        file.unlink(missing_ok=True)
        file.touch()
    else:
        database.create(s.conninfo, f"bench_{which}")
    return _conninfo(s, name, which)


def _step(contender: Contender) -> Outcome:
    """One run, with the most memory that the server had meanwhile."""
    conninfo = contender.params["conninfo"]
    server = None if conninfo.startswith("sqlite:") else database.server_pid(conninfo)
    sampler = Sampler(lambda: {str(pid): pid for pid in (tree(server) if server else ())}, SERVER_SECONDS)
    with sampler.running():
        (outcome,) = alternate([contender], 1).values()
    outcome.runs[0]["server_pss_bytes"] = sampler.peak_sum
    return outcome


# -- what is shown ---------------------------------------------------------------------------------------


def _new_row(size: _Size) -> list[float]:
    """Microseconds of a new row, run by run."""
    return [1e6 * run["seconds_after_start"] / run["records"] for run in size.outcomes[NEW].runs]


def _memory(size: _Size) -> list[float]:
    """Bytes of parent and writer while every record is new, run by run."""
    return [sum(run["peak_rss_by_process"][name] for name in ("parent", "writer")) for run in size.outcomes[NEW].runs]


def _no_bend(size: _Size, of_one: list[_Size]) -> list[Requirement]:
    """What must hold for a size of those of one database, the fewest records first."""
    fewest = of_one[0]
    against = f"{size.label}, against {fewest.records:,}"
    time, memory = (
        pairwise(what(size), _beside(what(fewest), of_one.index(size), len(of_one))) for what in (_new_row, _memory)
    )
    return [
        Requirement(f"a new row, {against}", time, MOST_OF_A_ROW, True, "×"),
        Requirement(f"memory of parent and writer, {against}", memory, MOST_MEMORY, True, "×"),
    ]


def _beside(fewest: list[float], place: int, sizes: int) -> list[float]:
    """The mean of the two runs with the fewest records before and behind each run of the size at ``place``."""
    behind = range(place, len(fewest), sizes)
    return [(fewest[number - 1] + fewest[number]) / 2 for number in behind]


def _table(sizes: list[_Size]) -> Table:
    columns = (
        "database, records",
        "what",
        "seconds",
        "of them index",
        "µs a row",
        "parent MB",
        "writer MB",
        "server MB",
    )
    rows = []
    for size in sizes:
        for what, outcome in size.outcomes.items():
            peaks = [{"parent": run["peak_rss_bytes"], **run["peak_rss_by_process"]} for run in outcome.runs]
            time = spread(1e6 * run["seconds"] / run["read"] for run in outcome.runs)
            rows.append(
                [
                    size.label,
                    what,
                    outcome.spread("seconds").text(2),
                    spread(run["phases"]["index"] for run in outcome.runs).text(1),
                    (spread(_new_row(size)) if what is NEW else time).text(1),
                    spread(peak["parent"] / 1e6 for peak in peaks).text(0),
                    spread(peak["writer"] / 1e6 for peak in peaks).text(0) if "writer" in peaks[0] else "",
                    spread(size / 1e6 for size in outcome.values("server_pss_bytes")).text(0)
                    if size.database == "PostgreSQL" else "",
                ]
            )  # fmt: skip
    return Table("By records", columns, rows)


def _against_table(against: dict[str, dict[str, Outcome]], records: int) -> Table:
    rows = [
        [f"{name}, {label}", outcome.spread("seconds").text(2), outcome.spread("cpu_seconds").text(2)]
        for name, pair in against.items()
        for label, outcome in pair.items()
    ]
    return Table(f"Nothing changed, {records:,} rows", ("database, version", "seconds", "of a core"), rows)
