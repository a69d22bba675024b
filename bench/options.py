"""What a run of the benchmarks was asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
STRESS_SETS = ("contacts", "tickets", "mixed")
DATABASES = ("PostgreSQL", "SQLite")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every part.

    Attributes:
        runs: Times that each contender is run, alternately.
        quick: Tiny sizes and one run: says whether everything works, measures nothing.
        sweep: Also try token budgets (part ``embed``).
        sets: Data sets of the part ``stress``.
        cpus: Of simulated clusters, for the part ``cluster``; empty for all of its sizes.
        add: Together with the runs that are in the results, for the parts ``embed`` and ``hosts``.
        against: Checkout of another version, measured in turn with this one (parts ``search``, ``engine``, ``scale``,
            ``million``).
        records: Sizes of the part ``million``; empty for its own.
        databases: Of the part ``million``.
        seed: Of the data sets.
        out: Directory of the results.
    """

    runs: int = 3
    quick: bool = False
    sweep: bool = False
    sets: tuple[str, ...] = STRESS_SETS
    cpus: tuple[int, ...] = ()
    add: bool = False
    against: Path | None = None
    records: tuple[int, ...] = ()
    databases: tuple[str, ...] = DATABASES
    seed: int = 1
    out: Path = RESULTS

    def size(self, full: int, quick: int) -> int:
        """Number of records: ``full``, or ``quick`` in a smoke test."""
        return quick if self.quick else full


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
