"""What is the most that one parent with one writer can take from a cluster?"""

from __future__ import annotations

import itertools
from typing import Any

from kdb_fast.engine.plan import FLUSH_SLOTS
from kdb_fast.engine.sharding import SHARD_ROWS
from kdb_fast.indexing.pipeline import BACKLOG_SHARDS

from .chart import Bar
from .measure import pairwise, spread
from .options import Options
from .results import Requirement, Result, Table
from .runner import Contender, Outcome, alternate, ran, raw
from .session import session

CPUS = tuple(2**n for n in range(1, 11))
"""Of the simulated clusters: up to 64 hosts of 16."""

TEXTS = 50_000
"""Different ones of the simulation; with a number behind each they are as many records as are needed."""

SECONDS = 12.0
"""That a simulated cluster is measured, once all its CPUs have work."""

LEAST_SECONDS_OF_TWO = 24.0
"""Of the smallest clusters, which commit seldom."""

MOST_RATE = 35_000
"""Rows a second that are expected at most."""

FREE_ROWS = 300_000
"""For the free encoder."""

DISTANCE = 0.02
"""Seconds to a host and back."""

IN_FLIGHT = 2 * SHARD_ROWS
"""Rows that a CPU has: two blocks."""

ALONE = 4000
"""Records that encoders alone embed: 7 s of two."""

BLOCKS, BLOCK_ROWS = 800, (128, 256, 512)
"""For what Ray costs; a block of the run has the first number of rows."""

LEAST_SHARE = 0.9
"""Of what all CPUs give together, or of the free encoder's rate where that is less."""


