"""``python -m bench.gate``: the performance that continuous integration insists on, in under five minutes.

Only ratios measured in the same run are judged, and quantities that do not depend on the machine's speed; so the gate
means the same on a slow machine. Thresholds and their reasons are in ``thresholds.json``. Exit code 1: one was missed.

``KDB_FAST_GATE_DELAY`` (seconds for each shard) makes the engine slow on purpose, to see the gate fail.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import history, machine
from .options import RESULTS, Options, say
from .runner import Contender, alternate
from .session import Session, session

THRESHOLDS = Path(__file__).with_name("thresholds.json")
DELAY = "KDB_FAST_GATE_DELAY"

RECORDS, SAMPLE, WHOLE_JOBS = 1500, 512, 2
"""Records of kdb-fast's whole job, of FastEmbed's (two of its batches: it is the slow one), and runs of each."""

ROWS, LOADS = 60_000, 8
"""Rows of the engine's part, and runs of each."""


class Verdict(NamedTuple):
    """What was measured, what is required, and whether it holds."""

    name: str
    measured: float | None
    required: str
    passed: bool
    reason: str


def judge(measurements: Mapping[str, float], thresholds: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """A verdict for every threshold. What was not measured, or is no number, has failed.

    Args:
        measurements: Name → value.
        thresholds: Name → ``at_least`` or ``at_most``, ``unit``, ``reason``.
    """
    verdicts = []
    for name, threshold in thresholds.items():
        value = measurements.get(name)
        unit = str(threshold.get("unit", ""))
        low, high = threshold.get("at_least"), threshold.get("at_most")
        if (low is None) == (high is None):
            raise ValueError(f"threshold {name} has not exactly one of at_least and at_most")
        required = f"≥ {low:g}{unit}" if low is not None else f"≤ {high:g}{unit}"
        passed = False
        if value is not None and math.isfinite(value):
            passed = value >= low if low is not None else value <= threshold["at_most"]
        verdicts.append(Verdict(name, value, required, passed, str(threshold["reason"])))
    return verdicts


def table(verdicts: list[Verdict]) -> str:
    """The verdicts for people; the reason is added where one failed."""
    lines = [f"{'what':<28}{'measured':>10}  {'required':<10}  result"]
    for v in verdicts:
        measured = "none" if v.measured is None else f"{v.measured:.3f}"
        lines.append(f"{v.name:<28}{measured:>10}  {v.required:<10}  {'pass' if v.passed else 'FAIL'}")
    lines += [f"FAIL {v.name}: {v.reason}" for v in verdicts if not v.passed]
    return "\n".join(lines)


def measure_whole_job(s: Session, records: int, runs: int) -> dict[str, float]:
    """kdb-fast against FastEmbed's defaults on a sample; memory, padding and accounting of the same runs."""
    tickets = s.dataset("tickets", records)
    outcomes = alternate(
        [
            Contender("kdb-fast, whole job", "reindex", {**tickets.params(), "conninfo": s.conninfo}, ours=True),
            Contender("FastEmbed default, embedding only", "fastembed", tickets.params(SAMPLE)),
        ],
        runs,
        s.reset,
    )
    ours, fastembed = outcomes.values()
    return {
        "whole_job_vs_fastembed": ours.ratio(fastembed).median,
        "worker_memory": max(ours.values("worker_pss_bytes")) / 1e6,
        "padding_share": max(1 - run["tokens"] / max(1, run["padded_tokens"]) for run in ours.runs),
        "unaccounted_records": float(sum(abs(run["unaccounted"]) + abs(records - run["records"]) for run in ours.runs)),
    }


def measure_engine(s: Session, rows: int, runs: int, delay: float = 0.0) -> dict[str, float]:
    """Everything but the encoder, against pgvector-python's loading example.

    Args:
        delay: Seconds that the engine waits before each shard: see the gate fail.
    """
    contacts = s.dataset("contacts", rows)
    params = {**contacts.params(), "conninfo": s.conninfo}
    outcomes = alternate(
        [
            Contender("kdb-fast, free encoder", "pipeline", {**params, "delay": delay}, ours=True),
            Contender("pgvector-python's loading example", "loading_example", params),
        ],
        runs,
        s.reset,
    )
    ours, example = outcomes.values()
    # What else the machine does only adds time, and to runs of few seconds a lot: the least of each is compared.
    return {"engine_vs_loading_example": min(example.values("seconds")) / min(ours.values("seconds_after_start"))}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, and return 1 if a threshold was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__)
    parser.add_argument("--records", type=int, default=RECORDS, help="records of the whole job")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the engine's part")
    parser.add_argument("--runs", type=int, help=f"runs of each contender (default {WHOLE_JOBS}, the engine {LOADS})")
    parser.add_argument("--record", action="store_true", help="write what was measured into bench/results/history.csv")
    parser.add_argument("--thresholds", type=Path, default=THRESHOLDS, help="file of the thresholds")
    given = parser.parse_args(arguments)
    thresholds: dict[str, Any] = json.loads(given.thresholds.read_text())
    delay = float(os.environ.get(DELAY) or 0.0)
    if delay:
        say(f"the engine is made slow on purpose: {DELAY}={delay:g}")
    measurements: dict[str, float] = {}
    with session(Options()) as s:
        if thresholds.keys() & {"engine_vs_loading_example"}:
            measurements |= measure_engine(s, given.rows, given.runs or LOADS, delay)
        if thresholds.keys() - {"engine_vs_loading_example"}:
            measurements |= measure_whole_job(s, given.records, given.runs or WHOLE_JOBS)
    verdicts = judge(measurements, thresholds)
    print(table(verdicts), flush=True)
    if given.record:
        units = {name: str(threshold.get("unit", "")).strip() for name, threshold in thresholds.items()}
        figures = {history.column("gate", name, units[name]): value for name, value in measurements.items()}
        history.record(figures, machine.describe(), RESULTS)
    return 0 if all(v.passed for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
