"""What does Ray cost where its own processes share two CPUs with the encoders?"""

from __future__ import annotations

from typing import Any

from . import machine
from .measure import pairwise, spread
from .options import Options
from .results import Requirement, Result, Table, measured
from .runner import Contender, Outcome, alternate, earlier, raw
from .session import session

RECORDS = 6000
"""Three quarters of a minute of two CPUs: the second that one of them waits at the end is 1 %."""

LEAST_OF_PROCESSES = 0.92
"""Two hosts of one CPU against the same CPUs as processes."""


def run(options: Options) -> Result:
    """Measure the part."""
    with session(options) as s:
        tickets = s.dataset("tickets", options.size(RECORDS, 300))
        params: dict[str, Any] = {**tickets.params(), "conninfo": s.conninfo}
        outcomes = alternate(
            [
                Contender("two hosts of a cluster", "hosts", {**params, "cluster": True}, ours=True),
                Contender("two processes", "hosts", params, ours=True),
            ],
            s.runs,
            s.reset,
        )
    if options.add:
        earlier(outcomes, measured("hosts", machine.describe(), options.out))
    cluster, processes = outcomes.values()
    found = [outcome for outcome in (cluster, processes) if outcome.runs]
    return Result(
        "hosts",
        "What does Ray cost where its own processes share two CPUs with the encoders?",
        s.lines,
        [
            "Two hosts: two raylets with one CPU each on this machine. The rate is from the first encoder that is "
            "ready to the last COMMIT, without search indexes.",
        ],
        [
            Table(
                "Two CPUs",
                ("encoders", "records/s", "whole job, s", "ratio", "seconds of a core: encoders", "driver", "raylets",
                 "Ray's head and agents", "parent and writer", "server"),
                [_row(outcome, processes) for outcome in found],
            ),
        ],
        requirements=[
            Requirement(
                "two hosts ÷ two processes, from the first that is ready to the last COMMIT",
                pairwise(processes.values("seconds_after_start"), cluster.values("seconds_after_start")),
                LEAST_OF_PROCESSES,
                unit="×",
            )
        ] if len(found) == 2 else [],
        raw=raw(outcomes.values()),
    )  # fmt: skip


def _row(outcome: Outcome, processes: Outcome) -> list[str]:
    def used(*names: str) -> str:
        return spread(sum(run["used_seconds"].get(name, 0.0) for name in names) for run in outcome.runs).text(1)

    return [
        outcome.contender.label,
        spread(run["records"] / run["seconds_after_start"] for run in outcome.runs).text(1),
        outcome.spread("seconds").text(1),
        pairwise(processes.values("seconds_after_start"), outcome.values("seconds_after_start")).text(3, "×"),
        used("actors", "worker-1", "worker-2"),
        used("cluster"),
        used("raylet"),
        used("gcs_server", "Ray's agents"),
        used("parent", "writer"),
        used("server"),
    ]