def run(options: Options) -> Result:
    """Measure the part."""
    chosen = options.cpus or (CPUS[:5:2] if options.quick else CPUS)
    with session(options) as s:
        contacts = s.dataset("contacts", options.size(TEXTS, 400))
        database: dict[str, Any] = {"conninfo": s.conninfo}
        costs = alternate(
            [
                Contender(
                    f"{rows} rows", "ray_cost",
                    {"block_rows": rows, "blocks": options.size(BLOCKS, 40), "actors": 2, "depth": 2},
                )
                for rows in BLOCK_ROWS
            ],
            s.runs,
        )  # fmt: skip
        alone = alternate(
            [Contender("encoders alone", "encode", contacts.params(options.size(ALONE, 200)), ours=True)], s.runs
        )
        (encoders,) = alone.values()
        cost = next(iter(ran(costs)), None)
        measured = [run["block_seconds"]["this process"] for run in cost.runs] if cost else []
        simulated: dict[str, Outcome] = {}
        if cost:
            rate = spread(run["records"] / sum(run["worker_seconds"]) for run in encoders.runs).median
            timers = {
                "data": str(contacts.path),
                "row_seconds": 1 / rate,
                "distance": DISTANCE,
                "block_seconds": spread(measured).median,
                **database,
            }
            most = options.size(FREE_ROWS, 3000)
            few = {"records": most, "settled": most // 5, "held": most // 50}
            free = Contender("free encoder", "simulated", {**timers, **few}, ours=True)
            simulated = alternate(
                [free, *(_cluster(cpus, rate, timers, options) for cpus in chosen)],
                s.runs,
                s.reset,
            )
    return Result(
        # Some of the sizes only: beside the page of all, and not in its place.
        "-".join(("cluster", *map(str, options.cpus))),
        "Where does one parent with one writer saturate before a cluster?",
        s.lines,
        [
            f"By simulation: each CPU of the cluster is a timer, as slow as the real encoder is here with all cores "
            f"busy, {DISTANCE * 1000:.0f} ms away, with two blocks in flight. The parent, the process that drives the "
            "cluster, the writer and the database are real and share the cores here; for every block that process "
            "burns the processor time that real Ray was measured to take of it. Rates are between two COMMITs while "
            "all CPUs have work.",
            "Linear is the number of CPUs times the rate of one. The free encoder is that of part `engine`, measured "
            "in the same way.",
        ],
        _tables(costs, encoders, simulated),
        requirements=_requirements(simulated, encoders),
        chart=("Rows a second by CPUs of the cluster", "rows/s",
               [Bar(o.contender.label, spread(o.values("rows_per_second")), o.contender.params.get("cpus", 0) > 0)
                for o in simulated.values()]) if simulated else None,
        raw={"ray": raw(costs.values()), "encoders": raw(alone.values()), "simulated": raw(simulated.values())},
    )  # fmt: skip


def _cluster(cpus: int, rate: float, timers: dict[str, Any], options: Options) -> Contender:
    """So many records that the cluster is busy for SECONDS between its start and its end."""
    in_flight = IN_FLIGHT * cpus
    # Where the writer cannot follow, every slot comes to be full.
    held = (3 * cpus + FLUSH_SLOTS) * SHARD_ROWS if cpus * rate > MOST_RATE / 2 else in_flight
    ahead = min(in_flight, BACKLOG_SHARDS * SHARD_ROWS)
    seconds = max(SECONDS, LEAST_SECONDS_OF_TWO * 2 / cpus)
    steady = int(min(cpus * rate, MOST_RATE) * options.size(int(seconds), 1))
    return Contender(
        f"{cpus:,} CPUs",
        "simulated",
        {**timers, "cpus": cpus, "settled": held, "held": held + ahead, "records": 2 * held + ahead + steady},
        ours=True,
    )


def _linear(outcome: Outcome, encoders: Outcome) -> list[float]:
    """Rows a second of as many encoders, in each run."""
    return [outcome.contender.params["cpus"] * run["records"] / sum(run["worker_seconds"]) for run in encoders.runs]


def _shares(outcome: Outcome, simulated: dict[str, Outcome], encoders: Outcome) -> list[float]:
    """Of the lesser of linear and the free encoder's rate, run by run."""
    free = next(iter(simulated.values())).values("rows_per_second")
    possible = map(min, zip(_linear(outcome, encoders), free, strict=True))
    return [rate / most for rate, most in zip(outcome.values("rows_per_second"), possible, strict=True)]


def _requirements(simulated: dict[str, Outcome], encoders: Outcome) -> list[Requirement]:
    if not simulated:
        return []
    outcomes = list(itertools.islice(simulated.values(), 1, None))
    cpus = [outcome.contender.params["cpus"] for outcome in outcomes]
    return [
        Requirement(
            f"{min(cpus)} to {max(cpus):,} CPUs: least share of linear, or of the free encoder's rate",
            min((spread(_shares(o, simulated, encoders)) for o in outcomes), key=lambda share: share.median),
            LEAST_SHARE,
        )
    ]


def _tables(costs: dict[str, Outcome], encoders: Outcome, simulated: dict[str, Outcome]) -> list[Table]:
    return [
        Table(
            "What a block costs with actors that compute nothing, ms of a core",
            ("block", "blocks/s", "driver", "driver, µs a row", "raylet", "actor"),
            [
                [
                    label,
                    spread(run["blocks"] / run["seconds"] for run in o.runs).text(0),
                    spread(_block_ms(o, "this process")).text(2),
                    spread(1000 * value / rows for value in _block_ms(o, "this process")).text(1),
                    spread(_block_ms(o, "raylet")).text(2),
                    spread(_block_ms(o, "actors")).text(2),
                ]
                for rows, (label, o) in zip(BLOCK_ROWS, costs.items(), strict=True) if o.runs
            ],
        ),
        Table(
            "By CPUs of the simulated cluster",
            ("CPUs", "rows/s", "of linear", "of the lesser of linear and free", "cores: parent", "driver", "writer",
             "server", "idle", "slots, MB", "parent, MB", "driver, MB", "writer, MB"),
            [_simulated(o, simulated, encoders) for o in simulated.values()],
        ),
    ]  # fmt: skip


def _block_ms(outcome: Outcome, name: str) -> list[float]:
    return [1000 * run["block_seconds"].get(name, 0.0) for run in outcome.runs]


def _simulated(outcome: Outcome, simulated: dict[str, Outcome], encoders: Outcome) -> list[str]:
    rates = outcome.values("rows_per_second")
    is_free = "cpus" not in outcome.contender.params
    cores = [
        spread(run["cores"].get(name, 0.0) for run in outcome.runs).text(2)
        for name in ("parent", "cluster", "writer", "server", "idle")
    ]
    memory = [
        spread(run["pss_by_process"].get(name, 0) / 1e6 for run in outcome.runs).text(0)
        for name in ("parent", "cluster", "writer")
    ]
    return [
        outcome.contender.label.removesuffix(" CPUs"),
        spread(rates).text(0),
        "" if is_free else pairwise(rates, _linear(outcome, encoders)).text(2),
        "" if is_free else spread(_shares(outcome, simulated, encoders)).text(2),
        *cores,
        f"{outcome.runs[0]['slots']:,}, {outcome.spread('slab_bytes').median / 1e6:,.0f}",
        *memory,
    ]
