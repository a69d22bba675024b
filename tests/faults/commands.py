"""Commands of kdb-fast as processes of their own, to be killed, stopped and started side by side."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import poison_worker
from oracle import MARK, check, processes_of
from servers import eventually

from kdb_fast.cli.demo import sqlalchemy_url
from kdb_fast.db.address import DatabaseAddress
from kdb_fast.records import Record, content_from_fields

PATIENCE = 60.0
"""Seconds after which a command is taken to hang."""


class Commands:
    """Starts commands with a stub for the model: a process forks for each, see ``stub_command.py``.

    Args:
        folder: An empty directory: the mark of all processes that are started, and where their output goes.
    """

    def __init__(self, folder: Path) -> None:
        self.mark = folder
        self._numbers = itertools.count(1)
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stub_command.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, MARK: str(folder), "PYTHONPATH": str(Path(__file__).parents[1])},
            text=True,
        )

    def start(self, *arguments: str, **environment: str) -> Command:
        """Start a command; it has no terminal, and what it prints is kept."""
        directory = self.mark / str(next(self._numbers))
        directory.mkdir()
        return self._start(arguments, environment, directory)

    def _start(self, arguments: tuple[str, ...], environment: Mapping[str, str], directory: Path) -> Command:
        return Command(
            self, self._ask(arguments=arguments, environment=environment, directory=str(directory)), directory
        )

    def wait_for(self, pid: int) -> int | None:
        """Exit code of a command, minus the signal that ended it; None while it runs."""
        code: int | None = self._ask(wait_for=pid)
        return code

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def fired(self) -> bool:
        """Whether a fault has happened since this was asked last."""
        try:
            (self.mark / "fired").unlink()
        except FileNotFoundError:
            return False
        return True

    def processes(self) -> list[Any]:
        """Living processes of all commands."""
        return [process for process in processes_of(self.mark) if process.pid != self._server.pid]

    def clear(self) -> None:
        """End whatever runs, and forget what faults and stubs have left."""
        for process in self.processes():
            with contextlib.suppress(Exception):
                process.kill()
        for file in self.mark.iterdir():
            if file.is_file():
                file.unlink()

    def close(self) -> None:
        """End whatever is left."""
        self.clear()
        self._server.communicate()


class RealCommands(Commands):
    """Starts ``python -m kdb_fast``: nothing is replaced."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def _start(self, arguments: tuple[str, ...], environment: Mapping[str, str], directory: Path) -> Command:
        with open(directory / "out", "wb") as out, open(directory / "err", "wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "kdb_fast", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, MARK: str(self.mark), **environment},
            )
        self._started[process.pid] = process
        return Command(self, process.pid, directory)

    def wait_for(self, pid: int) -> int | None:
        return self._started[pid].poll()

    def close(self) -> None:
        super().close()
        for process in self._started.values():
            process.wait()


class Command:
    """One of them, started."""

    def __init__(self, commands: Commands, pid: int, directory: Path) -> None:
        self.pid = pid
        self._commands = commands
        self._directory = directory
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, or None while it runs."""
        if self._code is None:
            self._code = self._commands.wait_for(self.pid)
        return self._code

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code; fails with what it has printed if it takes longer."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"hangs: {self.err}"
            time.sleep(0.005)
        return code

    def send(self, signum: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.send(signal.SIGKILL)
        self.wait()

    def wait_until_stopped(self) -> None:
        """Until the whole process is in state "stopped", or has ended."""
        eventually(lambda: self.poll() is not None or _state(self.pid) == "T", PATIENCE)

    @property
    def out(self) -> str:
        """What it has written to standard output so far."""
        return self._written("out")

    @property
    def err(self) -> str:
        """What it has written to standard error so far."""
        return self._written("err")

    def _written(self, name: str) -> str:
        # Right after the start the file may not be there yet.
        with contextlib.suppress(FileNotFoundError):
            return (self._directory / name).read_text()
        return ""

    @property
    def receipt(self) -> dict[str, Any]:
        """The object on its standard output."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


class FileJob:
    """A reindex of a file, with a stub for the model; ``records`` are what the index holds afterwards."""

    def __init__(self, commands: Commands, database: DatabaseAddress, folder: Path, texts: list[str]) -> None:
        self.commands, self.database = commands, database
        self._file = folder / "notes.jsonl"
        self.write(texts)

    def write(self, texts: list[str]) -> None:
        """Make the file anew; the records have the keys ``0``, ``1``, …"""
        self._file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
        self.records = [Record(("Note", str(i)), content_from_fields([("text", text)])) for i, text in enumerate(texts)]

    def start(self, *options: str, seconds: dict[str, float] | None = None, **environment: str) -> Command:
        """The command. ``seconds`` change limits of time, see ``stub_command.py``."""
        return self.commands.start(
            "reindex", "--from", str(self._file), "--entity", "Note", "--db", sqlalchemy_url(self.database), "--json",
            *options, LC_SECONDS=json.dumps(seconds or {}), **environment,
        )  # fmt: skip

    def run(self, *options: str) -> dict[str, Any]:
        """A run that must end well; its receipt."""
        command = self.start(*options)
        assert command.wait() == 0, command.err
        return command.receipt

    def check(self, receipt: dict[str, Any]) -> None:
        """The oracle, with another run of the same."""
        eventually(lambda: not self.commands.processes())
        check(self.database, self.records, receipt, vector=poison_worker.vector_of, rerun=self.run)


MakeJob = Callable[[DatabaseAddress, list[str]], FileJob]
"""The fixture ``make_job``."""
