"""Do more workers help in proportion, and do more records cost more memory or more time each?"""

from __future__ import annotations

from typing import Any

from kdb_fast.resources import usable_cpus

from .chart import Bar
from .compare import no_worse, other
from .measure import Spread, pairwise, spread
from .options import Options
from .results import Requirement, Result, Table
from .runner import Contender, Outcome, alternate, raw
from .session import session

BY_WORKERS = 6000
"""One and a half minutes of one worker: the start of processes and the index build, the same for all, count 3 %."""

ALONE = 2000
"""For the encoder alone."""

AGAINST = 3000
"""For the pairs with another version: so long that the start counts 5 %, so short that 15 pairs can be measured."""

LEAST_SHARE = 0.97
"""Share of the number of workers that as many must reach: 1.94 for two."""

MOST_RUNS = 5
"""Of everything but those pairs: the factors are far from their limits."""

FEW, MANY = 30_000, 300_000


def worker_counts(cores: int) -> list[int]:
    """1, 2, 4, … and the number of cores."""
    return sorted({1, cores, *(2**n for n in range(1, 8) if 2**n < cores)})


def run(options: Options) -> Result:
    """Measure the part."""
    with session(options) as s:
        tickets = s.dataset("tickets", options.size(BY_WORKERS, 220))
        few = s.dataset("contacts", options.size(FEW, 300))
        many = s.dataset("contacts", options.size(MANY, 3000))
        database: dict[str, Any] = {"conninfo": s.conninfo}
        free = {**database, "free_encoder": True, "build_index": False}
        by_workers = [
            Contender(f"{n} worker{'s' if n > 1 else ''}", "reindex",
                      {**tickets.params(), **database, "workers": n}, ours=True)
            for n in worker_counts(usable_cpus())
        ]  # fmt: skip
        half = s.dataset("tickets", options.size(AGAINST, 220)).params()
        all_cores = Contender("all workers", "reindex", {**by_workers[-1].params, **half}, ours=True)
        pairs = alternate([all_cores, *other(all_cores, options)], s.runs, s.reset) if options.against else {}
        runs = min(s.runs, MOST_RUNS)
        workers = alternate(by_workers, runs, s.reset)
        a_few = {**tickets.params(), "records": options.size(ALONE, 220)}
        encoders = alternate(
            [Contender(f"encoder alone, {n}", "encode", {**a_few, "workers": n}, ours=True)
             for n in worker_counts(usable_cpus())],
            runs,
        )  # fmt: skip
        sizes = alternate(
            [Contender(f"{d.records:,} records", "reindex", {**d.params(), **free}, ours=True) for d in (few, many)],
            runs,
            s.reset,
        )
    first, first_alone = next(iter(workers.values())), next(iter(encoders.values()))
    return Result(
        "scale",
        "Do more workers help in proportion, and do ten times as many records cost more memory, or more time each?",
        s.lines,
        [
            "By workers: the real encoder. The whole job includes the start of the processes and the index, which one "
            "worker does not make slower; loading is from the first worker that is ready to the last COMMIT. Parent, "
            "writer and the database share the cores with the workers, so as many workers as cores cannot give the "
            "full factor. "
            f"The encoder alone (the first {ALONE:,} records) shows what the machine gives.",
            "By records: with a free encoder and without the search indexes, so that only the pipeline counts; the "
            "records are read from a file. Memory is the largest resident set (VmHWM) of each process; shared memory "
            "counts in every process that has touched it.",
        ],
        [
            Table(
                "By workers",
                ("workers", "records/s", "whole job", "loading", "encoder alone", "PSS of the largest worker, MB"),
                [
                    [
                        label,
                        spread(o.rates).text(0),
                        o.ratio(first).text(2, "×"),
                        _loading(o, first).text(2, "×"),
                        pairwise(_alone(alone), _alone(first_alone)).text(2, "×"),
                        _megabytes(o, "worker_pss_bytes"),
                    ]
                    for (label, o), alone in zip(workers.items(), encoders.values(), strict=True)
                ],
            ),
            _sizes(list(sizes.values())),
        ],
        chart=("Whole job by number of workers", "records/s",
               [Bar(label, spread(o.rates), True) for label, o in workers.items()]),
        requirements=[
            Requirement(
                f"{label} ÷ 1, loading", _loading(o, first), LEAST_SHARE * o.contender.params["workers"], unit="×"
            )
            for label, o in workers.items()
            if o is not first
        ]
        + no_worse(pairs),
        raw={
            "pairs": raw(pairs.values()),
            "workers": raw(workers.values()),
            "encoders": raw(encoders.values()),
            "sizes": raw(sizes.values()),
        },
    )  # fmt: skip


def _loading(outcome: Outcome, first: Outcome) -> Spread:
    """How many times as fast as ``first`` between the start and the index."""
    return pairwise(first.values("seconds_after_start"), outcome.values("seconds_after_start"))


def _alone(outcome: Outcome) -> list[float]:
    """Tokens a second of each run, each encoder by its own clock: whose shards are shorter ends sooner."""
    return [run["tokens"] * run["workers"] / sum(run["worker_seconds"]) for run in outcome.runs]


def _sizes(outcomes: list[Outcome]) -> Table:
    first = outcomes[0]
    per_record = [[1e6 * run["seconds"] / run["records"] for run in o.runs] for o in outcomes]
    return Table(
        "By records",
        ("records", "seconds", "µs a record", "against fewer", "parent MB", "writer MB", "one worker MB"),
        [
            [
                o.contender.label,
                o.spread("seconds").text(2),
                spread(times).text(1),
                pairwise(times, per_record[0]).text(2, "×") if o is not first else "",
                *(_rss(o, name).text(0) for name in ("parent", "writer", "worker")),
            ]
            for o, times in zip(outcomes, per_record, strict=True)
        ],
    )


def _rss(outcome: Outcome, name: str) -> Spread:
    """Largest resident memory, in MB, of the processes whose name begins so."""
    return spread(
        max((size for process, size in run["peak_rss_by_process"].items() if process.startswith(name)), default=0) / 1e6
        for run in outcome.runs
    )


def _megabytes(outcome: Outcome, key: str) -> str:
    return spread(value / 1e6 for value in outcome.values(key)).text(0)
