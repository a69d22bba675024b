"""Runs contenders in fresh processes, alternately, and collects what they report."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .measure import Sampler, Spread, pairwise, spread, tree
from .options import ROOT, say

TIMEOUT = 3600.0
"""Seconds after which a contender is given up."""


class BenchError(RuntimeError):
    """A contender failed: its numbers would mean nothing."""


@dataclass(frozen=True)
class Contender:
    """What is run: a name of :data:`bench.contender.CONTENDERS` with parameters (plain values).

    ``root`` is the checkout whose code runs. The others are still measured if an ``optional`` one fails; the failure is
    reported.
    """

    label: str
    name: str
    params: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    ours: bool = False
    optional: bool = False
    root: Path = ROOT


@dataclass
class Outcome:
    """The reports of a contender's runs, or the reason why it did not run."""

    contender: Contender
    runs: list[dict[str, Any]] = field(default_factory=list)
    skipped: str = ""

    def values(self, key: str) -> list[float]:
        return [float(run[key]) for run in self.runs]

    def spread(self, key: str) -> Spread:
        return spread(self.values(key))

    @property
    def rates(self) -> list[float]:
        """Records a second of each run."""
        return [run["records"] / run["seconds"] for run in self.runs]

    def ratio(self, other: Outcome) -> Spread:
        """How many times as many records a second as ``other``, run by run."""
        return pairwise(self.rates, other.rates)


def run_once(name: str, params: dict[str, Any], *, timeout: float = TIMEOUT, root: Path = ROOT) -> dict[str, Any]:
    """The report of one contender, with what its whole tree of processes took: ``peak_pss_bytes`` and ``cpu_seconds``.

    Raises:
        BenchError: It failed, or took longer than ``timeout`` seconds.
    """
    command = [sys.executable, "-W", "ignore", "-m", "bench.contender", name, json.dumps(params)]
    before = _cpu_seconds()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=root, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=_clean())
        sampler = Sampler(lambda: {str(pid): pid for pid in tree(process.pid)})
        try:
            with sampler.running():
                code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{name} took more than {timeout:.0f} s") from None
        finally:
            if process.poll() is None:
                for pid in tree(process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        printed = out.read().strip().splitlines()
        if code != 0 or not printed:
            raise BenchError(f"{name} ended with exit code {code}: {err.read()[-2000:]}")
    report: dict[str, Any] = json.loads(printed[-1])
    report["peak_pss_bytes"] = sampler.peak_sum
    report["cpu_seconds"] = _cpu_seconds() - before
    return report


def _cpu_seconds() -> float:
    """Of all children that have ended so far, with theirs; a database server is none of them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def alternate(
    contenders: Sequence[Contender], runs: int, before: Callable[[], None] = lambda: None
) -> dict[str, Outcome]:
    """Run A B C A B C …: what changes about the machine meanwhile hits all alike.

    Args:
        runs: How often each is run.
        before: Called before every run; makes the tables fresh.

    Returns:
        Label → outcome, in the order given. A contender that reports ``skipped`` is not run again.
    """
    outcomes = {contender.label: Outcome(contender) for contender in contenders}
    for number in range(runs):
        for outcome in outcomes.values():
            if outcome.skipped:
                continue
            before()
            contender = outcome.contender
            try:
                report = run_once(contender.name, contender.params, root=contender.root)
            except BenchError as error:
                if not contender.optional:
                    raise
                report = {"skipped": str(error).splitlines()[-1]}
            if "skipped" in report:
                outcome.skipped, outcome.runs = str(report["skipped"]), []
                say(f"  {contender.label}: skipped: {outcome.skipped}")
                continue
            outcome.runs.append(report)
            say(
                f"  run {number + 1}/{runs}  {contender.label}: {report['records']:,} in {report['seconds']:.2f} s, "
                f"{report['records'] / report['seconds']:,.0f}/s, {report['peak_pss_bytes'] / 1e6:,.0f} MB"
            )
    return outcomes


def ran(outcomes: dict[str, Outcome]) -> list[Outcome]:
    """Those that were not skipped."""
    return [outcome for outcome in outcomes.values() if outcome.runs]


def earlier(outcomes: dict[str, Outcome], known: Mapping[str, Any]) -> None:
    """Put the runs that a part's results hold (:func:`raw`) before those of these outcomes, where there are some."""
    for label, outcome in outcomes.items():
        outcome.runs[:0] = known.get(label, {}).get("runs", [])


def raw(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """All reports, for the JSON file. Paths and connection strings are left out."""
    return {
        o.contender.label: {"skipped": o.skipped} if o.skipped else {"note": o.contender.note, "runs": o.runs}
        for o in outcomes
    }


def _clean() -> dict[str, str]:
    """The environment without settings that would tune one contender and not another.

    Without one that has each process compile every module again, too: installed packages come compiled.
    """
    tuning = (
        "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "KDB_FAST_FAULT", "PYTHONDONTWRITEBYTECODE"
    )  # fmt: skip
    return {name: value for name, value in os.environ.items() if name not in tuning}
