"""A soak: minutes of reindexing while processes are killed and stopped, connections are cut and the server dies.

usage: python soak.py --seconds N [--target index|column|table] [--seed S] [--records N] [--json FILE]

The real command, the real model, a real server behind a proxy; KameleonDB's own tables, a table with a column of
vectors and one with a table of vectors beside it, in turn. Records change between the runs and during them. Every 0.2
to 3 s something goes wrong, chosen at random. A command that ends with an exit code that says so is started again. At
the end the faults stop, the last run of each must end well, and the vectors must equal what one process computes from
the records. Exit code 0: nothing was lost, doubled, wrong, stuck or left behind.

Every wait here has a deadline, and the whole has one as well.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import oracle as oracles
import psutil
import psycopg
from changing_records import Records
from changing_table import Rows
from commands import Command, RealCommands
from nemesis import Nemesis, add
from proxy import PASS, Proxy
from servers import Oracle, Server, eventually, execute
from soak_figures import Figures, report

from kdb_fast.embedding.models.lookup import resolve
from kdb_fast.settings import DEFAULT_MODEL

PASSWORD = "hunter2%40@/ %SENTINEL"
SECRETS = ("hunter2", "SENTINEL")

AGAIN = {3, 5, 6, 7, 130, 143}
"""Documented exit codes after which the same command is started again."""

ENVIRONMENT = {
    # Shorter than an operator wants, so that there is time for more.
    "KDB_FAST_SILENCE": "1.5",
    "KDB_FAST_PATIENCE": "20",
    "PGCONNECT_TIMEOUT": "2",
    "PYTHONFAULTHANDLER": "1",
}

HANG_SECONDS = 90.0
"""A command that commits nothing for so long, while the database can be reached, hangs."""

RUN_SECONDS = 100.0 + HANG_SECONDS
"""No command takes as long as this."""

MARGIN_SECONDS = 170.0
"""For the start of the server, the last runs and the oracle, on a busy machine."""

TARGETS = ("index", "column", "table")
"""Of KameleonDB; a column of an application's table; a table of vectors beside one."""

Subject = Records | Rows
"""What is brought up to date, and who writes it meanwhile."""


class Soak:
    """The system under test and everything round it."""

    def __init__(
        self, seconds: float, seed: int, targets: list[str], records: int, folder: Path, oracle: Oracle
    ) -> None:
        self.oracle = oracle
        self.figures = Figures(seconds, seed, targets)
        self.random = random.Random(seed)
        self.server = Server()
        self.folder = folder
        self.ending = threading.Event()
        self.command: Command | None = None
        self.outage = False
        self.killed = False
        self.talks = False
        self._began = time.monotonic()
        for name in ("synchronous_commit", "full_page_writes"):  # what was committed must survive a crash
            execute(self.server.address, f"ALTER SYSTEM RESET {name}")
        execute(self.server.address, "SELECT pg_reload_conf()")
        self.address = self.server.create_database()
        self.proxy = Proxy(self.address)
        self.commands = RealCommands(folder)
        self.subjects = [self._subject(target, records // len(targets)) for target in targets]
        self.figures.records = records

    def _subject(self, target: str, records: int) -> Subject:
        chance = random.Random(self.figures.seed + 1)
        if target == "index":
            return Records(self.address, chance, records)
        return Rows(self.address, chance, "column" if target == "column" else "table", records)

    def close(self) -> None:
        self.commands.close()
        self.proxy.close()
        self.server.stop()

    def say(self, text: str) -> None:
        """What has happened, for somebody who looks for the cause of something."""
        if self.talks:
            print(f"{time.monotonic() - self._began:6.1f} {text}", flush=True)

    # -- runs ------------------------------------------------------------------------------------------

    def go(self) -> Figures:
        deadline = time.monotonic() + self.figures.seconds
        threads = [
            threading.Thread(target=Nemesis(self, random.Random(self.figures.seed + 2)).go, name="nemesis"),
            threading.Thread(target=Stalls(self).go, name="stalls"),
        ]
        # The command that runs when time is up ends without further faults.
        timer = threading.Timer(self.figures.seconds, self.ending.set)
        for thread in (*threads, timer):
            thread.start()
        try:
            for subject in itertools.cycle(self.subjects):
                if time.monotonic() > deadline or self.figures.hangs:
                    break
                self.round(subject, deadline)
        finally:
            timer.cancel()
            self.ending.set()
            for thread in threads:
                thread.join(60)
        self.last_runs()
        return self.figures

    def round(self, subject: Subject, deadline: float) -> None:
        """Change the records, then one command until it ends well."""
        chance = self.random.random
        self.patiently(lambda: subject.change(forget_rows=chance() < 0.5))
        options = ["--force"] if chance() < 0.3 else []
        change_meanwhile = chance() < 0.5
        while time.monotonic() < deadline:
            self.killed = False
            command = self.start(*subject.arguments, *options)
            with self.changing(subject) if change_meanwhile else contextlib.nullcontext():
                code = self.wait(command)
            if code == 0:
                if not change_meanwhile:
                    self.check_rows(subject)
                return
            if self.ending.wait(0.3):
                return

    @contextlib.contextmanager
    def changing(self, subject: Subject) -> Iterator[None]:
        """The records change all the time."""
        enough = threading.Event()

        def change() -> None:
            while not enough.wait(0.7):
                self.patiently(lambda: subject.change(forget_rows=False))

        thread = threading.Thread(target=change, name="application")
        thread.start()
        try:
            yield
        finally:
            enough.set()
            thread.join(60)

    def start(self, *arguments: str) -> Command:
        self.figures.runs += 1
        command = self.commands.start(
            "reindex", *arguments, "--workers", "2", "--json", KDB_FAST_DB=self.proxy.url(PASSWORD), **ENVIRONMENT
        )
        self.command = command
        return command

    def wait(self, command: Command) -> int:
        """The exit code; a command that hangs is made to print where it is, and killed."""
        deadline = time.monotonic() + RUN_SECONDS
        while command.poll() is None and not self.figures.hangs:
            time.sleep(0.02)
            self.figures.hangs += time.monotonic() > deadline
        if command.poll() is None:
            command.send(signal.SIGABRT)
            with contextlib.suppress(AssertionError):
                command.wait(5)
            self.figures.unexpected.append(f"hangs: {command.err[-3000:]}")
            self.commands.clear()
        code = command.wait(20)
        self.command = None
        self.say(f"exit code {code}: {command.err.rpartition('kdb-fast: ')[2][-300:].strip()}")
        add(self.figures.exit_codes, str(code))
        figures, printed = self.figures, command.out + command.err
        figures.secrets_shown += any(secret in printed for secret in SECRETS)
        if code not in AGAIN | {0} and not (code == -signal.SIGKILL and self.killed):
            figures.unexpected.append(f"exit code {code}: {command.err[-1000:]}")
        if code in (0, 3):
            receipt = command.receipt
            figures.rows_committed += receipt["stored"] + receipt["reused"]
            if receipt["read"] != sum(receipt[part] for part in oracles.PARTS):
                figures.counts_wrong += 1
        return code

    def patiently(self, work: Callable[[], Any]) -> Any:
        """``work()``, again while the server is away."""
        deadline = time.monotonic() + 30
        while True:
            try:
                return work()
            except Exception as error:
                if time.monotonic() > deadline or not server_was_away(error):
                    self.figures.unexpected.append(f"the application: {error!r}"[:1000])
                    raise
                time.sleep(0.2)

    # -- what must hold --------------------------------------------------------------------------------

    def check_rows(self, subject: Subject) -> None:
        """After a run that ended well: every record is there once, as it is now."""
        figures = self.figures
        figures.complete_checks += 1
        found = self.patiently(subject.check)
        figures.rows_lost += found.lost
        figures.rows_doubled += found.doubled
        figures.rows_without_record += found.without_record
        if any(found):
            self.say(f"{' '.join(subject.arguments)}: {found}")

    def last_runs(self) -> None:
        """Without faults: the same commands must end well, and everything must be right."""
        figures = self.figures
        self.proxy.mode = PASS
        self.proxy.close()
        self.proxy = Proxy(self.address)
        if figures.hangs:
            return
        found = [self.last_run(subject) for subject in self.subjects]
        figures.oracle = next((text for text in found if text != "agrees"), "agrees")
        with contextlib.suppress(AssertionError):
            eventually(lambda: not self.commands.processes(), 10)
        figures.children_left += len(self.commands.processes())
        figures.shared_memory_left = len(oracles.shared_memory() - oracles.SHARED_MEMORY_BEFORE)

    def last_run(self, subject: Subject) -> str:
        """Of one of them; what the oracle says."""
        figures, vector = self.figures, self.oracle.vector

        def rerun() -> dict[str, Any]:
            command = self.start(*subject.arguments)
            self.wait(command)
            return command.receipt

        command = self.start(*subject.arguments)
        if self.wait(command) != 0:
            figures.unexpected.append(f"the last run: {command.poll()}: {command.err[-2000:]}")
            return "not reached"
        self.check_rows(subject)
        wrong = subject.wrong_vectors(vector)
        figures.vectors_wrong += len(wrong)
        figures.unexpected += wrong
        try:
            subject.check_all(command.receipt, vector, rerun)
        except AssertionError as error:
            return f"{' '.join(subject.arguments)}: {error!r}"[:2000]
        return "agrees"


class Stalls:
    """Watches that something is committed while a command runs and the database can be reached."""

    QUERY = (
        "SELECT (SELECT (count(*), sum(last_flush), count(ended_at), max(ended_at)) FROM kdb_fast_runs)::text, "
        "(SELECT coalesce(max(phase), '') FROM kdb_fast_runs WHERE state = 'running')"
    )

    def __init__(self, soak: Soak) -> None:
        self._soak = soak

    def go(self) -> None:
        soak, connection = self._soak, None
        last, since = None, time.monotonic()
        while not soak.ending.wait(0.1):
            progress, now = None, time.monotonic()
            try:
                if connection is None:
                    connection = psycopg.connect(soak.address.conninfo, autocommit=True, connect_timeout=2)
                progress = connection.execute(self.QUERY).fetchone()
            except psycopg.errors.UndefinedTable:
                progress = ("", "")
            except psycopg.Error:
                connection = None
            if progress is None or progress != last or soak.outage or soak.command is None:
                if last is not None and now - since > 5:
                    soak.say(f"nothing was committed for {now - since:.1f} s")
                last, since = progress, now
                continue
            stall = now - since
            if stall > soak.figures.longest_stall_seconds:
                soak.figures.longest_stall_seconds = round(stall, 1)
            if stall > HANG_SECONDS:
                soak.figures.hangs += 1
                return
        if connection is not None:
            connection.close()


def server_was_away(error: BaseException | None) -> bool:
    """Whether a lost connection is the cause of the error; KameleonDB and SQLAlchemy wrap it. No application loses a
    transaction to a deadlock with a run, and none waits for long."""
    if isinstance(error, psycopg.errors.DeadlockDetected | psycopg.errors.LockNotAvailable):
        return False
    return error is not None and (isinstance(error, psycopg.OperationalError) or server_was_away(error.__cause__))


def end_hard(folder: Path) -> None:
    """The soak itself hangs: print all stacks and end everything."""
    faulthandler.dump_traceback()
    for process in oracles.processes_of(folder):
        with contextlib.suppress(psutil.Error):
            process.kill()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os._exit(3)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long things go wrong (default: 600)")
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="what is brought up to date; repeat it (default: all)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of all random choices (default: the time)")
    parser.add_argument("--records", type=int, default=2000, help="about how many there are (default: 2000)")
    parser.add_argument("--verbose", action="store_true", help="print what happens")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args(arguments)
    seed = options.seed if options.seed is not None else int(time.time())
    # As in the tests: the model is fetched once for each machine, before anything is made to go wrong.
    os.environ.setdefault("KDB_FAST_HOME", str(Path.home() / ".cache" / "kdb-fast-tests"))
    model = resolve(DEFAULT_MODEL)
    folder = Path(tempfile.mkdtemp(prefix="kdb-fast-soak-"))
    watchdog = threading.Timer(options.seconds + MARGIN_SECONDS, end_hard, [folder])
    watchdog.daemon = True
    watchdog.start()
    print(f"seed {seed}", flush=True)
    targets = options.target or list(TARGETS)
    soak = Soak(options.seconds, seed, targets, options.records, folder, Oracle(model.name, model.path))
    soak.talks = options.verbose
    try:
        figures = soak.go()
    finally:
        soak.close()
        watchdog.cancel()
        shutil.rmtree(folder, ignore_errors=True)
    print(report(figures))
    if options.json:
        options.json.write_text(json.dumps({**asdict(figures), "good": figures.good}, indent=1) + "\n")
    return 0 if figures.good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
